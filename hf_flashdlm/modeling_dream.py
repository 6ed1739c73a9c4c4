"""Dream: Qwen2 with bidirectional attention.

Owns the declaration that no attention module is causal; weights, rotary positions and checkpoint keys are those of
Qwen2. Knows nothing of steps, blocks, policies, or why a cache is frozen where it is.
"""

from transformers.models.qwen2.modeling_qwen2 import Qwen2ForCausalLM

from .configuration_dream import DreamConfig
from .diffusion_loss import declare_shift, takes_loss_weights
from .fused_layers import fuse_layers
from .generation_mixin import FlashDLMGenerationMixin, make_bidirectional


class DreamModel(FlashDLMGenerationMixin, Qwen2ForCausalLM):
    r"""
    The Dream masked diffusion language model with its output head, under its original name; `AutoModel` loads it, too.
    It also serves DiffuCoder and Dream-Coder. See [Dream 7B](https://huggingface.co/papers/2508.15487).

    `forward` takes the arguments of [`~transformers.Qwen2ForCausalLM`]. Its logits of shape
    `(batch_size, sequence_length, config.vocab_size)` are those of the original model, unshifted: those at position i
    score the token at position i + `config.logits_shift`. `labels` of shape `(batch_size, sequence_length)` hold the
    token of each masked position and -100 elsewhere, in place: the loss accounts for the shift. `loss_weights` of the
    same shape weight their cross-entropy. `attention_mask` of shape `(batch_size, past_length + sequence_length)`
    covers the cached positions, too.

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("Dream-org/Dream-v0-Instruct-7B", dtype="auto")
    ```"""

    config: DreamConfig
    forward = takes_loss_weights(Qwen2ForCausalLM.forward)

    def __init__(self, config: DreamConfig):
        super().__init__(config)
        fuse_layers(self)
        # The next-token loss of Transformers moves the labels by one position, as `logits_shift` 1 requires.
        self.loss_type = "ForCausalLM"
        # With no mask to say otherwise, attention backends read causality off the module.
        make_bidirectional(self)


declare_shift(DreamModel)

__all__ = ["DreamModel"]
