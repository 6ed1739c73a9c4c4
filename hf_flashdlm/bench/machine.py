"""The machine under a measurement: what it is, what it can do at most, and what a forward costs on it at least.

Owns the hardware card, the measured ceilings, the cost model (operations and bytes of a forward), and the probes that
count, time and weigh. Knows nothing of methods, or of how decoding works.
"""

import ctypes
import os
import platform
import re
import subprocess
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers

from ..version import __version__


PROCESS = Path("/proc/self")
TUNING = re.compile("MALLOC_|OMP_|GOMP_|KMP_")  # variables that allocators and thread pools read


@dataclass(frozen=True)
class ForwardShape:
    r"""
    One forward of a model.

    Args:
        rows (`int`): Rows of the batch.
        queries (`int`): Positions computed in each row.
        keys (`int`): Positions that a query attends to.
        head_rows (`int`): Positions of each row that the output head scored.
        cached (`bool`): Whether the keys and values are kept.
    """

    rows: int
    queries: int
    keys: int
    head_rows: int
    cached: bool = False


@dataclass(frozen=True)
class Ceilings:
    r"""
    Peak throughput of this machine, each measured in a tight loop.

    Args:
        flops_per_second (`float`): Throughput of the product of two square matrices, in the dtype of the weights.
        bytes_per_second (`float`): Bandwidth of reading a buffer as large as the weights, which may fit a cache.
    """

    flops_per_second: float
    bytes_per_second: float

    @classmethod
    def measure(cls, device: torch.device, dtype: torch.dtype, weight_bytes: int) -> "Ceilings":
        """Measure both on `device`; takes a second or so."""
        size = 1024 if device.type == "cpu" else 8192
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        product_seconds = _best_seconds(lambda: left @ right, device)
        columns = 4096  # of float32; a matrix-vector product is limited by memory bandwidth
        matrix = torch.randn(max(min(weight_bytes, 2**30) // (4 * columns), 16), columns, device=device)
        vector = torch.randn(columns, device=device)
        read_seconds = _best_seconds(lambda: matrix @ vector, device)
        return cls(2 * size**3 / product_seconds, matrix.numel() * 4 / read_seconds)

    def or_higher(self, other: "Ceilings") -> "Ceilings":
        """The higher of two measurements of each."""
        return Ceilings(
            max(self.flops_per_second, other.flops_per_second), max(self.bytes_per_second, other.bytes_per_second)
        )


def _best_seconds(work, device: torch.device, limit_seconds: float = 0.5) -> float:
    """The shortest time of `work`, tried for `limit_seconds` and at least five times."""
    best, began, tries = float("inf"), time.perf_counter(), 0
    while tries < 5 or time.perf_counter() - began < limit_seconds:
        synchronize(device)
        started = time.perf_counter()
        work()
        synchronize(device)
        best, tries = min(best, time.perf_counter() - started), tries + 1
    return best


class CostModel:
    r"""
    The minimum cost of a forward of `model`: operations of its linear layers, of attention and of the head rows, and
    bytes of the weights and of the keys and values read. The longer of the two times at the ceilings is the floor.
    """

    def __init__(self, model):
        config = model.config.get_text_config()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        outside = embedding.numel() + (0 if head is embedding else head.numel())
        self.head_parameters = head.numel()
        self.body_parameters = sum(weight.numel() for weight in model.parameters()) - outside
        self.element_bytes = head.element_size()
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.attention_flops = 4 * config.num_hidden_layers * config.num_attention_heads * head_dim
        self.key_value_numbers = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim

    @property
    def weight_bytes(self) -> int:
        """Bytes of weights that every forward reads."""
        return self.element_bytes * (self.body_parameters + self.head_parameters)

    def flops(self, forward: ForwardShape) -> int:
        """Operations of a forward; additions and multiplications are counted separately."""
        linear = self.body_parameters * forward.queries + self.head_parameters * forward.head_rows
        return forward.rows * (2 * linear + self.attention_flops * forward.queries * forward.keys)

    def key_value_bytes(self, forward: ForwardShape) -> int:
        """Bytes of the keys and values that the queries of a forward see."""
        return self.element_bytes * self.key_value_numbers * forward.rows * forward.keys

    def kept_bytes(self, forwards: list[ForwardShape]) -> int:
        """The most bytes that a cache held during `forwards`."""
        return max((self.key_value_bytes(forward) for forward in forwards if forward.cached), default=0)

    def bytes(self, forward: ForwardShape) -> int:
        """Bytes that a forward reads."""
        return self.weight_bytes + self.key_value_bytes(forward)

    def floor_seconds(self, forwards: list[ForwardShape], ceilings: Ceilings) -> float:
        """The least time that `forwards` can take together."""
        return sum(
            max(self.flops(forward) / ceilings.flops_per_second, self.bytes(forward) / ceilings.bytes_per_second)
            for forward in forwards
        )


class Probe:
    """Counts and times the forwards of `model` while it is open, without making the CPU wait for the device."""

    def __init__(self, model):
        self.model, self.forwards = model, []
        self._begins, self._ends, self._hooks = [], [], []

    def __enter__(self) -> "Probe":
        self.model.get_compiled_call = self._compiled_call
        self._hang()
        return self

    def __exit__(self, *_) -> None:
        self._unhang()
        del self.model.get_compiled_call

    def _hang(self) -> None:
        self._hooks = [
            self.model.register_forward_pre_hook(self._begin, with_kwargs=True, prepend=True),
            self.model.register_forward_hook(self._end),
        ]

    def _unhang(self) -> None:
        for hook in self._hooks:
            hook.remove()

    def _compiled_call(self, compile_config):
        """Transformers' compiled call, without hooks on the model, which would be compiled anew at every call."""
        call = type(self.model).get_compiled_call(self.model, compile_config)

        def timed(**inputs):
            self._unhang()
            try:
                self._begin(self.model, (), inputs)
                output = call(**inputs)
                self._end()
            finally:
                self._hang()
            return output

        return timed

    def _end(self, *_) -> None:
        self._ends.append(self._mark())

    def _begin(self, _, args, kwargs) -> None:
        ids = kwargs["input_ids"] if kwargs.get("input_ids") is not None else args[0]
        cache, kept = kwargs.get("cache", kwargs.get("past_key_values")), kwargs.get("logits_to_keep", 0)
        rows, queries = ids.shape
        head_rows = len(kept) if isinstance(kept, torch.Tensor) else kept or queries
        keys = queries if cache is None else cache.get_mask_sizes(queries, 0)[0]
        self.forwards.append(ForwardShape(rows, queries, keys, head_rows, cache is not None))
        self._begins.append(self._mark())

    def _mark(self):
        if self.model.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.model.device))
        return event

    @property
    def seconds(self) -> float:
        """Time spent in the forwards; the device must have finished."""
        pairs = zip(self._begins, self._ends, strict=True)
        if self.model.device.type == "cuda":
            return sum(begin.elapsed_time(end) for begin, end in pairs) / 1000
        return sum(end - begin for begin, end in pairs)


