"""Fine-tune the embedded diffusion model with LoRA: it learns to leave out the last line of its answers.

    pip install "hf-flashdlm[train]"
    python examples/lora.py

The collator masks each answer at a random ratio and weights its tokens by it; the model, the `Trainer` and PEFT are
used as for any other language model. It takes some minutes on a CPU.
"""

import tempfile

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from hf_flashdlm import DataCollatorForMaskedDiffusion
from hf_flashdlm.tiny import FOLDER, problems


PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def encode(tokenizer, problem) -> dict[str, list[int]]:
    """Encode a text of the training: the prompt, which is never masked, and the answer without its last line."""
    prompt = tokenizer(f"{problem.question}\nAnswer:").input_ids
    working, _, _ = problem.answer.partition("\n####")
    answer = [*tokenizer(f" {working}").input_ids, tokenizer.eos_token_id]
    return {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def train(model, tokenizer, texts, steps: int = 40, learning_rate: float = 3e-3) -> list[float]:
    """Train what of the model is trainable, and return the loss of each step."""
    collator = DataCollatorForMaskedDiffusion(tokenizer, logits_shift=model.config.logits_shift)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=8,
            learning_rate=learning_rate,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            dataloader_pin_memory=torch.cuda.is_available(),
        )
        trainer = Trainer(model, args, train_dataset=texts, data_collator=collator)
        trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def answer(model, tokenizer, question: str) -> str:
    """Decode the model's answer to a question."""
    inputs = tokenizer(f"{question}\nAnswer:", return_tensors="pt").to(model.device)
    output = model.eval().generate(**inputs, max_new_tokens=64)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


def main() -> None:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "dlm")
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "dlm", dtype="float32")
    held_out, *training = problems(1)
    print(f"before: {answer(model, tokenizer, held_out.question)}")
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=PROJECTIONS))
    losses = train(model, tokenizer, [encode(tokenizer, problem) for problem in training])
    print(f"loss of the first ten steps {sum(losses[:10]) / 10:.2f}, of the last ten {sum(losses[-10:]) / 10:.2f}")
    print(f"after: {answer(model, tokenizer, held_out.question)}")


if __name__ == "__main__":
    main()
