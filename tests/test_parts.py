"""Parts of a user's own: every part of a decode as an object, and one sentence for an object that does not fit."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, GenerationConfig

from hf_flashdlm import (
    METHODS,
    AdaptiveBlocks,
    BlockWindow,
    CanvasProcessor,
    DKVWindow,
    FixedBlocks,
    FreeCacheWindow,
    FullWindow,
    MostConfident,
    Window,
    WindowPolicy,
)
from hf_flashdlm.blocks import Blocks
from hf_flashdlm.schedule import UniformSchedule
from hf_flashdlm.unmasking import ConfidenceThreshold, Drafts


OWN = runpy.run_path(str(Path(__file__).parent.parent / "examples" / "own_parts.py"))
PROMPTS = [[5, 70, 33], [9, 8, 7, 6, 200, 41, 3]]
FILLED = dict(max_new_tokens=16, block_length=4, stop_at_eos=False)


def written_by(decode, model, prompts=PROMPTS, **options):
    output = decode(model, prompts, **FILLED | options)
    return output.sequences.tolist(), output.nfe.tolist(), output.active_tokens.tolist()


# Each object is the part that the name stands for


@pytest.mark.parametrize("model", ["llada", "dream_trained"])
@pytest.mark.parametrize(
    ("named", "objects"),
    [
        ({"window_policy": "none"}, {"window_policy": FullWindow()}),
        ({"window_policy": "dual"}, {"window_policy": BlockWindow(dual=True)}),
        ({"window_policy": "dkv"}, {"window_policy": DKVWindow(8)}),
        ({"window_policy": "freecache"}, {"window_policy": FreeCacheWindow(4)}),
        ({"right_window": 6}, {"window_policy": FreeCacheWindow(4, right_window=6)}),
        ({"confidence_threshold": 0.2}, {"unmasking_rule": ConfidenceThreshold(0.2)}),
        ({"steps": 8}, {"schedule": UniformSchedule((2, 2, 2, 2))}),
        ({"steps": 8}, {"steps": 8, "unmasking_rule": MostConfident()}),
        ({"schedule": "uniform"}, {"steps": 16}),
        ({}, {"blocks": FixedBlocks(4)}),
        ({"steps": 16}, {"steps": 16, "confidence": lambda scores, token_ids, probability: probability}),
        ({"blocks": "whole", "block_length": None}, {"block_length": 16}),
    ],
)
def test_an_object_decodes_as_the_name_of_its_part(tiny, decode, model, named, objects):
    assert written_by(decode, tiny(model), **named) == written_by(decode, tiny(model), **objects)


@pytest.mark.parametrize("model", ["llada", "dream_trained"])
def test_the_example_brings_a_rule_and_a_policy_that_run_in_every_family(tiny, decode, model):
    rule, policy = OWN["LeftToRight"](), OWN["KeepPrompt"]()
    output = decode(tiny(model), PROMPTS, unmasking_rule=rule, window_policy=policy, **FILLED)
    assert not (output.sequences == tiny(model).config.mask_token_id).any()
    alone = [decode(tiny(model), [p], unmasking_rule=rule, window_policy=policy, **FILLED) for p in PROMPTS]
    for index, (prompt, one) in enumerate(zip(PROMPTS, alone, strict=True)):
        assert output.sequences[index, -16:].tolist() == one.sequences[0, len(prompt) :].tolist()
        assert output.nfe[index] == one.nfe[0]


def test_the_example_is_short():
    lines = Path(OWN["__file__"]).read_text().split("if __name__")[0].splitlines()
    assert sum(bool(line.strip()) for line in lines) < 30


def test_a_rule_sees_what_it_decides_about(tiny, decode):
    seen = []

    def rule(drafts, row):
        seen.append((drafts, row.frontier, row.block_stop))
        return drafts.candidates[-1:]

    decode(tiny("llada"), PROMPTS[:1], unmasking_rule=rule, **FILLED)
    assert len(seen) == 16
    for drafts, frontier, stop in seen:
        assert drafts.candidates and drafts.candidates[0] == frontier and drafts.candidates[-1] < stop
        assert len(drafts.token_ids) == len(drafts.confidence) == len(drafts.positions)
        assert all(isinstance(token_id, int) for token_id in drafts.token_ids)
        assert 0 <= drafts.confidence_of(frontier) <= 1
        ranked = [drafts.confidence_of(position) for position in drafts.ranked()]
        assert ranked == sorted(ranked, reverse=True)


def test_a_rule_that_chooses_nothing_still_makes_progress(tiny, decode):
    written = written_by(decode, tiny("llada"), unmasking_rule=lambda drafts, row: [])
    assert written == written_by(decode, tiny("llada"), steps=16)


class Forbid(CanvasProcessor):
    """A guide without an autoregressive model: it forbids one token."""

    def __init__(self, token_id):
        self.token_id = token_id

    def reset(self, diffusion_model, canvas_mask, *args, **kwargs):
        self.rows = len(canvas_mask)

    def __call__(self, input_ids, scores, positions, frontier, candidate):
        assert scores.shape[:2] == positions.shape == candidate.shape and len(frontier) == len(input_ids)
        return scores.index_fill(-1, torch.tensor([self.token_id]), -torch.inf)


def test_a_guide_needs_no_autoregressive_model(tiny, decode):
    model = tiny("llada")
    token_id = int(decode(model, PROMPTS[:1], **FILLED).sequences[0, -1])
    guide = Forbid(token_id)
    output = decode(model, PROMPTS[:1], guider=guide, **FILLED)
    assert token_id not in output.sequences[0, 3:].tolist()
    assert not hasattr(guide, "rows"), "the state of a call must not outlive the call"


# Objects that do not fit


class Nothing:
    pass


class NoHistory:
    synchronous = needs_entropy = False

    def __call__(self, row):
        return None


class OneArgument:
    def __call__(self, drafts):
        return []


class OnlyStop:
    def stop(self, row):
        return row.block_start + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"window_policy": NoHistory()},
            "`window_policy` must have `history`, which NoHistory lacks: see the protocol `WindowPolicy`.",
        ),
        (
            {"blocks": OnlyStop()},
            "`blocks` must have `cut`, which OnlyStop lacks: see the protocol `BlockPolicy`.",
        ),
        (
            {"schedule": Nothing()},
            "`schedule` must have `__call__`, which Nothing lacks: see the protocol `Schedule`.",
        ),
        (
            {"unmasking_rule": OneArgument()},
            "`unmasking_rule` must be callable as `(drafts, row)`, which OneArgument is not: see the protocol "
            "`UnmaskingRule`.",
        ),
        (
            {"unmasking_rule": "threshold"},
            "`unmasking_rule` must be an object that follows `UnmaskingRule`, got 'threshold'.",
        ),
        (
            {"confidence": lambda scores: scores},
            "`confidence` must be callable as `(scores, token_ids, probability)`, which function is not: see the "
            "protocol `Confidence`.",
        ),
        (
            {"window_policy": BlockWindow},
            "`window_policy` must be an object, got the class BlockWindow: pass an instance of it.",
        ),
        (
            {"unmasking_rule": MostConfident(), "confidence_threshold": 0.5},
            "`confidence_threshold` and `unmasking_rule` are rules for the same thing: pass one of them.",
        ),
        (
            {"schedule": UniformSchedule((16,)), "steps": 16},
            "`steps` are spread by the built-in schedules, got steps=16 and a `schedule` of UniformSchedule: drop one "
            "of them.",
        ),
    ],
)
def test_an_object_of_a_wrong_form_is_refused_at_the_door(tiny, options, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        tiny("llada").generate(torch.tensor(PROMPTS[:1]), **FILLED | options)


class Narrow(WindowPolicy):
    def __init__(self, *numbers):
        self.numbers = numbers

    def __call__(self, row):
        return Window(*self.numbers) if row.nfe else Window(0, 19, 19, 0)


class Ends:
    def __init__(self, stop, cut=None):
        self.ends = stop, cut

    def stop(self, row):
        return self.ends[0]

    def cut(self, drafts, row):
        return self.ends[1]


# The first mask of the second step is still that of the first.
LAST_FIRST = {"unmasking_rule": lambda drafts, row: drafts.candidates[-1:]}
WINDOW = (
    "`window_policy` must return a `Window` with 0 <= frozen <= lo < hi <= attended <= canvas length and frozen <= "
    "first mask < hi, here 19 and {}, got {} from Narrow."
)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window_policy": Narrow(3, 20, 20, 0)} | LAST_FIRST, WINDOW.format(3, Window(3, 20, 20, 0))),
        ({"window_policy": Narrow(3, 19, 19, 5)} | LAST_FIRST, WINDOW.format(3, Window(3, 19, 19, 5))),
        ({"window_policy": Narrow(0, 3, 19, 0)} | LAST_FIRST, WINDOW.format(3, Window(0, 3, 19, 0))),
        ({"window_policy": Narrow(9, 19, 19, 9)} | LAST_FIRST, WINDOW.format(3, Window(9, 19, 19, 9))),
        (
            {"unmasking_rule": lambda drafts, row: [2]},
            "`unmasking_rule` must return positions among `drafts.candidates`, here [3, 4, 5, 6], got [2] from "
            "function.",
        ),
        (
            {"unmasking_rule": lambda drafts, row: 3},
            "`unmasking_rule` must return positions among `drafts.candidates`, here [3, 4, 5, 6], got 3 from "
            "function.",
        ),
        (
            {"schedule": lambda row: 1},
            "`schedule` must return two integers, the minimum number of tokens to write and the next step of the "
            "block, got 1 from function.",
        ),
        (
            {"steps": 16, "confidence": lambda scores, token_ids, probability: probability[0]},
            "`confidence` must return a tensor of shape (1, 4), a number for each position, got (4,) from function.",
        ),
        (
            {"blocks": Ends(3)},
            "`blocks` must end a block after its start 3 and at most at 19, got 3 from Ends.",
        ),
        (
            {"blocks": Ends(8, 2)},
            "`blocks` must end a block after its start 3 and at most at 8, got 2 from Ends.",
        ),
    ],
)
def test_an_answer_that_no_step_can_use_names_its_part(tiny, options, message):
    model = tiny("llada")
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.generate(torch.tensor(PROMPTS[:1]), **FILLED | options)


def test_an_object_is_refused_in_a_generation_config(tiny, tmp_path):
    tiny("llada").save_pretrained(tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "copy").eval()
    message = (
        "`unmasking_rule` must be a string in a generation config, which is saved as JSON, got an object of "
        "MostConfident: pass the object to `generate`."
    )
    config = GenerationConfig(max_new_tokens=4)
    config.unmasking_rule = MostConfident()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.generate(torch.tensor(PROMPTS[:1]), generation_config=config)
    model.generation_config.unmasking_rule = MostConfident()
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


# Named methods


@pytest.mark.parametrize("name", sorted(METHODS.keys() - {"adablock", "fast-dllm-v2"}))
def test_a_method_decodes_as_its_line_of_settings(tiny, decode, name):
    settings = METHODS[name]
    plain = FILLED if settings.get("blocks") != "whole" else FILLED | {"block_length": None}
    assert written_by(decode, tiny("llada"), **plain | {"method": name}) == written_by(
        decode, tiny("llada"), **settings | plain
    )


def test_a_method_and_what_wins_over_it(tiny, tmp_path, decode):
    tiny("llada").save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    model.generation_config = GenerationConfig(method="fast-dllm-dual", confidence_threshold=0.2)
    model.save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    saved = written_by(decode, model)
    assert saved == written_by(decode, tiny("llada"), window_policy="dual", confidence_threshold=0.2)
    assert written_by(decode, model, method="llada") == written_by(decode, tiny("llada"), method="llada")


# Adaptive blocks


adaptive = st.fixed_dictionaries(
    {
        "blocks": st.just("adaptive"),
        "delimiter_token_ids": st.lists(st.integers(0, 500), min_size=90, max_size=120),
        "delimiter_threshold": st.sampled_from([0.0, 0.05, 0.3]),
        "delimiter_window": st.integers(1, 9),
        "confidence_threshold": st.sampled_from([0.05, 0.5, 0.9]),
        "window_policy": st.sampled_from(["none", "prefix", "dual", "dkv", "freecache"]),
        "synchronize_blocks": st.just(False),
    }
)


@settings(max_examples=15)
@given(st.sampled_from(["llada", "dream_trained"]), adaptive)
def test_adaptive_blocks_of_a_batch_are_those_of_its_rows(tiny, decode, model, options):
    together = decode(tiny(model), PROMPTS, **FILLED | options)
    for index, prompt in enumerate(PROMPTS):
        alone = decode(tiny(model), [prompt], **FILLED | options)
        assert together.sequences[index, -16:].tolist() == alone.sequences[0, len(prompt) :].tolist()
        assert together.nfe[index] == alone.nfe[0]


@pytest.mark.parametrize("policy", ["prefix", "dual", "dkv"])
def test_rows_of_adaptive_blocks_that_wait_fill_their_canvas(tiny, decode, policy):
    options = dict(blocks="adaptive", delimiter_token_ids=list(range(0, 500, 3)), delimiter_threshold=0.0)
    output = decode(tiny("llada"), PROMPTS, window_policy=policy, **FILLED | options)
    assert not (output.sequences == 511).any()


def test_a_block_ends_at_the_most_confident_delimiter(start):
    policy = AdaptiveBlocks(4, frozenset([7, 8]), 0.5, 6)
    for confidence, stop in [
        ([0.6, 0.9, 0.7, 0.1, 0.1, 0.8, 0.9, 0.1], 3),  # of the positions 1 to 6, the second
        ([0.6, 0.6, 0.6, 0.1, 0.1, 0.6, 0.9, 0.1], 2),  # ties go to the first; the last is outside the window
        ([0.4, 0.4, 0.4, 0.9, 0.9, 0.4, 0.9, 0.1], 5),  # below the bar: the default
    ]:
        (row,) = start("p________", prompt_length=1).rows
        blocks = Blocks(policy)
        blocks.enter([row])
        assert row.block_stop == 7
        drafts = Drafts(range(1, 9), [7, 8, 7, 1, 2, 8, 7, 3], confidence, list(range(1, 9)))
        blocks.cut(drafts, row)
        assert row.block_stop == stop and row.block_masked == stop - 1
        assert drafts.candidates == list(range(1, stop))
