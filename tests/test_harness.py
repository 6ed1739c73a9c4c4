"""The model class of lm-evaluation-harness, on local tasks and the embedded pair, with the real harness."""

import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hf_flashdlm import ARGuider, log_likelihood
from hf_flashdlm.prompting import Checkpoint
from hf_flashdlm.tiny import FOLDER, final_number, problems


lm_eval = pytest.importorskip("lm_eval", reason="`make test-eval` installs it")

from harness_tasks import QUESTIONS, write_tasks  # noqa: E402
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from hf_flashdlm.evaluation.harness import FlashDLM  # noqa: E402


GUIDANCE = {"guider": str(FOLDER / "guider"), "guider_combine": "intersection", "guider_confidence_threshold": 0.5}
TINY = str(FOLDER / "dlm")


@pytest.fixture(scope="module")
def manager(tmp_path_factory):
    return TaskManager(include_path=str(write_tasks(tmp_path_factory.mktemp("tasks"))), include_defaults=False)


@pytest.fixture(scope="module")
def checkpoint():
    return Checkpoint.load(TINY, "cpu")


def model(batch_size=4, **options):
    return FlashDLM(TINY, device="cpu", batch_size=batch_size, **options)


def ask(lm, kind, *arguments):
    """The answers of the model to requests with these arguments."""
    return getattr(lm, kind)([Instance(kind, {}, each, 0) for each in arguments], disable_tqdm=True)


def until(*stops, **more):
    return {"until": list(stops), "max_gen_toks": 24, "do_sample": False, **more}


@pytest.mark.parametrize("batch_size", [1, 4])
@pytest.mark.parametrize("options", [{"method": "fast-dllm"}, {"method": "flashdlm", **GUIDANCE}], ids=str)
def test_a_task_is_answered_as_generate_answers(manager, checkpoint, batch_size, options):
    lm = model(batch_size, **options)
    found = lm_eval.simple_evaluate(
        lm, tasks=["words"], limit=4, task_manager=manager, apply_chat_template=True, bootstrap_iters=0
    )
    decode = {name: value for name, value in options.items() if not name.startswith("guider")}
    if "guider" in options:
        rule = {"combine": "intersection", "confidence_threshold": 0.5}
        decode["guider"] = checkpoint.load_guider(options["guider"], "cpu", **rule)
    alone = [checkpoint.continue_prompts([question], decode | {"max_new_tokens": 40}) for question in QUESTIONS[:4]]
    assert [sample["resps"][0][0].strip() for sample in found["samples"]["words"]] == [each.texts[0] for each in alone]
    right = [final_number(each.texts[0]) == problem.final for each, problem in zip(alone, problems(4), strict=False)]
    assert found["results"]["words"]["exact_match,number"] == sum(right) / 4 > 0
    assert lm.run.num_rows == 4
    assert lm.run.tokens == sum(each.lengths[0] for each in alone)
    assert lm.run.nfe == sum(int(each.output.nfe) for each in alone)
    assert (lm.run.guider_forwards > 0) == ("guider" in options)
    assert lm.run.seconds > 0


def test_a_filled_canvas_costs_all_its_forwards_and_is_read_up_to_its_end(checkpoint):
    lm = model(method="llada", stop_at_eos=False)
    prompt = QUESTIONS[0] + "\nAnswer:"
    [text] = ask(lm, "generate_until", (prompt, until(max_gen_toks=40)))
    output = checkpoint.continue_prompts([QUESTIONS[0]], {"method": "llada", "max_new_tokens": 40})
    assert text.strip() == output.texts[0]
    assert lm.run.nfe == 40 and lm.run.tokens == output.lengths[0] < 40


def test_stop_sequences_end_a_text_and_its_decode():
    lm = model(method="llada", block_length=1)
    prompt = QUESTIONS[0] + "\nAnswer:"
    whole, cut = (ask(lm, "generate_until", (prompt, until(*stops)))[0] for stops in ((), ("=",)))
    assert cut == whole.split("=")[0] != whole
    assert lm.run.nfe < 2 * len(lm.tok_encode(whole)), "the second decode took fewer forwards"


def test_a_task_may_draw():
    lm = model(method="fast-dllm")
    request = (QUESTIONS[0], until(do_sample=True, temperature=3.0))
    texts = set()
    for seed in range(2):
        torch.manual_seed(seed)
        texts.update(ask(lm, "generate_until", request))
    assert len(texts) == 2


def expected(lm, prompt, answer, num_samples):
    draw = random.Random(f"{lm.seed} {prompt} {answer}").getrandbits(63)
    generator = torch.Generator().manual_seed(draw)
    output = log_likelihood(lm.model, [prompt], [answer], num_samples=num_samples, generator=generator)
    return float(output.log_likelihood)


PAIRS = [(question + "\nAnswer:", " #### 7") for question in QUESTIONS[:3]]


