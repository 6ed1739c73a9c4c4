"""Outputs of the original implementations on tiny models, reproduced by settings (see tests/goldens/README.md).

Every case is compared in ids and in the query length of every forward, unless the original is wrong: the table of
differences in the README says where and how. Where an original has a habit that is not an option of ours, the test
swaps the part that has it.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

import hf_flashdlm.denoising_loop
import hf_flashdlm.generation_mixin
from hf_flashdlm import ARGuider
from hf_flashdlm.denoising_loop import Blocks
from hf_flashdlm.schedule import TimestepSchedule
from hf_flashdlm.unmasking import ConfidenceFactor
from hf_flashdlm.windows import DKVWindow, Window


GOLDENS = Path(__file__).parent / "goldens"


def cases(name):
    return json.loads((GOLDENS / f"cases_{name}.json").read_text())["cases"]


def parametrize(*names, keep=lambda case: True):
    chosen = [case for name in names for case in cases(name) if keep(case)]
    assert chosen, "the selection of golden cases must not be empty"
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


@pytest.fixture(scope="module")
def load():
    models = {}

    def load(name):
        if name not in models:
            models[name] = AutoModelForCausalLM.from_pretrained(GOLDENS / name).eval()
        return models[name]

    return load


@dataclass
class Run:
    output: object
    forwards: list


@pytest.fixture
def decode(load, monkeypatch):
    """Run a case with our options; `change` swaps parts of the method that no option names."""

    def decode(case, change=None, **options):
        model, forwards = load(case["model"]), []
        mask = case.get("attention_mask")
        if change is not None:
            choose = hf_flashdlm.generation_mixin.choose_parts
            monkeypatch.setattr(hf_flashdlm.generation_mixin, "choose_parts", lambda *args: change(choose(*args)))
        hook = model.register_forward_pre_hook(
            lambda module, args, kwargs: forwards.append(list(kwargs["input_ids"].shape)), with_kwargs=True
        )
        try:
            output = model.generate(
                torch.tensor(case["prompt_ids"]),
                attention_mask=None if mask is None else torch.tensor(mask),
                return_dict_in_generate=True,
                **{"stop_at_eos": False, **options},
            )
        finally:
            hook.remove()
        return Run(output, forwards)

    return decode


def assert_equal(run, case, forwards=None):
    assert run.output.sequences.tolist() == case["output_ids"]
    assert run.forwards == (case["forwards"] if forwards is None else forwards)


def llada_options(settings, **options):
    guidance = {"guidance_scale": 1 + settings["cfg_scale"]} if settings.get("cfg_scale") else {}
    return dict(
        max_new_tokens=settings["gen_length"],
        block_length=settings["block_length"],
        **guidance,
        **options,
    )


def rule_options(settings):
    if settings.get("threshold") is not None:
        return {"confidence_threshold": settings["threshold"]}
    if settings.get("factor") is not None:
        return {"factor": settings["factor"]}
    return {"steps": settings["steps"]}


# Confidences that are 1 in float32 tie there; `torch.topk` then takes any of them, we keep their order.
TIES = ("llada-cfg-2", "model_dream-topp", "model_dream-topp-topk")


@parametrize("llada_official", "dream_official", keep=lambda case: case["id"] in TIES)
def test_we_differ_from_the_originals_in_ties_only(decode, monkeypatch, case):
    calls = []

    def select(confidence, candidate, quota, rule=None):
        chosen = hf_flashdlm.unmasking.select(confidence, candidate, quota, rule)
        calls.append((torch.tensor(confidence), chosen))
        return chosen

    monkeypatch.setattr(hf_flashdlm.denoising_loop, "select", select)
    settings = case["settings"]
    if "alg" in settings:
        run = decode(case, **dream_options(settings, window_policy="none"))
    else:
        run = decode(case, **llada_options(settings, steps=settings["steps"], window_policy="none"))
    assert run.forwards == case["forwards"]
    masked = set(range(len(case["prompt_ids"][0]), len(case["output_ids"][0])))
    for (confidence, chosen), commits in zip(calls, case["commits"], strict=True):
        ours = {min(masked) + slot for slot in chosen}
        theirs = {position for _, position, _ in commits}
        if ours != theirs:
            differing = torch.tensor(sorted(ours ^ theirs)) - min(masked)
            assert confidence[differing].gt(1 - 1e-7).all(), "a choice differs that is not between equals"
            return
        masked -= ours
    raise AssertionError("the case holds no tie any more: compare it with the others")


@parametrize("llada_official", keep=lambda case: case["id"] not in TIES)
def test_llada_official(decode, case):
    options = llada_options(case["settings"], steps=case["settings"]["steps"], window_policy="none")
    run = decode(case, **options)
    needed = [forward for forward, commits in zip(case["forwards"], case["commits"], strict=True) if commits]
    assert_equal(run, case, needed if case["id"].endswith("surplus-steps") else None)


@dataclass(frozen=True)
class FastDLLMFactor(ConfidenceFactor):
    """The original's slip: if only the last candidate fails its bar, it is written as well."""

    def __call__(self, confidence):
        count = super().__call__(confidence)
        return count + (count == len(confidence) - 1)


