"""The machine under a measurement: its card, its ceilings, the cost of a forward, and the probes."""

import torch
from torch._dynamo.utils import counters
from transformers.generation.configuration_utils import CompileConfig

from hf_flashdlm.bench.machine import Ceilings, CostModel, ForwardShape, Probe, commit, describe_machine, peak_memory


def test_the_cost_model_counts_as_one_would_by_hand(tiny):
    model = tiny("llada_gqa")
    cost, config = CostModel(model), model.config
    forward = ForwardShape(rows=2, queries=3, keys=5, head_rows=1)
    linear = [layer for _, layer in model.named_modules() if isinstance(layer, torch.nn.Linear)]
    head = config.embedding_size * config.d_model
    norms = (2 * config.n_layers + 1) * config.d_model
    body = sum(layer.weight.numel() for layer in linear) - head + norms
    attention = 4 * config.n_layers * config.d_model * 3 * 5
    assert cost.flops(forward) == 2 * (2 * (body * 3 + head * 1) + attention)
    head_dim = config.d_model // config.n_heads
    assert cost.bytes(forward) == 4 * (body + head + 2 * 2 * 5 * config.n_layers * config.n_kv_heads * head_dim)
    flops_bound, bytes_bound = Ceilings(1.0, 1e30), Ceilings(1e30, 1.0)
    assert cost.floor_seconds([forward, forward], flops_bound) == 2 * cost.flops(forward)
    assert cost.floor_seconds([forward], bytes_bound) == cost.bytes(forward)
    kept = [ForwardShape(2, 3, keys, 1, cached=keys < 6) for keys in (4, 5, 6)]
    assert cost.kept_bytes(kept) == 4 * 2 * 2 * 5 * config.n_layers * config.n_kv_heads * head_dim


def test_a_probe_sees_each_forward_and_is_gone_afterwards(tiny):
    model = tiny("llada")
    prompt = torch.tensor([[5, 70, 200, 41]])
    with Probe(model) as probe:
        output = model.generate(
            prompt, max_new_tokens=4, block_length=2, steps=4, stop_at_eos=False, return_dict_in_generate=True
        )
    assert probe.forwards[0] == ForwardShape(rows=1, queries=8, keys=8, head_rows=2, cached=True)
    assert len(probe.forwards) == output.nfe == 4
    assert sum(forward.queries for forward in probe.forwards) == output.active_tokens
    assert probe.seconds > 0
    assert not model._forward_hooks and not model._forward_pre_hooks
    assert "get_compiled_call" not in vars(model)


def test_a_probe_does_not_become_part_of_what_is_compiled(tiny):
    model, counted = tiny("llada"), []
    prompt = torch.tensor([[5, 70, 200, 41]])
    options = {"max_new_tokens": 4, "block_length": 2, "steps": 4, "stop_at_eos": False, "window_policy": "dual"}
    torch.compiler.reset()
    counters.clear()
    for _ in range(3):
        with Probe(model) as probe:
            model.generate(prompt, **options, compile_config=CompileConfig(backend="eager", mode=None))
        counted.append(
            (len(probe.forwards), counters["stats"]["unique_graphs"], sum(counters["graph_break"].values()))
        )
    torch.compiler.reset()
    assert counted[0][0] == 4 and counted[0][1] > 0 and counted[0][2] == 0
    assert counted[1] == counted[2] == counted[0], "a probe is part of no graph"


def test_peak_memory_sees_a_tensor_that_is_gone():
    with peak_memory(torch.device("cpu")) as peak:
        torch.ones(2**24).sum()
    assert peak == [None] or peak[0] > 6e7


def test_ceilings_are_numbers_of_this_machine():
    ceilings = Ceilings.measure(torch.device("cpu"), torch.float32, 10**6)
    assert 1e8 < ceilings.flops_per_second < 1e15
    assert 1e8 < ceilings.bytes_per_second < 1e14


def test_of_two_measurements_the_higher_is_the_ceiling():
    assert Ceilings(1.0, 4.0).or_higher(Ceilings(3.0, 2.0)) == Ceilings(3.0, 4.0)


def test_the_card_names_what_tunes_allocator_and_threads(monkeypatch):
    monkeypatch.setattr("os.environ", {"GOMP_SPINCOUNT": "9", "HOME": "/home", "MALLOC_TRIM_THRESHOLD_": "7"})
    assert describe_machine(torch.device("cpu"))["environment"] == "GOMP_SPINCOUNT=9 MALLOC_TRIM_THRESHOLD_=7"
    monkeypatch.setattr("os.environ", {})
    assert describe_machine(torch.device("cpu"))["environment"] == "default"


def test_the_commit_is_known_in_a_repository():
    assert commit() is None or len(commit().removesuffix("+")) == 40
