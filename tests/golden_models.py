"""The golden models of both architectures, which the tests of the modeling code share."""

import functools
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import hf_flashdlm  # noqa: F401  registers the models with the Auto classes


GOLDENS = Path(__file__).parent / "goldens"
ATOL = 2e-3  # float32 rounding of the golden models is 1e-4


@functools.cache
def load(name, attention="sdpa"):
    """A golden model; tests share it, so they must not change it."""
    return AutoModelForCausalLM.from_pretrained(GOLDENS / f"model_{name}", attn_implementation=attention).eval()


def canvas(batch_size=2, length=12):
    return torch.randint(0, 58, (batch_size, length), generator=torch.Generator().manual_seed(1))
