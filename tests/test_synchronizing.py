"""Processes whose forwards are collective: they run as many of them, however different their texts are."""

import datetime
import os
import socket
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from hf_flashdlm import LLaDAModelLM
from hf_flashdlm.synchronizing import SynchronizedDenoiser


MODEL = Path(__file__).parent / "goldens" / "model_llada"
PROMPTS = [[[5, 70, 200, 41]], [[7, 9], [77, 130]]]
LENGTHS = [2, 12]


def options(rank):
    return dict(max_new_tokens=LENGTHS[rank], block_length=1, stop_at_eos=False)


def work(rank, path, queue):
    """Decode another prompt in each process, with a collective call in each forward, as sharded weights have."""
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=60)
    distributed.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=2, timeout=timeout)
    model, forwards = LLaDAModelLM.from_pretrained(MODEL).eval(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(distributed.all_reduce(torch.ones(1))))
    output = model.generate(
        torch.tensor(PROMPTS[rank]), synced_gpus=True, return_dict_in_generate=True, **options(rank)
    )
    distributed.barrier()
    sharded, mesh = LLaDAModelLM.from_pretrained(MODEL).eval(), init_device_mesh("cpu", (2,))
    for module in (*sharded.model.transformer.blocks, sharded):
        fully_shard(module, mesh=mesh)
    same = sharded.generate(torch.tensor(PROMPTS[rank]), **options(rank)).equal(output.sequences)
    distributed.barrier()
    queue.put((rank, len(forwards), output.nfe.tolist(), output.sequences.tolist(), same))
    distributed.destroy_process_group()


def test_a_process_whose_rows_are_finished_goes_on_until_all_are(tmp_path, tiny):
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(work, (tmp_path / "store", queue), 2, start_method="spawn")
    for rank, forwards, nfe, sequences, is_same_sharded in sorted(queue.get() for _ in range(2)):
        assert forwards == 12, "as many as the longest decode has"
        assert sequences == tiny("llada").generate(torch.tensor(PROMPTS[rank]), **options(rank)).tolist()
        assert nfe == [LENGTHS[rank]] * len(PROMPTS[rank]), "empty forwards are not counted"
        assert is_same_sharded, "FSDP2 gathers the weights of a layer in each forward, in all processes at once"


def work_with_deepspeed(rank, port, queue):
    """Decode with weights of which each of two processes holds a part."""
    import deepspeed
    from transformers.integrations import HfDeepSpeedConfig

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    deepspeed.init_distributed(dist_backend="gloo")
    settings = {"train_micro_batch_size_per_gpu": 1, "train_batch_size": 2, "zero_optimization": {"stage": 3}}
    keeps = HfDeepSpeedConfig(settings)  # Transformers forgets it with the object
    engine = deepspeed.initialize(model=LLaDAModelLM.from_pretrained(MODEL), config_params=settings)[0]
    model, forwards = engine.module.eval(), []
    model.register_forward_pre_hook(lambda *_: forwards.append(1))
    local = max(parameter.numel() for parameter in model.parameters())
    sequences = model.generate(torch.tensor(PROMPTS[rank]), **options(rank))
    queue.put((rank, local, len(forwards), sequences.tolist()))
    del keeps


@pytest.mark.slow  # the first run compiles
@pytest.mark.skipif(find_spec("deepspeed") is None, reason="needs `pip install deepspeed`")
def test_weights_that_zero_3_shards_decode_the_same(tiny):
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    queue = multiprocessing.get_context("spawn").SimpleQueue()
    multiprocessing.start_processes(work_with_deepspeed, (port, queue), 2, start_method="spawn")
    for rank, local, forwards, sequences in sorted(queue.get() for _ in range(2)):
        assert local == 0 and forwards == 12
        assert sequences == tiny("llada").generate(torch.tensor(PROMPTS[rank]), **options(rank)).tolist()


def test_every_forward_is_announced_and_the_end_is_waited_for(monkeypatch):
    others, told, forwards = [2.0, 1.0, 1.0, 0.0], [], []

    def all_reduce(flag):
        told.append(float(flag))
        flag += others.pop(0)

    monkeypatch.setattr(distributed, "all_reduce", all_reduce)
    denoiser = SynchronizedDenoiser(lambda canvas, *args: args, lambda **inputs: forwards.append(inputs))
    canvas = torch.zeros(2, 5, dtype=torch.long)
    assert denoiser(canvas, "windows") == ("windows",)
    denoiser.finish(canvas)
    assert told == [1, 0, 0, 0] and len(forwards) == 2
    assert all(inputs["input_ids"].shape == (1, 1) for inputs in forwards)


def test_a_sharded_guider_is_refused(tiny, monkeypatch):
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr("hf_flashdlm.generation_mixin.is_sharded", lambda model: True)
    with pytest.raises(ValueError) as error:
        tiny("llada").generate(torch.tensor([[5, 6]]), guider=tiny("guider"), max_new_tokens=3, synced_gpus=True)
    assert str(error.value) == (
        "`guider` must be whole on every process, got one that is sharded: how often it is asked depends on the text "
        "of each."
    )
