"""A file of prompts: answered in batches, in order, and as if nothing had happened after a kill."""

import json
import os
import random
import subprocess
import sys
import time
from contextlib import nullcontext

import pytest

from hf_flashdlm.cli import main, many
from hf_flashdlm.cli.processes import Processes
from hf_flashdlm.console.answer_file import AnswerFile
from hf_flashdlm.console.prompt_file import Line, batches
from hf_flashdlm.tiny import FOLDER, problems


COMMAND = [
    "generate",
    "--model",
    str(FOLDER / "dlm"),
    "--device",
    "cpu",
    "--max-new-tokens",
    "8",
    "--block-length",
    "8",
]
QUESTIONS = [problem.question for problem in problems(12)[:12]]
CHAT = [{"role": "user", "content": "Nora has 2 nuts."}]
PROMPTS = [QUESTIONS[0], CHAT, *QUESTIONS[1:5]]


@pytest.fixture
def files(tmp_path):
    """`files(prompts)`: a file with `prompts`, bytes as they are, and the name of a file for the answers."""

    def files(prompts=PROMPTS):
        texts = [each if isinstance(each, bytes) else json.dumps(each).encode() for each in prompts]
        (tmp_path / "prompts.jsonl").write_bytes(b"".join(text + b"\n" for text in texts))
        return tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"

    return files


def command(path, output, *more):
    return [*COMMAND, "--input", str(path), "--output", str(output), *more]


def rows(output):
    return [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]


def beside(output):
    return sorted(path.name for path in output.parent.iterdir() if path.name.startswith("answers"))


@pytest.fixture(scope="module")
def expected():
    """The answers to `QUESTIONS`, each decoded alone."""
    from hf_flashdlm.prompting import Checkpoint

    checkpoint = Checkpoint.load(str(FOLDER / "dlm"), "cpu", "float32")
    options = {"max_new_tokens": 8, "block_length": 8}
    return [checkpoint.continue_prompts([question], options).texts[0] for question in QUESTIONS]


@pytest.mark.parametrize("size", ["1", "3"])
def test_prompts_and_chats_are_answered_in_their_order(files, capsys, expected, size):
    path, output = files([*PROMPTS, b"", b"  "])
    assert main(command(path, output, "--batch-size", size, "--stats")) == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("6 answers, 0 lines skipped\nNFE ")
    assert [row["line"] for row in rows(output)] == [1, 2, 3, 4, 5, 6]
    answers = [row["answer"] for row in rows(output)]
    assert [answers[0], *answers[2:]] == expected[:5]
    main([*COMMAND, "--prompt", CHAT[0]["content"]])
    assert capsys.readouterr().out == answers[1] + "\n"
    assert all(row["nfe"] >= 1 and 1 <= row["tokens"] <= 8 for row in rows(output))
    assert beside(output) == ["answers.jsonl", "answers.jsonl.run"]


def test_a_guider_is_counted_in_each_row(files):
    path, output = files(PROMPTS[:2])
    assert main(command(path, output, "--guider", str(FOLDER / "guider"))) == 0
    assert all(row["guider_forwards"] >= 1 for row in rows(output))


def test_batches_hold_prompts_of_about_the_same_length_and_the_longest_comes_first():
    lines = [Line(number, 0, length) for number, length in enumerate([3, 9, 4, 8, 9], 1)]
    assert [[line.number for line in batch] for batch in batches(lines, 2)] == [[2, 5], [4, 3], [1]]


BAD = {
    b"Adam has 3 coins.": "it is no JSON in UTF-8",
    b'"Adam \xff"': "it is no JSON in UTF-8",
    rb'"Adam \ud800"': "it is no JSON in UTF-8",
    b"[" * 100_000: "it is no JSON in UTF-8",
    b'""': "it is empty",
    b"[]": "it is empty",
    b"7": 'it must be a string, or a list of turns such as {"role": "user", "content": "Hello"}',
    b'["Hello"]': 'it must be a string, or a list of turns such as {"role": "user", "content": "Hello"}',
    b'[{"role": "user"}]': 'it must be a string, or a list of turns such as {"role": "user", "content": "Hello"}',
    json.dumps("3 " * 600).encode(): "its 604 tokens and 8 new ones are more than the model's 512 positions",
}


