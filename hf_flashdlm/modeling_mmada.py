"""MMaDA: a LLaDA whose vocabulary holds the codes of images after the tokens of text.

Owns the name of the class. Knows nothing of how an image becomes codes.
"""

from .configuration_mmada import MMadaConfig
from .modeling_llada import LLaDAModelLM


class MMadaModelLM(LLaDAModelLM):
    r"""
    MMaDA, under its original name, for text and for understanding images: `input_ids` hold the codes of the image, as
    the original tokenizer of images gives them. See [MMaDA](https://huggingface.co/papers/2505.15809).

    Example:

    ```python
    >>> from transformers import AutoModelForCausalLM
    >>> import hf_flashdlm

    >>> model = AutoModelForCausalLM.from_pretrained("Gen-Verse/MMaDA-8B-MixCoT", dtype="auto")
    ```"""

    config: MMadaConfig


__all__ = ["MMadaModelLM"]
