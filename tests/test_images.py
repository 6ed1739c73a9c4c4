"""Decodes of prompts with images: as if the embeddings were tokens; rows of a batch; what a forward is fed."""

import copy
import functools
import re

import lavida
import pytest
import torch
from cases import ENDS, MASK, POLICIES, generated
from lavida import GOLDENS, IMAGE, KINDS
from safetensors import safe_open
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from hf_flashdlm import ARGuider
from hf_flashdlm.images import Images


SIZE = 56  # of a tile, which is 4 tokens
HEIGHT_AND_WIDTH = [(56, 100), (90, 50), (40, 80)]
PROMPTS = [[5, 70, 200, 41, 33], [9, "wide", 41], ["tall", 7, "tall", 200, 12, 18]]
NUM_IMAGES = [1, 2]  # of the prompts that have any
POLICIES = POLICIES | {
    "prefix-lm": dict(window_policy="none", prefix_lm=True),
    "prefix-lm-freecache": dict(prefix_lm=True),
    "prefix-lm-dual": dict(window_policy="dual", prefix_lm=True),
    "prefix-lm-dkv": dict(window_policy="dkv", prefix_lm=True),
    "prefix-lm-tail": dict(prefix_lm=True, prompt_tail=1, window_policy="none"),
    "guidance": dict(guidance_scale=1.5),
    "guidance-prefix-lm": dict(guidance_scale=1.5, prefix_lm=True),
}
OF_THE_FIRST_TEST = {
    *("dkv-often", "lag-0", "lag-3", "short-pieces", "narrow-stale", "growing", "none-growing", "refresh-entropy"),
    *("refresh-both-narrow", "synchronous", "narrow-margin-lag-0", "guidance-prefix-lm"),
}
SYNCHRONOUS = ("prefix", "dual", "dkv", "prefix-lm-dual", "prefix-lm-dkv")
every_policy = pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
every_kind = pytest.mark.parametrize("kind", KINDS)
OPTIONS = dict(max_new_tokens=11, block_length=4, eos_token_id=ENDS, pad_token_id=0)


@functools.cache
def small(kind):
    """The recorded model with small tiles, loaded once; no test may change it."""
    config = AutoConfig.from_pretrained(GOLDENS / f"model_{kind}")
    config.vision_config.image_size = SIZE
    config.image_grid_pinpoints = [[56, 112], [112, 56], [112, 112], [168, 56], [56, 168]]
    config.image_token_id = IMAGE
    torch.manual_seed(0)
    path = GOLDENS / f"model_{kind}"
    return AutoModelForImageTextToText.from_pretrained(path, config=config, ignore_mismatched_sizes=True).eval()


@functools.cache
def pixels():
    """One image of three tiles for the second prompt, two of one tile for the third."""
    draws = torch.Generator().manual_seed(0)
    return {
        "pixel_values": torch.randn(3, 3, 3, SIZE, SIZE, generator=draws),
        "image_sizes": torch.tensor(HEIGHT_AND_WIDTH),
        "batch_num_images": torch.tensor(NUM_IMAGES),
    }


@functools.cache
@torch.no_grad()
def features(kind):
    return small(kind).model.get_image_features(**pixels()).pooler_output


def prompts(kind):
    """The prompts in ids."""
    lengths = iter([len(one) for one in features(kind)])
    tokens = [[[IMAGE] * next(lengths) if isinstance(one, str) else [one] for one in prompt] for prompt in PROMPTS]
    return [sum(prompt, []) for prompt in tokens]


def inputs(kind, left_padded, row=None):
    """What the processor gives for all prompts, or for one."""
    texts = prompts(kind)
    if row is None:
        ids, mask = left_padded(texts)
        return {"input_ids": ids, "attention_mask": mask, **pixels()}
    if row == 0:
        return {"input_ids": torch.tensor([texts[0]])}
    first, last = ((0, 1), (1, 3))[row - 1]
    images = {name: value[first:last] for name, value in pixels().items()}
    return {"input_ids": torch.tensor([texts[row]]), **images, "batch_num_images": torch.tensor([last - first])}


def run(model, **options):
    """The output of `generate`, with the keywords of each forward."""
    forwards = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: forwards.append(kwargs), with_kwargs=True)
    try:
        output = model.generate(return_dict_in_generate=True, **OPTIONS | options)
    finally:
        hook.remove()
    object.__setattr__(output, "forwards", forwards)
    return output


# What an image is


