"""What bounds a step on a GPU, for models that do not fit on a CPU: weights, matrix products and launches, counted.

    python examples/step_limits.py --json examples/results/limits.json

Nothing is measured here. The weights and products of a forward are those of the model's shape; its launches are
counted on a model with one layer and a small vocabulary, whose layer takes the same operations. The ceilings are
numbers of a data sheet, by default of an H100 (SXM): 989 TFLOP/s in bfloat16 and 3.35 TB/s. The time of a launch is an
assumption.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch

from hf_flashdlm.bench.comparison import warm_up
from hf_flashdlm.bench.decoding import Models
from hf_flashdlm.bench.machine import Ceilings, CostModel, ForwardShape, commit, versions
from hf_flashdlm.bench.models import guider_config, named_config, random_model
from hf_flashdlm.bench.operations import layer_operations
from hf_flashdlm.bench.recipes import recipes
from hf_flashdlm.bench.report import format_table, write_json
from hf_flashdlm.bench.shapes import GUIDER_SHAPES
from hf_flashdlm.bench.workload import problem_workload
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.fused_layers import fused_view
from hf_flashdlm.tiny import FOLDER


KEYS = 1024 + 256  # a prompt and its canvas
STEPS = {"the canvas without a cache": KEYS, "a canvas of 256": 256, "a window of 64": 64, "a window of 32": 32}
SHAPES = {"llada-8b": STEPS, "dream-7b": STEPS, "qwen2.5-1.5b": {"a guider of 32 drafts": 33}}


def config_of(name: str):
    """The configuration of a diffusion model, or of a guider with the vocabulary of Dream."""
    if name not in GUIDER_SHAPES:
        return named_config(name)
    return guider_config(argparse.Namespace(guider=name, config=None), named_config("dream-7b"))


def launches(name: str) -> int:
    """Operations of the layers in a forward, counted on one of them."""
    config = config_of(name)
    layers = config.num_hidden_layers
    config.num_hidden_layers, config.vocab_size = 1, 64
    config.layer_types = ["full_attention"]
    for token in ("mask_token_id", "eos_token_id", "pad_token_id", "bos_token_id"):
        setattr(config, token, 0)
    # A guider is read by its fused view; a diffusion model of the package has such layers itself.
    (per_layer,) = layer_operations(fused_view(random_model(config, torch.bfloat16, torch.device("cpu"), 0)))
    return layers * per_layer


def launches_outside() -> int:
    """Operations outside of the forwards for each of them, counted on the embedded model."""
    checkpoint = Checkpoint.load(str(FOLDER / "dlm"), "cpu", "float32")
    workload = problem_workload(checkpoint, 1, 1, 0, {"max_new_tokens": 64, "block_length": 8})
    _, operations = warm_up(
        Models(checkpoint.model, checkpoint=checkpoint), recipes(8, 8)["freecache+window"], workload
    )
    return round(operations["operations_per_step"])


def limits(name: str, ceilings: Ceilings, launch_seconds: float, outside: int) -> list[dict]:
    """Milliseconds of each kind of work for each kind of step of a shape."""
    with torch.device("meta"):
        costs = CostModel(random_model(config_of(name), torch.bfloat16, torch.device("meta"), 0))
    count, rows = launches(name) + (0 if name in GUIDER_SHAPES else outside), []
    for step, queries in SHAPES[name].items():
        forward = ForwardShape(1, queries, KEYS, min(queries, 32), cached=queries < KEYS)
        parts = {
            "reading weights and keys": costs.bytes(forward) / ceilings.bytes_per_second,
            "matrix products": costs.flops(forward) / ceilings.flops_per_second,
            "launches": count * launch_seconds,
        }
        milliseconds = {part: 1000 * seconds for part, seconds in parts.items()}
        rows.append({"model": name, "step": step, "operations": count, "milliseconds": milliseconds})
    return rows


def main() -> None:
    """Count, print, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flops", type=float, default=989e12, help="per second (default: %(default)g)")
    parser.add_argument("--bandwidth", type=float, default=3.35e12, help="bytes per second (default: %(default)g)")
    parser.add_argument(
        "--launch", type=float, default=5e-6, help="seconds of a launch in eager mode (default: 5e-06)"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    ceilings = Ceilings(args.flops, args.bandwidth)
    outside = launches_outside()
    rows = [row for name in SHAPES for row in limits(name, ceilings, args.launch, outside)]
    parts = list(rows[0]["milliseconds"])
    table = [
        [row["model"], row["step"], str(row["operations"]), *(f"{row['milliseconds'][part]:.2f}" for part in parts)]
        + [max(parts, key=row["milliseconds"].get)]
        for row in rows
    ]
    print(format_table(["model", "step", "operations", *(f"{part}, ms" for part in parts), "bound by"], table))
    if args.json:
        assumed = vars(ceilings) | {"launch_seconds": args.launch}
        card = {"commit": commit(), "versions": versions(), "assumed": assumed}
        write_json(args.json, {"command": f"python {shlex.join(sys.argv)}", **card, "rows": rows})


if __name__ == "__main__":
    main()
