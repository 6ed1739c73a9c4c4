"""Transformers' own server and chat on an exported folder, over loopback."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, contextmanager
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from pages import section, snippets

from hf_flashdlm.console.checkpoint import Checkpoint, load_guider
from hf_flashdlm.hub.export import export_model
from hf_flashdlm.tiny import FOLDER as TINY


# What `pip install "transformers[serving]"` adds, and the command of Transformers, which may fail even so.
for name in ("fastapi", "openai", "uvicorn", "transformers.cli.transformers"):
    pytest.importorskip(name)

# A short answer, and another one with the guider.
QUESTION = json.loads((TINY / "problems.jsonl").read_text(encoding="utf-8").splitlines()[9])["question"]
CLI = [sys.executable, "-m", "transformers.cli.transformers"]
SECONDS_TO_START = 120


def free_port():
    with closing(socket.socket()) as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def is_healthy(url):
    try:
        return urlopen(f"{url}/health", timeout=5).status == 200
    except OSError:
        return False


@contextmanager
def serve(folder, apart):
    """The address at which `transformers serve` serves `folder`; its log and its modules are kept in `apart`."""
    port = free_port()
    command = [*CLI, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(apart / "modules")}
    with (apart / "log").open("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=apart, env=environment, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
            while not is_healthy(url):
                assert process.poll() is None and time.monotonic() < deadline, (apart / "log").read_text()
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()
            process.wait(timeout=30)


def ask(url, folder, **options):
    """What the server answers to `QUESTION`."""
    body = {"model": str(folder), "messages": [{"role": "user", "content": QUESTION}], **options}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return response.read().decode()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return export_model(str(TINY / "dlm"), tmp_path_factory.mktemp("exported") / "tiny", "o/tiny", "tiny-dlm")


@pytest.fixture(scope="module")
def url(folder, tmp_path_factory):
    with serve(folder, tmp_path_factory.mktemp("serve")) as url:
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


def test_a_guider_is_served_as_the_page_says(folder, checkpoint, tmp_path):
    (code,) = snippets(section("hf_flashdlm/hub/README.md", "Serving"))
    guided = shutil.copytree(folder, tmp_path / "guided")
    (guided / "custom_generate").mkdir()
    assert '"hf-flashdlm/tiny-guider"' in code
    code = code.replace('"hf-flashdlm/tiny-guider"', repr(str(TINY / "guider")))
    (guided / "custom_generate" / "generate.py").write_text(code, encoding="utf-8")
    with serve(guided, tmp_path) as url:
        answer = json.loads(ask(url, guided, max_tokens=64))["choices"][0]["message"]["content"].strip()
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
