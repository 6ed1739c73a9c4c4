"""Set-up of the whole suite: no network, few threads."""

import os

# Read by the libraries when they are imported, so they are set before that.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import torch

torch.set_num_threads(1)  # the tensors are tiny, and workers run side by side


import pytest  # noqa: E402


@pytest.fixture(scope="session")
def tiny():
    """`tiny(name)` is the model of `tests/goldens/model_<name>`, loaded once; no test may change it."""
    from pathlib import Path

    from transformers import AutoModelForCausalLM

    import hf_flashdlm  # noqa: F401  registers the models

    models = {}

    def tiny(name):
        if name not in models:
            path = Path(__file__).parent / "goldens" / f"model_{name}"
            models[name] = AutoModelForCausalLM.from_pretrained(path).eval()
        return models[name]

    return tiny
