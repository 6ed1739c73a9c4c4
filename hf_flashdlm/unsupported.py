"""Diffusion language models that are known and cannot be decoded here, refused by name.

Owns the table of their `model_type` and why. Knows nothing of the models that are supported.
"""

from transformers import PreTrainedConfig


REASONS = {
    "wedlm": (
        "WeDLM reorders tokens under causal attention, which is not supported: load it with its own code, "
        "`trust_remote_code=True`"
    ),
    "llada2_moe_veomni": (
        "LLaDA2 in the format of its trainer dFactory, with stacked experts, is not supported: convert it to the "
        "Hub's format with dFactory's script"
    ),
    "dimple": (
        "Dimple counts the positions of images in three dimensions, which is not supported: load it with its own "
        "code, in a process that does not import hf_flashdlm"
    ),
}


def _refusing(model_type: str) -> type[PreTrainedConfig]:
    """A configuration class that only says why."""

    def __post_init__(self, **kwargs):
        raise ValueError(
            f"`model_type` must be one that hf_flashdlm decodes, got {model_type!r}: {REASONS[model_type]}."
        )

    # With `trust_remote_code=True` Transformers takes the code of the repository, unless the registered class is of
    # another module than its own.
    members = {"model_type": model_type, "__post_init__": __post_init__, "__module__": "transformers.refused"}
    return type("RefusedConfig", (PreTrainedConfig,), members)


REFUSED = tuple(map(_refusing, REASONS))
