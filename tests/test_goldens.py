"""Outputs of the original implementations on tiny models, reproduced by settings (see tests/goldens/README.md).

Every case is compared in ids and in the query length of every forward, unless the original is wrong: the table of
differences says where and how. If an original does something that is not an option here, the test brings a part that
does it.
"""

import json
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path

import pytest
import torch
from transformers import TopKLogitsWarper, TopPLogitsWarper

from hf_flashdlm import AdaptiveBlocks, ARGuider, DKVWindow, MostConfident, Window
from hf_flashdlm.schedule import UniformSchedule
from hf_flashdlm.unmasking import ConfidenceFactor, ConfidenceThreshold


GOLDENS = Path(__file__).parent / "goldens"


def cases(name):
    return json.loads((GOLDENS / f"cases_{name}.json").read_text())["cases"]


def parametrize(*names, keep=lambda case: True):
    chosen = [case for name in names for case in cases(name) if keep(case)]
    assert chosen, "the selection of golden cases must not be empty"
    return pytest.mark.parametrize("case", chosen, ids=lambda case: case["id"])


@dataclass
class Run:
    output: object
    forwards: list


@pytest.fixture
def decode(load):
    """Run a case with options of `generate`, parts among them."""

    def decode(case, **options):
        model, forwards = load(case["model"]), []
        mask = case.get("attention_mask")
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
    return {"steps": settings["steps"]}


# Confidences that are 1 in float32 are ties in the originals; `torch.topk` takes any of them, this package the first.
TIES = ("llada-cfg-2", "model_dream-topp", "model_dream-topp-topk")


@parametrize("llada_official", "dream_official", keep=lambda case: case["id"] in TIES)
def test_we_differ_from_the_originals_in_ties_only(decode, case):
    calls = []

    def rule(drafts, row):
        chosen = MostConfident()(drafts, row)
        calls.append((torch.tensor(drafts.confidence), [place - drafts.positions.start for place in chosen]))
        return chosen

    settings = case["settings"]
    if "alg" in settings:
        options = dream_options(settings)
    else:
        options = llada_options(settings, steps=settings["steps"])
    run = decode(case, **options, window_policy="none", unmasking_rule=rule)
    assert run.forwards == case["forwards"]
    masked = set(range(len(case["prompt_ids"][0]), len(case["output_ids"][0])))
    for (confidence, chosen), commits in zip(calls, case["commits"], strict=True):
        ours = {min(masked) + slot for slot in chosen}
        theirs = {position for _, position, _ in commits}
        if ours != theirs:
            differing = torch.tensor(sorted(ours ^ theirs)) - min(masked)
            assert confidence[differing].gt(1 - 1e-7).all(), "a choice differs that is not a tie"
            return
        masked -= ours
    raise AssertionError("the case holds no tie any more: compare it with the others")


@parametrize("llada_official", keep=lambda case: case["id"] not in TIES)
def test_llada_official(decode, case):
    options = llada_options(case["settings"], steps=case["settings"]["steps"], window_policy="none")
    run = decode(case, **options)
    needed = [forward for forward, commits in zip(case["forwards"], case["commits"], strict=True) if commits]
    assert_equal(run, case, needed if case["id"].endswith("surplus-steps") else None)


class FastDLLMFactor(ConfidenceFactor):
    """The original's mistake: if only the last candidate fails its bar, it is written as well."""

    def count(self, confidence):
        count = super().count(confidence)
        return count + (count == len(confidence) - 1)


@parametrize("fastdllm_llada_v1", "fastdllm_llada_v0", keep=lambda case: "quirk" not in case["id"])
def test_fastdllm_llada(decode, case):
    policy = {"generate": "none", "generate_with_prefix_cache": "prefix", "generate_with_dual_cache": "dual"}
    settings = case["settings"]
    factor = settings.get("factor")
    rule = rule_options(settings) if factor is None else {"unmasking_rule": FastDLLMFactor(factor)}
    run = decode(
        case,
        **llada_options(settings, **rule),
        window_policy=policy[case["function"]],
        synchronize_blocks=True,
    )
    assert run.output.sequences.tolist() == case["output_ids"]
    # The first release runs an extra forward for a block that its refresh has completed.
    needed = [forward for forward, commits in zip(case["forwards"], case["commits"], strict=True) if commits]
    expected = needed if case["source"].endswith("v0") else case["forwards"]
    # Here finished rows leave the batch.
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


