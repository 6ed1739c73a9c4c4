"""The command line: arguments in, texts and figures out, one sentence for a mistake."""

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest

import hf_flashdlm
from hf_flashdlm.bench.settings import Settings
from hf_flashdlm.cli import main
from hf_flashdlm.tiny import FOLDER as TINY


ROOT = Path(__file__).parents[1]
QUESTION = "Adam has 3 coins. Nora gives Adam 4 more coins. How many coins does Adam have now?"
SHORT = ["generate", "--model", str(TINY / "dlm"), "--device", "cpu", "--max-new-tokens", "8", "--block-length", "8"]
GENERATE_OPTIONS = """--model --guider --prompt --image --max-new-tokens --block-length --steps
--confidence-threshold --window-policy --temperature --seed --dtype --device --chat --no-chat --stream --stats --input
--output --batch-size --bad-lines""".split()
CHAT_OPTIONS = """--model --guider --max-new-tokens --block-length --temperature --seed --dtype --device
--system""".split()
APP_OPTIONS = "--model --guider --host --port --share --dtype --device".split()
DEMO_OPTIONS = "--problems --batch-size --repeats --show --slow --seed --json".split()
PUSH_OPTIONS = "--private --public --tag --dry-run".split()


@pytest.mark.parametrize(
    ("command", "options"),
    [("generate", GENERATE_OPTIONS), ("chat", CHAT_OPTIONS), ("app", APP_OPTIONS)]
    + [("demo", DEMO_OPTIONS), ("push", PUSH_OPTIONS)],
    ids=["generate", "chat", "app", "demo", "push"],
)
def test_help_names_every_option(capsys, command, options):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    words = capsys.readouterr().out.replace(",", " ").split("options:")[1].split()
    assert sorted(set(options)) == sorted({word for word in words if word.startswith("--")} - {"--help", "--steps:"})


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    printed = capsys.readouterr().out
    for command in ("generate", "chat", "app", "demo", "bench", "evaluate", "export", "push"):
        assert f"\n    {command} " in printed


def test_the_package_runs_as_a_module():
    run = subprocess.run(
        [sys.executable, "-m", "hf_flashdlm", "--version"], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"flashdlm {hf_flashdlm.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    ["--version", "--help", "bench --help", "evaluate --help", "export model --help", "chat --steps", "app --port 0"],
)
def test_help_and_mistakes_do_not_wait_for_torch(arguments):
    imported = """
import sys
import flashdlm_command
try:
    sys.exit(flashdlm_command.main())
finally:
    print(sorted({name.split(".")[0] for name in sys.modules} & {"torch", "transformers", "rich", "huggingface_hub"}))
"""
    command = [sys.executable, "-c", imported, *arguments.split()]
    run = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == (0 if arguments.startswith("--version") or arguments.endswith("--help") else 2)
    assert run.stdout.splitlines()[-1] == "[]"


def test_the_script_runs_the_package_before_a_command(tmp_path):
    arguments = [*SHORT, "--prompt", QUESTION]
    script, module = (
        subprocess.run([sys.executable, "-m", name, *arguments], capture_output=True, text=True, cwd=ROOT)
        for name in ("flashdlm_command", "hf_flashdlm")
    )
    assert script.returncode == module.returncode == 0
    assert script.stdout == module.stdout != ""
    assert script.stderr == module.stderr == ""


def test_texts_are_all_that_standard_output_gets(capsys):
    assert main([*SHORT, "--prompt", QUESTION, "--prompt", "Nora has 2 nuts."]) == 0
    both = capsys.readouterr()
    assert main([*SHORT, "--prompt", QUESTION]) == 0
    first = capsys.readouterr().out
    assert both.out.startswith(first + "\n")
    assert both.err == ""


def test_a_prompt_is_read_from_standard_input(capsys, monkeypatch):
    main([*SHORT, "--prompt", QUESTION])
    expected = capsys.readouterr().out
    monkeypatch.setattr("sys.stdin", io.StringIO(QUESTION + "\n"))
    assert main(SHORT) == 0
    assert capsys.readouterr().out == expected


def test_stats_go_to_standard_error(capsys):
    assert main([*SHORT, "--prompt", QUESTION, "--steps", "8", "--window-policy", "none", "--stats"]) == 0
    line, seconds = capsys.readouterr().err.splitlines()
    assert line.startswith("NFE 8, guider forwards 0, active tokens ")
    assert line.endswith(", tokens per forward 1.00")
    assert float(seconds.removesuffix(" seconds")) > 0


