"""The page without a browser: decodes that take turns, canvases as HTML, what is refused. None of it needs Gradio."""

import re
import socket
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import hf_flashdlm.app
from hf_flashdlm.app.canvas import AUTHORS, COUNTS, GUIDER, MASKED, MODEL, Cell, canvas, panel, pieces, plain
from hf_flashdlm.app.run import Settings, methods, race
from hf_flashdlm.app.serve import check_address, load_models, warm_up
from hf_flashdlm.cli import main


QUESTION = "Clara has 8 beads. Yara has 10 more than Clara. How many do they have together?"
SETTINGS = Settings(max_new_tokens=16, block_length=8, confidence_threshold=0.9)
STYLE = (Path(hf_flashdlm.app.__file__).parent / "page.css").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def pair():
    return load_models(None, None, "cpu", "float32")


@pytest.fixture(scope="module")
def traces(pair):
    """A finished race."""
    checkpoint, guider = pair
    return list(race(checkpoint, QUESTION, methods(SETTINGS, guider), SETTINGS))[-1]


@pytest.fixture(scope="module")
def outputs(pair):
    """What `model.generate` returns for each method."""
    checkpoint, guider = pair
    options = {"max_new_tokens": 16, "block_length": 8, "do_sample": False, "return_dict_in_generate": True}
    options |= {"output_history": True, "output_confidence": True}
    inputs = checkpoint.encode([QUESTION], None)
    compared = methods(SETTINGS, guider)
    return [checkpoint.model.generate(**inputs, **options | method.options) for method in compared]


class Parts(HTMLParser):
    """The elements of a piece of HTML with their text, and all that is not closed."""

    def __init__(self, text):
        super().__init__()
        self.open, self.found, self.text = [], [], ""
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.found.append([tag, dict(attrs), ""])

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.found:
            self.found[-1][2] += data


def parts(text):
    read = Parts(text)
    assert read.open == []
    return read


# Decodes that take turns


def test_a_race_gives_what_generate_gives(pair, traces, outputs):
    begin = len(traces[0].prompt)
    for trace, output in zip(traces, outputs, strict=True):
        assert trace.error is None
        assert torch.equal(trace.continuation.output.sequences, output.sequences)
        seen = torch.tensor(trace.canvases)[:, : output.history.shape[2] - begin]
        assert torch.equal(seen, output.history[:, 0, begin:])


def test_what_is_seen_on_the_way_is_what_the_output_says(traces, outputs):
    for trace, output in zip(traces, outputs, strict=True):
        lengths = output.accepted_lengths
        assert trace.accepted == ([0] * int(output.nfe) if lengths is None else lengths[0])
        assert len(trace.canvases) == len(trace.seconds) == int(output.nfe)
        assert trace.seconds == sorted(trace.seconds) and trace.seconds[0] > 0
    assert 0 in traces[2].accepted, "a draft that the guider refused was written"


def test_the_last_method_needs_a_guider(pair):
    assert [method.name for method in methods(SETTINGS, pair[1])] == ["Plain", "FreeCache", "FreeCache and guider"]
    assert [method.name for method in methods(SETTINGS, None)] == ["Plain", "FreeCache"]


def test_the_next_step_is_that_of_the_method_with_the_least_time(pair):
    checkpoint, guider = pair
    before = [0.0, 0.0, 0.0]
    for traces in race(checkpoint, QUESTION, methods(SETTINGS, guider), SETTINGS):
        now = [trace.seconds[-1] if trace.seconds else 0.0 for trace in traces]
        moved = [index for index in range(3) if now[index] != before[index]]
        assert len(moved) <= 1, "one decode computes at a time"
        assert all(
            before[index] <= before[other] for index in moved for other in range(3) if not traces[other].is_done
        )
        before = now


def test_the_defaults_are_those_of_the_checkpoint(pair):
    assert Settings.of(pair[0]) == Settings(max_new_tokens=64, block_length=8, confidence_threshold=0.9)


def alive():
    return [thread for thread in threading.enumerate() if "Decode" in repr(getattr(thread, "_target", None))]