@parametrize("fastdllm_llada_v1", "fastdllm_llada_v0", keep=lambda case: "quirk" not in case["id"])
def test_fastdllm_llada(decode, case):
    policy = {"generate": "none", "generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}
    settings = case["settings"]
    factor = settings.get("factor")
    run = decode(
        case,
        change=None if factor is None else lambda method: replace(method, rule=FastDLLMFactor(factor)),
        **llada_options(settings, **rule_options(settings)),
        window_policy=policy[case["function"]],
        synchronize_blocks=True,
    )
    assert run.output.sequences.tolist() == case["output_ids"]
    # The first release runs one forward more for a block that its refresh has completed.
    needed = [forward for forward, commits in zip(case["forwards"], case["commits"], strict=True) if commits]
    expected = needed if case["source"].endswith("v0") else case["forwards"]
    # Rows that are finished leave the batch.
    assert [length for _, length in run.forwards] == [length for _, length in expected]


def flash_options(settings):
    if settings.get("freeze") == "clean":
        return {"freeze_lag": 1}
    return (
        {"freeze_lag": 0} if "freeze" in settings or settings.get("use_block_caching") else {"window_policy": "none"}
    )


def is_right(case):
    return "quirk" not in case["id"] and "early-stop" not in case["id"]


@parametrize("flash_llada", keep=is_right)
def test_flash_llada(decode, case):
    options = llada_options(case["settings"], steps=case["settings"]["steps"])
    assert_equal(decode(case, **options, **flash_options(case["settings"])), case)


DREAM_CONFIDENCE = {"maskgit_plus": "probability", "topk_margin": "margin", "entropy": "entropy"}


def dream_options(settings, **options):
    filters = []
    if settings.get("top_p"):
        filters.append(TopPLogitsWarper(settings["top_p"]))
    if settings.get("top_k"):
        filters.append(TopKLogitsWarper(settings["top_k"]))
    return dict(
        max_new_tokens=settings["max_new_tokens"],
        block_length=settings.get("block_size", settings["max_new_tokens"]),
        steps=settings["steps"],
        schedule="timesteps",
        run_empty_steps=True,
        eps=settings.get("eps", 1e-3),
        confidence=DREAM_CONFIDENCE[settings["alg"]],
        logits_processor=filters,
        **options,
    )


def is_settled(case):
    return case["deterministic"] and case["id"] not in TIES


@parametrize("dream_official", "dream_official_batch", keep=is_settled)
def test_dream_official(decode, case):
    assert_equal(decode(case, **dream_options(case["settings"], window_policy="none")), case)


@parametrize("dream_official", keep=is_settled)
def test_dream_without_empty_steps(decode, case):
    options = dream_options(case["settings"], window_policy="none") | {"run_empty_steps": False}
    needed = [forward for forward, commits in zip(case["forwards"], case["commits"], strict=True) if commits]
    assert_equal(decode(case, **options), case, needed)


@parametrize("flash_dream_blocks", keep=is_right)
def test_flash_dream_blocks(decode, case):
    options = dream_options(case["settings"], left_margin=1)
    lag = 1 if case["settings"].get("freeze") == "clean" else 0
    assert_equal(decode(case, **options, freeze_lag=lag), case)


def is_fastdllm_block(case):
    return case["function"].endswith("_block)") and "quirk" not in case["id"]


@dataclass(frozen=True)
class FirstTokenBlocks(Blocks):
    """Fast-dLLM's way around Dream's shift: the refresh of a block writes the block's first position only."""

    def candidates(self, rows, ends):
        positions, candidate = super().candidates(rows, ends)
        (row,), (where,), (may,) = rows, positions, candidate
        if row.block_nfe == 0:
            may = [one and position == row.block_start for position, one in zip(where, may, strict=True)]
        return positions, [may]


@dataclass(frozen=True)
class BlockTimesteps(TimestepSchedule):
    """Fast-dLLM's timesteps run over each block for itself; step 0 is the refresh."""

    def __call__(self, row):
        steps, masked = self.steps[0], row.masked.count(True, 0, row.block_stop)
        timesteps = torch.linspace(1, self.eps, steps + 1)
        share = 1 - timesteps[row.step + 1] / timesteps[row.step]
        quota = masked if row.step == steps - 1 else int(masked * share)
        return (quota if row.step else 1), row.step + 1


@parametrize("fastdllm_dream", keep=is_fastdllm_block)
def test_fastdllm_dream_blocks(decode, case):
    settings = case["settings"]
    if settings["alg"] == "confidence_threshold":
        options = {"confidence_threshold": settings["threshold"]}
    else:
        options = dream_options(settings)

    def change(method):
        method = replace(method, blocks=FirstTokenBlocks(**vars(method.blocks)))
        if isinstance(method.schedule, TimestepSchedule):
            return replace(method, schedule=BlockTimesteps(**vars(method.schedule)))
        return method

    options |= {"max_new_tokens": settings["max_new_tokens"], "block_length": settings["block_length"]}
    policy = "dual" if settings["dual_cache"] else "prefix"
    assert_equal(decode(case, change, window_policy=policy, **options), case)


class BudgetedThreshold:
    """Fast-dLLM's Dream without cache: a step may write its share of the tokens and what earlier steps left."""

    def __init__(self, settings):
        self.share, self.steps = settings["max_new_tokens"] // settings["steps"], settings["steps"]
        self.threshold, self.step, self.written = settings["threshold"], 0, 0

    def __call__(self, confidence):
        self.step += 1
        budget = self.share * self.step - self.written
        count = min(max(sum(one >= self.threshold for one in confidence), 1), max(budget, 1))
        self.written += count
        return count


@parametrize("fastdllm_dream", keep=lambda case: case["function"].endswith("(generation_utils)"))
def test_fastdllm_dream_without_cache(decode, case):
    settings = case["settings"]
    run = decode(
        case,
        change=lambda method: replace(method, rule=BudgetedThreshold(settings)),
        max_new_tokens=settings["max_new_tokens"],
        block_length=settings["max_new_tokens"],
        confidence_threshold=settings["threshold"],
        window_policy="none",
    )
    assert_equal(run, case)


@parametrize("dkv_llada_decode")
def test_dkv_llada(decode, case):
    settings = case["settings"]

    def change(method):
        return replace(method, window_policy=replace(method.window_policy, first_steps=2))

    options = llada_options(settings, steps=settings["steps"], refresh_steps=settings["cache_reloading_step"])
    assert_equal(decode(case, change, window_policy="dkv", **options), case)


@parametrize("dkv_dream_base", "dkv_dream_pd", keep=lambda case: case["settings"]["shift_type"] != "right")
def test_dkv_dream(decode, case):
    settings, change = case["settings"], None
    options = dream_options(settings, window_policy="none")
    if settings["use_cache"] and settings["cache_type"] == "prefill":
        options |= {"window_policy": "freecache", "freeze_length": settings["max_new_tokens"], "left_margin": 1}
    elif settings["use_cache"]:
        frozen = len(case["prompt_ids"][0]) - 1 if settings["cache_type"] == "pd" else 0
        too = settings["shift_type"] == "un_right"
        options |= {"window_policy": "dkv"}

        def change(method):
            policy = DKVWindow(settings["cache_steps"], frozen_prompt=frozen, include_scored=too)
            return replace(method, window_policy=policy)

    assert_equal(decode(case, change, **options), case)


def guided_options(settings):
    window = settings["sliding_window_size"]
    return {
        "none": {"window_policy": "none"},
        "prompt": {"freeze_length": settings["max_new_tokens"]},
        "aggressive": {"freeze_length": 1},
        "block": {"freeze_length": settings["block_size"]},
        "window": {
            "freeze_length": 1,
            "freeze_lag": 0,
            "left_margin": (window or 0) + 1,
            "right_window": (window or 2) - 1,
        },
    }[settings["cache_mode"]]


def is_guided_right(case):
    corrected = case["source"] == "patched" or case["settings"]["cache_mode"] == "prompt"
    return corrected and case["settings"].get("block_origin") != "absolute"


@parametrize("flash_dream_guided", keep=is_guided_right)
def test_flash_dream_guided(decode, load, checked, case):
    settings = case["settings"]
    num_new = settings["max_new_tokens"]
    guider = ARGuider(
        load(case["guider"]),
        accept="top1" if settings["strategy"] == "deterministic" else settings["strategy"],
        top_k=settings["acceptance_top_k"] or 1,
        relative_threshold=settings["relative_threshold"] or 0.0,
        num_drafts=num_new,
    )
    options = guided_options(settings) | {"max_new_tokens": num_new, "stop_at_eos": True}
    run = decode(case, guider=guider, **options)
    ids = run.output.sequences[0].tolist()
    # The original fills the canvas behind the end with end tokens; we cut it.
    assert case["output_ids"][0] == ids + [settings["eos_token_id"]] * (len(case["output_ids"][0]) - len(ids))
    assert run.forwards == case["forwards"]
    checked(run.output, guider)
    assert run.output.accepted_lengths == [case["accepted_per_step"]]
    assert run.output.nfe.tolist() == [case["diffusion_steps"]]


class GreedyOrder:
    """dKV-Cache-Greedy: an order drawn in advance, so that a step can compute only what it is about to write."""

    history, synchronous, needs_entropy = 0, True, False

    def __init__(self, orders, settings, schedule):
        self.orders, self.settings, self.schedule = orders, settings, schedule

    def __call__(self, row):
        """As a window policy: the positions of this step, of the last one, and masked neighbours of the former."""
        self.row, order, length = row, self.orders[row.block_index], len(row.masked)
        written = [position for position in order if not row.masked[position]]
        now = order[len(written) : len(written) + self.schedule(row)[0]]
        scored = bytearray(position in now or position in row.written for position in range(length))
        for position in now:
            for neighbour in self.neighbours(position, row.masked, scored):
                scored[neighbour] = True
        refresh = row.block_nfe % self.settings["cache_reloading_step"] == 0
        return Window(0, length, length, 0, None if refresh else scored)

    def neighbours(self, position, masked, taken):
        found, distance = [], 1
        while len(found) < self.settings["window_size"] and distance < len(masked):
            for side in (position - distance, position + distance):
                free = 0 <= side < len(masked) and masked[side] and not taken[side]
                if free and len(found) < self.settings["window_size"]:
                    found.append(side)
            distance += 1
        return found

    def draft(self, scores):
        """As a drafter: the confidence is the place in the order."""
        token_ids, _ = hf_flashdlm.unmasking.draft(scores, self.settings["mask_id"])
        positions = range(self.row.frontier, self.row.frontier + scores.shape[1])
        order = self.orders[self.row.block_index]
        places = [-order.index(position) if position in order else -torch.inf for position in positions]
        return token_ids, torch.tensor([places], dtype=torch.float)


@parametrize("dkv_llada_greedy")
def test_dkv_llada_greedy(decode, monkeypatch, case):
    settings, parts = case["settings"], []

    def change(method):
        parts.append(GreedyOrder(case["denoising_order_per_block"], settings, method.schedule))
        return replace(method, window_policy=parts[0])

    monkeypatch.setattr(hf_flashdlm.generation_mixin, "Drafter", lambda *args: lambda scores: parts[0].draft(scores))
    options = llada_options(settings, steps=settings["steps"], window_policy="dkv")
    assert_equal(decode(case, change, **options), case)


@parametrize("llada_loglikelihood")
def test_llada_log_likelihood(load, case):
    """The recorded draws, scored by our model: the estimate is theirs."""
    prompt_length, scale = len(case["prompt_ids"]), 1 + case["settings"]["cfg_scale"]
    answer = torch.tensor(case["answer_ids"])
    losses = []
    for batch in case["batches"]:
        canvas = torch.tensor(batch["perturbed"])
        without_prompt = canvas.clone()
        without_prompt[:, :prompt_length] = case["settings"]["mask_id"]
        with torch.no_grad():
            conditional, unconditional = load(case["model"])(torch.cat([canvas, without_prompt])).logits.chunk(2)
        logits = (unconditional + scale * (conditional - unconditional))[:, prompt_length:]
        loss = torch.nn.functional.cross_entropy(logits.mT, answer.expand(len(canvas), -1), reduction="none")
        masked = canvas[:, prompt_length:] == case["settings"]["mask_id"]
        ratio = torch.tensor(batch["p_mask"])[:, None]  # of each row
        losses.append(float((loss / ratio)[masked].sum() / len(canvas)))
    assert losses == pytest.approx(case["batch_losses"], rel=1e-4)
    assert -sum(losses) / len(losses) == pytest.approx(case["log_likelihood"], rel=1e-4)
