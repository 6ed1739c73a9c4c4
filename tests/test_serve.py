"""Transformers' own server and chat on an exported folder, over loopback."""

import json
import os
import runpy
import subprocess
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError

import pytest
from pages import ROOT, page, section, snippets

from hf_flashdlm.console.checkpoint import Checkpoint, load_guider
from hf_flashdlm.hub.export import export_model
from hf_flashdlm.tiny import FOLDER as TINY


# What `pip install "transformers[serving]"` adds, and the command of Transformers, which may fail even so.
for name in ("fastapi", "openai", "uvicorn", "transformers.cli.transformers"):
    pytest.importorskip(name)

PAGE = "hf_flashdlm/hub/SERVE.md"
SERVING = runpy.run_path(str(ROOT / "examples" / "serving.py"))
CLI, serve = SERVING["CLI"], SERVING["serve"]
# A short answer, and another one with the guider.
QUESTION = json.loads((TINY / "problems.jsonl").read_text(encoding="utf-8").splitlines()[9])["question"]


def ask(url, folder, **options):
    """What the server answers to `QUESTION`."""
    return SERVING["ask"](url, folder, QUESTION, **options)


def text_of(answer):
    return json.loads(answer)["choices"][0]["message"]["content"].strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_model(str(TINY / "dlm"), tmp_path_factory.mktemp("exported") / "tiny", "o/tiny", "tiny-dlm")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with serve(folder, tmp_path_factory.mktemp("serve")) as (url, _):
        yield url


@pytest.fixture(scope="module")
def checkpoint(folder):
    return Checkpoint.load(str(folder), "cpu")


def test_the_server_answers_as_generate_does(url, folder, checkpoint):
    answer = json.loads(ask(url, folder, max_tokens=64))
    expected = checkpoint.continue_prompts([QUESTION], {"max_new_tokens": 64})
    assert answer["choices"][0]["message"]["content"].strip() == expected.texts[0]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == expected.lengths[0]


def test_a_streamed_answer_is_the_same(url, folder, checkpoint):
    lines = ask(url, folder, max_tokens=64, stream=True).split("\n\n")
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    text = "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks)
    assert text.strip() == checkpoint.continue_prompts([QUESTION], {"max_new_tokens": 64}).texts[0]
    assert len(chunks) > 3


def test_more_tokens_than_the_model_has_positions_are_refused(url, folder):
    with pytest.raises(HTTPError, match="500"):
        ask(url, folder)
    refusal = "`max_new_tokens` and the prompt must fit the model's 512 positions together"
    assert refusal in ask(url, folder, stream=True)


def test_options_are_passed_as_the_page_says(url, folder, checkpoint, capsys):
    code = snippets(page(PAGE))[1].replace("http://localhost:8000", url).replace('"FOLDER"', repr(str(folder)))
    exec(compile(code, PAGE, "exec"), {})
    question = "Adam has 3 coins and finds 4 more. How many coins does he have?"
    assert question in code
    expected = checkpoint.continue_prompts([question], {"max_new_tokens": 64, "method": "fast-dllm-dual"})
    assert capsys.readouterr().out.strip() == expected.texts[0]
    with pytest.raises(HTTPError, match="422"):
        ask(url, folder, max_tokens=64, block_length=8)


def test_a_generation_config_is_that_of_the_folder_but_for_what_it_names(url, folder, checkpoint):
    options = {"block_length": 4, "steps": 16}
    answer = ask(url, folder, generation_config=json.dumps(options))
    assert text_of(answer) == checkpoint.continue_prompts([QUESTION], options).texts[0]
    refused = ask(url, folder, stream=True, generation_config=json.dumps(options | {"steps": 3}))
    assert "`steps` must give each of the 16 blocks of 4 tokens at least one step, got 3" in refused


def test_a_temperature_draws_where_the_request_or_the_folder_says_so(url, folder):
    def drawn(**options):
        return {text_of(ask(url, folder, temperature=3.0, seed=seed, max_tokens=16, **options)) for seed in range(3)}

    assert len(drawn()) == 1
    assert len(drawn(generation_config=json.dumps({"do_sample": True}))) > 1


def test_requests_at_once_are_answered_one_after_another_and_alike(url, folder):
    alone = text_of(ask(url, folder, max_tokens=64))
    with ThreadPoolExecutor(4) as threads:
        together = [*threads.map(lambda _: text_of(ask(url, folder, max_tokens=64)), range(4))]
    assert together == 4 * [alone]


def test_a_stop_string_ends_a_text(url, folder):
    answer = json.loads(ask(url, folder, max_tokens=64, stop=["="]))["choices"][0]
    assert answer["message"]["content"].endswith("=") and answer["finish_reason"] == "stop"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flag", "refusal"),
    [
        ("--continuous-batching", "`generate_batch` and continuous batching decode from left to right"),
        ("--compile", "`cache_implementation` has no meaning for a diffusion decode, got 'static': drop it."),
    ],
)
def test_flags_that_a_canvas_has_no_use_for_are_refused_by_the_first_request(folder, tmp_path, flag, refusal):
    with serve(folder, tmp_path, flag) as (url, _):
        with pytest.raises(HTTPError, match="500"):
            ask(url, folder, max_tokens=64)
    assert refusal in (tmp_path / "log").read_text()


def test_a_guider_is_served_as_the_page_says(folder, checkpoint, tmp_path):
    assert '"hf-flashdlm/tiny-guider"' in section(PAGE, "A guider")
    guided = SERVING["with_guider"](folder, tmp_path / "guided", TINY / "guider")
    with serve(guided, tmp_path) as (url, _):
        answer = text_of(ask(url, guided, max_tokens=64))
        streamed = ask(url, guided, max_tokens=64, stream=True)
    options = {"max_new_tokens": 64}
    guider = load_guider(str(TINY / "guider"), "cpu")
    assert answer == checkpoint.continue_prompts([QUESTION], options | {"guider": guider}).texts[0]
    assert answer != checkpoint.continue_prompts([QUESTION], options).texts[0]
    assert '"error"' not in streamed


@pytest.mark.slow
def test_the_chat_of_transformers_talks_to_it(url, folder, checkpoint):
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}  # the client refuses loopback, too, in offline mode
    command = [*CLI, "chat", str(folder), f"{url}/v1", "max_new_tokens=64", "do_sample=False", "--user", "tester"]
    lines = f"{QUESTION}\n!exit\n"
    run = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    expected = checkpoint.continue_prompts([QUESTION], {"max_new_tokens": 64})
    assert expected.texts[0].splitlines()[0] in run.stdout