def wait_for(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_race_that_nobody_watches_ends_within_a_step(pair):
    checkpoint, guider = pair
    forwards = []
    hook = checkpoint.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    watched = race(checkpoint, QUESTION, methods(SETTINGS, guider), SETTINGS)
    for _ in range(5):
        next(watched)
    count = len(forwards)
    watched.close()
    wait_for(lambda: not alive())
    hook.remove()
    assert len(forwards) == count == 5
    assert list(race(checkpoint, QUESTION, methods(SETTINGS, guider), SETTINGS))[-1][0].error is None


def test_races_of_two_visitors_do_not_mix(pair, traces):
    checkpoint, guider = pair
    other = "There are 5 stamps in each of 5 trays. How many stamps are there in all?"
    watched = [race(checkpoint, text, methods(SETTINGS, guider), SETTINGS) for text in (QUESTION, other)]
    found = [None, None]

    def watch(index):
        found[index] = list(watched[index])[-1]

    threads = [threading.Thread(target=watch, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    alone = list(race(checkpoint, other, methods(SETTINGS, guider), SETTINGS))[-1]
    for ours, expected in zip(found, (traces, alone), strict=True):
        assert [trace.canvases for trace in ours] == [trace.canvases for trace in expected]
        assert [trace.accepted for trace in ours] == [trace.accepted for trace in expected]


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("a " * 600, SETTINGS, "`max_new_tokens` and the prompt must fit the model's 512 positions together, got "),
        (QUESTION, Settings(4, 8, 0.9), "`block_length` must be at most `max_new_tokens`=4, got 8: lower it, or "),
        (QUESTION, Settings(8, 8, 1.5), "`confidence_threshold` must be a number between 0 and 1, got 1.5."),
    ],
    ids=["long", "blocks", "threshold"],
)
def test_a_mistake_ends_a_decode_and_not_the_race(pair, text, settings, message):
    checkpoint, guider = pair
    traces = list(race(checkpoint, text, methods(settings, guider), settings))[-1]
    said = [trace.error for trace in traces if trace.error is not None]
    assert said and all(error.startswith(message) for error in said)
    html = panel(checkpoint, next(trace for trace in traces if trace.error is not None))
    assert plain(said[0]) in html and 'role="alert"' in html


def test_a_fault_of_the_model_is_named(pair, monkeypatch):
    checkpoint, _ = pair

    def fail(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(checkpoint.model, "forward", fail)
    trace = list(race(checkpoint, QUESTION, methods(SETTINGS, None)[1:], SETTINGS))[-1][0]
    assert trace.error is not None and trace.is_done


def test_a_warm_up_decodes_a_token_by_each_method(pair):
    checkpoint, guider = pair
    forwards = []
    hook = checkpoint.model.register_forward_pre_hook(lambda *_: forwards.append(1))
    warm_up(checkpoint, guider, QUESTION)
    hook.remove()
    assert len(forwards) == 3


# Canvases as HTML


def test_each_token_has_its_author(pair, traces, outputs):
    begin = len(traces[0].prompt)
    for trace, output in zip(traces, outputs, strict=True):
        cells = canvas(pair[0], trace, len(trace.canvases))
        steps = output.written_at[0, begin:].tolist()
        assert [cell.step - 1 for cell in cells] == steps[: len(cells)]
        assert [cell.token_id for cell in cells] == output.sequences[0, begin:].tolist()[: len(cells)]
        probability = torch.tensor([cell.probability for cell in cells])
        assert torch.allclose(probability, output.confidence[0, begin : begin + len(cells)])
        for step in set(steps) - {-1}:
            authors = [cell.author for cell in cells if cell.step == step + 1]
            accepted = 0 if output.accepted_lengths is None else output.accepted_lengths[0][step]
            assert authors == ([GUIDER] * accepted + [MODEL] * len(authors))[: len(authors)]


def test_a_canvas_begins_masked_and_fills(pair, traces):
    for trace in traces:
        written = [
            sum(cell.author != MASKED for cell in canvas(pair[0], trace, step))
            for step in range(len(trace.canvases) + 1)
        ]
        assert written[0] == 0 and len(canvas(pair[0], trace, 0)) == 16
        assert written[1] > 0 and written[-1] == len(canvas(pair[0], trace, len(trace.canvases)))


def test_a_panel_shows_the_text_and_the_counts(pair, traces, outputs):
    for trace, output in zip(traces, outputs, strict=True):
        found = parts(panel(pair[0], trace)).found
        text = "".join(text for tag, attrs, text in found if "flash-token" in attrs.get("class", ""))
        assert text.strip() == trace.continuation.texts[0]
        counts = dict(zip(COUNTS, [text for tag, _, text in found if tag == "dd"], strict=True))
        asked = 0 if output.guider_forwards is None else int(output.guider_forwards)
        assert [counts[name] for name in COUNTS[:2]] == [str(int(output.nfe)), str(asked)]
        tokens = trace.continuation.lengths[0]
        assert counts["tokens"] == str(tokens)
        assert float(counts["tokens per forward"]) == pytest.approx(float(output.tokens_per_forward), abs=0.01)
        assert float(counts["seconds"]) == pytest.approx(trace.seconds[-1], abs=0.01)


def test_a_step_after_the_last_shows_the_last(pair, traces):
    for trace in traces:
        assert panel(pair[0], trace, 10**6) == panel(pair[0], trace) != panel(pair[0], trace, 1)


def test_masks_have_words(pair, traces):
    found = parts(panel(pair[0], traces[0], 0)).found
    (masks,) = [(attrs, text) for _, attrs, text in found if "flash-masked" in attrs.get("class", "")]
    assert masks[0]["aria-label"] == "16 masked" and masks[0]["role"] == "img" and masks[1].count("░") == 16
    assert "nothing written yet" in panel(pair[0], traces[0], 0)
    words = parts(panel(pair[0], traces[2])).text
    assert AUTHORS[MODEL] in words and AUTHORS[GUIDER] in words


def test_a_panel_says_what_a_token_is(pair, traces):
    found = parts(panel(pair[0], traces[2])).found
    titles = [attrs["title"] for _, attrs, _ in found if "title" in attrs]
    assert all(
        re.fullmatch(r"(written on|accepted by) .* at step \d+, probability [01]\.\d\d", title) for title in titles
    )


HOSTILE = "<img src=x onerror=alert(1)> & \"'</p></section> \x1b[31m\x9b\u202e"


def test_text_of_anybody_is_text(pair):
    checkpoint, _ = pair
    html = panel(checkpoint, list(race(checkpoint, HOSTILE, methods(SETTINGS, None), SETTINGS))[-1][0])
    tags = {tag for tag, *_ in parts(html).found}
    assert tags == {"section", "h2", "p", "dl", "div", "dt", "dd", "span"}
    assert plain(HOSTILE) in html
    assert plain(HOSTILE).startswith("&lt;img src=x onerror=alert(1)&gt; &amp; &quot;&#x27;&lt;/p&gt;")
    assert plain(HOSTILE).endswith(r"\x1b[31m\x9b\u202e")


class Spelling:
    """A tokenizer of bytes, as far as a canvas needs it."""

    def decode(self, ids, skip_special_tokens):
        return bytes(ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("text", ["plain", "naïve – 日本 👍🏽", "\n\tline", "<b>&amp;"])
def test_what_a_model_writes_is_escaped_and_characters_stay_whole(text):
    cells = [Cell(byte, MODEL, 1) for byte in text.encode()]
    found = list(pieces(Spelling(), cells))
    assert "".join(piece for piece, _ in found) == text
    assert [cell for _, group in found for cell in group] == cells
    assert len(found) == len(text)


def test_a_character_that_is_not_complete_yet_is_shown_as_such():
    cells = [Cell(byte, MODEL, 1) for byte in "a日".encode()[:3]]
    assert [text for text, _ in pieces(Spelling(), cells)] == ["a", "\ufffd"]


def test_words_that_begin_with_a_space_keep_it():
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁sea": 1, "?": 2}, "?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert "".join(text for text, _ in pieces(tokenizer, [Cell(one, MODEL, 1) for one in (0, 1, 0)])) == "the sea the"


def test_a_long_prompt_is_shown_from_its_end(pair):
    checkpoint, _ = pair
    trace = list(race(checkpoint, "start " + "beads " * 200, methods(SETTINGS, None)[1:], SETTINGS))[-1][0]
    (given,) = [
        text for _, attrs, text in parts(panel(checkpoint, trace)).found if attrs.get("class") == "flash-given"
    ]
    assert given.startswith("…") and len(given) < 500 and "start" not in given


def test_every_class_has_a_style(pair, traces):
    html = "".join(panel(pair[0], trace, step) for trace in traces for step in (0, 1, None))
    used = {name for attributes in re.findall(r'class="([^"]*)"', html) for name in attributes.split()}
    assert {name for name in used if f".{name}" not in STYLE} <= {"flash-forming"}


# What is refused


def test_a_port_in_use_and_a_strange_host_are_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with pytest.raises(ValueError) as refused:
            check_address("127.0.0.1", port)
        assert str(refused.value) == (
            f"`--port` must be free, got {port}, which cannot be used: name another, or drop it."
        )
    check_address("127.0.0.1", port)
    for host in ("192.0.2.1", "no host", "a" * 300):
        with pytest.raises(ValueError) as refused:
            check_address(host, None)
        assert str(refused.value) == f"`--host` must be an address of this machine, got {host!r}."


@pytest.mark.parametrize("port", ["0", "65536", "-1", "x", "8.5", "²"])
def test_a_port_out_of_range_is_refused(capsys, port):
    assert main(["app", f"--port={port}"]) == 2
    expected = f"flashdlm: argument --port: must be an integer between 1 and 65535, got {port!r}.\n"
    assert capsys.readouterr().err == expected


def test_gradio_is_an_extra(capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert main(["app"]) == 2
    expected = "flashdlm: `flashdlm app` needs Gradio, which is not installed: pip install 'hf-flashdlm[app]'.\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/no/such"], "`--model` must be a folder with a checkpoint or a Hub repository, got no folder "),
        (["--host", "192.0.2.1"], "`--host` must be an address of this machine, got '192.0.2.1'."),
    ],
)
def test_a_mistake_is_one_sentence(capsys, monkeypatch, arguments, message):
    monkeypatch.setattr("hf_flashdlm.app.serve.check_gradio", lambda: None)
    assert main(["app", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"flashdlm: {message}") and error.count("\n") == 1


def test_a_guider_without_a_model_goes_with_the_embedded_one():
    from hf_flashdlm.tiny import FOLDER

    _, guider = load_models(None, str(FOLDER / "guider"), "cpu", "float32")
    assert guider.combine is None
    _, missing = load_models(str(FOLDER / "dlm"), None, "cpu", "float32")
    assert missing is None
