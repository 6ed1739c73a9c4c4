"""What makes a decoder of Transformers a diffusion language model.

Owns that its attention is what the config says, bidirectional or block-causal, and where its loss stands. Knows
nothing of architectures, steps, policies, or why a cache is frozen where it is.
"""

from .block_causal import make_block_causal
from .configuration_diffusion import DiffusionConfig
from .diffusion_loss import declare_shift, takes_loss_weights
from .fused_layers import fuse_layers
from .generation_mixin import FlashDLMGenerationMixin, make_bidirectional


class DiffusionModelMixin(FlashDLMGenerationMixin):
    """
    For a subclass of it and of a `...ForCausalLM` class of Transformers, whose `forward` it keeps. Its `config` is a
    [`DiffusionConfig`] of that architecture.

    The logits are those of the original model, unshifted: row i scores the token at position
    i + `config.logits_shift`. `labels` of shape `(batch_size, sequence_length)` hold the token of each masked position
    and -100 elsewhere, in place: the loss accounts for the shift. `loss_weights` of the same shape weight their
    cross-entropy. `attention_mask` of shape `(batch_size, past_length + sequence_length)` covers the cached positions,
    too.
    """

    config_class: type[DiffusionConfig]

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        cls.forward = takes_loss_weights(cls.forward)
        if cls.config_class.logits_shift:
            declare_shift(cls)

    def __init__(self, config):
        super().__init__(config)
        fuse_layers(self)
        # The next-token loss of Transformers moves the labels by one, which is what `logits_shift` 1 asks for.
        self.loss_type = "ForCausalLM" if config.logits_shift else "ForMaskedLM"
        if config.attention_block_length is None:
            make_bidirectional(self)
        else:
            make_block_causal(self, config.attention_block_length, config.attention_block_origin)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        # Transformers looks in the file of the class. The experts of a family are in that of the class it extends.
        extended = next(base for base in cls.__mro__ if base.__module__.startswith("transformers.models."))
        return extended._can_set_experts_implementation()  # type: ignore[attr-defined]  # it is a class of models


__all__ = ["DiffusionModelMixin"]
