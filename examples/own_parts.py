"""An unmasking rule and a window policy of your own: `python examples/own_parts.py` decodes with both."""

from itertools import takewhile

from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_flashdlm import Drafts, Window, WindowPolicy
from hf_flashdlm.tiny import FOLDER


class LeftToRight:
    """Writes the next tokens in reading order, as many as the model is sure of, and at least one."""

    def __call__(self, drafts: Drafts, row) -> list[int]:
        return list(takewhile(lambda position: drafts.confidence_of(position) >= 0.9, drafts.candidates))


class KeepPrompt(WindowPolicy):
    """Computes the prompt once, and everything after it in every step."""

    def __call__(self, row) -> Window:
        begin, length = (row.prompt_length if row.nfe else 0), len(row.tokens)
        return Window(lo=begin, hi=length, attended=length, frozen=begin)


if __name__ == "__main__":
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "dlm")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "dlm")
    question = "Adam has 3 coins. Nora gives Adam 4 more coins. How many coins does Adam have now?\nAnswer:"
    inputs = tokenizer(question, return_tensors="pt")
    output = model.generate(**inputs, unmasking_rule=LeftToRight(), window_policy=KeepPrompt(), max_new_tokens=64)
    print(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True))
