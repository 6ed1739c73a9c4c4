"""The laws of every decode, over models, options, batches and guiders that are drawn at random.

`make test` tries a moderate number of calls, `make test-laws` more than ten thousand, those of models with
block-causal attention (`test_block_causal_decoding.py`) among them. The models compute in float64: rounding
depends on the size of a batch, and in float32 it would now and then decide between two tokens.
"""

import copy
from dataclasses import dataclass, field, replace

import lavida
import pytest
import torch
from cases import ENDS, MASK
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.generation.streamers import BaseStreamer
from transformers.modeling_outputs import BaseModelOutputWithPooling

from hf_flashdlm import ARGuider


MODELS = ["llada_gqa", "dream", "dream_trained"]
DELIMITERS = list(range(100, 200))
COUNTS = ("nfe", "active_tokens", "tokens_per_forward", "guider_forwards", "drafts_judged", "drafts_accepted")
WAITING = ("prefix", "dual", "dkv")  # rows of a batch wait for each other


@dataclass(frozen=True)
class Call:
    """
    What `generate` is asked for: `guider` holds the settings of a guider, if there is one, `images` the length and the
    seed of the embeddings of each row's images.
    """

    model: str
    prompts: list[list[int]]
    options: dict
    guider: dict | None = None
    seed: int = 0
    negative: list[list[int]] | None = None
    images: list[list[tuple[int, int]]] = field(default_factory=list)

    @property
    def is_drawn(self):
        """Whether the rows of a batch draw from one source of randomness."""
        options = self.options
        return bool(options.get("do_sample") or options.get("position_temperature")) or (
            options.get("confidence") == "random"
        )

    @property
    def waits(self):
        options = self.options
        return options.get("window_policy") in WAITING or bool(options.get("synchronize_blocks"))

    def alone(self, row):
        negative = self.negative
        if negative is not None and len(negative) > 1:
            negative = [negative[row]]
        return replace(self, prompts=[self.prompts[row]], negative=negative, images=self.images[row : row + 1])


# --- calls -----------------------------------------------------------------------------------------------------------


def some(draw, likely=1, **strategies):
    """A subset of options, each with a value."""
    return {name: draw(one) for name, one in strategies.items() if draw(st.integers(0, likely)) == 0}


@st.composite
def window_policies(draw):
    """A window policy with options of its own."""
    kind = draw(st.sampled_from(["freecache"] * 4 + ["none", "prefix", "dual", "dkv"]))
    options = {} if kind == "freecache" else {"window_policy": kind}
    if kind == "freecache":
        options |= some(
            draw,
            likely=2,
            freeze_length=st.integers(1, 6),
            freeze_lag=st.integers(0, 3),
            left_margin=st.integers(0, 3),
            right_window=st.integers(1, 8),
            attend_stale=st.booleans(),
            refresh_blocks=st.integers(1, 3),
            refresh_entropy=st.floats(0, 6),
        )
    if kind in ("freecache", "none"):
        options |= some(draw, likely=3, grow_canvas=st.booleans())
    if kind == "dkv":
        options |= some(draw, refresh_steps=st.integers(1, 5))
    return options | some(draw, likely=4, synchronize_blocks=st.booleans())


@st.composite
def schedules(draw, num_blocks):
    """A number of steps and the order of what they write."""
    options = {"steps": draw(st.integers(num_blocks, 16))} | some(
        draw,
        confidence=st.sampled_from(["probability", "margin", "entropy", "random"]),
        schedule=st.sampled_from(["uniform", "timesteps"]),
    )
    if options.get("schedule") == "timesteps":
        options |= some(draw, eps=st.floats(1e-3, 0.5), run_empty_steps=st.booleans())
    return options | some(draw, likely=4, position_temperature=st.floats(0.1, 2))


def rules():
    """How many drafts a step writes, by what they are worth."""
    return st.one_of(
        st.just({}),
        st.fixed_dictionaries({"confidence_threshold": st.floats(0, 1)}),
        st.fixed_dictionaries({"factor": st.floats(0, 3)}),
        st.fixed_dictionaries({"frechet_delta": st.floats(0, 1)}),
        st.fixed_dictionaries({"entropy_bound": st.floats(0, 8)}),
    )