@every_kind
def test_a_tile_is_four_tokens_and_a_newline_ends_each_row(kind):
    # The first fills two tiles of 56 x 112, of which 100 x 56 becomes 112 x 62: all rows, hence 2 rows of 4 tokens.
    assert [len(one) for one in features(kind)] == [4 + 2 * (4 + 1), 4 + 1, 4 + 1]


@every_kind
@every_policy
def test_an_image_decodes_as_tokens_of_these_embeddings(kind, policy, left_padded):
    given = inputs(kind, left_padded)
    is_image = given["input_ids"] == IMAGE
    tokens = 300 + torch.arange(int(is_image.sum()))
    model = copy.deepcopy(small(kind))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens] = torch.cat(features(kind))
    options = policy | {"suppress_tokens": tokens.tolist(), "attention_mask": given["attention_mask"]}
    ids = given["input_ids"].clone()
    ids[is_image] = tokens
    as_text = run(model, **options, input_ids=ids)
    as_images = run(small(kind), **given | options)
    length = ids.shape[1]
    assert as_images.sequences[:, length:].tolist() == as_text.sequences[:, length:].tolist()
    assert as_images.nfe.tolist() == as_text.nfe.tolist()
    assert as_images.sequences[:, :length].equal(given["input_ids"]), "the prompt stays"


@every_kind
@pytest.mark.parametrize("policy", ["dkv", "freecache", "prefix-lm-tail"])
def test_a_prompt_may_end_with_an_image(kind, policy):
    given = {"input_ids": torch.tensor([[5, 70, *[IMAGE] * len(features(kind)[0])]])}
    image = {name: value[:1] for name, value in pixels().items()}
    tokens = 300 + torch.arange(len(features(kind)[0]))
    model = copy.deepcopy(small(kind))
    with torch.no_grad():
        model.get_input_embeddings().weight[tokens] = features(kind)[0]
    # From the right, so that the image's last token is fed with the positions after a gap.
    from_the_right = {"unmasking_rule": lambda drafts, row: drafts.candidates[-1:]}
    options = POLICIES[policy] | from_the_right | {"suppress_tokens": tokens.tolist()}
    ids = given["input_ids"].clone()
    ids[:, 2:] = tokens
    as_text, as_image = run(model, **options, input_ids=ids), run(small(kind), **given | image | options)
    assert as_image.sequences[:, ids.shape[1] :].equal(as_text.sequences[:, ids.shape[1] :])


@every_kind
@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - OF_THE_FIRST_TEST))
def test_a_row_decodes_alone_as_in_an_uneven_batch(kind, policy, left_padded):
    batch = run(small(kind), **inputs(kind, left_padded), **POLICIES[policy])
    longest = max(map(len, prompts(kind)))
    for row, prompt in enumerate(prompts(kind)):
        alone = run(small(kind), **inputs(kind, left_padded, row), **POLICIES[policy])
        text, in_batch = generated(alone, 0, len(prompt)), generated(batch, row, longest)
        assert in_batch == text + [0] * (len(in_batch) - len(text)), f"row {row} depends on its neighbours"
        if policy not in SYNCHRONOUS:
            assert batch.nfe[row] == alone.nfe[0]


@every_kind
def test_an_image_changes_the_answer(kind, left_padded):
    given = inputs(kind, left_padded, 1)
    seen = run(small(kind), **given).sequences
    blank = run(small(kind), **given | {"pixel_values": torch.zeros_like(given["pixel_values"])}).sequences
    assert seen.tolist() != blank.tolist()


# What a forward is fed


def fed(output):
    """Whether each forward was fed embeddings; no forward sees pixels."""
    for forward in output.forwards:
        assert (forward.get("input_ids") is None) != (forward.get("inputs_embeds") is None)
        assert not {"pixel_values", "image_sizes", "mm_encoder_outputs"} & forward.keys()
    return [forward.get("inputs_embeds") is not None for forward in output.forwards]


@every_kind
def test_embeddings_are_fed_only_to_forwards_that_reach_images(kind, left_padded):
    given = inputs(kind, left_padded, 1) | {"stop_at_eos": False}
    assert set(fed(run(small(kind), **given, window_policy="none"))) == {True}
    assert fed(run(small(kind), **given, prefix_lm=True)).count(True) == 1
    frozen = run(small(kind), **given)
    ends = (given["input_ids"][0] == IMAGE).nonzero().max() + 1
    firsts = [int(forward["position_ids"][0, 0]) for forward in frozen.forwards]
    assert fed(frozen) == [first < ends for first in firsts]
    assert fed(frozen)[-1] is False, "the prompt is frozen by then"


