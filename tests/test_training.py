"""Training of masked diffusion models: the collator, the weighted loss, the `Trainer`, and the example."""

import copy
import importlib.util
import math
import sys
import types
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Trainer, TrainingArguments

import hf_flashdlm
from hf_flashdlm import DataCollatorForMaskedDiffusion
from hf_flashdlm.tiny import FOLDER, problems


TEXTS = [list(range(10, 30)), list(range(40, 52)), list(range(60, 63))]
EOS, MASK = 3, 511


@pytest.fixture(params=["llada", "dream", "sdar", "open_dcoder"])
def model(request, tiny):
    """A model made in each way: of its own modules, of those of Transformers, by the mixin, and with a shift."""
    if request.param in ("llada", "dream"):
        model = copy.deepcopy(tiny(request.param))
        model.has_seen_labels = False  # whatever other tests gave the model that all share
        return model
    kind, config = {
        "sdar": (hf_flashdlm.SDARForCausalLM, hf_flashdlm.SDARConfig),
        "open_dcoder": (hf_flashdlm.OpenDCoderModel, hf_flashdlm.OpenDCoderConfig),
    }[request.param]
    torch.manual_seed(0)
    sizes = dict(vocab_size=512, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    return kind(config(**sizes, num_key_value_heads=1, head_dim=16, mask_token_id=MASK, eos_token_id=EOS)).eval()


def ids_of(mask=MASK, eos=EOS):
    """What the collator needs of a tokenizer."""
    return types.SimpleNamespace(mask_token_id=mask, eos_token_id=eos)


def features(prompt_length=0):
    return [{"input_ids": text, "labels": [-100] * prompt_length + text[prompt_length:]} for text in TEXTS]


@pytest.mark.parametrize("shift", [0, 1])
@pytest.mark.parametrize("prompt_length", [0, 3])
def test_the_collator_masks_answers_and_padding_and_nothing_else(prompt_length, shift):
    torch.manual_seed(0)
    collator = DataCollatorForMaskedDiffusion(ids_of(), logits_shift=shift, pad_to_multiple_of=8)
    padded = torch.tensor([text + [EOS] * (24 - len(text)) for text in TEXTS])
    ever = torch.zeros_like(padded, dtype=torch.bool)
    for _ in range(100):
        batch = collator(features(prompt_length))
        masked = batch["input_ids"] == MASK
        ever |= masked
        assert torch.where(masked, padded, batch["input_ids"]).equal(padded), "other tokens stay"
        assert batch["labels"].equal(torch.where(masked, padded, -100))
        assert ((batch["loss_weights"] > 0) == masked).all()
    first = max(prompt_length, shift)
    assert ever[:, first:].all() and not ever[:, :first].any()


def test_weights_make_the_loss_that_of_the_paper():
    """The mean over texts of sum(cross-entropy of masked tokens) / (t * number of tokens that may be masked)."""
    torch.manual_seed(1)
    batch = DataCollatorForMaskedDiffusion(ids_of())(features(2))
    torch.manual_seed(1)
    ratio = (1 - 1e-3) * (1 - torch.rand(3, 1)) + 1e-3
    masked = batch["labels"] != -100
    expected = (masked / (ratio * 18)).sum() / 3
    torch.testing.assert_close(batch["loss_weights"].sum() / masked.sum(), expected)


def test_the_ratio_is_uniform_and_a_token_counts_once_on_average():
    torch.manual_seed(0)
    collator = DataCollatorForMaskedDiffusion(ids_of())
    batches = [collator([{"input_ids": list(range(10, 210))}]) for _ in range(2000)]
    ratios = torch.tensor([float((batch["labels"] != -100).float().mean()) for batch in batches])
    assert abs(ratios.mean() - 0.5) < 0.03 and abs(ratios.std() - 1 / math.sqrt(12)) < 0.02
    shares = [float(batch["loss_weights"].sum() / (batch["labels"] != -100).sum().clamp_min(1)) for batch in batches]
    assert abs(sum(shares) / len(shares) - 1) < 0.05


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: DataCollatorForMaskedDiffusion(ids_of(mask=None)),
            "`tokenizer` must have a token for the mask, got none: pass `mask_token_id`.",
        ),
        (
            lambda: DataCollatorForMaskedDiffusion(ids_of(eos=None)),
            "`tokenizer` must have a token for the end, got none: set its `eos_token`.",
        ),
        (
            lambda: DataCollatorForMaskedDiffusion(ids_of(), smallest_ratio=0),
            "`smallest_ratio` must lie above 0 and be at most 1, got 0.",
        ),
        (
            lambda: DataCollatorForMaskedDiffusion(ids_of())([{"input_ids": [5, 6], "labels": [5]}]),
            "`labels` must be as long as `input_ids`, 2, got 1.",
        ),
    ],
)
def test_the_collator_says_what_it_lacks(make, message):
    with pytest.raises(ValueError) as error:
        make()
    assert str(error.value) == message


