"""Sizes of the checkpoints, and what the recorded decodes of the block-causal families cost here and originally.

`PYTHONPATH=tests python examples/families.py` writes `examples/results/families.json`. The sizes are those of models
without weights, built from the fields of the checkpoints' configs.
"""

import json
from pathlib import Path

import torch
from recorded_decodes import RECORDINGS
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

from hf_flashdlm import (
    METHODS,
    A2DQwen2Config,
    A2DQwen3Config,
    DreamConfig,
    Fast_dLLM_QwenConfig,
    LavidaDreamConfig,
    LavidaLLaDAConfig,
    LLaDA2MoeConfig,
    LLaDAConfig,
    LLaDAMoEConfig,
    LLaDAVConfig,
    MMadaConfig,
    OpenDCoderConfig,
    SDARConfig,
    SDARMoeConfig,
)


RESULTS = Path(__file__).parent / "results" / "families.json"


def sizes(hidden, intermediate, layers, heads, key_value_heads, **others):
    """The fields of a dense model that say how large it is."""
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return dict(zip(names, (hidden, intermediate, layers, heads, key_value_heads), strict=True)) | others


QWEN3 = {"head_dim": 128, "vocab_size": 151936, "rope_theta": 1000000, "tie_word_embeddings": False}
TIED = {"vocab_size": 151936, "tie_word_embeddings": True}
SDAR_4B = sizes(2560, 9728, 36, 32, 8, **QWEN3)
SDAR_8B = sizes(4096, 12288, 36, 32, 8, **QWEN3)
QWEN3_30B = sizes(2048, 6144, 48, 32, 4, **QWEN3, moe_intermediate_size=768, num_experts=128, num_experts_per_tok=8)
FLASH = sizes(4096, 9216, 32, 32, 4, head_dim=128, moe_intermediate_size=1024)
QWEN2_HALF_B = sizes(896, 4864, 24, 14, 2, **TIED)
QWEN2_7B = sizes(3584, 18944, 28, 28, 4, vocab_size=152064, tie_word_embeddings=False)
QWEN3_06B = sizes(1024, 3072, 28, 16, 8, **QWEN3 | TIED)
# Checkpoint, its config, its licence where its card or code says one, and where the fields are from.
READ, TOLD = "read", "second hand"
CHECKPOINTS = [
    ("GSAI-ML/LLaDA-8B-Instruct", LLaDAConfig, {}, "mit", READ),
    ("GSAI-ML/LLaDA-1.5", LLaDAConfig, {}, "mit", "not seen, LLaDA-8B's"),
    ("Dream-org/Dream-v0-Instruct-7B", DreamConfig, {}, "apache-2.0", READ),
    ("apple/DiffuCoder-7B-Instruct", DreamConfig, {}, "apple-amlr", "not seen, Dream-7B's"),
    ("inclusionAI/LLaDA-MoE-7B-A1B-Instruct", LLaDAMoEConfig, {}, None, TOLD),
    ("inclusionAI/LLaDA2.0-mini", LLaDA2MoeConfig, {}, None, READ),
    ("inclusionAI/LLaDA2.0-flash", LLaDA2MoeConfig, FLASH, None, READ),
    ("inclusionAI/LLaDA2.1-mini", LLaDA2MoeConfig, {}, "apache-2.0", "not seen, LLaDA2.0-mini's"),
    ("inclusionAI/LLaDA2.1-flash", LLaDA2MoeConfig, FLASH, "apache-2.0", "not seen, LLaDA2.0-flash's"),
    ("JetLM/SDAR-1.7B-Chat", SDARConfig, sizes(2048, 6144, 28, 16, 8, **QWEN3), "apache-2.0", READ),
    ("JetLM/SDAR-4B-Chat", SDARConfig, SDAR_4B, "apache-2.0", READ),
    ("JetLM/SDAR-8B-Chat", SDARConfig, SDAR_8B, "apache-2.0", READ),
    ("JetLM/SDAR-30B-A3B-Chat", SDARMoeConfig, QWEN3_30B, "apache-2.0", "not seen, Qwen3-30B-A3B's"),
    ("Gen-Verse/TraDo-4B-Instruct", SDARConfig, SDAR_4B, None, TOLD),
    ("Gen-Verse/TraDo-8B-Instruct", SDARConfig, SDAR_8B, None, TOLD),
    (
        "Efficient-Large-Model/Fast_dLLM_v2_1.5B",
        Fast_dLLM_QwenConfig,
        sizes(1536, 8960, 28, 12, 2, **TIED),
        "apache-2.0",
        READ,
    ),
    (
        "Efficient-Large-Model/Fast_dLLM_v2_7B",
        Fast_dLLM_QwenConfig,
        QWEN2_7B,
        "apache-2.0",
        "not seen, Qwen2.5-7B-Instruct's",
    ),
    ("dllm-hub/Qwen3-0.6B-diffusion-mdlm-v0.1", A2DQwen3Config, QWEN3_06B, None, "not seen, Qwen3-0.6B's"),
    ("dllm-hub/Qwen3-0.6B-diffusion-bd3lm-v0.1", A2DQwen3Config, QWEN3_06B, None, "not seen, Qwen3-0.6B's"),
    (
        "dllm-hub/Qwen2.5-Coder-0.5B-Instruct-diffusion-bd3lm-v0.1",
        A2DQwen2Config,
        QWEN2_HALF_B,
        None,
        "not seen, Qwen2.5-Coder-0.5B's",
    ),
    ("fredzzp/open-dcoder-0.5B", OpenDCoderConfig, QWEN2_HALF_B, None, "not seen, Qwen2.5-Coder-0.5B's"),
    ("jacklishufan/lavida-llada-v1.0-instruct", LavidaLLaDAConfig, {}, None, "not seen, LLaDA-8B's and SigLIP's"),
    ("jacklishufan/lavida-dream-v1.0-instruct", LavidaDreamConfig, {}, None, "not seen, Dream-7B's and SigLIP's"),
    ("GSAI-ML/LLaDA-V", LLaDAVConfig, sizes(4096, 12288, 32, 32, 32), None, "not seen, LLaDA-8B's and SigLIP's"),
    ("Gen-Verse/MMaDA-8B-MixCoT", MMadaConfig, {}, None, "not seen, LLaDA-8B's with more ids"),
]


