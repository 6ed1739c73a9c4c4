"""Set-up of the whole suite: no network, few threads."""

import os
from pathlib import Path


# The libraries read these when they are imported, so they are set before that.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import cases
import hypothesis
import pytest
import torch
from cases import CHARACTERS, MASK
from guided_cases import Decided
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_flashdlm import ARGuider
from hf_flashdlm.bench.machine import Ceilings
from hf_flashdlm.cli.bench import add_commands
from hf_flashdlm.cli.command import Parser
from hf_flashdlm.compiling import cache_name
from hf_flashdlm.denoising_loop import DenoisingState


torch.set_num_threads(1)  # the tensors are tiny, and workers run side by side

# The same examples in every run, without a time limit: the machines are shared.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None, max_examples=40)
# Other examples in every run, for `make test-laws`.
hypothesis.settings.register_profile("laws", deadline=None, database=None, max_examples=5000, print_blob=True)
hypothesis.settings.load_profile("suite")


# Files that start processes, servers or compilers; their tests are marked `heavy`.
HEAVY = {
    "hub",
    "test_ablation",
    "test_bench",
    "test_chat",
    "test_cli",
    "test_compile",
    "test_demo",
    "test_readme",
    "test_serve",
    "test_synchronizing",
    "test_tensor_parallel",
    "test_terminal_text",
}


def pytest_collection_modifyitems(items):
    for item in items:
        if HEAVY & {item.path.stem, item.path.parent.name}:
            item.add_marker(pytest.mark.heavy)


@pytest.fixture(scope="session")
def tiny():
    """`tiny(name)` is the model of `tests/goldens/model_<name>`, loaded once; no test may change it."""
    models = {}

    def tiny(name):
        if name not in models:
            path = Path(__file__).parent / "goldens" / f"model_{name}"
            models[name] = AutoModelForCausalLM.from_pretrained(path).eval()
        return models[name]

    return tiny


@pytest.fixture(scope="module")
def load():
    """`load("model_llada")`: the model in that folder of tests/goldens, one for all tests of a module."""
    models = {}

    def load(name):
        if name not in models:
            models[name] = AutoModelForCausalLM.from_pretrained(Path(__file__).parent / "goldens" / name).eval()
        return models[name]

    return load


@pytest.fixture(scope="session")
def left_padded():
    """Ids and attention mask of prompts of different length."""
    return cases.left_padded


def check_guidance(output, guider):
    """Check what the statistics of any guided decode must satisfy."""
    lengths, judged, accepted = output.accepted_lengths, output.drafts_judged, output.drafts_accepted
    asked = torch.tensor([len(row) for row in lengths])
    assert accepted.tolist() == [sum(row) for row in lengths]
    assert output.guider_forwards.tolist() == asked.tolist()
    assert (accepted <= judged).all() and (judged <= asked * min(guider.num_drafts, 10**6)).all()
    assert all(0 <= length <= guider.num_drafts for row in lengths for length in row)
    assert 0 < output.guider_time_share < 1
    if guider.gate is None:
        assert output.gate_closed_at is None
        # Every step asks, but in rows that wait for others at the end of a block.
        assert (asked <= output.nfe).all() and (asked.equal(output.nfe) or guider.beyond_prefix)
    else:
        closed = output.gate_closed_at
        assert ((closed == -1) | (asked <= closed)).all() and (asked <= output.nfe).all()
    if guider.gate is None and not guider.beyond_prefix:
        # A token is written because it is accepted, or because it is the first draft of a step that accepts none.
        forced = torch.tensor([row.count(0) for row in lengths])
        assert (accepted + forced >= output.tokens_per_forward * output.nfe - 1e-3).all()


@pytest.fixture(scope="session")
def checked():
    """`checked(output, guider)` is the output, after a check that its statistics add up."""

    def checked(output, guider):
        check_guidance(output, guider)
        return output

    return checked


@pytest.fixture(scope="session")
def decode(left_padded):
    """`decode(model, prompts, **options)`: the output of `generate` and each forward; guided decodes are `checked`."""

    def decode(model, prompts, **options):
        input_ids, attention_mask = left_padded(prompts)
        forwards = []
        hook = model.register_forward_pre_hook(
            lambda _, args, kwargs: forwards.append(kwargs | {"cache": kwargs[cache_name(model)]}), with_kwargs=True
        )
        try:
            output = model.generate(input_ids, attention_mask=attention_mask, return_dict_in_generate=True, **options)
        finally:
            hook.remove()
        guider = options.get("guider")
        if isinstance(guider, PreTrainedModel):
            guider = ARGuider(guider)
        if isinstance(guider, ARGuider):
            check_guidance(output, guider)
        object.__setattr__(output, "forwards", forwards)
        return output

    return decode


@pytest.fixture(scope="session")
def spell():
    """`spell("ab_", ...)` is a canvas of code points, one row per text; `_` is the mask token."""
    return lambda *texts: torch.tensor([[ord(letter) for letter in text] for text in texts])


@pytest.fixture(scope="session")
def start(spell):
    """`start("ab__", prompt_length=1, nfe=[1])`: the state before the first step of a spelled canvas, fields set."""

    def start(*texts, prompt_length=0, history=0, **fields):
        state = DenoisingState.start(spell(*texts), ord("_"), prompt_length, history)
        for name, values in fields.items():
            for row, value in zip(state.rows, values, strict=True):
                setattr(row, name, value)
        return state

    return start


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer with a character for every id of the tiny models."""
    backend = Tokenizer(models.WordLevel({character: i for i, character in enumerate(CHARACTERS)}, CHARACTERS[0]))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=CHARACTERS[0],
        eos_token=CHARACTERS[510],
        mask_token=CHARACTERS[MASK],
        padding_side="left",
    )


@pytest.fixture
def no_grad():
    with torch.no_grad():
        yield


@pytest.fixture
def guider(tiny):
    """`guider(**options)` is a guider around the tiny autoregressive model."""
    return lambda **options: ARGuider(tiny("guider"), **options)


@pytest.fixture
def decided(tiny):
    """`decided(decide, **options)` is a guider that accepts as `decide` says."""
    return lambda decide, **options: Decided(tiny("guider"), decide, **options)


@pytest.fixture
def bench(monkeypatch):
    """`bench("--config", "tiny")` runs the command with these arguments."""
    monkeypatch.setattr(Ceilings, "measure", lambda *_: Ceilings(1e9, 1e9))

    def bench(*arguments):
        parser = Parser()
        add_commands(parser.add_subparsers())
        args = parser.parse_args(["bench", *arguments])
        args.run(args)

    return bench
