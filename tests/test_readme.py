"""The pages hold what their records, the code and the command line hold, and run as they are written."""

import ast
import builtins
import json
import re
from importlib.metadata import version

import pytest
import torch
from pages import NAMES, ROOT, commands, marked, page, rows, section, snippets
from transformers import AutoModelForCausalLM

from hf_flashdlm import METHODS, DiffusionOptions
from hf_flashdlm.bench.comparison import report_comparison
from hf_flashdlm.cli.command import make_parser
from hf_flashdlm.tiny import FOLDER


# Tables against their records


def expect_demo(record, shown):
    """All methods, all figures."""
    yield [*shown[0]]
    for row in record["methods"]:
        low, high = (100 * bound for bound in row["accuracy_interval"])
        yield [
            row["name"],
            f"{100 * row['accuracy']:.1f} ({low:.0f}-{high:.0f})",
            *(f"{row[name]:.1f}" for name in ("nfe", "guider_forwards")),
            f"{row['active_tokens']:.0f}",
            f"{row['tokens_per_forward']:.2f}",
            f"{row['seconds']:.1f}",
            *(f"{row[name]:.1f}x" for name in ("speed_over_full_canvas", "speed_over_eos_stop")),
        ]


def expect_ablation(record, shown):
    """The figures of the rows that are shown."""
    known = {(row["group"], row["name"]): row for row in record["rows"]}
    yield [*shown[0]]
    for group, name, *_ in shown[1:]:
        row = known[group, name]
        counts = (f"{row[count]:.2f}" for count in ("nfe", "guider_forwards"))
        yield [group, name, f"{100 * row['accuracy']:.1f}", *counts, f"{row['seconds']:.1f}"]


def expect_guiders(record, shown):
    """All guiders; what is after a comma in their name is a remark."""
    sizes = {name: model["parameters"] for name, model in record["models"].items()}
    remarks = {name.split(",")[0]: name for name, *_ in shown}
    yield [*shown[0]]
    for name in sizes.keys() - {"model"}:
        yield [remarks[name], f"{sizes[name]:,}", f"{sizes[name] / sizes['model']:.2f}"]


def expect_profile(record, shown):
    """A row for each part, a column for each method."""
    methods = {row["method"]: row["microseconds_per_step"] for row in record["rows"]}
    yield ["microseconds per step", *methods]
    for part in {part for parts in methods.values() for part in parts}:
        yield [part, *(f"{parts.get(part, 0):.0f}" for parts in methods.values())]


def expect_reference(record, shown):
    """A row for each loop, a column for each batch size."""
    pairs = {(row["like"], row["batch_size"]): row for row in record["rows"] if row["like"] is not None}
    sizes = sorted({size for _, size in pairs})
    yield ["loop of", *(f"batch {size}" for size in sizes)]
    for loop in {loop for loop, _ in pairs}:
        yield [loop, *(f"{pairs[loop, size]['speed_over_like']:.2f}x" for size in sizes)]


def expect_loops(record, shown):
    """A row for each loop and batch size."""
    yield [*shown[0]]
    for row in record["rows"]:
        if row["like"] is not None:
            shares = f"{row['speed_over_like']:.2f}x", f"{100 * row['equal_share']:.0f}"
            yield [row["like"], str(row["batch_size"]), *shares, f"{row['seconds_over_floor']:.2f}"]


def expect_compiled(record, shown):
    """A row for each compiled method."""
    seconds = {row["method"]: row["seconds"] for row in record["rows"]}
    yield [*shown[0]]
    for row in record["rows"]:
        if row["compiled"]:
            yield [
                row["like"],
                *(f"{seconds[name]:.2f}" for name in (row["like"], row["method"])),
                f"{row['speed_over_like']:.2f}x",
                f"{100 * row['equal_share']:.0f}",
                str(row["graphs"]),
                str(row["later_graphs"]),
            ]