def test_a_guider_is_counted(capsys):
    assert main([*SHORT, "--prompt", QUESTION, "--guider", str(TINY / "guider"), "--stats"]) == 0
    words = capsys.readouterr().err.replace(",", "").split()
    nfe, guider_forwards = int(words[1]), int(words[4])
    assert 1 <= guider_forwards == nfe <= 8


def test_a_stream_prints_each_text_and_its_stats(capsys):
    prompts = ["--prompt", QUESTION, "--prompt", "Nora has 2 nuts."]
    main([*SHORT, *prompts])
    expected = capsys.readouterr().out.split()
    assert main([*SHORT, *prompts, "--stream", "--stats"]) == 0
    captured = capsys.readouterr()
    assert captured.out.split() == expected
    assert captured.err.count("NFE") == 2


def test_the_seed_decides_what_is_drawn(capsys):
    def drawn(seed):
        main([*SHORT, "--prompt", QUESTION, "--temperature", "2", "--seed", seed])
        return capsys.readouterr().out

    texts = [drawn(seed) for seed in "12345"]
    assert texts == [drawn(seed) for seed in "12345"]
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["generate"], "the following arguments are required: --model"),
        (["export"], "the following arguments are required: KIND"),
        (["export", "model", "o/n", "folder"], "the following arguments are required: --checkpoint"),
        (["push", "folder"], "the following arguments are required: REPO_ID"),
        (["push", "folder", "o/n", "--private", "--public"], "argument --public: not allowed with argument --private"),
        ([*SHORT, "--prompt", ""], "a prompt must hold text, got ''."),
        ([*SHORT, "--prompt", "a", "--steps", "x"], "argument --steps: invalid int value: 'x'"),
        (["demo", "--problems", "0"], "argument --problems: must be an integer of at least 1, got '0'."),
        (["demo", "--show", "-1"], "argument --show: must be an integer of at least 0, got '-1'."),
        (["demo", "--slow", "fast"], "argument --slow: must be an integer of at least 0, got 'fast'."),
        (
            ["demo", "--json", "/no/such/folder/a.json"],
            "`--json` must be a file in a folder that exists, got '/no/such",
        ),
        (["demo", "--json", "/"], "`--json` must be a file in a folder that exists, got '/'."),
        (["demo", "--problems", "1000000"], "`--problems` must be at most "),
        (
            ["generate", "--model", "/no/such", "--prompt", "a"],
            "`--model` must be a folder with a checkpoint or a Hub ",
        ),
        (
            [*SHORT, "--prompt", "a", "--guider", str(TINY / "dlm")],
            "`--guider` must be an autoregressive language model",
        ),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(capsys, arguments, message):
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith(f"flashdlm: {message}")
    assert captured.err.count("\n") == 1


def test_what_generate_refuses_is_a_mistake_too(capsys):
    assert main([*SHORT, "--prompt", "a", "--steps", "8", "--confidence-threshold", "0.9"]) == 2
    error = capsys.readouterr().err
    assert "`steps`" in error and "`confidence_threshold`" in error
    assert error.count("\n") == 1


def test_a_terminal_is_asked_for_a_prompt(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("ignored"))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert main(SHORT) == 2
    assert "`--prompt` is missing: give it, or pipe a prompt into the command." in capsys.readouterr().err


def test_an_interrupt_ends_quietly(capsys, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_flashdlm.bench.demo.run_demo", interrupted)
    assert main(["demo"]) == 130
    assert capsys.readouterr().err == ""


def test_demo_passes_its_settings_and_writes_the_figures(monkeypatch, tmp_path):
    seen = []
    monkeypatch.setattr(
        "hf_flashdlm.bench.demo.run_demo", lambda settings, console: seen.append(settings) or {"figure": 1}
    )
    path = tmp_path / "figures.json"
    arguments = "demo --problems 3 --batch-size 2 --repeats 5 --show 0 --slow 9 --seed 7".split()
    assert main([*arguments, "--json", str(path)]) == 0
    assert seen == [Settings(problems=3, batch_size=2, repeats=5, show=0, slow=9, seed=7)]
    assert json.loads(path.read_text()) == {"figure": 1}