def test_bad_lines_are_named_and_skipped_or_fatal(files, capsys):
    path, output = files([*BAD, CHAT])
    assert main(command(path, output)) == 2
    assert capsys.readouterr().err == (
        "flashdlm: line 1 of `--input` is no prompt: it is no JSON in UTF-8; mend it, or add --bad-lines skip.\n"
    )
    assert not output.exists() and beside(output) == []
    assert main(command(path, output, "--bad-lines", "skip")) == 0
    told = [f"line {number} is skipped: {fault}." for number, fault in enumerate(BAD.values(), 1)]
    assert capsys.readouterr().err.splitlines() == [*told, "1 answers, 10 lines skipped"]
    assert rows(output)[:10] == [{"line": number, "error": fault} for number, fault in enumerate(BAD.values(), 1)]
    assert rows(output)[10]["line"] == 11 and rows(output)[10]["answer"]


def test_a_line_that_only_the_model_refuses_is_fatal_before_the_work(files, capsys):
    path, output = files([QUESTIONS[0], list(BAD)[-1]])
    assert main(command(path, output)) == 2
    assert "line 2 of `--input` is no prompt: its 604 tokens and 8 new ones" in capsys.readouterr().err
    assert beside(output) == []


def test_a_chat_needs_the_template(files, capsys):
    path, output = files([CHAT])
    assert main(command(path, output, "--no-chat")) == 2
    assert "line 1 of `--input` is no prompt: it is a chat, and no chat template is used;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--output a", "`--output` belongs to `--input`: drop it, or add `--input`."),
        ("--batch-size 2", "`--batch-size` belongs to `--input`: drop it, or add `--input`."),
        ("--bad-lines skip", "`--bad-lines` belongs to `--input`: drop it, or add `--input`."),
        ("--input a", "`--output` is missing: `--input` needs a file for the answers."),
        ("--input a --output b --prompt c", "`--prompt` cannot be used with `--input`: drop one of them."),
        ("--input a --output b --stream", "`--stream` cannot be used with `--input`: drop one of them."),
        ("--input a --output b --image c", "`--image` cannot be used with `--input`: drop one of them."),
        ("--input {}/no --output {}/b", "`--input` must be a file with prompts, got '{}/no', which is no file."),
        ("--input {}/empty --output {}/b", "`--input` must be a file with prompts, got '{}/empty', which is empty."),
        ("--input a --output /no/b", "`--output` must be a file in a folder that exists, got '/no/b'."),
        ("--input a --output b --batch-size 0", "argument --batch-size: must be an integer of at least 1, got '0'."),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, arguments, message):
    (tmp_path / "empty").write_text("\n \n")
    assert main([*COMMAND, *arguments.replace("{}", str(tmp_path)).split()]) == 2
    assert capsys.readouterr().err == f"flashdlm: {message}\n".replace("{}", str(tmp_path))


def interrupt(monkeypatch, after):
    """Let the command be interrupted when it has kept `after` batches."""
    add, kept = AnswerFile.add, []

    def interrupted(self, batch, batch_rows):
        if len(kept) == after:
            raise KeyboardInterrupt
        kept.append(batch)
        add(self, batch, batch_rows)

    monkeypatch.setattr(AnswerFile, "add", interrupted)


def test_only_what_is_left_is_decoded(files, monkeypatch, capsys, expected):
    path, output = files(QUESTIONS[:6])
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert main(command(path, output, "--batch-size", "2")) == 130
    assert beside(output) == ["answers.jsonl.part0", "answers.jsonl.run"]
    with (output.parent / "answers.jsonl.part0").open("ab") as file:
        file.write(b'{"run": "0", "ba')  # a kill in the middle of a line
    decoded = []
    add = AnswerFile.add
    monkeypatch.setattr(AnswerFile, "add", lambda self, batch, rows: decoded.append(batch) or add(self, batch, rows))
    assert main(command(path, output, "--batch-size", "2")) == 0
    assert decoded == [2]
    assert [row["answer"] for row in rows(output)] == expected[:6]
    assert main(command(path, output, "--batch-size", "2")) == 0
    assert decoded == [2], "a command that is done does nothing"