def guiders():
    """Settings of a guider; the models are random, so that it has to be generous to accept anything."""
    return st.fixed_dictionaries(
        {"accept": st.sampled_from(["topk", "topk", "topk_relative", "top1"])},
        optional={
            "top_k": st.integers(1, 400),
            "relative_threshold": st.floats(0, 1),
            "num_drafts": st.integers(1, 6),
            "combine": st.sampled_from(["union", "intersection"]),
            "confidence_threshold": st.floats(0, 1),
            "beyond_prefix": st.booleans(),
            "gate": st.just("auto"),
            "cost_ratio": st.floats(0, 1),
        },
    )


def processors(num_new):
    """Options that Transformers makes processors of scores from."""
    return st.sampled_from(
        [
            *[{}] * 4,
            {"repetition_penalty": 1.7},
            {"no_repeat_ngram_size": 2},
            {"bad_words_ids": [[token, token] for token in range(30, 500, 25)]},
            {"suppress_tokens": list(range(250, 400))},
            {"min_new_tokens": min(3, num_new)},
            {"forced_eos_token_id": 5},
        ]
    )


def sampling():
    return st.fixed_dictionaries(
        {"do_sample": st.just(True)},
        optional={"temperature": st.floats(0.2, 2), "top_k": st.integers(1, 50), "top_p": st.floats(0.3, 1)},
    )


tokens = st.integers(30, 500)
prompt = st.lists(st.one_of(tokens, tokens, tokens, st.just(MASK)), min_size=1, max_size=7)


