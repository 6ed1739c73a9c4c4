"""`flashdlm evaluate`: its table, its record, what it does not measure twice, and what it refuses."""

import importlib.util
import json

import pytest
from pages import ROOT, blocks, page

from hf_flashdlm.cli import main
from hf_flashdlm.methods import METHODS
from hf_flashdlm.tiny import FOLDER


COMMAND = ["evaluate", "--model", str(FOLDER / "dlm"), "--device", "cpu", "--new-tokens", "24"]
COMMAND += ["--num-samples", "2", "--dtype", "float32"]


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main([*COMMAND, "--tasks", "gsm8k"]) == 2
    assert capsys.readouterr().err == (
        "flashdlm: `flashdlm evaluate` needs lm-eval, which is not installed: pip install 'hf-flashdlm[eval]'.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --tasks"),
        ("--tasks a,,b", "argument --tasks: must be names with commas between them, got 'a,,b'."),
        ("--tasks a --limit 0", "argument --limit: must be an integer of at least 1, got '0'."),
        ("--tasks a --num-fewshot -1", "argument --num-fewshot: must be an integer of at least 0, got '-1'."),
        ("--tasks a --json /no/b", "`--json` must be - or a file in a folder that exists, got '/no/b'."),
        ("--tasks a --plot b.txt", "`--plot` must be a .png or .svg file in a folder that exists, got 'b.txt'."),
    ],
)
def test_a_mistake_is_refused_without_the_harness(capsys, arguments, message):
    assert main([*COMMAND, *arguments.split()]) == 2
    assert capsys.readouterr().err == f"flashdlm: {message}\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with tasks of the harness."""
    pytest.importorskip("lm_eval", reason="`make test-eval` installs it")
    from harness_tasks import write_tasks

    return write_tasks(tmp_path_factory.mktemp("tasks"))


def evaluate(folder, *arguments, tasks="words", limit=2):
    files = ",".join(str(folder / f"{name}.yaml") for name in tasks.split(","))
    return main([*COMMAND, "--tasks", files, "--limit", str(limit), *arguments])


def count_runs(monkeypatch):
    """A list that grows by the limit of each run of the harness."""
    import lm_eval

    runs, simple_evaluate = [], lm_eval.simple_evaluate

    def counted(*args, **kwargs):
        runs.append(kwargs["limit"])
        return simple_evaluate(*args, **kwargs)

    monkeypatch.setattr(lm_eval, "simple_evaluate", counted)
    return runs


def test_the_table_and_the_record(folder, tmp_path, capsys, monkeypatch):
    runs, path = count_runs(monkeypatch), tmp_path / "record.json"
    guider = ["--guider", str(FOLDER / "guider"), "--batch-size", "2"]
    more = [*guider, "--json", str(path), "--plot", str(tmp_path / "plot.png")]
    assert evaluate(folder, *more, tasks="words,choice") == 0
    assert runs == [1, 2, 2, 2, 2, 2], "the first is the warm-up"
    words, choice = capsys.readouterr().out.split("\n\n")
    lines = [line.split() for line in words.splitlines()]
    assert words.startswith("words, exact_match,number, 2 problems\n")
    assert lines[1] == ["method", "accuracy%", "95%", "s/problem", "/full", "/EOS", "NFE", "guider", "tok/fwd"]
    assert [line[0] for line in lines[2:]] == ["plain", "plain-eos", "freecache", "guided"]
    assert choice.splitlines()[2].split()[0] == "log-likelihood"
    record = json.loads(path.read_text())
    rows = {row["method"]: row for row in record["rows"]}
    plain, guided = rows["plain"], rows["guided"]
    assert plain["nfe"] == 24 and plain["guider_forwards"] == 0 and plain["speed_over_full_canvas"] == 1
    assert guided["nfe"] == guided["guider_forwards"] < 24
    assert guided["speed_over_full_canvas"] == pytest.approx(plain["seconds"] / guided["seconds"])
    assert guided["speed_over_eos_stop"] == pytest.approx(rows["plain-eos"]["seconds"] / guided["seconds"])
    assert guided["tokens_per_forward"] == pytest.approx(guided["tokens"] / guided["nfe"])
    low, high = guided["score_interval"]
    assert 0 <= low <= guided["score"] <= high <= 1
    assert rows["log-likelihood"]["tokens_per_forward"] is None
    assert record["command"].startswith("flashdlm evaluate --model ")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_what_the_record_holds_is_not_measured_again(folder, tmp_path, capsys, monkeypatch):
    runs, path = count_runs(monkeypatch), tmp_path / "record.json"
    arguments = ["--json", str(path), "--methods", "fast-dllm,freecache+threshold"]
    from hf_flashdlm.evaluation import compare

    with monkeypatch.context() as patch:
        measure = compare.measure

        def interrupted(args, manager, models, row, limit):
            if row.recipe.name == "freecache+threshold":
                raise KeyboardInterrupt
            return measure(args, manager, models, row, limit)

        patch.setattr(compare, "measure", interrupted)
        assert evaluate(folder, *arguments) == 130
    assert runs == [1, 2]
    assert evaluate(folder, *arguments) == 0
    assert runs == [1, 2, 1, 2]
    first = capsys.readouterr().out
    assert evaluate(folder, *arguments) == 0
    assert runs == [1, 2, 1, 2] and capsys.readouterr().out == first
    assert evaluate(folder, *arguments, limit=1) == 0
    assert len(runs) == 7, "another limit is another row"
    assert len(json.loads(path.read_text())["earlier"]) == 2


