"""The host's own server and chat on an exported folder, over loopback."""

import json
import os
import socket
import subprocess
import sys
import time
from contextlib import closing
from urllib.request import Request, urlopen

import pytest

from hf_flashdlm import hub
from hf_flashdlm.demo import TINY
from hf_flashdlm.prompting import Checkpoint


# What `pip install "transformers[serving]"` adds, and the host's command line, which may lack something even so.
for name in ("fastapi", "openai", "uvicorn", "transformers.cli.transformers"):
    pytest.importorskip(name)

QUESTION = json.loads((TINY / "problems.jsonl").read_text(encoding="utf-8").splitlines()[0])["question"]
HOST = [sys.executable, "-m", "transformers.cli.transformers"]
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


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """The folder that `transformers serve` serves, and where."""
    apart = tmp_path_factory.mktemp("serve")
    folder = hub.export_model(str(TINY / "dlm"), apart / "tiny", "o/tiny", "tiny-dlm")
    port = free_port()
    command = [*HOST, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1"]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(apart / "modules")}
    with (apart / "log").open("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=apart, env=environment, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
            while not is_healthy(url):
                assert process.poll() is None and time.monotonic() < deadline, (apart / "log").read_text()
                time.sleep(0.1)
            yield folder, url
        finally:
            process.terminate()
            process.wait(timeout=30)


def test_the_server_answers_as_generate_does(server):
    folder, url = server
    turn = {"role": "user", "content": QUESTION}
    body = {"model": str(folder), "messages": [turn], "max_tokens": 64}
    request = Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        answer = json.load(response)
    expected = Checkpoint.load(str(folder), "cpu").continue_prompts([QUESTION], {"max_new_tokens": 64})
    assert answer["choices"][0]["message"]["content"].strip() == expected.texts[0]
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == expected.lengths[0]


def test_the_chat_of_the_host_talks_to_it(server):
    folder, url = server
    environment = os.environ | {"HF_HUB_OFFLINE": "0"}  # the client refuses loopback, too, in offline mode
    command = [*HOST, "chat", str(folder), f"{url}/v1", "max_new_tokens=64", "do_sample=False", "--user", "tester"]
    lines = f"{QUESTION}\n!exit\n"
    run = subprocess.run(command, input=lines, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    expected = Checkpoint.load(str(folder), "cpu").continue_prompts([QUESTION], {"max_new_tokens": 64})
    assert expected.texts[0].splitlines()[0] in run.stdout