def test_draws_do_not_depend_on_an_interrupt(files, monkeypatch):
    path, output = files(QUESTIONS[:4])
    arguments = command(path, output, "--batch-size", "1", "--temperature", "2", "--seed", "5")
    assert main(arguments) == 0
    whole = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        interrupt(patch, 3)
        assert main(arguments) == 130
    assert main(arguments) == 0
    assert output.read_bytes() == whole


@pytest.mark.parametrize("changed", ["prompts", "--max-new-tokens", "--seed", "--chat"])
def test_the_output_of_another_run_is_refused(files, capsys, changed):
    path, output = files(QUESTIONS[:2])
    assert main(command(path, output)) == 0
    before = output.read_bytes()
    more = {"--max-new-tokens": ["--max-new-tokens", "9"], "--seed": ["--seed", "1"], "--chat": ["--chat"]}
    if changed == "prompts":
        files(QUESTIONS[:3])
    capsys.readouterr()
    assert main(command(path, output, *more.get(changed, []))) == 2
    name = {"prompts": "input"}.get(changed, changed.removeprefix("--").replace("-", "_"))
    assert capsys.readouterr().err == (
        f"flashdlm: `--output` must be a new file or one of the same run, got {str(output)!r} with another {name}: "
        "give the same arguments, or write to another file.\n"
    )
    assert output.read_bytes() == before


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.jsonl.part3"])
def test_a_file_that_no_run_has_written_is_refused(files, capsys, name):
    path, output = files(QUESTIONS[:1])
    (output.parent / name).write_text("a file of the user's")
    assert main(command(path, output)) == 2
    assert capsys.readouterr().err == (
        f"flashdlm: `--output` must be a new file or one of the same run, got {str(output)!r}, which has no "
        "answers.jsonl.run beside it: write to another file.\n"
    )
    assert (output.parent / name).read_text() == "a file of the user's"


RUN = {"model": "a", "seed": 0}


def answers(folder, run=RUN, process=0):
    return AnswerFile(folder / "answers.jsonl", run, process)


def test_batches_are_kept_once_whoever_has_written_them(tmp_path):
    for process in (0, 1):
        file = answers(tmp_path, process=process)
        file.claim()
        file.start()
        file.add(process, [{"line": 2 - process}])
        file.add(2, [{"line": 4}])
    with (tmp_path / "answers.jsonl.part1").open("ab") as part:
        part.write(b"\0\0\0\n")  # as a loss of power leaves behind
    assert answers(tmp_path).finish(3, {3: "it is empty"}) == rows(tmp_path / "answers.jsonl")
    assert [row["line"] for row in rows(tmp_path / "answers.jsonl")] == [1, 2, 3, 4]


def test_an_output_with_fewer_batches_than_there_are_is_not_written(tmp_path):
    file = answers(tmp_path)
    file.claim()
    file.start()
    with pytest.raises(
        ValueError, match="^`--output` must be written by one command at a time, and .* 0 of 1 batches"
    ):
        file.finish(1, {})
    assert not file.path.exists()


def test_parts_of_another_run_are_refused(tmp_path):
    other = answers(tmp_path, {"model": "b"})
    other.claim()
    other.start()
    other.add(0, [])
    other.run_path.unlink()
    mine = tmp_path / "answers.jsonl.run"
    mine.write_text(json.dumps(RUN))
    with pytest.raises(
        ValueError, match=r"^`--output` must have no part of another run beside it: remove '.*part0'\.$"
    ):
        answers(tmp_path).done()
    mine.write_text("{")
    with pytest.raises(ValueError, match=r", whose answers\.jsonl\.run cannot be read: write to another file\.$"):
        answers(tmp_path)


def test_what_an_end_between_two_moves_leaves_is_removed(files):
    path, output = files(QUESTIONS[:1])
    main(command(path, output))
    before = output.read_bytes()
    (output.parent / "answers.jsonl.part0").write_bytes(b"")
    assert main(command(path, output)) == 0
    assert output.read_bytes() == before and beside(output) == ["answers.jsonl", "answers.jsonl.run"]


