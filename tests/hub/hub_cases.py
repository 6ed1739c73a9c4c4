"""What the tests of repositories share: their names, and scripts that run without the package."""

import json
import re
from pathlib import Path

import hf_flashdlm


ROOT = Path(__file__).parents[2]
PACKAGE = Path(hf_flashdlm.__file__).parent
TINY = PACKAGE / "tiny"
GOLDENS = ROOT / "tests" / "goldens"

MODEL, GUIDER = "hf-flashdlm/tiny-dlm", "hf-flashdlm/tiny-guider"
CODE, STRATEGY, LLADA = "hf-flashdlm/flash-dream", "hf-flashdlm/flashdlm", "hf-flashdlm/tiny-llada"

# Repositories that the cards name; the tiny pair replaces them here.
STAND_INS = {
    "Dream-org/Dream-v0-Instruct-7B": "dlm",
    "Qwen/Qwen2.5-1.5B-Instruct": "guider",
    "Qwen/Qwen2.5-Coder-1.5B-Instruct": "guider",
}

QUESTIONS = [json.loads(line)["question"] for line in (TINY / "problems.jsonl").read_text().splitlines()[:3]]

# Makes sure that the package is absent, even if it is installed.
APART = """
import sys
sys.modules["hf_flashdlm"] = None
import json, torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Qwen2ForCausalLM, pipeline
from transformers import LlamaForCausalLM, TextIteratorStreamer
"""


def summary(output):
    return {"kind": type(output).__name__, "nfe": output.nfe.tolist(), "sequences": output.sequences.tolist()}


SUMMARY = """
def summary(output):
    return {"kind": type(output).__name__, "nfe": output.nfe.tolist(), "sequences": output.sequences.tolist()}
"""


def usage(card):
    """The code of a card."""
    return "".join(re.findall(r"```python\n(.*?)```", card, re.DOTALL))