def expect_targets(record, shown):
    """All methods: accuracies at batch 1, and how many times as fast as the opponents they are at each batch size."""
    rows = {(row["method"], row["batch_size"]): row for row in record["rows"]}
    sizes, opponents = sorted({size for _, size in rows}), ("ar", "dual+threshold")
    yield [*shown[0]]
    for method in dict.fromkeys(method for method, _ in rows):
        row = rows[method, sizes[0]]
        shares = (row[name] for name in ("accuracy", "accuracy_of_long"))
        ratios = (rows[name, size]["seconds"] / rows[method, size]["seconds"] for name in opponents for size in sizes)
        yield [method, *("-" if share is None else f"{100 * share:.1f}" for share in shares)] + [
            f"{ratio:.2f}x" for ratio in ratios
        ]


def expect_limits(record, shown):
    """All steps of all shapes."""
    parts = list(record["rows"][0]["milliseconds"])
    yield [*shown[0]]
    for row in record["rows"]:
        times = row["milliseconds"]
        yield [row["model"], row["step"], str(row["operations"]), *(f"{times[part]:.1f}" for part in parts)] + [
            max(parts, key=times.get)
        ]


def expect_long(record, shown):
    """The one row."""
    (row,) = record["rows"]
    length = re.search(r"--prompt-length (\d+)", record["command"])[1]
    yield [*shown[0]]
    yield [length, *(f"{row[name] / 1e6:.0f}" for name in ("kept_bytes", "peak_memory_bytes"))]


def expect_scores(record, shown):
    """All decoders."""
    yield [*shown[0]]
    for name, score in record["scores"].items():
        yield [name, f"{100 * score['exact_match']:.1f}", f"{score['nfe']:.2f}"]


def expect_checkpoints(record, shown):
    """All checkpoints."""
    yield [*shown[0]]
    for row in record["checkpoints"]:
        blocks = row["attention_block_length"]
        yield [
            f"`{row['checkpoint']}`",
            f"`{row['class']}`",
            f"`{row['method']}`",
            "-" if blocks is None else str(blocks),
            row["licence"] or "its card's",
            f"{row['parameters'] / 1e9:.2f}",
            f"{row['bytes'] / 1e9:.1f}",
            f"{row['cache_bytes_per_token'] / 1e3:.0f}",
            row["config"],
        ]


def expect_recordings(record, shown):
    """All families."""
    yield [*shown[0]]
    for row in record["recordings"]:
        counts = ("decodes", "forwards", "original_forwards", "active_tokens", "original_active_tokens")
        yield [row["family"], *(f"{row[name]:,}" for name in counts)]


def expect_serving(record, shown):
    """Both folders."""
    yield [*shown[0]]
    for row in record["rows"]:
        seconds = [row[f"processor_seconds_per_request{when}"] for when in ("", "_at_once")]
        yield [
            row["served"],
            f"{row['memory_bytes'] / 1e6:.0f}",
            f"{row['right']}, {row['right_at_once']}",
            *(f"{one:.2f}" for one in seconds),
            f"{100 * row['median_share_at_first_text']:.0f} %",
        ]


def expect_large_models(record, shown):
    """All ways of loading."""
    yield [*shown[0]]
    for row in record["rows"]:
        places = [row.get(place) for place in ("model", "guider", "both")]
        cells = [f"{place['same']}, {place['right']}" if place else "fails" for place in places]
        yield [row["way"], row["package"], *cells]


EXPECTED = {
    "large_models.json": expect_large_models,
    "serving.json": expect_serving,
    "families.json, checkpoints": expect_checkpoints,
    "families.json, recordings": expect_recordings,
    "demo.json": expect_demo,
    "ablation.json": expect_ablation,
    "ablation.json, models": expect_guiders,
    "profile.json": expect_profile,
    "profile_50m.json": expect_profile,
    "profile_batch.json": expect_profile,
    "limits.json": expect_limits,
    "targets.json": expect_targets,
    "reference.json": expect_reference,
    "reference_50m.json": expect_loops,
    "compiled.json": expect_compiled,
    "compiled_50m.json": expect_compiled,
    "long.json": expect_long,
    "results.json": expect_scores,
}
# The page, the folder of the record, its file with the part of it that is shown, and the table.
MARKS = [
    (name, *mark.removeprefix("from ").rpartition("/")[::2], block) for name in NAMES for mark, block in marked(name)
]


