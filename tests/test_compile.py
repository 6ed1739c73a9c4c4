"""Compiled forwards: equal tokens, few shapes, and a warning where a model cannot be compiled."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import Qwen2ForCausalLM
from transformers.generation.configuration_utils import CompileConfig

from hf_flashdlm import ARGuider, diffusion_generate, make_bidirectional
from hf_flashdlm.compiling import CompiledForward


EAGER = CompileConfig(backend="eager", mode=None)
INDUCTOR = CompileConfig(mode=None)
PROMPTS = [[5, 70, 200, 41, 333, 62, 90, 8], [77, 130, 402, 256], [300, 21, 450]]
NAMES = ["llada", "dream"]
SETTINGS = [
    {"window_policy": "none", "steps": 24},
    {"window_policy": "none", "grow_canvas": True},
    {"window_policy": "prefix", "confidence_threshold": 0.5},
    {"window_policy": "dual", "confidence_threshold": 0.5},
    {"window_policy": "dkv", "steps": 24},
    {"confidence_threshold": 0.5},
    {"right_window": 10, "left_margin": 3, "confidence_threshold": 0.5},
    {"right_window": 10, "attend_stale": True, "refresh_blocks": 2},
    {"grow_canvas": True},
    {"guidance_scale": 1.5},
]


# To compile takes seconds: each setting in turn with a model of one name in every run, the rest in `make test-slow`.
OFTEN = (0, 3, 5, 7, 9)
MODELS = [
    pytest.param(name, setting, marks=[] if index in OFTEN and index % 2 != other else [pytest.mark.slow])
    for index, setting in enumerate(SETTINGS)
    for other, name in enumerate(NAMES)
]
CAPTURED = [
    pytest.param(one, marks=[] if index in (0, 4) else [pytest.mark.slow]) for index, one in enumerate(SETTINGS[:7])
]


@pytest.fixture(autouse=True)
def fresh():
    """Reset what is compiled and counted."""
    torch.compiler.reset()
    counters.clear()
    yield
    torch.compiler.reset()


# Modules that torch imports for compiled code warn of deprecated parts of torch.
importing = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def num_graphs():
    return counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(("name", "setting"), MODELS, ids=str)
def test_tokens_and_counts_are_those_of_eager_forwards(tiny, decode, name, setting):
    options = {"max_new_tokens": 24, "block_length": 8} | setting
    eager = decode(tiny(name), PROMPTS[1:], **options)
    compiled = decode(tiny(name), PROMPTS[1:], **options, compile_config=EAGER)
    assert num_graphs() > 0
    for field in ("sequences", "nfe", "active_tokens"):
        assert compiled[field].equal(eager[field])


def test_block_causal_forwards_are_compiled_once(load, decode):
    options = {"max_new_tokens": 16, "mask_token_id": 311, "eos_token_id": 1, "confidence_threshold": 0.02}
    model = load("families/block_ar/model_sdar")
    eager = decode(model, [[5, 70, 200]], **options)
    compiled = decode(model, [[5, 70, 200]], **options, compile_config=EAGER)
    warm = num_graphs()
    decode(model, [[9, 8, 7, 6]], **options, compile_config=EAGER)
    assert 0 < warm == num_graphs()
    assert compiled.sequences.equal(eager.sequences) and compiled.nfe.equal(eager.nfe)


def test_compiled_forwards_run_in_the_mode_of_transformers(tiny, monkeypatch):
    modes = []
    run = CompiledForward._compiled
    monkeypatch.setattr(
        CompiledForward, "_compiled", lambda *args: modes.append(torch.is_inference_mode_enabled()) or run(*args)
    )
    tiny("llada").generate(torch.tensor(PROMPTS[:1]), max_new_tokens=8, block_length=4, compile_config=EAGER)
    assert modes and not any(modes)


def test_a_guider_is_compiled_too(tiny, decode):
    options = {"max_new_tokens": 8, "block_length": 8}
    forwards = []

    class Kept(ARGuider):
        def reset(self, *args, **kwargs):
            super().reset(*args, **kwargs)
            forwards.append(self.reader.forward)

    guide = Kept(tiny("guider"), accept="topk", top_k=5)
    eager = decode(tiny("dream_trained"), PROMPTS[2:], guider=guide, **options)
    counters.clear()
    compiled = decode(tiny("dream_trained"), PROMPTS[2:], guider=guide, **options, compile_config=EAGER)
    assert forwards[1].compile_config.dynamic and tiny("guider")._last_compile_config.dynamic
    assert num_graphs() > 1
    assert compiled.sequences.equal(eager.sequences) and compiled.accepted_lengths == eager.accepted_lengths


@pytest.mark.parametrize(
    "setting", [SETTINGS[0], SETTINGS[5], pytest.param(SETTINGS[6], marks=pytest.mark.slow)], ids=str
)
def test_nothing_is_compiled_again_after_the_first_call(tiny, setting):
    model = tiny("dream_trained")
    first, *others = torch.randint(3, 400, (5, 1, 12), generator=torch.Generator().manual_seed(0))
    options = {"max_new_tokens": 48, "block_length": 16, "stop_at_eos": False, "compile_config": EAGER}
    model.generate(first, **options | setting)
    warm = num_graphs()
    assert warm > 0
    for prompt in others:
        model.generate(prompt, **options | setting)
    assert num_graphs() == warm


POLICIES = {
    "none": {"window_policy": "none"},
    "prefix": {"window_policy": "prefix"},
    "dual": {"window_policy": "dual"},
    "dkv": {"window_policy": "dkv"},
    "freecache": {"window_policy": "freecache"},
    "fast": {"method": "flashdlm-fast"},
    "window": {"right_window": 10},
}
BIDIRECTIONAL = ["model_llada", "model_dream", "families/block_ar/model_a2d_qwen3", "families/llada2/model_llada_moe"]
SDAR, FAST_DLLM_V2 = "families/block_ar/model_sdar", "families/block_ar/model_fast_dllm_v2"
BLOCK_CAUSAL = {SDAR: 8, FAST_DLLM_V2: 32, "families/llada2/model_llada2": 32}  # the length of their blocks here
ALLOWED = [(name, 8, policy) for name in BIDIRECTIONAL for policy in POLICIES]
ALLOWED += [(*one, policy) for one in BLOCK_CAUSAL.items() for policy in ("none", "freecache", "fast")]
ALLOWED += [(FAST_DLLM_V2, 8, "dual"), (SDAR, 8, "window")]


@importing
@pytest.mark.slow
@pytest.mark.parametrize(("name", "block_length", "policy"), ALLOWED)
def test_every_family_is_compiled_once_under_every_policy(load, name, block_length, policy):
    # A token per step, so that the first call visits every width.
    options = {"max_new_tokens": 32, "steps_per_block": block_length, "stop_at_eos": False} | POLICIES[policy]
    options |= {"block_length": block_length, "return_dict_in_generate": True}
    model = load(name)
    if model.config.mask_token_id is None:
        options["mask_token_id"] = 311
    prompts = torch.randint(5, 200, (3, 1, 12), generator=torch.Generator().manual_seed(0))
    eager = [model.generate(prompt, **options) for prompt in prompts]
    compiled = [model.generate(prompts[0], **options, compile_config=INDUCTOR)]
    warm = num_graphs()
    compiled += [model.generate(prompt, **options, compile_config=INDUCTOR) for prompt in prompts[1:]]
    assert 0 < warm == num_graphs()
    for one, other in zip(compiled, eager, strict=True):
        assert one.sequences.equal(other.sequences) and one.nfe.equal(other.nfe)


def test_the_width_of_a_compiled_window_is_one_of_few(tiny, decode):
    options = {"max_new_tokens": 40, "block_length": 8, "right_window": 12, "steps": 40, "stop_at_eos": False}
    eager = decode(tiny("dream"), PROMPTS[:1], **options)
    widths = {forward["input_ids"].shape[1] for forward in eager.forwards[1:]}
    compiled = decode(tiny("dream"), PROMPTS[:1], **options, compile_config=EAGER)
    static = {forward["input_ids"].shape[1] for forward in compiled.forwards[1:]}
    assert len(widths) > 2 and static <= {16, 32}


@importing
@pytest.mark.parametrize("setting", CAPTURED, ids=str)
def test_a_captured_graph_would_serve_all_steps(tiny, decode, setting):
    graphs = []

    def keep(graph, inputs, mode=None):
        graphs.append([node.meta for node in graph.graph.nodes if node.op == "placeholder"])
        return graph.forward

    options = {"max_new_tokens": 48, "block_length": 8} | setting
    eager = decode(tiny("llada"), PROMPTS[1:], **options)
    config = CompileConfig(backend=keep, mode="reduce-overhead")
    compiled = decode(tiny("llada"), PROMPTS[1:], **options, compile_config=config)
    assert compiled.sequences.equal(eager.sequences)
    assert graphs
    for inputs in graphs:
        values = [meta["example_value"] for meta in inputs]
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        layouts = {str(size) for tensor in tensors for size in (*tensor.shape, *tensor.stride())}
        numbers = {str(value) for value in values if not isinstance(value, torch.Tensor)}
        assert numbers <= layouts, "a number that changes from step to step needs a captured graph for each value"
        buffers = [meta["tensor_dict"] for meta, value in zip(inputs, values, strict=True) if is_buffer(value)]
        assert all(buffer.get("_dynamo_static_input_type") == "unguarded" for buffer in buffers)
        cached = setting.get("window_policy") != "none"
        assert len(buffers) == (2 * tiny("llada").config.n_layers if cached else 0)


def is_buffer(value):
    return isinstance(value, torch.Tensor) and value.dim() == 4 and value.dtype.is_floating_point


@importing
@pytest.mark.parametrize("mode", [None, "reduce-overhead"])
def test_what_a_replay_would_write_over_is_copied(mode):
    logits, embedding = torch.arange(6.0).view(1, 2, 3), torch.nn.Identity()
    model = SimpleNamespace(
        forward=lambda cache=None: None,
        get_input_embeddings=lambda: embedding,
        get_compiled_call=lambda config: lambda **inputs: SimpleNamespace(logits=logits),
    )
    returned = CompiledForward(model, CompileConfig(mode=mode))(input_ids=None).logits
    assert returned.equal(logits) and (returned is logits) == (mode is None)


def test_a_model_that_cannot_be_compiled_runs_eagerly_and_says_so(tiny, decode, monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no compiler here")

    said = []
    monkeypatch.setattr("hf_flashdlm.compiling.logger.warning", said.append)
    config = CompileConfig(backend=fail, mode=None)
    options = {"max_new_tokens": 8, "block_length": 8, "steps": 8}
    compiled = decode(tiny("dream"), PROMPTS[:1], **options, compile_config=config)
    assert len(said) == 1
    assert said[0].startswith("`compile_config` has no effect: the forward of DreamModel could not be compiled and")
    assert compiled.sequences.equal(decode(tiny("dream"), PROMPTS[:1], **options).sequences)
    # No later call tries again with these settings, but with others it does.
    decode(tiny("dream"), PROMPTS[:1], **options, compile_config=config)
    assert len(said) == 1
    decode(tiny("dream"), PROMPTS[:1], **options, compile_config=EAGER)
    assert len(said) == 1 and num_graphs() > 0


def test_a_model_of_another_class_that_cannot_be_compiled_is_tried_once(monkeypatch):
    def fail(graph, inputs):
        raise RuntimeError("no compiler here")

    said = []
    monkeypatch.setattr("hf_flashdlm.compiling.logger.warning", said.append)
    model = Qwen2ForCausalLM.from_pretrained(Path(__file__).parent / "goldens" / "model_dream").eval()
    model.config.logits_shift, model.config.mask_token_id = 1, 3
    make_bidirectional(model)
    for _ in range(2):
        diffusion_generate(
            model,
            torch.tensor(PROMPTS[:1]),
            max_new_tokens=8,
            compile_config=CompileConfig(backend=fail, mode=None),
        )
    assert len(said) == 1
