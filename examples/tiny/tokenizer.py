"""The tokenizer of the embedded model pair: a token per word of the problems and per digit, bytes for other text.

Owns the 512 ids: end of text, mask, the 256 bytes, then the words. Lossless on any text.
"""

import re
from itertools import islice

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from problems import answer_text, problems, prompt_text


EOS, MASK = "<|endoftext|>", "<|mdm_mask|>"
VOCAB_SIZE = 512
PIECE = r" ?[A-Za-z]+| ?[0-9]| ?#+| ?[^A-Za-z0-9#\s]|\s"
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %} {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ message['content'] }}\nAnswer:{% endif %}{% endfor %}"
)


def build_tokenizer(sample_size: int = 20_000) -> PreTrainedTokenizerFast:
    """Builds the tokenizer from the words of the first `sample_size` training problems (always the same ones)."""
    vocab = {EOS: 0, MASK: 1}
    for piece in sorted(pre_tokenizers.ByteLevel.alphabet()) + corpus_pieces(sample_size):
        vocab.setdefault(piece, len(vocab))
    if len(vocab) > VOCAB_SIZE:
        raise ValueError(f"the vocabulary must have at most {VOCAB_SIZE} entries, got {len(vocab)}")
    core = Tokenizer(models.BPE(vocab, merges=[], ignore_merges=True))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECE), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=EOS,
        pad_token=EOS,
        mask_token=MASK,
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def corpus_pieces(sample_size: int) -> list[str]:
    """The different words of `sample_size` training problems in the byte alphabet (where a blank is `Ġ`), sorted."""
    pieces = set()
    for problem in islice(problems(seed=0, split="train"), sample_size):
        pieces.update(re.findall(PIECE, prompt_text(problem.question) + answer_text(problem.answer)))
    return sorted(piece.replace(" ", "Ġ").replace("\n", "Ċ") for piece in pieces)