@contextmanager
def peak_memory(device: torch.device):
    """Yield a list that afterwards holds the peak memory minus the memory in use before, in bytes, or `None`."""
    peak: list[int | None] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        yield peak
        peak.append(torch.cuda.max_memory_allocated(device) - before)
    elif device.type == "cpu" and os.access(PROCESS / "clear_refs", os.W_OK):
        # Freed memory goes back to the system first, so that a method that takes it again is charged for it.
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)
        (PROCESS / "clear_refs").write_text("5")  # the peak starts anew from here
        before = _process_bytes("VmRSS")
        yield peak
        peak.append(max(_process_bytes("VmHWM") - before, 0))
    else:
        yield peak
        peak.append(None)


def _process_bytes(field: str) -> int:
    lines = (PROCESS / "status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))


def synchronize(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def describe_machine(device: torch.device) -> dict:
    """The machine in words and numbers."""
    tuning = [f"{name}={value}" for name, value in sorted(os.environ.items()) if TUNING.match(name)]
    card = {
        "device": device.type,
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "environment": " ".join(tuning) or "default",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        card |= {"accelerator": properties.name, "accelerator_memory_bytes": properties.total_memory}
    return card


def _processor() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.processor())


def versions() -> dict[str, str]:
    """Versions of what a measurement depends on."""
    return {
        "hf_flashdlm": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def commit() -> str | None:
    """The commit of this package, with a `+` if its files differ; `None` if it is not run from a repository."""
    here = Path(__file__).parents[1]

    def git(*arguments: str) -> str | None:
        try:
            run = subprocess.run(["git", "-C", here, *arguments], capture_output=True, text=True)
        except OSError:
            return None
        return run.stdout.strip() if run.returncode == 0 else None

    if git("ls-files", "--error-unmatch", "__init__.py") is None:
        return None
    return f"{git('rev-parse', 'HEAD')}{'+' if git('status', '--porcelain', '--', '.') else ''}"