def record(folder, mark):
    return json.loads((ROOT / folder / mark.partition(",")[0]).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("folder", "mark", "table"), [marks for _, *marks in MARKS if marks[1] in EXPECTED], ids=lambda part: part[:20]
)
def test_a_marked_table_is_its_record(folder, mark, table):
    shown = rows(table)
    first, *others = EXPECTED[mark](record(folder, mark), shown)
    assert shown[0] == first
    assert sorted(shown[1:]) == sorted(others)


def test_every_kind_of_mark_is_on_a_page_and_checked():
    assert {mark for _, _, mark, _ in MARKS} == {*EXPECTED, "bench.json", "methods", "settings"}


@pytest.mark.parametrize("name", NAMES)
def test_every_mark_has_a_table(name):
    assert page(name).count("\n<!-- ") == len(marked(name))


def test_the_bench_is_shown_as_it_is_printed():
    ((folder, block),) = [(folder, block) for _, folder, mark, block in MARKS if mark == "bench.json"]
    assert block == f"```\n{report_comparison(record(folder, 'bench.json'))}\n```\n"


def settings(cell):
    """The keywords in a cell of code."""
    (call,) = ast.parse(f"f({cell.strip('`')})").body
    return {keyword.arg: ast.literal_eval(keyword.value) for keyword in call.value.keywords}


def test_the_methods_are_those_of_the_code():
    (table,) = [block for *_, mark, block in MARKS if mark == "methods"]
    shown = {name.strip("`"): settings(line) for name, line, _ in rows(table)[1:]}
    assert shown == METHODS and len(rows(table)) == 1 + len(METHODS)


@pytest.mark.parametrize(
    "line", [line for *_, mark, block in MARKS if mark == "settings" for _, line in rows(block)[1:]]
)
def test_the_settings_of_a_variant_are_options(line):
    keywords = settings(line)
    own = {name: value for name, value in keywords.items() if name != "guidance_scale"}
    DiffusionOptions(**DiffusionOptions.expand(own))


# Length, links, commands


def test_the_readme_has_at_most_1500_words():
    assert len(page("README.md").split()) <= 1500


