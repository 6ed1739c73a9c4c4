"""Operations of torch: how many a layer, a forward and a step take, each of them a kernel launch on an accelerator.

Owns what counts as an operation and whose it is. Knows nothing of methods, or of how decoding works.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch.nn import Module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..cache import FreeCache
from ..compiling import cache_name, device_of


# A single kernel each on accelerators, though torch makes the first of several operations on a CPU.
WHOLE = {torch.ops.aten.rms_norm.default, torch.ops.aten.scaled_dot_product_attention.default}

_NO_KERNEL = {torch.ops.aten.detach_.default}  # part of `torch.tensor`; it says that it writes, but does not
_COMPOSITE = torch._C.DispatchKey.CompositeImplicitAutograd


class OperationCounter(TorchDispatchMode):
    """
    Counts the operations of torch while it is open, by name, but for views: those whose results lie in the memory of
    their inputs, unchanged. Operations that torch makes of others count as these, but for RMS norm and attention.
    """

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    @property
    def total(self) -> int:
        """Number of operations so far."""
        return self.counts.total()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        # Not `func.decompose`, which prefers decompositions in Python: there dropout copies in evaluation, too.
        if func not in WHOLE and torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), _COMPOSITE):
            with self:
                return func._op_dk(_COMPOSITE, *args, **kwargs)
        result = func(*args, **kwargs)
        memory = _memory(result)
        if func in _NO_KERNEL:
            return result
        if func._schema.is_mutable or not memory or not memory <= _memory((args, kwargs)):
            self.counts[func._schema.name] += 1
        return result


def _memory(tree) -> set[int]:
    """Where the tensors in a tree of arguments or results are stored."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)}


@contextmanager
def operations_within(counter: OperationCounter, modules: Iterable[Module]) -> Iterator[list[int]]:
    """Yield a list that gets the number of operations of each forward of the modules while `counter` is open."""
    counts: list[int] = []
    began: list[int] = []
    hooks = []
    for module in modules:
        hooks.append(module.register_forward_pre_hook(lambda *_: began.append(counter.total), prepend=True))
        hooks.append(module.register_forward_hook(lambda *_: counts.append(counter.total - began.pop())))
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def layer_operations(model, num_queries: int = 8) -> list[int]:
    """
    Operations of each layer of `model` in a step with a [`FreeCache`] that recomputes the last `num_queries` of 16
    positions.
    """
    names = model._no_split_modules
    layers = [module for module in model.modules() if type(module).__name__ in names]
    cache, device = FreeCache(), device_of(model)
    ids, positions = (torch.arange(16, device=device)[None] for _ in range(2))
    model(ids, position_ids=positions, **{cache_name(model): cache})
    cache.window(16 - num_queries, 16)
    with OperationCounter() as counter, operations_within(counter, layers) as counts:
        model(ids[:, -num_queries:], position_ids=positions[:, -num_queries:], **{cache_name(model): cache})
    return counts