@every_kind
def test_a_prompt_without_images_is_fed_as_ids(kind, left_padded):
    assert set(fed(run(small(kind), **inputs(kind, left_padded, 0)))) == {False}


@every_kind
def test_images_are_encoded_once(kind, left_padded, monkeypatch):
    model, given, calls = small(kind), inputs(kind, left_padded), []
    encode = model.model.get_image_features

    @functools.wraps(encode)  # Transformers reads its signature
    def counted(*args, **kwargs):
        calls.append(args)
        return encode(*args, **kwargs)

    monkeypatch.setattr(model.model, "get_image_features", counted)
    run(model, **given, window_policy="none")
    assert len(calls) == 1


@every_kind
def test_a_written_image_token_is_a_token(kind, left_padded):
    """A model whose answers hold the image token, which stands for no image there."""
    given = inputs(kind, left_padded, 1) | {"sequence_bias": [[[IMAGE], 100.0]], "eos_token_id": 1}
    output = run(small(kind), **given, window_policy="none")
    length = given["input_ids"].shape[1]
    assert generated(output, 0, length) == OPTIONS["max_new_tokens"] * [IMAGE]
    last = output.forwards[-1]["inputs_embeds"][0]
    answer = small(kind).get_input_embeddings().weight[IMAGE]
    assert last[length].equal(answer) and not last[length - 2].equal(answer)


@every_kind
def test_several_answers_to_an_image(kind, left_padded):
    given = inputs(kind, left_padded) | {"do_sample": True, "temperature": 1.0, "num_return_sequences": 3}
    torch.manual_seed(0)
    sampled = run(small(kind), **given)
    assert len(sampled.sequences) == 9
    assert len({tuple(row) for row in sampled.sequences[3:6].tolist()}) > 1
    images = [0, 0, 0, 1, 2, 1, 2, 1, 2]
    repeated = {name: given[name].repeat_interleave(3, 0) for name in ("input_ids", "attention_mask")}
    repeated |= {name: given[name][images] for name in ("pixel_values", "image_sizes")}
    repeated |= {"batch_num_images": torch.tensor([1, 1, 1, 2, 2, 2]), "num_return_sequences": 1}
    torch.manual_seed(0)
    assert run(small(kind), **given | repeated).sequences.equal(sampled.sequences)


# The model by itself


@every_kind
def test_a_forward_puts_images_where_their_tokens_are(kind, left_padded, no_grad):
    given = inputs(kind, left_padded, 2)
    ids = given["input_ids"]
    embeds = small(kind).get_input_embeddings()(ids)
    embeds[ids == IMAGE] = torch.cat(features(kind)[1:])
    expected = small(kind)(inputs_embeds=embeds).logits
    assert small(kind)(**given).logits.equal(expected)
    assert not small(kind)(ids).logits.equal(expected)