def test_likelihoods_are_estimates_that_depend_on_their_texts_alone():
    lm = model(num_samples=3)
    answers = ask(lm, "loglikelihood", *PAIRS)
    for (prompt, answer), (value, _) in zip(PAIRS, answers, strict=True):
        ids = lm.tok_encode(prompt)
        assert value == pytest.approx(expected(lm, ids, lm.tok_encode(prompt + answer)[len(ids) :], 3), rel=1e-5)
    for batch_size in (1, 3):
        again = ask(model(batch_size, num_samples=3), "loglikelihood", *reversed(PAIRS))
        assert [value for value, _ in reversed(again)] == pytest.approx([value for value, _ in answers], rel=1e-5)
    other = ask(model(num_samples=3, seed=1), "loglikelihood", *PAIRS)
    assert all(mine[0] != others[0] for mine, others in zip(answers, other, strict=True))


def test_a_single_token_takes_one_forward():
    lm = model(num_samples=3)
    prompt = lm.tok_encode(QUESTIONS[0])
    [(value, _)] = lm._loglikelihood_tokens([(("", ""), prompt, [9])])
    assert lm.run.nfe == 1
    assert value == pytest.approx(expected(lm, prompt, [9], 7), rel=1e-5)


def test_whether_an_answer_would_be_written():
    lm = model(method="llada", num_samples=1)
    prompt = QUESTIONS[0] + "\nAnswer:"
    # A single block as long as the answer, as the estimate of an answer has it.
    [text] = ask(lm, "generate_until", (prompt, {"until": [], "max_gen_toks": 8, "do_sample": False}))
    ids = lm.tok_encode(prompt)
    assert ask(lm, "loglikelihood", (prompt, text), (prompt, text + " 3"))[0][1]
    assert not ask(lm, "loglikelihood", (prompt, text[:-1] + "#"))[0][1]
    assert len(lm.tok_encode(prompt + text)) == len(ids) + 8


def test_a_text_is_read_in_pieces_that_fit(checkpoint):
    lm = model(num_samples=2)
    text = "3 " * 600  # and there are 512 positions
    [value] = ask(lm, "loglikelihood_rolling", (text,))
    ids = lm.tok_encode(text)
    first, rest = ids[:511], ids[511:]
    pieces = [([lm.prefix_token_id], first), (ids[:511][-(512 - len(rest)) :], rest)]
    assert rest and value == pytest.approx(sum(expected(lm, *piece, 2) for piece in pieces), rel=1e-4)


def test_choices_and_perplexities_of_tasks(manager):
    lm = model(8, num_samples=8)
    found = lm_eval.simple_evaluate(lm, tasks=["choice", "reading"], limit=2, task_manager=manager, bootstrap_iters=0)[
        "results"
    ]
    assert found["choice"]["acc,none"] in (0, 0.5, 1)
    assert found["reading"]["word_perplexity,none"] > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pretrained": str(FOLDER / "guider")}, r"^`pretrained` must be a diffusion model, got '.*guider' with"),
        ({"guider": TINY}, r"^`--guider` must be an autoregressive language model, got type 'Dream'\.$"),
        ({"guider_top_k": 3}, r"^`guider_top_k` belongs to `guider`: drop it, or name a guider\.$"),
        ({"batch_size": "auto"}, r"^`batch_size` must be a number, got 'auto'\.$"),
    ],
    ids=str,
)
def test_what_cannot_be_evaluated_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        FlashDLM(**{"pretrained": TINY, "device": "cpu", **options})


def test_options_that_exclude_each_other_are_refused_by_generate():
    with pytest.raises(ValueError, match="`steps`"):
        ask(model(steps=4, confidence_threshold=0.9), "generate_until", (QUESTIONS[0], until()))


def test_an_answer_longer_than_the_model_is_refused():
    with pytest.raises(ValueError, match="^a continuation must be at most 511 tokens long, got 600: leave out its"):
        model()._loglikelihood_tokens([(("", ""), [1], [5] * 600)])


def test_the_models_themselves_can_be_given(checkpoint):
    guider = ARGuider(checkpoint.load_guider(str(FOLDER / "guider"), "cpu").model)
    lm = FlashDLM(checkpoint.model, tokenizer=checkpoint.tokenizer, guider=guider, method="flashdlm")
    assert ask(lm, "generate_until", (QUESTIONS[0] + "\nAnswer:", until()))[0]
    assert lm.run.guider_forwards > 0


@pytest.mark.heavy
def test_the_command_of_the_harness_knows_the_model(tmp_path):
    folder = write_tasks(tmp_path)
    arguments = f"""run --model flashdlm --model_args pretrained={TINY},method=fast-dllm --tasks words --limit 2
        --include_path {folder} --device cpu --batch_size 2 --apply_chat_template""".split()
    command = [sys.executable, "-m", "hf_flashdlm.evaluation", *arguments]
    run = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert run.returncode == 0, run.stderr
    assert "|words|" in run.stdout and "exact_match" in run.stdout