def anchors(name):
    """Of the titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)", page(name), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("name", NAMES)
def test_links_lead_somewhere(name):
    for target in re.findall(r"\]\(([^)\s]+)\)", page(name)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            found = ((ROOT / name).parent / path if path else ROOT / name).resolve()
            assert found.exists(), target
            if anchor:
                assert anchor in anchors(found.relative_to(ROOT).as_posix()), target


@pytest.mark.parametrize("name", NAMES)
def test_files_that_are_named_exist(name):
    text = page(name)
    for path in re.findall(r"\bpython (\S+\.py)", text) + re.findall(r"\bbash (\S+\.sh)", text):
        assert (ROOT / path).is_file(), path
    for path in re.findall(r"`((?:examples|tests|hf_flashdlm|model_cards)/[\w./-]*)`", text):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`([\w./-]+\.md)`", text):
        assert any((folder / path).exists() for folder in (ROOT, (ROOT / name).parent)), path


@pytest.mark.parametrize("name", NAMES)
def test_commands_are_those_of_the_makefile_and_of_the_command_line(name):
    targets = re.findall(r"^([\w-]+):", page("Makefile"), re.MULTILINE)
    for words in commands(page(name), "make"):
        assert words[0] in targets
    for words in commands(page(name), "flashdlm"):
        make_parser().parse_args(words)
    assert page(name).count("\nmake ") == len(commands(page(name), "make"))
    assert page(name).count("\nflashdlm ") == len(commands(page(name), "flashdlm"))


def test_the_tree_names_every_file_of_the_library():
    tree = section("README.md", "Where things are")
    named = {*re.findall(r"\w+\.py", tree)}
    library = {path.name for path in (ROOT / "hf_flashdlm").glob("*.py") if not path.name.startswith("__")}
    assert {name for name in library if not name.startswith(("configuration_", "modeling_"))} <= named
    assert named <= library
    assert {*re.findall(r"^  (\w+)/", tree, re.MULTILINE)} == {
        path.parent.name for path in (ROOT / "hf_flashdlm").glob("*/__init__.py")
    }


# Snippets


def test_the_snippets_of_the_readme_run_one_after_the_other(capsys):
    here = page("README.md").replace(section("README.md", "On the Hub"), "")
    first, guided, own = snippets(here)
    names, texts = {}, []
    for snippet in (first, guided, own):
        exec(compile(snippet, "README.md", "exec"), names)
        texts.append(capsys.readouterr().out)
    assert texts[0].strip().endswith("#### 26") and "#### 26" in texts[1]
    answer = names["tokenizer"].decode(names["output"][0], skip_special_tokens=True)
    assert answer.endswith("#### 26")


@pytest.mark.parametrize("name", ["hf_flashdlm/GENERATE.md", "hf_flashdlm/GUIDER.md"])
def test_the_snippets_of_a_page_run(name):
    model = AutoModelForCausalLM.from_pretrained(FOLDER / "dlm")
    names = {"model": model, "input_ids": torch.tensor([[40, 50, 60]])}
    for snippet in snippets(page(name)):
        exec(compile(snippet, name, "exec"), names)
    ids = names["output"] if torch.is_tensor(names["output"]) else names["output"].sequences
    assert not (ids == model.config.mask_token_id).any()


def test_the_answers_to_questions_are_so(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    name, names, told = "hf_flashdlm/TROUBLESHOOTING.md", {}, 0
    is_pinned = f"\ntransformers=={version('transformers')}\n" in page("tests/requirements.txt")
    for snippet, message in re.findall(r"^```python\n(.*?)^```\n(?:```text\n(.*?)\n```\n)?", page(name), re.M | re.S):
        code = compile(snippet, name, "exec")
        if not message:
            exec(code, names)
            continue
        told += 1
        kind, _, text = message.partition(": ")
        with pytest.raises(getattr(builtins, kind)) as refused:
            exec(code, names)
        if is_pinned:  # other versions of Transformers say some of it in other words
            assert str(refused.value) == text
    assert told == page(name).count("```text\n") > 8
    assert names["counts"][0] > 0 and len(names["answers"]) == 2
    end, prompt = names["tokenizer"].eos_token_id, names["inputs"]["input_ids"].shape[1]
    assert (names["filled"] == end).sum() > 10 and (names["stopped"][0, prompt:] == end).sum() == 1
    assert names["longer"].shape[1] > prompt + 40
    assert names["hasty"].shape != names["careful"].shape or not names["hasty"].equal(names["careful"])


# The contributor's kit


@pytest.mark.parametrize("tool", ["mypy", "ruff"])
def test_a_checker_has_one_version(tool):
    (pinned,) = re.findall(rf"{tool}==([\d.]+)", page("pyproject.toml"))
    assert f"\n{tool}=={pinned}\n" in page("tests/requirements.txt")
    if tool == "ruff":
        assert re.findall(r"rev: v([\d.]+)", page(".pre-commit-config.yaml")) == [pinned]


def test_the_package_says_that_it_is_typed():
    assert (ROOT / "hf_flashdlm" / "py.typed").is_file()


def test_the_checklists_name_what_is_there():
    names = {
        *re.findall(r"`(?:methods\.|\w+/)?(\w+)(?:\.py)?`", page("CONTRIBUTING.md").partition("## Checklists")[2])
    }
    files = [path for folder in ("hf_flashdlm", "tests") for path in (ROOT / folder).rglob("*.py")]
    code = "\n".join([*(path.stem for path in files), *(path.read_text(encoding="utf-8") for path in files)])
    assert {name for name in names if not re.search(rf"\b{name}\b", code)} == set()
