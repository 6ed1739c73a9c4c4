"""What Transformers' server needs for an exported folder: memory, and processor time of requests alone and at once.

    OMP_NUM_THREADS=1 python examples/serving.py --json examples/results/serving.json

The embedded pair is exported and served over loopback, alone and with its guider in the folder. The same problems are
asked one after another, as a stream, and all at once. Processor time counts, which other work on the machine does not
change. Needs `pip install "transformers[serving]"`, and Linux, which tells time and memory of a process.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import torch

from hf_flashdlm.bench.machine import describe_machine, versions
from hf_flashdlm.bench.report import format_table, write_json
from hf_flashdlm.hub.export import export_model
from hf_flashdlm.tiny import FOLDER, final_number, sample_problems


CLI = [sys.executable, "-m", "transformers.cli.transformers"]
PAGE = Path(__file__).parents[1] / "hf_flashdlm" / "hub" / "SERVE.md"
SECONDS_TO_START, MAX_TOKENS = 240, 64


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
def serve(folder, apart, *more):
    """The address at which `transformers serve` serves `folder`, and its process; its log is in the folder `apart`."""
    port = free_port()
    command = [*CLI, "serve", str(folder), "--trust-remote-code", "--device", "cpu", "--host", "127.0.0.1", *more]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(apart / "modules")}
    with (apart / "log").open("w+") as log:
        process = subprocess.Popen([*command, "--port", str(port)], cwd=apart, env=environment, stdout=log, stderr=log)
        try:
            url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + SECONDS_TO_START
            while not is_healthy(url):
                assert process.poll() is None and time.monotonic() < deadline, (apart / "log").read_text()
                time.sleep(0.1)
            yield url, process
        finally:
            process.terminate()
            process.wait(timeout=30)


def request(url, folder, question, **options):
    """A request for an answer to `question`."""
    body = {"model": str(folder), "messages": [{"role": "user", "content": question}], **options}
    return Request(f"{url}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})


def ask(url, folder, question, **options):
    """What the server answers to `question`."""
    with urlopen(request(url, folder, question, **options), timeout=120) as response:
        return response.read().decode()


def share_at_first_text(url, folder, question):
    """When a streamed answer has a piece of text, as a share of the time until its end."""
    started = time.perf_counter()
    with urlopen(request(url, folder, question, max_tokens=MAX_TOKENS, stream=True), timeout=120) as response:
        next(line for line in response if b'"content"' in line)
        first = time.perf_counter()
        response.read()
    return (first - started) / (time.perf_counter() - started)


def processor_seconds(process):
    """Processor time that a process has taken so far."""
    fields = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(process):
    """Most bytes that a process has had in memory so far."""
    status = Path(f"/proc/{process.pid}/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition("VmHWM:")[2].split()[0])


def with_guider(folder, guided, guider):
    """A copy of `folder` whose server has a guider, as the page says."""
    shutil.copytree(folder, guided)
    code = PAGE.read_text(encoding="utf-8").partition("```python\n")[2].partition("```")[0]
    (guided / "custom_generate").mkdir()
    path = guided / "custom_generate" / "generate.py"
    path.write_text(code.replace('"hf-flashdlm/tiny-guider"', repr(str(guider))), encoding="utf-8")
    return guided


def measure(name, folder, apart, problems):
    """The row of a served folder."""

    def is_right(problem):
        answer = json.loads(ask(url, folder, problem.question, max_tokens=MAX_TOKENS))
        return final_number(answer["choices"][0]["message"]["content"]) == problem.final

    with serve(folder, apart) as (url, process):
        is_right(problems[0])  # warm-up
        memory, times = peak_memory(process), [processor_seconds(process)]
        right = sum(map(is_right, problems))
        times.append(processor_seconds(process))
        with ThreadPoolExecutor(len(problems)) as threads:
            right_at_once = sum(threads.map(is_right, problems))
        times.append(processor_seconds(process))
        shares = [share_at_first_text(url, folder, problem.question) for problem in problems]
    return {
        "served": name,
        "memory_bytes": memory,
        "right": right,
        "right_at_once": right_at_once,
        "processor_seconds_per_request": (times[1] - times[0]) / len(problems),
        "processor_seconds_per_request_at_once": (times[2] - times[1]) / len(problems),
        "median_share_at_first_text": statistics.median(shares),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--problems", type=int, default=8, metavar="N", help="requests (default: 8)")
    parser.add_argument("--json", metavar="PATH", help="write the figures to this file")
    args = parser.parse_args()
    problems = sample_problems(args.problems, seed=0)
    with TemporaryDirectory() as directory:
        apart = Path(directory)
        folder = export_model(str(FOLDER / "dlm"), apart / "tiny", "o/tiny", "tiny-dlm")
        guided = with_guider(folder, apart / "guided", FOLDER / "guider")
        rows = [measure(*served, apart, problems) for served in (("the model", folder), ("with its guider", guided))]
    record = {
        "command": "OMP_NUM_THREADS=1 python examples/serving.py --json examples/results/serving.json",
        "problems": args.problems,
        "max_tokens": MAX_TOKENS,
        "machine": describe_machine(torch.device("cpu")),
        "versions": versions(),
        "rows": rows,
    }
    print(format_table([*rows[0]], [[str(value) for value in row.values()] for row in rows]))
    if args.json is not None:
        write_json(Path(args.json), record)


if __name__ == "__main__":
    main()