def test_progress_shows_a_rate_and_the_time_left(files, monkeypatch, capsys):
    path, output = files(QUESTIONS[:3])
    monkeypatch.setattr(many, "LOG_SECONDS", 0)
    assert main(command(path, output, "--batch-size", "1")) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" rows, ")[0] for line in lines[:3]] == ["1 of 3", "2 of 3", "3 of 3"]
    assert all(" rows/s, left: 0:0" in line for line in lines[:3])
    output.unlink()
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    assert main(command(path, output, "--batch-size", "1")) == 0
    shown = capsys.readouterr().err
    assert "rows/s, left:" in shown and "3/3" in shown


def kill_and_resume(arguments, output, delay):
    """Start the command, kill it after `delay` seconds of work, and let it go on; whether there was work left."""
    process = start(arguments)
    while not (output.parent / "answers.jsonl.part0").exists() and process.poll() is None:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.wait()
    was_left = not output.exists()
    assert start(arguments).wait() == 0
    return was_left


def start(arguments):
    """Start the command in a process of its own."""
    return subprocess.Popen([sys.executable, "-m", "flashdlm_command", *arguments], stderr=subprocess.DEVNULL)


@pytest.mark.heavy
def test_a_kill_loses_and_doubles_nothing(files, expected):
    path, output = files(QUESTIONS)
    assert kill_and_resume(command(path, output, "--batch-size", "1"), output, 0.05), "the kill came too late"
    assert [row["line"] for row in rows(output)] == list(range(1, 13))
    assert [row["answer"] for row in rows(output)] == expected


@pytest.mark.slow
def test_twenty_kills_lose_and_double_nothing(files, expected):
    path, output = files(QUESTIONS)
    draw, left = random.Random(0), 0
    for _ in range(20):
        left += kill_and_resume(command(path, output, "--batch-size", "1"), output, draw.uniform(0, 0.8))
        assert [row["line"] for row in rows(output)] == list(range(1, 13))
        assert [row["answer"] for row in rows(output)] == expected
        for name in beside(output):
            (output.parent / name).unlink()
    assert left >= 5, "the kills came too late"


@pytest.fixture
def join(monkeypatch):
    """`join(number)`: from now on this is process `number` of two, the other of which says the same."""

    def join(number):
        monkeypatch.setattr(Processes, "joined", lambda args: nullcontext(Processes(number, 2)))
        monkeypatch.setattr(Processes, "gather", lambda self, value: [value, value])

    return join


def test_processes_share_the_batches(files, join, capsys, expected):
    path, output = files(QUESTIONS[:5])
    arguments = command(path, output, "--batch-size", "1")
    join(0)
    assert main(arguments) == 2
    assert capsys.readouterr().err == (
        "flashdlm: `--output` must be written by one command at a time, and lie in a folder that all its processes "
        f"share, got 3 of 5 batches beside {str(output)!r}: run it again.\n"
    )
    join(1)
    assert main(arguments) == 0
    assert beside(output) == ["answers.jsonl.part0", "answers.jsonl.part1", "answers.jsonl.run"]
    assert capsys.readouterr().err == ""
    join(0)
    assert main(arguments) == 0
    assert [row["answer"] for row in rows(output)] == expected[:5]
    assert beside(output) == ["answers.jsonl", "answers.jsonl.run"]


@pytest.mark.heavy
def test_two_launched_processes_give_the_rows_of_one(files, monkeypatch):
    path, output = files(QUESTIONS[:5])
    arguments = command(path, output, "--batch-size", "1", "--temperature", "2", "--seed", "3")
    assert main(arguments) == 0
    whole = output.read_bytes()
    output.unlink()
    with monkeypatch.context() as patch:
        interrupt(patch, 2)
        assert main(arguments) == 130
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no".split()
    launcher = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--main_process_port", "0", "-m"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([*launcher, "hf_flashdlm", *arguments], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stderr.count("5 answers, 0 lines skipped") == 1
    assert output.read_bytes() == whole


def test_processes_must_be_alike(monkeypatch):
    processes = Processes(0, 2)
    monkeypatch.setattr(Processes, "gather", lambda self, values: [values, values | {"version of torch": "2.6"}])
    processes.agree({"seed": 1, "version of torch": "2.6"})
    with pytest.raises(ValueError) as refused:
        processes.agree({"seed": 1, "version of torch": "2.13"})
    assert str(refused.value) == (
        "all processes must have the same version of torch, got '2.13' in process 0 and '2.6' in process 1: start all "
        "of them alike."
    )
