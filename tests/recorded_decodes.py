"""The recorded decodes of the families with block-causal attention, and the settings that reproduce each of them."""

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cases import left_padded
from transformers import AutoModelForCausalLM

from hf_flashdlm import make_block_causal


GOLDENS = Path(__file__).parent / "goldens" / "families"


@dataclass(frozen=True)
class Recording:
    """A file of recordings: which of its cases are reproduced, the length of their blocks, and their settings."""

    file: str
    keep: Callable
    block_length: str
    options: Callable
    origin: str = "row"

    def cases(self) -> list[dict]:
        chosen = list(filter(self.keep, json.loads((GOLDENS / f"{self.file}.json").read_text())["cases"]))
        assert chosen, "the selection of golden cases must not be empty"
        return chosen

    def decode(self, case: dict, **others):
        """The rows of the output without padding on the left, and the output."""
        settings = case["settings"]
        model = _model(f"{self.file.partition('/')[0]}/{case['model']}", settings[self.block_length], self.origin)
        if self.origin == "prompt":
            model.config.logits_shift = int(settings.get("right_shift_logits", False))
        ids, mask = left_padded(case["prompt_ids"])
        options = self.options(case) | others
        output = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        rows = zip(output.sequences.tolist(), case["prompt_ids"], strict=True)
        return [row[ids.shape[1] - len(prompt) :] for row, prompt in rows], output


@functools.cache
def _model(name, block_length, origin):
    return make_block_causal(AutoModelForCausalLM.from_pretrained(GOLDENS / name).eval(), block_length, origin)


def to_the_end_of_a_block(case):
    """The number of new tokens that fill the last block: the originals decode it whole."""
    (prompt,), settings = case["prompt_ids"], case["settings"]
    length = settings["block_length"]
    return -(-(len(prompt) + settings["gen_length"]) // length) * length - len(prompt)


def llada2(case):
    settings = case["settings"]
    ends = case.get("first_eos_in_full_run") is not None
    return {
        "max_new_tokens": settings["gen_length"] if ends else to_the_end_of_a_block(case),
        "steps_per_block": min(settings["steps"], settings["gen_length"] // settings["minimal_topk"]),
        "confidence_threshold": None if settings["threshold"] > 1 else settings["threshold"],
        "mask_token_id": settings["mask_id"],
        "eos_token_id": settings["eos_id"],
        "stop_at_eos": ends,
    }


def llada21(case):
    settings = case["settings"]
    length, quota = settings["block_length"], settings["num_to_transfer"]
    rule = {"confidence_threshold": settings["threshold"]} if settings["threshold"] <= 1 else {"schedule": "uniform"}
    if quota > 1:
        rule = rule | {"steps_per_block": -(-length // quota)}
    return {
        "max_new_tokens": settings["gen_length"] if settings["eos_early_stop"] else to_the_end_of_a_block(case),
        "editing_threshold": min(settings["editing_threshold"], 1.0),
        "max_post_steps": settings["max_post_steps"],
        "mask_token_id": settings["mask_id"],
        "eos_token_id": settings["eos_id"],
        "stop_at_eos": settings["eos_early_stop"],
        **rule,
    }


def follows_its_definition(case):
    """Not those that divide by zero or overwrite the prompt, nor those where `top_k=1` makes every token certain."""
    return not case.get("error") and not case.get("quirk") and case["settings"].get("top_k") != 1


def sdar(case):
    settings = case["settings"]
    strategy, stops = settings["remasking_strategy"], settings.get("stopping_criteria_idx")
    return {
        "max_new_tokens": to_the_end_of_a_block(case),
        "steps_per_block": settings["denoising_steps"],
        "confidence_threshold": settings["confidence_threshold"] if "dynamic" in strategy else None,
        "mask_token_id": settings["mask_id"],
        "eos_token_id": stops,
        "stop_at_eos": bool(stops),
        **({"confidence": "position"} if strategy == "sequential" else {}),
    }


def bd3lm(case):
    settings = case["settings"]
    per_block = settings.get("steps_per_block")
    return {
        "max_new_tokens": settings["max_new_tokens"],
        "mask_token_id": settings["mask_token_id"],
        "guidance_scale": 1 + settings.get("cfg_scale", 0),
        "schedule": "linear",
        "stop_at_eos": False,  # the original fills rows until each has its end token
        **({"steps": settings["steps"]} if per_block is None else {"steps_per_block": per_block}),
    }


def runs_by_rows(case):
    """
    Not prompts of exactly one block, which the original does not see. In a batch not the sub-block cache, which makes
    rows wait for each other, nor an end token that a block begins with, which the original overlooks.
    """
    in_batch = case["function"] == "batch_sample"
    overlooked = case["id"] == "fast-037"
    return not case.get("quirk") and not overlooked and not (in_batch and has_sub_block_cache(case))


def has_sub_block_cache(case):
    return bool(case["settings"].get("use_block_cache"))


def expected_rows(case):
    """The recorded rows."""
    return case["output_ids"] if isinstance(case["output_ids"][0], list) else [case["output_ids"]]


def fast_dllm_v2(case):
    settings = case["settings"]
    lengths = [len(row) - len(prompt) for row, prompt in zip(expected_rows(case), case["prompt_ids"], strict=True)]
    # A threshold of 1 is never exceeded: one token per step.
    below = settings["threshold"] < 1
    return {
        "method": "fast-dllm-v2",
        "block_length": settings["small_block_size"],
        "max_new_tokens": max(lengths),
        "mask_token_id": settings["mask_id"],
        "eos_token_id": settings["stop_token"],
        "window_policy": "dual" if has_sub_block_cache(case) else "freecache",
        "confidence_threshold": settings["threshold"] if below else None,
        **({} if below else {"schedule": "uniform"}),
    }


V2 = "block_ar/cases_fast_dllm_v2"
RECORDINGS = {
    "SDAR": Recording("block_ar/cases_sdar", follows_its_definition, "block_length", sdar),
    "BD3LM": Recording(
        "block_ar/cases_a2d", lambda case: case["function"].startswith("BD3LM"), "block_size", bd3lm, "prompt"
    ),
    "LLaDA2.0": Recording("llada2/cases_llada2", lambda case: case.get("quirk") is None, "block_length", llada2),
    "LLaDA2.1": Recording("llada2/cases_llada21", lambda case: True, "block_length", llada21),
    "Fast-dLLM v2": Recording(
        V2, lambda case: runs_by_rows(case) and not has_sub_block_cache(case), "block_size", fast_dllm_v2
    ),
    "Fast-dLLM v2, sub-block cache": Recording(
        V2, lambda case: runs_by_rows(case) and has_sub_block_cache(case), "block_size", fast_dllm_v2
    ),
}
