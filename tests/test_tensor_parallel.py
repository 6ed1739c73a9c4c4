"""Tensor parallelism: processes that hold a share of the heads each decode the tokens of the whole model."""

import datetime
import os
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig
from transformers.utils import logging

from hf_flashdlm import FreeCache
from hf_flashdlm.block_causal import attention_block_length


GOLDENS = Path(__file__).parent / "goldens"
IDS = torch.tensor([[5, 70, 200, 41], [7, 9, 77, 130]])


def load(name, **kwargs):
    return AutoModelForCausalLM.from_pretrained(GOLDENS / name, **kwargs).eval()


def decode(model, guiders):
    """The heads in the cache, and the tokens of several calls with a batch, one for each guider that fits."""
    calls = {"cache": {"cache": FreeCache()}, "no cache": {"window_policy": "none"}}
    if attention_block_length(model) is None:
        calls["window"] = {"right_window": 4, "block_length": 4, "confidence_threshold": 0.2}
    for place, guider in enumerate(guiders):
        if guider.config.vocab_size == model.config.vocab_size:
            calls[f"guider {place}"] = {"guider": guider}
    common = {"max_new_tokens": 12, "stop_at_eos": False, "attention_mask": torch.ones_like(IDS)}
    if getattr(model.config, "mask_token_id", None) is None:
        common["mask_token_id"] = model.config.vocab_size - 1
    tokens = {label: model.generate(IDS, **common, **options).tolist() for label, options in calls.items()}
    return calls["cache"]["cache"].layers[0].keys.shape[1], tokens


def work(rank, store, queue, names, guider):
    """Decode on one of two processes, with a guider that is whole on both, and with a shared one."""
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}  # as torchrun sets them
    timeout = datetime.timedelta(seconds=120)
    distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=timeout)
    shared = {"distributed_config": DistributedConfig(tp_plan="auto")}
    guiders = [load(guider), load(guider, **shared)] if guider else []
    queue.put((rank, [decode(load(name, **shared), guiders) for name in names]))
    distributed.barrier()
    distributed.destroy_process_group()


def compare(store, names, guider=None):
    """For each model and process whether the tokens are equal, the heads in its cache, and those of a whole one."""
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(work, (store, queue, names, guider), 2, start_method="spawn")
    ranks = [decodes for _, decodes in sorted(queue.get() for _ in range(2))]
    whole = [decode(load(name), 2 * [load(guider)] if guider else []) for name in names]
    return {
        name: [(tokens == expected, heads, all_heads) for heads, tokens in decodes]
        for name, (all_heads, expected), decodes in zip(names, whole, zip(*ranks, strict=True), strict=True)
    }


@pytest.mark.slow
def test_two_processes_decode_the_tokens_of_one_and_each_caches_half_of_the_heads(tmp_path):
    names = ["model_llada", "model_dream", "families/llada2/model_llada2"]
    assert compare(tmp_path / "store", names, "model_guider") == {
        names[0]: 2 * [(True, 2, 4)],
        names[1]: 2 * [(True, 1, 2)],
        names[2]: 2 * [(True, 2, 2)],  # whose attention is not shared
    }
