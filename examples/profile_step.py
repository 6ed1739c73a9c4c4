"""The time of a decode, part by part. `outside%` of `flashdlm bench` is all parts but the two forwards.

    python examples/profile_step.py --json FILE
    python examples/profile_step.py --batch-size 16 --problems 32 --passes 1 --json FILE
    python examples/profile_step.py --config llada-50m --new-tokens 64 --passes 1 --json FILE

The embedded pair decodes held-out problems; another shape gets random weights, random prompts and the shape of the
embedded guider. Each part is counted without the parts that it calls, those of both models together where they have
one name; the fastest of several passes counts. The clock itself adds about a microsecond to each call of a part.
"""

import argparse
import shlex
import sys
import time
from collections import Counter
from functools import wraps
from pathlib import Path

import torch

from hf_flashdlm import denoising_loop, generation_mixin
from hf_flashdlm.bench.comparison import RANDOM_PROMPT_LENGTH, make_workload
from hf_flashdlm.bench.decoding import Models
from hf_flashdlm.bench.machine import commit, describe_machine, versions
from hf_flashdlm.bench.models import load_models
from hf_flashdlm.bench.recipes import recipes
from hf_flashdlm.bench.report import format_table, write_json
from hf_flashdlm.bench.shapes import SHAPES
from hf_flashdlm.canvas_processors import CanvasProcessors
from hf_flashdlm.cli.bench import prepare
from hf_flashdlm.denoiser import Denoiser
from hf_flashdlm.stopping import RowEnds
from hf_flashdlm.unmasking import Drafter


METHODS = ("plain-eos", "freecache+window+threshold", "guided+window+intersection", "fast+guided+intersection")


class Clock:
    """Splits the time between the functions that it watches."""

    def __init__(self):
        self.seconds, self.parts, self.last = Counter(), [], 0.0

    def watch(self, part: str, owner, name: str) -> None:
        """Count the time of a function of `owner` as that of `part`."""
        function = getattr(owner, name)

        @wraps(function)
        def timed(*args, **kwargs):
            self._turn()
            self.parts.append(part)
            try:
                return function(*args, **kwargs)
            finally:
                self._turn()
                self.parts.pop()

        setattr(owner, name, timed)

    def _turn(self) -> None:
        """Count the time since the last turn as that of the running part."""
        now = time.perf_counter()
        if self.parts:
            self.seconds[self.parts[-1]] += now - self.last
        self.last = now


def watched(models: Models) -> Clock:
    """A clock on all parts of a decode."""
    clock = Clock()
    clock.watch("the rest of the model", models.model, "forward")
    # Of its class: a guider whose own forward is replaced is read as it is, without the view that takes less.
    clock.watch("the rest of the guider", type(models.guiders["guider"]), "forward")
    clock.watch("matrix products of weights", torch.nn.Linear, "forward")
    clock.watch("attention", torch.nn.functional, "scaled_dot_product_attention")
    clock.watch("windows and inputs", denoising_loop.Blocks, "enter")
    clock.watch("windows and inputs", denoising_loop.Blocks, "candidates")
    clock.watch("windows and inputs", Denoiser, "__call__")
    clock.watch("acceptance by the guider", CanvasProcessors, "__call__")
    clock.watch("drafts and confidence", Drafter, "__call__")
    clock.watch("transfer", denoising_loop, "_transfer")
    clock.watch("choosing and writing", denoising_loop, "_unmask")
    clock.watch("choosing and writing", denoising_loop.DenoisingState, "write")
    clock.watch("choosing and writing", RowEnds, "update")
    clock.watch("the rest of the loop", generation_mixin, "denoise")
    clock.watch("set-up of the call", Models, "decode")
    return clock


def main() -> None:
    """Measure, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", choices=SHAPES, default="tiny")
    parser.add_argument("--problems", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--passes", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.set_defaults(device="cpu", model=None, guider=None, dtype="float32", seed=0, prompt_length=None)
    args = parser.parse_args()
    device = prepare(args)

    args.random_weights = args.config != "tiny"
    args.guider = "tiny" if args.random_weights else None
    models = load_models(args, device, RANDOM_PROMPT_LENGTH + args.new_tokens)
    block_length = models.block_length(None, args.new_tokens)
    options = {"max_new_tokens": args.new_tokens, "block_length": block_length}
    workload = make_workload(args, models, args.batch_size, options)
    # Random weights end no text: few steps are as long as many.
    steps_per_block = 1 if args.random_weights else block_length

    clock = watched(models)
    rows = []
    for name in METHODS:
        recipe, passes = recipes(steps_per_block, block_length)[name], []
        for _ in range(1 + args.passes):  # the first warms up
            clock.seconds.clear()
            outputs = [models.decode(recipe, inputs, workload.options)[1] for inputs in workload.batches]
            steps = sum(int(output.nfe.max()) for output in outputs)
            passes.append({part: 1e6 * seconds / steps for part, seconds in clock.seconds.items()})
        best = min(passes[1:], key=lambda times: sum(times.values()))
        rows.append({"method": name, "steps": steps, "microseconds_per_step": best})

    parts = list(dict.fromkeys(part for row in reversed(rows) for part in row["microseconds_per_step"]))
    table = [[part, *(f"{row['microseconds_per_step'].get(part, 0):.0f}" for row in rows)] for part in parts]
    print(format_table(["microseconds per step", *METHODS], table))
    if args.json:
        card = {"commit": commit(), "machine": describe_machine(device), "versions": versions()}
        write_json(args.json, {"command": f"python {shlex.join(sys.argv)}", **card, "rows": rows})


if __name__ == "__main__":
    main()