def test_methods_that_are_made_for_a_guider_are_measured_with_it():
    pytest.importorskip("lm_eval", reason="`make test-eval` installs it")
    from hf_flashdlm.evaluation import compare

    known = compare.methods(16, 4)
    assert {name for name in METHODS if known[name].guider is not None} == {"flashdlm", "flashdlm-fast"}


def test_the_task_of_the_page_is_one(folder, monkeypatch):
    from lm_eval.tasks import TaskManager

    from hf_flashdlm.evaluation import compare

    file = folder / "page.yaml"
    [text] = blocks(page("hf_flashdlm/evaluation/README.md"), "yaml")
    file.write_text(text, encoding="utf-8")
    monkeypatch.chdir(ROOT)
    [task] = compare.load_task(TaskManager(include_defaults=False), str(file)).values()
    assert len(task.test_docs()) == 600 and compare.new_tokens(task) == 64
    assert task.doc_to_target(task.test_docs()[0]) == "26"


def test_a_metric_is_chosen_by_name(folder, capsys):
    assert evaluate(folder, "--metric", "bits_per_byte,none", tasks="reading") == 2
    assert capsys.readouterr().err.endswith(
        f"flashdlm: `--metric` must be one of word_perplexity,none in '{folder / 'reading.yaml'}', got "
        "'bits_per_byte,none'.\n"
    )
    assert evaluate(folder, "--metric", "word_perplexity,none", tasks="reading") == 0
    shown = capsys.readouterr().out.splitlines()[2].split()
    assert float(shown[1]) > 1 and shown[2] == "-"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--tasks {}/none.yaml", "`--tasks` must be names of tasks or .yaml files that exist, got '{}/none.yaml'."),
        ("--tasks {}/broken.yaml", "`--tasks` '{}/broken.yaml' cannot be loaded: "),
        ("--tasks {}/words.yaml --methods none", "`--methods` must be some of llada, dream, "),
        ("--tasks {}/words.yaml --methods guided", "`--methods` guided needs a guider: add `--guider`."),
        ("--tasks {}/words.yaml --methods flashdlm", "`--methods` flashdlm needs a guider: add `--guider`."),
        ("--tasks {}/words.yaml --model {}", "`--model` must be a folder with a checkpoint or a Hub repository, got"),
        (
            "--tasks {}/words.yaml --json {}/words.yaml",
            "`--json` must be a new file or one that this",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(folder, capsys, arguments, message):
    data = f"dataset_kwargs: {{data_files: {{test: {folder}/none.jsonl}}}}"
    (folder / "broken.yaml").write_text(f"task: broken\ndataset_path: json\n{data}\n", encoding="utf-8")
    assert main([*COMMAND, *arguments.replace("{}", str(folder)).split()]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("flashdlm: " + message.replace("{}", str(folder)))


def test_an_unknown_task_is_answered_with_a_near_one(folder, capsys, monkeypatch):
    from hf_flashdlm.evaluation import compare

    class Manager:
        all_tasks = ("gsm8k", "piqa")

    with pytest.raises(ValueError) as refused:
        compare.load_task(Manager, "gsm8")
    assert str(refused.value) == (
        "`--tasks` must be tasks of lm-evaluation-harness or .yaml files, got 'gsm8': did you mean 'gsm8k'?"
    )
    with pytest.raises(ValueError, match="got 'xyz': `lm_eval ls tasks` lists them"):
        compare.load_task(Manager, "xyz")


def sample(doc, value, kept="none", metric="acc"):
    return {"doc_id": doc, "filter": kept, "metrics": [metric], metric: value}


def test_scores_are_pooled_over_the_tasks_of_a_group(folder):
    from hf_flashdlm.evaluation.compare import scores, select

    samples = {"a": [sample(0, 1.0), sample(1, 0.0)], "b": [sample(0, 1.0), sample(1, 1.0)]}
    found = scores({}, samples)["acc,none"]
    assert found["score"] == 0.75 and found["is_share"]
    assert found["score_interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)  # Wilson's, 3 of 4
    f1 = scores({}, {"a": [sample(0, 0.5, metric="f1"), sample(1, 1.0, metric="f1")]})["f1,none"]
    assert f1["score_interval"] == pytest.approx([0.75 - 0.49, 0.75 + 0.49])
    both = scores({}, {"a": [sample(0, 1.0, "strict"), sample(0, 0.0, "flexible")]})
    assert select({"task": "a", "scores": both}, None)["score"] == 1
    assert select({"task": "a", "scores": both}, "acc,flexible")["score"] == 0
