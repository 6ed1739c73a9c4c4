"""Recorded features, logits and decodes of LaViDa, reproduced (tests/goldens/families/lavida)."""

import json
from dataclasses import dataclass

import lavida
import pytest
import torch
from lavida import GOLDENS, KINDS, MASK
from safetensors.torch import load_file

from hf_flashdlm import FreeCache
from hf_flashdlm.denoiser import Denoiser
from hf_flashdlm.images import Images
from hf_flashdlm.schedule import ShiftSchedule
from hf_flashdlm.windows import Window


TENSORS = {kind: load_file(GOLDENS / f"tensors_{kind}.safetensors") for kind in KINDS}
FEATURES = [(kind, name.partition(".")[2]) for kind in KINDS for name in TENSORS[kind] if name.startswith("features.")]
CASES = {kind: json.loads((GOLDENS / f"cases_{kind}.json").read_text())["cases"] for kind in KINDS}
PROMPTS = {(kind, case["prompt"]): case for kind in KINDS for case in CASES[kind]}
LOGITS = [(kind, name) for kind, name in PROMPTS if f"logits.{name}.full" in TENSORS[kind]]


def test_every_recording_is_compared():
    kinds = {"features", "tower", "logits"}
    assert {name.partition(".")[0] for tensors in TENSORS.values() for name in tensors} == kinds
    names = [name for tensors in TENSORS.values() for name in tensors]
    assert len(FEATURES) == sum(name.startswith("features.") for name in names) == 4
    assert len(LOGITS) == sum(name.endswith(".full") for name in names) == 8
    assert [len(CASES[kind]) for kind in KINDS] == [21, 16]