@every_kind
def test_it_saves_under_the_original_names(kind, tmp_path, left_padded, no_grad):
    lavida.load(kind).save_pretrained(tmp_path)

    def names(path):
        with safe_open(path / "model.safetensors", "pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}

    assert names(tmp_path) == names(GOLDENS / f"model_{kind}")
    model, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    ids = torch.tensor([[5, 70, 200]])
    assert model.eval()(ids).logits.equal(lavida.load(kind)(ids).logits)
    assert model.config.image_token_id == IMAGE


@every_kind
@pytest.mark.parametrize(
    ("asked", "used"),
    [
        (None, ("sdpa", "sdpa")),
        ("eager", ("eager", "eager")),
        ({"": "sdpa", "vision_config": "eager"}, ("sdpa", "eager")),
    ],
)
def test_the_vision_part_has_the_attention_of_the_model(kind, asked, used):
    path = GOLDENS / f"model_{kind}"
    model = AutoModelForImageTextToText.from_pretrained(path, attn_implementation=asked)
    vision = model.model.vision_tower.vision_tower.vision_model.encoder.layers[0].self_attn.config
    assert (model.config._attn_implementation, vision._attn_implementation) == used
    model.set_attn_implementation("eager")
    assert vision._attn_implementation == "eager"


@every_kind
def test_it_trains(kind, left_padded):
    model, given = copy.deepcopy(small(kind)).train(), inputs(kind, left_padded, 1)
    labels = torch.full_like(given["input_ids"], -100)
    labels[0, -1] = 17
    output = model(**given, labels=labels)
    shift = int(kind == "dream")
    expected = cross_entropy(output.logits[0, -1 - shift][None].float(), torch.tensor([17]))
    torch.testing.assert_close(output.loss, expected)
    output.loss.backward()
    for part in (model.model.mm_projector, model.model.vision_tower):
        assert any(one.grad is not None and one.grad.abs().sum() > 0 for one in part.parameters())


# `prefix_lm` of text


TEXTS = [[5, 70, 200, 41, 333, 62], [77, 130, 402], [300, 21, 450, 9]]


@pytest.mark.parametrize("name", ["llada", "dream"])
@pytest.mark.parametrize("policy", ["none", "freecache", "prefix", "dual", "dkv"])
@pytest.mark.parametrize("tail", [0, 2])
def test_a_prompt_that_does_not_see_its_answer_decodes_alone_as_in_a_batch(tiny, decode, name, policy, tail):
    options = OPTIONS | dict(window_policy=policy, prefix_lm=True, prompt_tail=tail, eos_token_id=1)
    batch = decode(tiny(name), TEXTS, **options)
    for row, prompt in enumerate(TEXTS):
        alone = decode(tiny(name), [prompt], **options)
        assert generated(batch, row, 6) == generated(alone, 0, len(prompt))
    prefill, *others = batch.forwards
    assert prefill["input_ids"].shape[1] == 6 - tail
    assert all(forward["input_ids"].shape[1] <= tail + 11 for forward in others)
    assert len(others) == batch.nfe.max()


@pytest.mark.parametrize("name", ["llada", "dream"])
def test_states_of_the_prompt_are_those_of_the_prompt_alone(tiny, decode, name, no_grad):
    """The first token, computed from a mask of four dimensions: the prompt does not see the answer."""
    model, prompt, length = tiny(name), TEXTS[0], 5
    canvas = torch.tensor([prompt + length * [MASK]])
    end = canvas.shape[1]
    sees = torch.ones(1, 1, end, end, dtype=torch.bool)
    sees[..., : len(prompt), len(prompt) :] = False
    logits = model(canvas, attention_mask=sees).logits[0]
    logits = logits[len(prompt) - 1 : end - 1] if name == "dream" else logits[len(prompt) :]
    logits[:, MASK] = -torch.inf
    options = dict(max_new_tokens=length, block_length=length, steps=1, stop_at_eos=False, prefix_lm=True)
    for policy in ("none", "freecache", "dual"):
        output = decode(model, [prompt], window_policy=policy, **options)
        assert generated(output, 0, len(prompt)) == logits.argmax(-1).tolist()
        assert output.active_tokens.item() == end


def test_masks_in_the_tail_of_a_prompt_are_filled(tiny, decode):
    prompt = [*TEXTS[0], 12, MASK, 13, MASK]
    options = OPTIONS | dict(prefix_lm=True, prompt_tail=4, window_policy="none", stop_at_eos=False)
    for name in ("llada", "dream"):
        (row,) = decode(tiny(name), [prompt], **options).sequences.tolist()
        assert MASK not in row
        assert [row[6], row[8]] == [12, 13]


def test_a_guider_reads_a_prompt_that_is_computed_by_itself(tiny, decode, guider):
    options = OPTIONS | dict(prefix_lm=True, eos_token_id=1)
    guided = [decode(tiny("dream_trained"), [prompt], guider=guider(), **options) for prompt in TEXTS]
    batch = decode(tiny("dream_trained"), TEXTS, guider=guider(), **options)
    for row, (alone, prompt) in enumerate(zip(guided, TEXTS, strict=True)):
        assert generated(batch, row, 6) == generated(alone, 0, len(prompt))


# What is refused


IMAGES_OF_ONE = {name: value[:1] for name, value in pixels().items()}
REFUSALS = {
    "no-placeholder": (
        dict(input_ids=torch.tensor([[5, 6]]), **IMAGES_OF_ONE),
        "`input_ids` must hold an image token for each of the 14 embeddings of the images, got 0: prepare the prompts "
        "with the processor of the model.",
    ),
    "fewer-placeholders": (
        dict(input_ids=torch.tensor([[5, IMAGE, 6]]), **IMAGES_OF_ONE),
        "`input_ids` must hold an image token for each of the 14 embeddings of the images, got 1: prepare the prompts "
        "with the processor of the model.",
    ),
    "no-image": (
        dict(input_ids=torch.tensor([[5, IMAGE, IMAGE, 6]])),
        f"`pixel_values` must be given for the 2 image tokens {IMAGE} in `input_ids`: pass all that the processor "
        "returns.",
    ),
    "guider": (
        dict(input_ids=torch.tensor([14 * [IMAGE] + [6]]), **IMAGES_OF_ONE, guider="guider"),
        "`guider` reads text alone, got a prompt with images: drop one of them.",
    ),
    "no-tiles": (
        dict(input_ids=torch.tensor([[5]]), **IMAGES_OF_ONE | {"pixel_values": torch.zeros(1, 3, SIZE, SIZE)}),
        "`pixel_values` must have the shape (num_images, num_tiles, 3, 56, 56), got (1, 3, 56, 56): pass what the "
        "processor of the model returns.",
    ),
    "other-tiles": (
        dict(input_ids=torch.tensor([[5]]), **IMAGES_OF_ONE | {"pixel_values": torch.zeros(1, 3, 3, 384, 384)}),
        "`pixel_values` must have the shape (num_images, num_tiles, 3, 56, 56), got (1, 3, 3, 384, 384): pass what "
        "the processor of the model returns.",
    ),
    "missing-tiles": (
        dict(input_ids=torch.tensor([[5]]), **IMAGES_OF_ONE | {"pixel_values": torch.zeros(1, 2, 3, SIZE, SIZE)}),
        "`pixel_values` must hold the 3 tiles of an image of 56 x 100 pixels, got 2: pass what the processor of the "
        "model returns.",
    ),
    "no-sizes": (
        dict(input_ids=torch.tensor([[5]]), pixel_values=IMAGES_OF_ONE["pixel_values"]),
        "`image_sizes` must hold the height and width of each of the 1 images, got None: pass all that the processor "
        "returns.",
    ),
    "fewer-sizes": (
        dict(input_ids=torch.tensor([[5]]), **IMAGES_OF_ONE | {"image_sizes": torch.zeros(0, 2, dtype=torch.long)}),
        "`image_sizes` must hold the height and width of each of the 1 images, got (0, 2): pass all that the "
        "processor returns.",
    ),
    "other-counts": (
        dict(input_ids=torch.tensor([[5]]), **IMAGES_OF_ONE | {"batch_num_images": torch.tensor([2])}),
        "`batch_num_images` must add up to the 1 images, got [2]: pass all that the processor returns.",
    ),
}


@every_kind
@pytest.mark.parametrize("case", REFUSALS)
def test_what_makes_no_sense_is_refused(kind, case, tiny, left_padded):
    given, message = REFUSALS[case]
    given = given | ({"guider": ARGuider(tiny("guider"))} if "guider" in given else {})
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        small(kind).generate(**given, **OPTIONS)
    before = inputs(kind, left_padded, 1)
    assert len(small(kind).generate(**before, **OPTIONS)) == 1, "the model works as before"


def test_images_without_an_id_for_their_token_are_refused(left_padded):
    model = lavida.load("llada")
    assert AutoConfig.from_pretrained(GOLDENS / "model_llada").image_token_id is None, "the vocabulary is too small"
    model = copy.copy(small("llada"))
    model.config = copy.deepcopy(model.config)
    model.config.image_token_id = None
    with pytest.raises(ValueError, match="^`image_token_id` must be the id that stands for images in `input_ids`"):
        model.generate(**inputs("llada", left_padded, 1), **OPTIONS)


def test_where_images_stand_is_kept_through_a_batch_that_shrinks():
    is_image = torch.tensor([[0, 1, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    images = Images(torch.zeros(3, 4, 2), is_image)
    assert images.ends == [3, 0, 1]
    assert images.are_fed([3, 0, 0]) and not images.are_fed([3, 0, 1])
    images.batch_select_indices(torch.tensor([1, 2]))
    assert images.ends == [0, 1] and images.is_image.tolist() == is_image[1:].tolist()
    doubled = images.with_rows_without()
    assert doubled.ends == [0, 1, 0, 0] and doubled.embeds.shape == (4, 4, 2)


def test_text_models_take_no_images(tiny):
    with pytest.raises(ValueError, match="pixel_values"):
        tiny("llada").generate(torch.tensor([[5]]), **pixels(), **OPTIONS)
    assert isinstance(tiny("llada"), type(AutoModelForCausalLM.from_pretrained(GOLDENS.parents[1] / "model_llada")))
