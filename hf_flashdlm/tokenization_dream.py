"""The tokenizer of Dream, under the name that its checkpoints ask for."""

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """
    The tokenizer of Qwen2, on whose vocabulary that of Dream is based. Checkpoints of Dream name this class and bring
    remote code for it; because it is registered with `AutoTokenizer`, they load without that code.
    """
