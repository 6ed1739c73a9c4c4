"""Recorded decodes of the families with bidirectional attention, reproduced by settings (tests/goldens/families)."""

import json
from pathlib import Path

import pytest


GOLDENS = Path(__file__).parent / "goldens" / "families"


def cases(name, keep=lambda case: True):
    chosen = [case for case in json.loads((GOLDENS / f"{name}.json").read_text())["cases"] if keep(case)]
    assert chosen, "the selection of golden cases must not be empty"
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


def run(model, prompts, left_padded, **options):
    """The output of `generate` without its padding, row by row; and the shape of each forward's input."""
    input_ids, attention_mask = left_padded(prompts)
    shapes = []
    hook = model.register_forward_pre_hook(
        lambda module, args, kwargs: shapes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    try:
        sequences = model.generate(
            input_ids, attention_mask=attention_mask, window_policy="none", stop_at_eos=False, **options
        )
    finally:
        hook.remove()
    longest = input_ids.shape[1]
    return [row[longest - len(prompt) :].tolist() for row, prompt in zip(sequences, prompts, strict=True)], shapes


@cases("llada2/cases_llada_moe")
def test_llada_moe(load, left_padded, case):
    settings = case["settings"]
    lengths = case.get("attention_mask") or [[1] * len(prompt) for prompt in case["prompt_ids"]]
    prompts = [prompt[len(prompt) - sum(mask) :] for prompt, mask in zip(case["prompt_ids"], lengths, strict=True)]
    threshold = settings.get("threshold")
    rows, shapes = run(
        load("families/llada2/model_llada_moe"),
        prompts,
        left_padded,
        max_new_tokens=settings["gen_length"],
        block_length=settings["block_length"],
        mask_token_id=settings["mask_id"],
        **({"steps": settings["steps"]} if threshold is None else {"confidence_threshold": threshold}),
    )
    expected = [
        row[len(row) - settings["gen_length"] - len(prompt) :]
        for row, prompt in zip(case["returned_ids"], prompts, strict=True)
    ]
    assert rows == expected
    assert shapes == case["forwards"]


@cases("block_ar/cases_a2d", lambda case: case["function"].startswith("MDLM"))
def test_mdlm(load, left_padded, case):
    settings, prompts = case["settings"], case["prompt_ids"]
    model = load("families/block_ar/" + case["model"])
    model.config.logits_shift = int(settings.get("right_shift_logits", False))
    rows, shapes = run(
        model,
        prompts,
        left_padded,
        max_new_tokens=settings["max_new_tokens"],
        block_length=settings["block_size"],
        steps=settings["steps"],
        schedule="linear",
        mask_token_id=settings["mask_token_id"],
        guidance_scale=1 + settings.get("cfg_scale", 0),
    )
    # The original pads rows on the right, after their answers.
    lengths = [len(prompt) + settings["max_new_tokens"] for prompt in prompts]
    assert rows == [row[:length] for row, length in zip(case["output_ids"], lengths, strict=True)]
    assert len(shapes) == case["nfe"]