def checkpoint(name, config_class, fields, licence, config_seen):
    """The row of a checkpoint."""
    config = config_class(name_or_path=name, **fields)
    auto = AutoModelForImageTextToText if hasattr(config, "vision_config") else AutoModelForCausalLM
    with torch.device("meta"):
        model = auto.from_config(config, dtype=torch.bfloat16)
    tensors = [*model.parameters(), *(value for name, value in model.named_buffers() if name in model.state_dict())]
    method = getattr(config, "recommended_method", None) or "flashdlm"
    text = config.get_text_config()
    head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return {
        "checkpoint": name,
        "class": type(model).__name__,
        "method": method,
        "settings": METHODS[method],
        "attention_block_length": getattr(config, "attention_block_length", None),
        "licence": licence,
        "parameters": sum(value.numel() for value in model.parameters()),
        "bytes": sum(value.numel() * value.element_size() for value in tensors),
        "cache_bytes_per_token": 2 * 2 * text.num_hidden_layers * text.num_key_value_heads * head_size,  # K, V in bf16
        "config": config_seen,
    }


def recording(name):
    """The sums over the recorded decodes of a family."""
    sums = dict.fromkeys(("decodes", "forwards", "active_tokens", "original_forwards", "original_active_tokens"), 0)
    for case in RECORDINGS[name].cases():
        # The originals count batches, the two forwards of guidance and decodes that leave masks in other ways.
        stops = "stops" in (case.get("notes") or "")
        if len(case["prompt_ids"]) > 1 or case["settings"].get("cfg_scale") or case["masks_left"] or stops:
            continue
        _, output = RECORDINGS[name].decode(case)
        lengths = [entry[-1][-1] if isinstance(entry[-1], list) else entry[-1] for entry in case["forwards"]]
        counts = (1, output.nfe.item(), output.active_tokens.item(), len(lengths), sum(lengths))
        sums = {key: total + count for (key, total), count in zip(sums.items(), counts, strict=True)}
    return {"family": name} | sums


if __name__ == "__main__":
    torch.set_num_threads(1)
    record = {
        "command": "PYTHONPATH=tests python examples/families.py",
        "checkpoints": [checkpoint(*row) for row in CHECKPOINTS],
        "recordings": [recording(name) for name in RECORDINGS],
    }
    RESULTS.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