@pytest.mark.parametrize(("kind", "name"), FEATURES)
def test_features(kind, name):
    expected = TENSORS[kind][f"features.{name}"]
    torch.testing.assert_close(lavida.features(kind, name), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_tower(kind, no_grad):
    tower = lavida.load(kind).model.vision_tower.vision_tower.vision_model
    states = tower(lavida.tiles("wide")[:1])
    torch.testing.assert_close(states[:, ::27], TENSORS[kind]["tower.wide"], atol=2e-5, rtol=0)


def canvas_of(kind, name):
    """Prompt and answer of recorded logits, as ids; the length of the prompt; the recordings."""
    case = PROMPTS[kind, name]
    recorded = {field: TENSORS[kind][f"logits.{name}.{field}"] for field in ("answer_ids", "full", "prefix")}
    prompt = lavida.spliced(kind, case["prompt_ids"], case["images"])
    assert len(prompt) == TENSORS[kind][f"logits.{name}.embeds_length"]
    return torch.tensor([prompt + recorded["answer_ids"][0].tolist()]), len(prompt), recorded


@pytest.mark.parametrize(("kind", "name"), LOGITS)
def test_logits(kind, name, no_grad):
    model, (canvas, _, recorded) = lavida.load(kind), canvas_of(kind, name)
    logits = model(canvas, **lavida.encoded(kind, PROMPTS[kind, name]["images"])).logits[0]
    torch.testing.assert_close(logits[-len(recorded["full"]) :], recorded["full"], atol=4e-4, rtol=0)


@pytest.mark.parametrize(("kind", "name"), LOGITS)
def test_logits_of_an_answer_after_a_prompt_that_does_not_see_it(kind, name, no_grad):
    model, (canvas, length, recorded) = lavida.load(kind), canvas_of(kind, name)
    images, names = None, PROMPTS[kind, name]["images"]
    if names:
        prompt = canvas[:, :length]
        images = Images.of([lavida.features(kind, name) for name in names], prompt, prompt == lavida.IMAGE)
    shift = int(kind == "dream")
    end = canvas.shape[1]
    cache, mask = FreeCache(canvas_length=end), torch.ones_like(canvas)
    denoiser = Denoiser(model, mask, cache, shift, prefix_length=length, images=images)
    logits, computed = denoiser(canvas, [Window(0, end, end, 0)], [range(length, end)], [length])
    expected = recorded["prefix"]
    if kind == "dream":  # unshifted, and the first position is scored by the last of the prompt
        expected = torch.cat([TENSORS[kind][f"logits.{name}.prefill_last"][None], expected[:-1]])
    torch.testing.assert_close(logits[0], expected, atol=4e-4, rtol=0)
    assert computed == [end]  # those of the prompt among them


@dataclass(frozen=True)
class CosineSchedule(ShiftSchedule):
    """LaViDa's `cosine`."""

    def share(self, times):
        return 1 - (1 + torch.cos(torch.pi * times)) / 2


CONFIDENCES = {"margin": "margin", "topk_margin": "margin", "entropy": "entropy", "entrophy": "entropy"}


def options_of(kind, settings):
    """The settings of the original as ours."""
    length = settings["max_new_tokens"]
    block_length = settings.get("block_length", length)
    steps = int(settings.get("steps", length) * settings.get("step_ratio", 1))
    if "step_per_block" in settings:
        steps = settings["step_per_block"] * length // block_length
    schedule = settings.get("schedule")
    if schedule is None:
        timesteps = {"schedule": "timesteps", "run_empty_steps": True}
        schedule = timesteps if kind == "dream" else {"schedule": "uniform"}
    elif schedule == "cosine":
        schedule = {"schedule": CosineSchedule((steps,))}
    else:
        shift = 1.0 if schedule == "linear" else settings.get("schedule_kwargs", {}).get("shift", 3.0)
        schedule = {"schedule": "shift", "schedule_shift": shift}
    return {
        "window_policy": "none",
        "stop_at_eos": False,
        "max_new_tokens": length,
        "steps": None if settings.get("schedule") == "cosine" else steps,
        "confidence": CONFIDENCES.get(settings.get("remasking", settings.get("alg")), "probability"),
        "prefix_lm": settings["prefix_lm"],
        **({"blocks": "whole"} if kind == "dream" else {"block_length": block_length}),
        **schedule,
    }


def with_answer(kind, case, prompt, options):
    """The prompt and the options, where the original has written a part of the answer before the first step."""
    if "draft_ids" in case:  # the last mask is generated, those before it are filled in
        draft = case["draft_ids"]
        assert draft[-1] == MASK
        given = {"prompt_tail": len(draft) - 1, "steps": draft.count(MASK), "max_new_tokens": 1, "block_length": 1}
        return prompt + draft[:-1], options | given
    if kind == "dream" and options["prefix_lm"]:  # the argmax of the prefill
        logits = lavida.load(kind)(torch.tensor([prompt]), **lavida.encoded(kind, case["images"])).logits[0, -1]
        logits[MASK] = -torch.inf
        one_less = {"prompt_tail": 1, "max_new_tokens": options["max_new_tokens"] - 1}
        return [*prompt, logits.argmax().item()], options | one_less
    return prompt, options


@pytest.mark.parametrize(
    ("kind", "case"),
    [(kind, case) for kind in KINDS for case in CASES[kind]],
    ids=lambda value: value if isinstance(value, str) else value["id"],
)
def test_ids_and_forwards(kind, case, no_grad):
    prompt = lavida.spliced(kind, case["prompt_ids"], case["images"])
    ids, options = with_answer(kind, case, prompt, options_of(kind, case["settings"]))
    model, shapes = lavida.load(kind), []

    def record(_, args, kwargs):
        fed = kwargs.get("input_ids") if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        shapes.append(list(fed.shape[:2]))

    hook = model.register_forward_pre_hook(record, with_kwargs=True)
    try:
        encoded = lavida.encoded(kind, case["images"])
        output = model.generate(torch.tensor([ids]), return_dict_in_generate=True, **options, **encoded)
    finally:
        hook.remove()
    assert output.sequences[0, len(prompt) :].tolist() == case["answer_ids"]
    assert shapes == case["forwards"]
    assert output.nfe.item() == case["nfe"] - options["prefix_lm"]  # the prefill is no step