def test_a_mask_token_may_be_given():
    torch.manual_seed(0)
    batch = DataCollatorForMaskedDiffusion(ids_of(mask=None), mask_token_id=500)(features())
    assert (batch["input_ids"] == 500).any()


def test_the_loss_is_the_weighted_mean_of_the_cross_entropy_in_place(model):
    torch.manual_seed(0)
    shift = model.config.logits_shift
    batch = DataCollatorForMaskedDiffusion(ids_of(), logits_shift=shift)(features())
    with torch.no_grad():
        output = model(**batch)
        logits = model(batch["input_ids"]).logits
    expected = 0.0
    for row, position in (batch["labels"] != -100).nonzero().tolist():
        own = cross_entropy(logits[row, position - shift].float(), batch["labels"][row, position])
        expected += float(own * batch["loss_weights"][row, position])
    count = int((batch["labels"] != -100).sum())
    assert float(output.loss) == pytest.approx(expected / count, rel=1e-4)
    assert output.logits.equal(logits)
    with torch.no_grad():
        accumulated = model(**batch, num_items_in_batch=2 * count).loss
        as_tuple = model(**batch, return_dict=False)
    assert float(accumulated) == pytest.approx(expected / count / 2, rel=1e-4)
    assert float(as_tuple[0]) == pytest.approx(expected / count, rel=1e-4) and as_tuple[1].equal(logits)


def test_weights_of_one_change_nothing(model):
    ids = torch.tensor([TEXTS[0]])
    labels = torch.where(torch.arange(20) % 3 == 1, ids, -100)
    inputs = {"input_ids": torch.where(labels == ids, MASK, ids), "labels": labels}
    with torch.no_grad():
        plain, weighted = model(**inputs).loss, model(**inputs, loss_weights=torch.ones(1, 20)).loss
    torch.testing.assert_close(weighted, plain)


def test_a_batch_without_a_mask_has_a_loss_of_zero_that_can_be_trained_on(model):
    ids = torch.tensor([TEXTS[0]])
    loss = model(ids, labels=torch.full_like(ids, -100), loss_weights=torch.zeros(1, 20)).loss
    loss.backward()
    assert float(loss.detach()) == 0
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.parameters())


def test_labels_without_a_mask_are_answered_with_one_warning(model, caplog):
    """As the collators for causal models of Transformers make them."""
    other, ids = copy.deepcopy(model), torch.tensor([TEXTS[0]])
    with torch.no_grad():
        other(torch.where(ids > 25, MASK, ids), labels=torch.where(ids > 25, ids, -100))
        assert caplog.messages == []
        model(ids, labels=ids)
        model(input_ids=ids, labels=ids)
    assert caplog.messages == [
        f"None of the `labels` belongs to a mask token (511) in `input_ids`: {type(model).__name__} sees the tokens "
        "that it is trained to predict and learns to copy them. Mask the inputs, for instance with "
        "`DataCollatorForMaskedDiffusion`."
    ]


def test_smoothed_labels_of_the_trainer_are_scored_in_place(model, tmp_path):
    ids = torch.randint(5, 500, (4, 16), generator=torch.Generator().manual_seed(0))
    masked = (torch.arange(16) >= 6) & (torch.arange(16) < 12)
    inputs = {"input_ids": torch.where(masked, MASK, ids), "labels": torch.where(masked, ids, -100)}
    args = TrainingArguments(tmp_path, report_to=[], use_cpu=True, label_smoothing_factor=1e-9)
    with torch.no_grad():
        smoothed = Trainer(model, args).compute_loss(model, dict(inputs))
        assert float(smoothed) == pytest.approx(float(model(**inputs).loss), abs=1e-4)


@pytest.fixture
def example(monkeypatch):
    """`examples/lora.py`. Without PEFT, which it needs, a stand-in trains all weights."""
    if importlib.util.find_spec("peft") is None:
        stand_in = types.ModuleType("peft")
        stand_in.LoraConfig, stand_in.get_peft_model = dict, lambda model, config: model
        monkeypatch.setitem(sys.modules, "peft", stand_in)
    path = Path(__file__).parents[1] / "examples" / "lora.py"
    spec = importlib.util.spec_from_file_location("lora", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_example_lowers_the_loss_and_changes_what_is_decoded(example):
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "dlm")
    model = example.AutoModelForCausalLM.from_pretrained(FOLDER / "dlm", dtype=torch.float32)
    held_out, *training = problems(1)
    before = example.answer(model, tokenizer, held_out.question)
    assert "####" in before
    texts = [example.encode(tokenizer, problem) for problem in training]
    model = example.get_peft_model(model, example.LoraConfig(r=8, lora_alpha=16, target_modules=example.PROJECTIONS))
    torch.manual_seed(0)
    losses = example.train(model, tokenizer, texts, steps=25, learning_rate=3e-4)
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])
    after = example.answer(model, tokenizer, held_out.question)
    assert "####" not in after and after == before.partition("\n####")[0].strip()
