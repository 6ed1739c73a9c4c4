"""Decode one word problem with the embedded pair of models: FreeCache alone, then with the guider.

    python examples/quickstart.py

For a pair of real models, put the names of their repositories in place of the two folders.
"""

from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_flashdlm  # registers LLaDA and Dream with the Auto classes


TINY = Path(hf_flashdlm.__file__).parent / "tiny"

model = AutoModelForCausalLM.from_pretrained(TINY / "dlm", dtype="auto")
guider = AutoModelForCausalLM.from_pretrained(TINY / "guider", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(TINY / "dlm")

question = "There were 15 lemons on the table. Sofia took 7 away. How many lemons are still there?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
for name, options in (("FreeCache", {"steps": 64}), ("FreeCache and guider", {"guider": guider})):
    output = model.generate(**inputs, max_new_tokens=64, return_dict_in_generate=True, **options)
    text = tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    print(f"{name}, {int(output.nfe)} forwards:{text}")