@st.composite
def calls(draw):
    """A call that `generate` must answer."""
    num_new = draw(st.integers(1, 14))
    block_length = draw(st.one_of(st.just(num_new), st.integers(1, num_new)))
    options = {"max_new_tokens": num_new, "block_length": block_length} | draw(window_policies())
    guider = draw(st.one_of(st.none(), st.none(), guiders()))
    blocks = draw(st.sampled_from(["fixed"] * 4 + ["whole", "adaptive"]))
    if blocks == "whole":
        options |= {"blocks": "whole", "block_length": None}
    if guider is None and draw(st.booleans()):
        options |= draw(schedules(1 if blocks == "whole" else -(-num_new // block_length)))
    elif guider is None:
        options |= draw(rules())
        if blocks == "adaptive" and "entropy_bound" not in options:
            options |= {"blocks": "adaptive", "delimiter_token_ids": DELIMITERS}
            options |= some(draw, delimiter_threshold=st.floats(0, 0.3), delimiter_window=st.integers(1, 8))
    options |= draw(processors(num_new)) | draw(st.one_of(st.just({}), st.just({}), sampling()))
    options["stop_at_eos"] = draw(st.booleans())
    prompts = draw(st.lists(prompt, min_size=1, max_size=3))
    negative = None
    if draw(st.integers(0, 5)) == 0:
        options["guidance_scale"] = draw(st.sampled_from([0.5, 1.5, 3.0]))
        given_tokens = st.lists(tokens, min_size=1, max_size=5)
        sizes = st.sampled_from([1, len(prompts)])
        negative = draw(st.none() | sizes.flatmap(lambda size: st.lists(given_tokens, min_size=size, max_size=size)))
    return Call(draw(st.sampled_from(MODELS)), prompts, options, guider, draw(st.integers(0, 2**31)), negative)


@st.composite
def calls_with_images(draw):
    """The same for a model that sees images: no, one or several in each prompt, at any place."""
    call = draw(calls())
    prompts, images, options = [], [], dict(call.options)
    if draw(st.integers(0, 2)) == 0:
        options |= {"prefix_lm": True}
    for text in call.prompts:
        of_row, pieces = [], []
        for token in [None, *text]:
            if token is not None:
                pieces.append(99 if token == MASK and "prefix_lm" in options else token)
            if len(of_row) < 2 and draw(st.integers(0, 3)) == 0:
                of_row.append((draw(st.integers(1, 5)), draw(st.integers(0, 9))))
                pieces += of_row[-1][0] * [lavida.IMAGE]
        prompts.append(pieces)
        images.append(of_row)
    model = draw(st.sampled_from([f"lavida_{kind}" for kind in lavida.KINDS]))
    return replace(call, model=model, prompts=prompts, images=images, options=options, guider=None)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def exact(tiny):
    """`exact(name)` is the tiny model of that name, in float64."""
    models = {}

    def exact(name):
        if name not in models:
            kind = name.removeprefix("lavida_")
            models[name] = copy.deepcopy(tiny(name) if kind == name else lavida.load(kind)).double()
        return models[name]

    return exact


@dataclass
class Collected(BaseStreamer):
    """What a streamer is given."""

    ids: list[int] = field(default_factory=list)
    ended: int = 0

    def put(self, value):
        self.ids += value.reshape(-1).tolist()

    def end(self):
        self.ended += 1


def padded(rows):
    longest = max(map(len, rows))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])


def embedded(images, model):
    """The embeddings of all images as the keyword that Transformers hands on, if there are any."""
    width, scale = model.config.hidden_size, model.get_input_embeddings().weight.std()
    embeddings = [
        scale * torch.randn(length, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        for length, seed in sum(images, [])
    ]
    return (
        {"mm_encoder_outputs": {"image": BaseModelOutputWithPooling(pooler_output=embeddings)}} if embeddings else {}
    )


def num_fed(inputs):
    """Positions of a forward."""
    embeds = inputs.get("inputs_embeds")
    return inputs["input_ids"].numel() if embeds is None else embeds.shape[:2].numel()


@pytest.fixture(scope="session")
def answer(exact):
    """`answer(call)` is what `generate` returns, and the number of positions in each forward."""

    def answer(call, **more):
        model, sizes = exact(call.model), []
        options = dict(eos_token_id=ENDS, pad_token_id=0, return_dict_in_generate=True) | call.options
        if call.guider is not None:
            options["guider"] = ARGuider(exact("guider"), **call.guider)
        if call.negative is not None:
            options["negative_prompt_ids"], options["negative_prompt_attention_mask"] = padded(call.negative)
        input_ids, options["attention_mask"] = padded(call.prompts)
        torch.manual_seed(call.seed)
        hook = model.register_forward_pre_hook(lambda _, args, inputs: sizes.append(num_fed(inputs)), with_kwargs=True)
        try:
            output = model.generate(input_ids, **options | more, **embedded(call.images, model))
        finally:
            hook.remove()
        return output, sizes

    return answer


# --- laws of an answer -----------------------------------------------------------------------------------------------


def check_text(call, output):
    """No masks, the prompt as it was given, and nothing after the end; returns the text of each row."""
    longest, num_new = max(map(len, call.prompts)), call.options["max_new_tokens"]
    assert longest < output.sequences.shape[1] <= longest + num_new
    texts = []
    for prompt, sequence in zip(call.prompts, output.sequences.tolist(), strict=True):
        assert MASK not in sequence
        padding = longest - len(prompt)
        assert sequence[:padding] == [0] * padding
        for given_token, token in zip(prompt, sequence[padding:], strict=False):
            assert token == given_token or given_token == MASK, "the prompt has changed"
        text = sequence[longest:]
        length = next((index for index, token in enumerate(text, 1) if token in ENDS), num_new)
        if call.options["stop_at_eos"] and length < num_new:
            assert not any(text[length:]), "there is no padding after the end"
            text = text[:length]
        assert len(text) == num_new or call.options["stop_at_eos"]
        texts.append(sequence[padding:longest] + text)
    return texts


def check_rules(call, texts):
    """What the options of Transformers promise about the text."""
    options = call.options
    for prompt, text in zip(call.prompts, texts, strict=True):
        written = text[len(prompt) :]
        if "suppress_tokens" in options:
            assert not set(written) & set(options["suppress_tokens"])
        if "min_new_tokens" in options:
            assert not set(written[: options["min_new_tokens"]]) & set(ENDS)
        if MASK in prompt:
            continue
        pairs = list(zip(text, text[1:], strict=False))
        if "no_repeat_ngram_size" in options:
            assert all(pairs.index(pair) == at for at, pair in enumerate(pairs) if at >= len(prompt) - 1)
        if "bad_words_ids" in options:
            assert all([a, b] not in options["bad_words_ids"] for a, b in pairs[len(prompt) - 1 :])


def check_counts(call, output, texts, sizes):
    """Counts that add up: forwards, and tokens written by them."""
    nfe, options = output.nfe.tolist(), call.options
    assert len(sizes) == max(nfe) + bool(options.get("prefix_lm"))
    for row, (prompt, text) in enumerate(zip(call.prompts, texts, strict=True)):
        written = len(text) - len(prompt) + prompt.count(MASK)
        assert float(output.tokens_per_forward[row]) * nfe[row] == pytest.approx(written)
        assert nfe[row] >= 1
        if not options.get("run_empty_steps") and (len(nfe) == 1 or not call.waits):
            assert nfe[row] <= options["max_new_tokens"] + prompt.count(MASK), "a step wrote nothing"
    computed = sum(output.active_tokens.tolist())
    # Rows whose windows differ are fed the same number of positions, of which some repeat others.
    is_even = len(nfe) == 1 and (call.negative is None or len(call.negative[0]) == len(call.prompts[0]))
    assert computed == sum(sizes) if is_even else computed <= sum(sizes)
    if call.guider is not None:
        lengths = output.accepted_lengths
        assert output.guider_forwards.tolist() == [len(row) for row in lengths]
        assert output.drafts_accepted.tolist() == [sum(row) for row in lengths]
        assert (output.drafts_accepted <= output.drafts_judged).all()
        assert (output.guider_forwards <= output.nfe).all()


def check_same(first, second, counts=COUNTS):
    assert first.sequences.tolist() == second.sequences.tolist()
    for name in counts:
        one, other = getattr(first, name), getattr(second, name)
        assert (one is None) == (other is None) and (one is None or one.tolist() == other.tolist()), name


def check_alone(call, row, text, nfe, answer):
    """A row that is decoded alone has the tokens that it has in a batch, and its streamer hears them once."""
    streamer, single = Collected(), call.alone(row)
    output, sizes = answer(single, streamer=streamer)
    texts = check_text(single, output)
    check_counts(single, output, texts, sizes)
    assert streamer.ended == 1
    assert len(streamer.ids) >= len(texts[0])
    if not call.is_drawn:
        assert texts == [text], f"row {row} depends on its neighbours"
        assert call.waits or output.nfe.tolist() == [nfe]


# --- the suite -------------------------------------------------------------------------------------------------------


half = settings(max_examples=settings.default.max_examples // 2)  # of the profile; a call that decodes takes longest
quarter = settings(max_examples=settings.default.max_examples // 4)


@half
@given(calls())
def test_a_valid_call_obeys_the_laws(answer, call):
    check_laws(answer, call)


@quarter
@given(calls_with_images())
def test_a_call_with_images_obeys_the_laws(answer, call):
    check_laws(answer, call)


def check_laws(answer, call):
    output, sizes = answer(call)
    texts = check_text(call, output)
    check_rules(call, texts)
    check_counts(call, output, texts, sizes)
    for row in range(len(call.prompts)):
        check_alone(call, row, texts[row], int(output.nfe[row]), answer)
    with pytest.raises(ValueError, match="`freeze_lag`"):
        answer(call, freeze_lag=-1)
    check_same(output, answer(call)[0])


# A cache that is refreshed at every step, and what it is compared with.
REFRESHED = [
    (dict(window_policy="dkv", refresh_steps=1), {}),
    (dict(left_margin=1000), {}),
    (dict(left_margin=1000, grow_canvas=True), dict(grow_canvas=True)),
    (dict(refresh_entropy=0.0, freeze_lag=1000), {}),
    (dict(window_policy="prefix", block_length=1), dict(block_length=1)),
    (dict(window_policy="dual", block_length=1), dict(block_length=1)),
    (dict(refresh_blocks=1, block_length=1), dict(block_length=1)),
]
POLICY_OPTIONS = {
    *("window_policy", "freeze_length", "freeze_lag", "left_margin", "right_window", "attend_stale", "grow_canvas"),
    *("refresh_blocks", "refresh_entropy", "refresh_steps", "synchronize_blocks"),
}


@half
@given(calls(), st.sampled_from(REFRESHED))
def test_a_cache_that_is_refreshed_at_every_step_changes_nothing(answer, call, policies):
    check_refreshed(answer, call, policies)


@quarter
@given(calls_with_images(), st.sampled_from(REFRESHED))
def test_images_in_a_cache_that_is_refreshed_at_every_step_change_nothing(answer, call, policies):
    options = {name: value for name, value in call.options.items() if name != "prefix_lm"}
    check_refreshed(answer, replace(call, options=options), policies)


def check_refreshed(answer, call, policies):
    # How much randomness a step takes depends on the number of positions that it scores.
    left_out = POLICY_OPTIONS | {"do_sample", "temperature", "top_k", "top_p", "position_temperature"}
    plain = {name: value for name, value in call.options.items() if name not in left_out and value != "random"}
    if "block_length" in policies[0]:  # what is masked in the prompt is no block
        call = replace(call, prompts=[[99 if token == MASK else token for token in row] for row in call.prompts])
        call = replace(call, guider=None)  # which may write after the block and leave it unfinished
        plain = {name: value for name, value in plain.items() if not name.startswith(("blocks", "delimiter_"))}
        plain["steps"] = plain["max_new_tokens"] if "steps" in plain else None
    waits = policies[0].get("window_policy") in WAITING
    cached, exact = (
        answer(replace(call, options=plain | policy | more))[0]
        for policy, more in zip(policies, ({}, dict(window_policy="none", synchronize_blocks=waits)), strict=True)
    )
    check_same(cached, exact, [name for name in COUNTS if name != "active_tokens"])


# Values that no call may have; each sentence names the option, or the option that it does not go with.
WRONG = {
    "block_length": [0, -3, 2.5, "4", True],
    "steps": [0, -1, 1.5, "8", float("nan"), 10**9],
    "freeze_length": [0, 0.5],
    "freeze_lag": [-1, 1.5, None],
    "left_margin": [-1, "2"],
    "right_window": [0, -2],
    "refresh_blocks": [0, 1.5],
    "refresh_entropy": [-0.1, "1", float("nan")],
    "refresh_steps": [0, -1],
    "confidence_threshold": [-0.1, 1.5, float("nan"), "0.9", True],
    "factor": [-1, float("nan")],
    "frechet_delta": [-1, 2],
    "entropy_bound": [-1, "0.1"],
    "position_temperature": [-1, float("inf")],
    "eps": [-1, 2, float("nan")],
    "window_policy": ["free-cache", 3, True],
    "blocks": ["fixd", 4],
    "schedule": ["cosine", 2],
    "confidence": ["max", 0.9],
    "unmasking_rule": ["all", 3],
    "method": ["fast", 1],
    "stop_at_eos": [None, 1, "no"],
    "attend_stale": [None, 0],
    "grow_canvas": ["yes"],
    "run_empty_steps": [1],
    "synchronize_blocks": [1, "no"],
    "mask_token_id": [-1, 512, "mask"],
    "max_new_tokens": [0, -4, 2.5, 10**9],
    "num_beams": [2],
    "num_return_sequences": [0, -1],
    "guidance_scale": [float("inf"), float("nan"), "1.5"],
    "repetition_penalty": [0, -1.0, float("inf")],
    "attention_mask": [torch.ones(1, 99), torch.full((1, 1), 2), "1"],
    "inputs_embeds": [torch.zeros(1, 1, 64)],
    "guider": ["gpt2", 3, ARGuider],
    "generator": [3, "cpu"],
    "gen_length": [8],
    "remasking": ["low_confidence"],
    "cfg_scale": [0.5],
    "assistant_model": [3],
}
FAULTS = [(name, value) for name, values in WRONG.items() for value in values]


@given(calls(), st.sampled_from(FAULTS))
def test_an_invalid_call_is_one_value_error_that_names_an_option(answer, exact, call, fault):
    name, value = fault
    model = exact(call.model)
    before = (set(vars(model)), model.generation_config.to_dict())
    with pytest.raises(ValueError, match=r"^[^\n]*`\w+`[^\n]*$") as error:
        answer(call, **{name: value})
    assert f"`{name}`" in str(error.value)
    assert (set(vars(model)), model.generation_config.to_dict()) == before
