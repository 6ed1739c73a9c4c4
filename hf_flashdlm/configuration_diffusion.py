"""What the configuration of every diffusion model on an architecture of Transformers declares.

Owns the attention pattern, the mask token, the shift of the logits, and what is refused about them. Knows nothing of
architectures, generation settings or tokenizers.
"""

from pathlib import PurePath
from typing import ClassVar, cast

from transformers import PreTrainedConfig
from transformers.utils.versions import require_version

from .methods import METHODS


require_version("transformers>=5.18", "hf_flashdlm needs it: `pip install -U transformers`.")


def check_block_length(name: str, value) -> None:
    """Refuse what is no length of a block."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(
            f"`{name}` must be a positive integer, got {value!r}: give the length that the weights were trained with."
        )


def check_block_origin(name: str, value) -> None:
    """Refuse what is no place to count blocks from."""
    if value not in ("row", "prompt"):
        raise ValueError(f"`{name}` must be 'row' or 'prompt', got {value!r}.")


def check_experts(per_token, number) -> None:
    """Refuse more experts for a token than there are, and none."""
    if not 1 <= per_token <= number:
        raise ValueError(
            f"`num_experts_per_tok` must be from 1 to `num_experts` ({number}), got {per_token}: change one of them."
        )


def repository_name(name_or_path) -> str:
    """The last part of a checkpoint's name on the Hub or of its folder; in the Hub's cache folders have hashes."""
    parts = PurePath(name_or_path).parts or ("",)
    in_cache = len(parts) > 2 and parts[-2] == "snapshots"
    return parts[-3].rpartition("--")[2] if in_cache else parts[-1]


class DiffusionConfig(PreTrainedConfig):
    r"""
    Base of the configurations of diffusion models; a subclass adds an architecture and `attention_block_length`.

    Args:
        rope_theta (`float`, *optional*, defaults to 10000.0):
            Base of the rotary embedding. A value in `rope_parameters` wins.
        mask_token_id (`int`, *optional*):
            Id of the mask token. Defaults to that of the released checkpoints, where the vocabulary has it.
        is_causal (`bool`, *optional*, defaults to `False`): Must be `False`.
        logits_shift (`int`, *optional*, defaults to 0):
            The logits at position i score the token at position i + `logits_shift`.
        attention_block_origin (`str`, *optional*, defaults to `"row"`):
            Where attention blocks are counted from, see [`make_block_causal`].
        recommended_method (`str`, *optional*):
            The named method whose settings `generate` uses where the caller gives none. Defaults to that of the
            model's authors, where they recommend one.

    Raises:
        ValueError: If the fields contradict each other or ask for another kind of attention.
    """

    released_mask_token_id: ClassVar[int | None] = None  # where config.json names none
    attention_block_length = cast("int | None", None)  # a subclass says where its files keep it

    rope_theta: float | int = 10000.0
    mask_token_id: int | None = None
    is_causal: bool = False
    logits_shift: int = 0
    attention_block_origin: str = "row"
    recommended_method: str | None = None

    @classmethod
    def get_config_dict(cls, pretrained_model_name_or_path, **kwargs) -> tuple[dict, dict]:
        """As of Transformers, with the name: some checkpoints of a `model_type` are told apart by nothing else."""
        config_dict, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        return config_dict | {"name_or_path": str(pretrained_model_name_or_path)}, kwargs

    def to_dict(self) -> dict:
        """As of Transformers, with the field that the original code reads in place of `rope_parameters`."""
        scaling = {name: value for name, value in self.rope_parameters.items() if name != "rope_theta"}
        is_default = scaling.get("rope_type", "default") == "default"
        return super().to_dict() | {"rope_scaling": None if is_default else scaling}

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        # The original code reads `rope_theta` and would ignore `rope_parameters`, so a saved file must agree on both.
        self.rope_theta = self.rope_parameters["rope_theta"]
        if self.mask_token_id is None and (self.released_mask_token_id or self.vocab_size) < self.vocab_size:
            self.mask_token_id = self.released_mask_token_id
        if self.mask_token_id is not None and self.mask_token_id not in range(self.vocab_size):
            raise ValueError(
                f"`mask_token_id` must be an id of the vocabulary of {self.vocab_size}, got {self.mask_token_id!r}: "
                "set it to the tokenizer's."
            )
        for name in ("is_causal", "use_sliding_window"):
            if getattr(self, name, False):
                raise ValueError(
                    f"`{name}` must be False for a diffusion model, got True: load an autoregressive checkpoint with "
                    "the class of its architecture."
                )
        name = self.attribute_map.get("attention_block_length")
        if name is not None or self.attention_block_length is not None:  # where a file has a name for it, it is needed
            check_block_length(name or "attention_block_length", self.attention_block_length)
        check_block_origin("attention_block_origin", self.attention_block_origin)
        if self.recommended_method not in (None, *METHODS):
            raise ValueError(
                f"`recommended_method` must be one of {', '.join(METHODS)}, got {self.recommended_method!r}."
            )

    def require(self, values: dict) -> None:
        """Refuse fields that ask for what no released checkpoint has and the model class does not compute."""
        for name, implemented in values.items():
            value = getattr(self, name, None)
            if value not in implemented:
                raise ValueError(
                    f"`{name}` must be {' or '.join(map(repr, implemented))}, as in every released checkpoint of "
                    f"`{self.model_type}`, got {value!r}: load it with the modeling code it was trained with."
                )


__all__ = ["DiffusionConfig"]
