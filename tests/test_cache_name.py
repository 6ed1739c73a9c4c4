"""Models that call their cache `past_key_values`, as before Transformers 5.24, and models that call it `cache`."""

import warnings

import pytest
import torch
from transformers import Qwen2ForCausalLM

from hf_flashdlm import FreeCache
from hf_flashdlm.compiling import CACHE_NAME, cache_name
from hf_flashdlm.generation_mixin import diffusion_generate, make_bidirectional


PROMPT = torch.tensor([[5, 70, 33]])
OPTIONS = dict(max_new_tokens=8, block_length=4, stop_at_eos=False)


class Older(Qwen2ForCausalLM):
    """Code of a Hub repository that was written before Transformers 5.24."""

    def forward(
        self, input_ids=None, attention_mask=None, position_ids=None, past_key_values=None, logits_to_keep=0, **kwargs
    ):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **{CACHE_NAME: past_key_values},
            **kwargs,
        )


class Newer(Qwen2ForCausalLM):
    """Code of a Hub repository that was written for Transformers 5.24."""

    def forward(self, input_ids=None, attention_mask=None, position_ids=None, cache=None, logits_to_keep=0, **kwargs):
        return super().forward(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            logits_to_keep=logits_to_keep,
            **{CACHE_NAME: cache},
            **kwargs,
        )


def of_class(kind, model):
    """The weights of `model` under another class."""
    view = kind.__new__(kind)
    view.__dict__ = model.__dict__
    return view


@pytest.mark.parametrize(("kind", "name"), [(Older, "past_key_values"), (Newer, "cache")])
def test_a_diffusion_model_of_either_naming_decodes_with_its_cache(tiny, decode, kind, name):
    plain, model = tiny("dream_trained"), make_bidirectional(of_class(kind, tiny("dream_trained")))
    assert cache_name(model) == name
    fed = []
    hook = model.register_forward_pre_hook(lambda _, args, kwargs: fed.append(kwargs[name]), with_kwargs=True)
    try:
        ids = diffusion_generate(model, PROMPT, **OPTIONS)
    finally:
        hook.remove()
    assert ids.tolist() == plain.generate(PROMPT, **OPTIONS).tolist()
    assert fed and all(isinstance(cache, FreeCache) for cache in fed)


@pytest.mark.parametrize("kind", [Older, Newer])
def test_a_guider_of_either_naming_judges_with_its_cache(tiny, decode, kind):
    guider = tiny("guider")
    wanted = decode(tiny("dream_trained"), PROMPT.tolist(), guider=guider, **OPTIONS)
    output = decode(tiny("dream_trained"), PROMPT.tolist(), guider=of_class(kind, guider), **OPTIONS)
    assert output.sequences.tolist() == wanted.sequences.tolist()
    assert output.drafts_accepted.tolist() == wanted.drafts_accepted.tolist()


@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_llada_takes_a_cache_under_either_name_without_a_word(tiny, name):
    model, canvas = tiny("llada"), torch.tensor([[5, 70, 33, 9, 8, 7]])
    whole = model(canvas).logits
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        cache = FreeCache()
        model(canvas, use_cache=True, **{name: cache})
        cache.freeze(3)
        cache.window(3, 6)
        rest = model(canvas[:, 3:], position_ids=torch.arange(3, 6)[None], **{name: cache}).logits
    assert not said
    torch.testing.assert_close(rest, whole[:, 3:], atol=2e-4, rtol=1e-3)


def test_generate_takes_a_fresh_cache_under_the_newer_name_on_every_version(tiny, decode):
    for name in ("llada", "dream_trained"):
        cache = FreeCache()
        output = decode(tiny(name), PROMPT.tolist(), cache=cache, **OPTIONS)
        assert all(forward["cache"] is cache for forward in output.forwards)
