"""The three networks of the embedded model pair: how they are built, grown, rounded and written to disk.

Owns the sizes and the checkpoint formats. Dream is Qwen2 with bidirectional attention and logits shifted by one, so
the Qwen2 of Transformers is trained. The guider is a Llama: for a Qwen2 checkpoint `AutoTokenizer` always builds
Qwen's own tokenizer, whatever the files in the folder say.
"""

import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from tokenizer import EOS, MASK, VOCAB_SIZE


AR_SIZE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_hidden_layers": 2,
}
DLM_SIZE = AR_SIZE | {"num_hidden_layers": 6}
GUIDER_SIZES = {
    "small": AR_SIZE | {"hidden_size": 48, "intermediate_size": 128},
    "medium": AR_SIZE | {"hidden_size": 96, "intermediate_size": 256},
    "large": AR_SIZE,
}
INHERITED_LAYERS = {1: 0, 3: 1}  # layer of the diffusion model: layer of the AR model it starts as


def build_network(size: dict[str, int], tokenizer: PreTrainedTokenizerFast, causal: bool = True) -> Qwen2ForCausalLM:
    """A freshly initialised network of `size`; without `causal` every position sees the whole row."""
    config = Qwen2Config(**size, **shared_settings(tokenizer))
    if not causal:
        config.is_causal = False
    network = Qwen2ForCausalLM(config)
    for layer in network.model.layers:
        layer.self_attn.is_causal = causal
    return network


def build_guider(size: str, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A freshly initialised guider of one of `GUIDER_SIZES`."""
    return LlamaForCausalLM(LlamaConfig(**GUIDER_SIZES[size], **shared_settings(tokenizer)))


def shared_settings(tokenizer: PreTrainedTokenizerFast) -> dict:
    """The settings that the configs of all networks share."""
    return {
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": tokenizer.model_max_length,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "pad_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "attn_implementation": "eager",
    }


def grow(ar: Qwen2ForCausalLM, dlm: Qwen2ForCausalLM) -> None:
    """Copies the shallow `ar` into the deeper `dlm`; the new layers between add nothing until they are trained."""
    dlm.model.embed_tokens.load_state_dict(ar.model.embed_tokens.state_dict())
    dlm.model.norm.load_state_dict(ar.model.norm.state_dict())
    dlm.lm_head.load_state_dict(ar.lm_head.state_dict())
    for index, layer in enumerate(dlm.model.layers):
        if index in INHERITED_LAYERS:
            layer.load_state_dict(ar.model.layers[INHERITED_LAYERS[index]].state_dict())
        else:
            torch.nn.init.zeros_(layer.self_attn.o_proj.weight)
            torch.nn.init.zeros_(layer.mlp.down_proj.weight)


def num_parameters(network: PreTrainedModel) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def round_weights(network: PreTrainedModel) -> PreTrainedModel:
    """Rounds all weights in place to what bfloat16 can hold, as the checkpoints do."""
    for parameter in network.parameters():
        parameter.data = parameter.data.bfloat16().to(parameter.dtype)
    return network


def export_dlm(dlm: Qwen2ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `dlm` in the format of the public Dream checkpoints: kept in bfloat16, to be computed in float32."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    weights = {name: weight.bfloat16().contiguous() for name, weight in dlm.state_dict().items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    ids = {
        "eos_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "pad_token_id": tokenizer.convert_tokens_to_ids(EOS),
        "mask_token_id": tokenizer.convert_tokens_to_ids(MASK),
    }
    config = dream_config(dlm.config) | ids
    generation_config = {"max_new_tokens": 64, "block_length": 8, "do_sample": False, **ids}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "generation_config.json").write_text(json.dumps(generation_config, indent=2) + "\n")
    make_readable(folder)


def dream_config(config: Qwen2Config) -> dict:
    """The `config.json` of a Dream checkpoint with the sizes of `config`, token ids left out."""
    return {
        "architectures": ["DreamModel"],
        "attention_dropout": 0.0,
        "bos_token_id": None,
        "hidden_act": "silu",
        "hidden_size": config.hidden_size,
        "initializer_range": config.initializer_range,
        "intermediate_size": config.intermediate_size,
        "max_position_embeddings": config.max_position_embeddings,
        "max_window_layers": config.num_hidden_layers,
        "model_type": "Dream",
        "num_attention_heads": config.num_attention_heads,
        "num_hidden_layers": config.num_hidden_layers,
        "num_key_value_heads": config.num_key_value_heads,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": config.rope_parameters["rope_theta"],
        "sliding_window": None,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": transformers.__version__,
        "use_cache": True,
        "use_mrope": False,
        "use_sliding_window": False,
        "vocab_size": config.vocab_size,
    }


def export_guider(guider: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes `guider` as an ordinary Llama checkpoint: kept in bfloat16, to be computed in float32."""
    tokenizer.save_pretrained(folder)
    rounded = LlamaForCausalLM(guider.config).bfloat16()
    rounded.load_state_dict(guider.state_dict())
    rounded.save_pretrained(folder)
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"dtype": "bfloat16"', '"dtype": "float32"'))
    make_readable(folder)


def make_readable(folder: Path) -> None:
    """Makes the files of `folder` readable by everyone; safetensors writes files that only their owner can read."""
    for file in folder.iterdir():
        file.chmod(0o644)