class FirstToken:
    """Fast-dLLM's handling of Dream's shift: the refresh of a block writes the block's first position only."""

    def __init__(self, rule):
        self.rule = rule

    def __call__(self, drafts, row):
        return [row.block_start] if row.block_nfe == 0 else self.rule(drafts, row)


class BlockTimesteps:
    """Fast-dLLM's timesteps run over each block separately; step 0 is the refresh."""

    def __init__(self, steps, eps):
        self.steps, self.timesteps = steps, torch.linspace(1, eps, steps + 1)

    def __call__(self, row):
        masked = row.masked.count(True, 0, row.block_stop)
        share = 1 - self.timesteps[row.step + 1] / self.timesteps[row.step]
        quota = masked if row.step == self.steps - 1 else int(masked * share)
        return (quota if row.step else 1), row.step + 1


@parametrize("fastdllm_dream", keep=is_fastdllm_block)
def test_fastdllm_dream_blocks(decode, case):
    settings = case["settings"]
    if settings["alg"] == "confidence_threshold":
        options = {"unmasking_rule": FirstToken(ConfidenceThreshold(settings["threshold"]))}
    else:
        num_blocks = settings["max_new_tokens"] // settings["block_length"]
        options = {
            name: value for name, value in dream_options(settings).items() if name not in ("steps", "run_empty_steps")
        }
        options["schedule"] = BlockTimesteps(settings["steps"] // num_blocks, options["eps"])
        options["unmasking_rule"] = FirstToken(MostConfident())
    options |= {"max_new_tokens": settings["max_new_tokens"], "block_length": settings["block_length"]}
    policy = "dual" if settings["dual_cache"] else "prefix"
    assert_equal(decode(case, window_policy=policy, **options), case)


class BudgetedThreshold:
    """Fast-dLLM's Dream without cache: a step may write its share of the tokens and what earlier steps left over."""

    def __init__(self, settings):
        self.share, self.steps = settings["max_new_tokens"] // settings["steps"], settings["steps"]
        self.threshold, self.step, self.written = settings["threshold"], 0, 0

    def __call__(self, drafts, row):
        self.step += 1
        budget = self.share * self.step - self.written
        sure = sum(drafts.confidence_of(position) >= self.threshold for position in drafts.candidates)
        count = min(max(sure, 1), max(budget, 1))
        self.written += count
        return drafts.ranked()[:count]


@parametrize("fastdllm_dream", keep=lambda case: case["function"].endswith("(generation_utils)"))
def test_fastdllm_dream_without_cache(decode, case):
    settings = case["settings"]
    run = decode(
        case,
        max_new_tokens=settings["max_new_tokens"],
        blocks="whole",
        unmasking_rule=BudgetedThreshold(settings),
        window_policy="none",
    )
    assert_equal(run, case)


class TwoRefreshes(DKVWindow):
    """The original on LLaDA: a block's second step recomputes everything as well."""

    def __call__(self, row):
        window = super().__call__(row)
        return replace(window, scored=None) if row.block_nfe == 1 else window


@parametrize("dkv_llada_decode")
def test_dkv_llada(decode, case):
    settings = case["settings"]
    options = llada_options(settings, steps=settings["steps"])
    assert_equal(decode(case, window_policy=TwoRefreshes(settings["cache_reloading_step"]), **options), case)


class DreamDKVWindow(DKVWindow):
    """The original's variants on Dream: the prompt's states are kept ("pd"), masks are fed as well ("un_right")."""

    def __init__(self, settings, prompt_length):
        super().__init__(settings["cache_steps"])
        object.__setattr__(self, "frozen", prompt_length - 1 if settings["cache_type"] == "pd" else 0)
        object.__setattr__(self, "include_scored", settings["shift_type"] == "un_right")

    def __call__(self, row):
        window, frozen = super().__call__(row), self.frozen if row.nfe else 0
        include = window.include_scored or self.include_scored
        return replace(window, lo=frozen, frozen=frozen, include_scored=include)


@parametrize("dkv_dream_base", "dkv_dream_pd", keep=lambda case: case["settings"]["shift_type"] != "right")
def test_dkv_dream(decode, case):
    settings = case["settings"]
    policy = {"window_policy": "none"}
    if settings["use_cache"] and settings["cache_type"] == "prefill":
        policy = {"window_policy": "freecache", "freeze_length": settings["max_new_tokens"], "left_margin": 1}
    elif settings["use_cache"]:
        policy = {"window_policy": DreamDKVWindow(settings, len(case["prompt_ids"][0]))}
    assert_equal(decode(case, **dream_options(settings), **policy), case)


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
    # The original fills the canvas after the end with end tokens; here it is cut.
    assert case["output_ids"][0] == ids + [settings["eos_token_id"]] * (len(case["output_ids"][0]) - len(ids))
    assert run.forwards == case["forwards"]
    checked(run.output, guider)
    assert run.output.accepted_lengths == [case["accepted_per_step"]]
    assert run.output.nfe.tolist() == [case["diffusion_steps"]]


class GreedyOrder:
    """dKV-Cache-Greedy: an order drawn in advance, so that a step can compute only what it is about to write."""

    history, synchronous, needs_entropy = 0, True, False

    def __init__(self, orders, settings):
        self.orders, self.settings = orders, settings
        num_blocks = settings["gen_length"] // settings["block_length"]
        self.schedule = UniformSchedule((settings["steps"] // num_blocks,) * num_blocks)

    def next_in_order(self, row):
        left = [position for position in self.orders[row.block_index] if row.masked[position]]
        return left[: self.schedule(row)[0]]

    def __call__(self, row):
        """Window policy: the positions of this step and of the last step, and masked neighbours of the former."""
        now, length = self.next_in_order(row), len(row.masked)
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

    def rule(self, drafts, row):
        """Unmasking rule: write the positions that the window was made for."""
        return self.next_in_order(replace(row, step=row.step - 1))  # the schedule has already moved on


@parametrize("dkv_llada_greedy")
def test_dkv_llada_greedy(decode, case):
    order = GreedyOrder(case["denoising_order_per_block"], case["settings"])
    options = llada_options(case["settings"], steps=case["settings"]["steps"])
    assert_equal(decode(case, window_policy=order, unmasking_rule=order.rule, **options), case)


def adablock_options(settings):
    length = settings.get("gen_length", settings.get("max_new_tokens"))
    ids, threshold = settings.get("delimiter_ids", DREAM_DELIMITERS), settings["delimiter_threshold"]
    blocks = AdaptiveBlocks(
        settings.get("init_block_length", settings.get("block_length")),
        frozenset(ids),
        inf if threshold is None else threshold,
        int(length * 0.25),
    )
    return dict(max_new_tokens=length, blocks=blocks, confidence_threshold=settings["threshold"])


# The delimiters of the original that the tiny vocabularies have.
DREAM_DELIMITERS = (198, 271, 280, 319, 340, 382, 401)


@parametrize("adablock")
def test_adablock(decode, case):
    options = adablock_options(case["settings"]) | {"window_policy": case["cache"]}
    if case["model"].startswith("model_dream") and case["cache"] == "dual":
        options["unmasking_rule"] = FirstToken(ConfidenceThreshold(options.pop("confidence_threshold")))
    assert_equal(decode(case, **options), case)


@parametrize("llada_loglikelihood")
def test_llada_log_likelihood(load, case):
    """The recorded draws, scored by this package: the estimate is that of the original."""
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
