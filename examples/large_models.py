"""What becomes of the tokens if weights are offloaded or quantised: those of the model, of the guider, of both.

    python examples/large_models.py --json examples/results/large_models.json

The embedded pair decodes held-out problems in float32 as it is, and then with its weights loaded in each way whose
package is installed: bitsandbytes, optimum-quanto, torchao (`pip install --no-deps`, which leaves torch alone).
"""

import argparse
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, QuantoConfig, TorchAoConfig

from hf_flashdlm import ARGuider
from hf_flashdlm.bench.machine import versions
from hf_flashdlm.bench.report import write_json
from hf_flashdlm.cli.command import quiet_transformers
from hf_flashdlm.console.checkpoint import Checkpoint
from hf_flashdlm.hub.loading import load_tokenizer
from hf_flashdlm.tiny import FOLDER, GUIDANCE, final_number, sample_problems


OPTIONS = {"max_new_tokens": 64}


def on_disk(name, folder):
    return {"device_map": {"": "disk"}, "offload_folder": folder}


def in_part_on_disk(name, folder):
    memory = {"dlm": "2MB", "guider": "1MB"}[name]  # of 5.4 and 1.3
    return {"device_map": "auto", "max_memory": {"cpu": memory}, "offload_folder": folder}


def quantized(make):
    return lambda name, folder: {"quantization_config": make()}


def torchao(bits):
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig

    return TorchAoConfig(Int8WeightOnlyConfig() if bits == 8 else Int4WeightOnlyConfig(group_size=32))


# How weights are loaded, with the package that does it.
WAYS = {
    "`device_map={'': 'cpu'}`": ("accelerate", lambda name, folder: {"device_map": {"": "cpu"}}),
    "`device_map='auto'`, in part on disk": ("accelerate", in_part_on_disk),
    "`device_map={'': 'disk'}`": ("accelerate", on_disk),
    "8 bits, `load_in_8bit`": ("bitsandbytes", quantized(lambda: BitsAndBytesConfig(load_in_8bit=True))),
    "4 bits, `load_in_4bit`": ("bitsandbytes", quantized(lambda: BitsAndBytesConfig(load_in_4bit=True))),
    "8 bits, `QuantoConfig('int8')`": ("optimum-quanto", quantized(lambda: QuantoConfig(weights="int8"))),
    "4 bits, `QuantoConfig('int4')`": ("optimum-quanto", quantized(lambda: QuantoConfig(weights="int4"))),
    "8 bits, `Int8WeightOnlyConfig`": ("torchao", quantized(lambda: torchao(8))),
    "4 bits, `Int4WeightOnlyConfig`": ("torchao", quantized(lambda: torchao(4))),
}


def load(name, **options):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / name, **{"dtype": torch.float32} | options).eval()
    if "offload_folder" in options and "disk" not in model.hf_device_map.values():
        raise RuntimeError(f"nothing of {name} is on disk")
    return model


def decode(model, guider=None, *, problems):
    """The texts of a decode of all problems in one batch."""
    tokenizer = load_tokenizer("--model", str(FOLDER / "dlm"))
    guiding = {} if guider is None else {"guider": ARGuider(guider, **GUIDANCE)}
    questions = [problem.question for problem in problems]
    return Checkpoint(model, tokenizer).continue_prompts(questions, OPTIONS | guiding).texts


# The models of a decode, and those of them whose weights are loaded in another way.
PLACES = {"model": (["dlm"], ["dlm"]), "guider": (["dlm", "guider"], ["guider"]), "both": (["dlm", "guider"],) * 2}


def compare(way, problems, usual):
    """For the model, the guider and both in a `way` of loading: how many texts are the same, and how many right."""
    found = {}
    for place, (names, changed) in PLACES.items():
        with TemporaryDirectory() as model_folder, TemporaryDirectory() as guider_folder:
            folders = {"dlm": model_folder, "guider": guider_folder}
            options = {name: WAYS[way][1](name, folders[name]) for name in changed}
            models = [load(name, **options.get(name, {})) for name in names]
            texts = decode(*models, problems=problems)
        same = sum(one == other for one, other in zip(texts, usual[len(names)], strict=True))
        right = sum(final_number(text) == problem.final for text, problem in zip(texts, problems, strict=True))
        found[place] = {"same": same, "right": right}
    return found


def try_way(way, problems, usual):
    """The row of a way of loading: what came of it, or the mistake that ended it."""
    package = WAYS[way][0]
    try:
        row = {"way": way, "package": f"{package} {version(package)}"}
    except PackageNotFoundError:
        return {"way": way, "package": package, "error": "not installed"}
    try:
        return row | compare(way, problems, usual)
    except Exception as error:  # of whatever library
        return row | {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=16, metavar="N", help="problems to decode (default: 16)")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file")
    args = parser.parse_args()
    quiet_transformers(progress_bars=False)
    problems = sample_problems(args.problems, seed=0)
    usual = {1: decode(load("dlm"), problems=problems), 2: decode(load("dlm"), load("guider"), problems=problems)}
    rows = []
    for way in WAYS:
        rows.append(try_way(way, problems, usual))
        print(rows[-1], flush=True)
    record = {
        "command": "python examples/large_models.py --json examples/results/large_models.json",
        "problems": args.problems,
        "versions": versions(),
        "rows": rows,
    }
    if args.json is not None:
        write_json(Path(args.json), record)


if __name__ == "__main__":
    main()
