"""MMaDA: a LLaDA by another name, whose prompts hold the codes of an image as ids."""

import json
import shutil
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from hf_flashdlm import LLaDAModelLM, MMadaConfig, MMadaModelLM


LLADA = Path(__file__).parent / "goldens" / "model_llada"
# Understand; the image begins, its codes, it ends; the question.
PROMPT = [489, 484, *range(400, 416), 485, 5, 70, 33]


def test_an_original_file_decodes_as_the_llada_that_it_is(tmp_path):
    shutil.copytree(LLADA, tmp_path / "mmada")
    path = tmp_path / "mmada" / "config.json"
    fields = {"model_type": "mmada", "architectures": ["MMadaModelLM"], "codebook_size": 16, "num_vq_tokens": 16}
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "mmada", output_loading_info=True)
    assert type(model) is MMadaModelLM and not any(info.values())
    assert model.config.codebook_size == 16
    llada = LLaDAModelLM.from_pretrained(LLADA)
    for options in ({"method": "llada"}, {}, {"prefix_lm": True}, {"guidance_scale": 2.0}):
        ours, theirs = (
            one.generate(torch.tensor([PROMPT]), max_new_tokens=9, block_length=4, **options) for one in (model, llada)
        )
        assert ours.equal(theirs) and ours[0, : len(PROMPT)].tolist() == PROMPT
    model.save_pretrained(tmp_path / "saved")
    assert type(AutoConfig.from_pretrained(tmp_path / "saved")) is MMadaConfig


def test_the_vocabulary_is_that_of_the_release():
    config = MMadaConfig()
    assert (config.vocab_size, config.embedding_size, config.mask_token_id) == (134656, 134656, 126336)
