"""What a layer and a step launch: the counter, the numbers of the families, and results as before."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from torch import nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention
from transformers import AutoModelForCausalLM, DynamicCache, GPT2Config, LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoeAttention, Glm4MoeRMSNorm, Glm4MoeRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2RMSNorm, Qwen2RotaryEmbedding
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3RMSNorm, Qwen3RotaryEmbedding
from transformers.models.qwen3_moe.modeling_qwen3_moe import (
    Qwen3MoeAttention,
    Qwen3MoeRMSNorm,
    Qwen3MoeRotaryEmbedding,
)

from hf_flashdlm.bench.comparison import report_layers
from hf_flashdlm.bench.operations import OperationCounter, layer_operations, operations_within
from hf_flashdlm.compiling import cache_name
from hf_flashdlm.fused_layers import (
    FusedGlm4MoeAttention,
    FusedGlm4MoeRotaryEmbedding,
    FusedQwen2Attention,
    FusedQwen3Attention,
    FusedQwen3MoeAttention,
    FusedRMSNorm,
    FusedRotaryEmbedding,
    fuse_layers,
    fused_view,
)


def count(work):
    with torch.inference_mode(), OperationCounter() as counter:
        work()
    return dict(counter.counts)


STATES = torch.randn(2, 3, 4)


@pytest.mark.parametrize(
    ("work", "counts"),
    [
        (lambda: STATES.view(6, 4).transpose(0, 1)[1:], {}),
        (lambda: STATES.to(torch.float32).reshape(6, 4).contiguous(), {}),
        (lambda: nn.functional.dropout(STATES, 0.5, training=False), {}),
        (lambda: STATES.transpose(0, 1).reshape(6, 4), {"aten::clone": 1}),
        (lambda: STATES.to(torch.bfloat16), {"aten::_to_copy": 1}),
        (lambda: STATES.clone().mul_(2), {"aten::clone": 1, "aten::mul_": 1}),
        (lambda: nn.functional.linear(STATES, torch.ones(5, 4)), {"aten::ones": 1, "aten::mm": 1}),
        (lambda: STATES.sum().item(), {"aten::sum": 1, "aten::_local_scalar_dense": 1}),
        (lambda: rms_norm(STATES, (4,)), {"aten::rms_norm": 1}),
        (lambda: scaled_dot_product_attention(STATES, STATES, STATES), {"aten::scaled_dot_product_attention": 1}),
    ],
)
def test_all_but_views_count_and_rms_norm_and_attention_are_whole(work, counts):
    assert count(work) == counts


def test_operations_are_attributed_to_the_forwards_of_modules():
    first, second = nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU())
    with torch.inference_mode(), OperationCounter() as counter, operations_within(counter, [first, second]) as counts:
        second(first(STATES) + 1)
    assert (counter.total, counts) == (4, [1, 2])
    assert not first._forward_hooks and not second._forward_pre_hooks


LAYERS = {
    "model_llada": {21},
    "model_llada_gqa": {21},
    "model_dream": {20},
    "families/block_ar/model_fast_dllm_v2": {20},
    "families/block_ar/model_a2d_qwen3": {22},
    # However many experts are hit: router and experts are those of Transformers, with grouped matrix products.
    "families/llada2/model_llada_moe": {39},
    "families/llada2/model_llada2": {23, 61, 62},  # 62 with the router of Transformers 5.18
}


@pytest.fixture(scope="module")
def half(golden_path):
    return lambda name: AutoModelForCausalLM.from_pretrained(golden_path / name, dtype=torch.bfloat16).eval()


@pytest.fixture(scope="module")
def golden_path(request):
    return request.path.parent / "goldens"


@pytest.mark.parametrize(("name", "operations"), LAYERS.items())
def test_a_layer_in_bfloat16_takes_few_operations(half, name, operations):
    assert set(layer_operations(half(name))) <= operations


def test_a_mask_costs_no_more_than_repeating_the_keys_and_values(half):
    """Which the attention of Transformers does under a mask, if queries share them. No cache, no copies into it."""
    for name, operations in (("model_llada", 19), ("model_llada_gqa", 21), ("model_dream", 20)):
        model, mask = half(name), torch.ones(1, 8, dtype=torch.long)
        mask[0, 0] = 0
        layers = [module for module in model.modules() if type(module).__name__ in model._no_split_modules]
        with torch.inference_mode(), OperationCounter() as counter, operations_within(counter, layers) as counts:
            model(torch.arange(8)[None], attention_mask=mask, use_cache=False)
        assert set(counts) == {operations}, name


def test_the_bench_prints_the_operations_of_a_layer_and_reads_records_without_them():
    models = {"model": {"operations_of_layers": [20, 20]}, "guider": {"operations_of_layers": [177, 149, 177]}}
    assert report_layers(models) == ["operations of a layer: model 20, guider 149 or 177\n"]
    assert report_layers({"model": {"parameters": 1}}) == [""]


STEPS = {
    # Ten draft a token for each position and measure how sure it is, one gathers the numbers, one writes the canvas.
    "plain": (12, {"window_policy": "none"}),
    "freecache": (12, {"window_policy": "freecache"}),
    "freecache+window": (12, {"window_policy": "freecache", "right_window": 4, "block_length": 4}),
}


@pytest.mark.parametrize(("operations", "options"), STEPS.values(), ids=STEPS)
def test_a_step_takes_few_operations_outside_of_the_forward(tiny, operations, options):
    model, ids = tiny("llada"), torch.arange(1, 9)[None]

    def outside(steps):
        common = {"block_length": steps, "steps": steps, "stop_at_eos": False, "do_sample": False}
        with torch.inference_mode(), OperationCounter() as counter, operations_within(counter, [model]) as counts:
            model.generate(ids, max_new_tokens=steps, **(common | options))
        assert len(counts) == steps
        return counter.total - sum(counts)

    assert (outside(16) - outside(8)) / 8 == operations


PLAIN = {
    "model_dream": {
        FusedQwen2Attention: Qwen2Attention,
        FusedRMSNorm: Qwen2RMSNorm,
        FusedRotaryEmbedding: Qwen2RotaryEmbedding,
    },
    "families/block_ar/model_a2d_qwen3": {
        FusedQwen3Attention: Qwen3Attention,
        FusedRMSNorm: Qwen3RMSNorm,
        FusedRotaryEmbedding: Qwen3RotaryEmbedding,
    },
    "families/llada2/model_llada_moe": {
        FusedQwen3MoeAttention: Qwen3MoeAttention,
        FusedRMSNorm: Qwen3MoeRMSNorm,
        FusedRotaryEmbedding: Qwen3MoeRotaryEmbedding,
    },
    "families/llada2/model_llada2": {
        FusedGlm4MoeAttention: Glm4MoeAttention,
        FusedRMSNorm: Glm4MoeRMSNorm,
        FusedGlm4MoeRotaryEmbedding: Glm4MoeRotaryEmbedding,
    },
}


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", PLAIN)
def test_results_are_those_of_the_layers_of_transformers(golden_path, name, attention):
    ids = torch.randint(0, 200, (2, 24), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[0, :5] = 0

    def logits(dtype, plain):
        path = golden_path / name
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, attn_implementation=attention).eval()
        swapped = {type(module) for module in model.modules()} & PLAIN[name].keys()
        assert swapped == PLAIN[name].keys()
        for module in model.modules():
            module.__class__ = PLAIN[name].get(type(module), type(module)) if plain else type(module)
        with torch.inference_mode():
            return model(ids, attention_mask=mask, use_cache=False).logits[:, 5:].float()

    exact = logits(torch.float32, plain=True)
    torch.testing.assert_close(logits(torch.float32, plain=False), exact, atol=1e-4, rtol=1e-4)
    # In bfloat16 every layer rounds: what counts is that the results are about as near to the exact ones as before.
    fused, before = ((logits(torch.bfloat16, plain) - exact).square().mean() for plain in (False, True))
    assert fused < 2 * before


def test_fusing_keeps_weights_and_subclasses(tiny):
    model = tiny("dream")
    attention = model.model.layers[0].self_attn
    assert isinstance(attention, FusedQwen2Attention) and isinstance(attention, Qwen2Attention)
    before = {name: weight.data_ptr() for name, weight in model.state_dict().items()}
    fuse_layers(model)  # again: nothing is left to do
    assert {name: weight.data_ptr() for name, weight in model.state_dict().items()} == before


SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2)
SIZES |= dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=None, eos_token_id=None, pad_token_id=None)
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
GUIDERS = {
    "llama": (LlamaConfig, {}, 22),
    "qwen2": (Qwen2Config, {}, 22),
    "qwen2-sliding": (Qwen2Config, dict(use_sliding_window=True, sliding_window=5, max_window_layers=1), 22),
    "qwen3": (Qwen3Config, dict(head_dim=16), 24),
    "llama-dynamic": (LlamaConfig, dict(rope_parameters=DYNAMIC, max_position_embeddings=8), 22),
}


def autoregressive(name):
    config, options, _ = GUIDERS[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config(**SIZES | options)).eval()


def read(model, ids, pieces=(5, 3, 4)):
    """Logits of `ids`, read piece by piece with a cache."""
    cache, start, logits = DynamicCache(config=model.config), 0, []
    for length in pieces:
        with torch.inference_mode():
            output = model(ids[:, start : start + length], use_cache=True, **{cache_name(model): cache})
        logits.append(output.logits)
        start += length
    return torch.cat(logits, 1)


IDS = torch.randint(0, 64, (2, 12), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", GUIDERS)
def test_a_fused_view_of_a_guider_gives_its_logits_and_leaves_it_as_it_was(name):
    model = autoregressive(name)
    kinds, expected = [type(module) for module in model.modules()], read(model, IDS)
    for _ in range(2):  # frequencies that grew with the text are forgotten with the view
        view = fused_view(model)
        assert view is not model and type(view) is type(model)
        torch.testing.assert_close(read(view, IDS), expected, atol=1e-5, rtol=1e-5)
        assert [type(module) for module in model.modules()] == kinds
        assert torch.equal(read(model, IDS), expected)
    assert all(one is other for one, other in zip(view.parameters(), model.parameters(), strict=True))


@pytest.mark.parametrize("name", GUIDERS)
def test_a_layer_of_a_fused_view_takes_few_operations(name):
    model = autoregressive(name).to(torch.bfloat16)
    assert set(layer_operations(fused_view(model))) == {GUIDERS[name][2]}
    assert min(layer_operations(model)) >= 36


def test_hooks_of_a_model_are_called_through_its_fused_view():
    model, seen = autoregressive("llama"), []
    for module in (model, model.model.layers[1].self_attn, model.model.norm, model.lm_head):
        module.register_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    read(fused_view(model), IDS, pieces=(12,))
    assert seen == ["FusedLlamaAttention", "FusedRMSNorm", "Linear", "LlamaForCausalLM"]


def test_what_was_fused_or_is_not_known_is_its_own_view(tiny):
    offloaded, replaced, wrapped, quantised, cut = (autoregressive("llama") for _ in range(5))
    cpu_offload(offloaded, execution_device="cpu")
    replaced.model.layers[0].self_attn.__class__ = type("Mine", (LlamaAttention,), {})
    wrapped.forward = wrapped.forward
    quantised.lm_head.weight = type("Weight", (nn.Parameter,), {})(quantised.lm_head.weight)
    cut.model.layers[1] = nn.Identity()
    other = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=64))
    for model in (
        tiny("llada"),
        tiny("dream"),
        offloaded,
        replaced,
        wrapped,
        quantised,
        cut,
        other,
        SimpleNamespace(),
    ):
        assert fused_view(model) is model


def test_a_norm_whose_weight_was_kept_in_float32_answers_as_that_of_transformers():
    norm, plain = FusedRMSNorm(4), LlamaRMSNorm(4)
    states = STATES.to(torch.bfloat16)
    assert norm(states).dtype == plain(states).dtype == torch.float32
    assert torch.equal(norm(states), plain(states))
    torch.testing.assert_close(norm(STATES), plain(STATES))
