"""The tokenizer of Dream, under the name that its checkpoints ask for."""

from transformers import Qwen2Tokenizer


class DreamTokenizer(Qwen2Tokenizer):
    """
    Qwen2's tokenizer, from whose vocabulary Dream's was made. Checkpoints of Dream name this class and bring remote
    code for it; registered with `AutoTokenizer`, it makes them load without.
    """
