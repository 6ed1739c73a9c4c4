"""Processes whose forwards are collective.

Owns `synced_gpus`: where the weights of a model are sharded, every forward gathers them from all processes, so that a
process whose rows are finished has to go on with empty forwards until all are. Knows nothing of how a step works.
"""

import torch
from torch import distributed
from torch.nn import Parameter
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled


def is_sharded(model) -> bool:
    """Whether forwards of `model` are collective: it, or a part of it, is sharded by FSDP 1 or 2, or by ZeRO-3."""
    if not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1:
        return False
    from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel  # takes long to import  # noqa: PLC0415

    kinds = (FSDPModule, FullyShardedDataParallel)
    return is_deepspeed_zero3_enabled() or any(isinstance(module, kinds) for module in model.modules())


def has_plain_weights(model) -> bool:
    """Whether all parameters are plain tensors: those of quantizers and of sharding do not support inference mode."""
    if distributed.is_available() and distributed.is_initialized():
        return False
    # Every call asks: not `parameters()`, which takes longer, because it leaves out those that were seen before.
    kinds = {type(parameter) for module in model.modules() for parameter in module._parameters.values()}
    return kinds <= {Parameter, type(None)}


class SynchronizedDenoiser:
    r"""
    A denoiser that tells all processes before each of its forwards that it is going to run.

    Args:
        denoiser ([`Scorer`]): Runs one forward of `model` a call.
        model (`PreTrainedModel`): The diffusion model.
    """

    def __init__(self, denoiser, model):
        self.denoiser, self.model = denoiser, model

    def __call__(self, canvas: torch.Tensor, *args):
        """Announce the forward and return what the denoiser does."""
        self._is_any_left(canvas.device, True)
        return self.denoiser(canvas, *args)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` (on the CPU) of the batch."""
        self.denoiser.batch_select_indices(indices)

    def finish(self, canvas: torch.Tensor) -> None:
        """Run forwards of one token, whose result is dropped, until the rows of every process are finished."""
        token = torch.zeros(1, 1, dtype=torch.long, device=canvas.device)
        while self._is_any_left(canvas.device, False):
            self.model(input_ids=token, position_ids=token, use_cache=False)

    @staticmethod
    def _is_any_left(device, is_left: bool) -> bool:
        """Whether any process has unfinished rows; waits for all of them."""
        flag = torch.tensor(float(is_left), device=device)
        distributed.all_reduce(flag)
        return bool(flag > 0)
