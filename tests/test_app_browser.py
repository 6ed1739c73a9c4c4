"""The page in a real browser: what a visitor does, and what is seen. Run by `make test-app`."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from urllib.request import urlopen

import pytest

from hf_flashdlm.app.run import Settings, methods
from hf_flashdlm.app.serve import EXAMPLE_SEED, load_models
from hf_flashdlm.hub.space import export_space
from hf_flashdlm.tiny import sample_problems


gradio = pytest.importorskip("gradio")
playwright = pytest.importorskip("playwright.sync_api")
page_module = pytest.importorskip("hf_flashdlm.app.page")

# Of Gradio, whose count of visits uses what pandas drops.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*no_silent_downcasting"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]

ROOT = Path(__file__).parents[1]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDE, NARROW = {"width": 1280, "height": 900}, {"width": 375, "height": 800}
HOSTILE = "<img src=x onerror=alert(1)>${1+1}{{7*7}}<script>alert(2)</script>&lt; \x1b[31m \u202egnp"


@pytest.fixture(scope="module")
def models():
    return load_models(None, None, "cpu", "float32")


@pytest.fixture(scope="module")
def address(models):
    """The page, served on a free port."""
    checkpoint, guider = models
    page = page_module.make_page(checkpoint, guider, [one.question for one in sample_problems(4, EXAMPLE_SEED)])
    _, local, _ = page.launch(prevent_thread_lock=True, quiet=True, **page_module.LOOK)
    yield local
    page.close()


@pytest.fixture(scope="module")
def chromium():
    assert CHROMIUM is not None, "Chromium is needed: apt-get install chromium"
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """`visit(size)` is a new visitor's page; in the end its console must hold nothing, and nothing was fetched."""
    contexts, found = [], []

    def visit(size=WIDE, scheme="light"):
        contexts.append(chromium.new_context(viewport=size, color_scheme=scheme))
        page = contexts[-1].new_page()
        page.on("console", lambda message: found.append(message.text) if message.type in ("error", "warning") else 0)
        page.on("pageerror", lambda error: found.append(str(error)))
        page.on("request", lambda request: None if request.url.startswith(address) else found.append(request.url))
        page.on("dialog", lambda dialog: found.append(dialog.message))
        page.goto(address)
        page.wait_for_selector("#start")
        return page

    yield visit
    for context in contexts:
        context.close()
    assert found == []


def wait(page, condition, timeout=60_000):
    page.wait_for_function(condition, timeout=timeout)


def done(page, start="Done"):
    wait(page, f"document.querySelector('#status').innerText.startsWith('{start}')")


def decode(page, text):
    page.fill("#prompt textarea", text)
    page.click("#start")
    done(page)


def panels(page):
    return page.query_selector_all(".flash-panel")


def answer(panel):
    return "".join(token.text_content() for token in panel.query_selector_all(".flash-token")).strip()


def numbers(panel):
    return [float(number.text_content()) for number in panel.query_selector_all("dd")]


def steps(page):
    return page.query_selector("#step input[type=range]")


def move(page, step):
    """The slider, moved by keys."""
    steps(page).focus()
    page.keyboard.press("Home")
    for _ in range(step):
        page.keyboard.press("ArrowRight")
    most = f"Math.min({step}, 1e9) == +document.querySelector('.flash-panel dd').innerText"
    wait(page, most)


@contextmanager
def counted(model, seconds=0.0):
    """The forwards of a model, each of which waits so long first."""
    forwards = []

    def count(*_):
        forwards.append(time.perf_counter())
        time.sleep(seconds)

    hook = model.register_forward_pre_hook(count)
    yield forwards
    hook.remove()


def expected(models, text):
    """What `model.generate` itself returns for each method."""
    checkpoint, guider = models
    settings = Settings.of(checkpoint)
    inputs = checkpoint.encode([text], None)
    options = {"max_new_tokens": settings.max_new_tokens, "block_length": settings.block_length, "do_sample": False}
    options |= {"return_dict_in_generate": True, "output_history": True}
    outputs = [checkpoint.model.generate(**inputs, **options | method.options) for method in methods(settings, guider)]
    begin = inputs["input_ids"].shape[1]
    decoded = [
        checkpoint.tokenizer.decode(output.sequences[0, begin:], skip_special_tokens=True).strip()
        for output in outputs
    ]
    return outputs, decoded


# The guider refuses the first draft of the first; the second takes few steps.
QUESTION = "Clara has 8 beads. Yara has 10 more than Clara. How many do they have together?"
SHORT = "There are 5 stamps in each of 5 trays. How many stamps are there in all?"


def test_a_prompt_is_answered_as_generate_answers_it(visit, models):
    page = visit()
    decode(page, QUESTION)
    outputs, texts = expected(models, QUESTION)
    assert len(panels(page)) == 3
    for panel, output, text in zip(panels(page), outputs, texts, strict=True):
        assert answer(panel) == text
        guided = 0 if output.guider_forwards is None else int(output.guider_forwards)
        tokens = round(float(output.tokens_per_forward * output.nfe))
        assert numbers(panel)[:4] == [int(output.nfe), guided, tokens, round(tokens / int(output.nfe), 2)]
        assert numbers(panel)[4] > 0
    by_model, by_guider = (len(panels(page)[2].query_selector_all(f".flash-{name}")) for name in ("model", "guider"))
    assert by_guider > by_model > 0
    assert panels(page)[0].query_selector(".flash-guider") is None


def test_the_slider_shows_every_step_again(visit, models):
    page = visit()
    decode(page, SHORT)
    history = expected(models, SHORT)[0][0].history
    mask = models[0].model.config.mask_token_id
    for step in (0, 1, 4):
        move(page, step)
        masked = page.query_selector(".flash-panel").query_selector_all(".flash-masked")
        assert sum("░" in one.text_content() for one in masked) == len(masked) > 0
        written = numbers(panels(page)[0])[2]
        assert written == (
            0 if step == 0 else int((history[step - 1] != mask).sum()) - int((history[0] != mask).sum()) + 1
        )
    page.keyboard.press("End")
    wait(page, "document.querySelectorAll('.flash-panel.flash-done').length == 3")


def test_columns_on_a_wide_screen_and_a_pile_on_a_narrow_one(visit):
    page = visit(WIDE)
    decode(page, "a" * 150 + " " + SHORT)
    page.click("#settings button")
    page.wait_for_selector("#block_length input", state="visible")
    for size, shape in ((WIDE, (1, 3)), (NARROW, (3, 1))):
        page.set_viewport_size(size)
        boxes = [panel.bounding_box() for panel in panels(page)]
        tops, lefts = ({round(box[side]) for box in boxes} for side in "yx")
        assert (len(tops), len(lefts)) == shape
        assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") <= 0
        assert all(box["x"] >= 0 and box["x"] + box["width"] <= size["width"] for box in boxes)


def test_the_keyboard_is_enough(visit, models):
    page = visit()
    focused = "document.activeElement.closest('[id]') && document.activeElement.closest('#{0}') != null"
    for _ in range(5):
        page.keyboard.press("Tab")
        if page.evaluate(focused.format("prompt")):
            break
    page.keyboard.press("Control+A")
    page.keyboard.type(SHORT)
    page.keyboard.press("Enter")
    done(page)
    assert answer(panels(page)[0]) == expected(models, SHORT)[1][0]
    for _ in range(20):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.type") == "range":
            break
    before = numbers(panels(page)[0])[0]
    page.keyboard.press("ArrowLeft")
    wait(page, f"document.querySelector('.flash-panel dd').innerText == '{before - 1:.0f}'")


def test_text_is_text(visit):
    page = visit()
    decode(page, HOSTILE)
    given = page.text_content("#stage .flash-given")
    assert "<img src=x onerror=alert(1)>${1+1}{{7*7}}<script>alert(2)</script>&lt; \\x1b[31m \\u202egnp" in given
    assert page.query_selector("#stage img, #stage script") is None


@pytest.mark.parametrize(
    ("text", "settings", "message"),
    [
        ("  ", {}, "The prompt is empty: type one, or choose an example."),
        ("a " * 600, {}, "must fit the model's 512 positions together"),
        (SHORT, {"max_new_tokens": "4"}, "`block_length` must be at most `max_new_tokens`=4, got 8"),
        (SHORT, {"max_new_tokens": ""}, "A setting is empty: give it a number."),
    ],
    ids=["empty", "long", "blocks", "missing"],
)
def test_a_mistake_is_a_message(visit, text, settings, message):
    page = visit()
    page.click("#settings button")
    for name, value in settings.items():
        page.fill(f"#{name} input", value)
        page.keyboard.press("Tab")
    page.fill("#prompt textarea", text)
    page.click("#start")
    wait(page, "document.querySelector('#status [role=alert]')")
    assert message in page.inner_text("#status")
    assert panels(page) == []
    assert page.is_enabled("#start")


def test_stop_ends_a_decode_within_a_step(visit, models):
    page = visit()
    with counted(models[0].model, 0.1) as forwards:
        page.click("#start")
        wait(page, "document.querySelectorAll('.flash-panel .flash-token').length > 5")
        page.click("#stop")
        done(page, "Stopped")
        time.sleep(0.5)
        before = len(forwards)
        time.sleep(1)
        assert len(forwards) == before
    reached = max(numbers(panel)[0] for panel in panels(page))
    move(page, 1)
    assert numbers(panels(page)[0])[0] == 1 <= reached
    decode(page, SHORT)


def test_a_closed_page_ends_its_decode(visit, models):
    page = visit()
    with counted(models[0].model, 0.1) as forwards:
        page.click("#start")
        wait(page, "document.querySelectorAll('.flash-panel .flash-token').length > 5")
        page.context.close()
        time.sleep(1)
        before = len(forwards)
        time.sleep(1)
        assert len(forwards) == before
    decode(visit(), SHORT)


def test_two_visitors_at_once_get_their_own_answers(visit, models):
    questions = (SHORT, "Nora has 18 beads and loses 3 of them. How many beads does Nora have left?")
    pages = [visit(), visit()]
    for page, question in zip(pages, questions, strict=True):
        page.fill("#prompt textarea", question)
        page.click("#start")
    for page, question in zip(pages, questions, strict=True):
        done(page)
        assert [answer(panel) for panel in panels(page)] == expected(models, question)[1]


CONTRAST = """
([selector]) => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(v => v / 255)
    .map(v => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = element => {
    for (; element; element = element.parentElement) {
      const found = channels(getComputedStyle(element).backgroundColor);
      if (found.length < 4 || found[3] > 0) return found;
    }
    return [255, 255, 255];
  };
  return [...document.querySelectorAll(selector)].filter(one => one.innerText.trim()).map(one => {
    const [text, back] = [light(channels(getComputedStyle(one).color)), light(ground(one))];
    return (Math.max(text, back) + 0.05) / (Math.min(text, back) + 0.05);
  });
}
"""


def test_text_can_be_read(visit):
    page = visit()
    decode(page, SHORT)
    move(page, 1)
    for _ in range(2):
        for selector in (".flash-token", ".flash-given", *(f".flash {tag}" for tag in ("h1", "p", "li", "dt", "dd"))):
            ratios = page.evaluate(CONTRAST, [selector])
            assert ratios and min(ratios) >= 4.5, selector
        page.evaluate("document.body.classList.toggle('dark')")
        page.wait_for_timeout(500)  # colours move slowly
    lines = {kind: page.eval_on_selector(f".flash-panels .flash-{kind}", LINE) for kind in ("model", "guider")}
    assert lines["model"] != lines["guider"], "authors differ by more than a colour"


LINE = "one => getComputedStyle(one).borderBottomStyle"


def test_a_screenshot(visit, tmp_path):
    page = visit({"width": 1280, "height": 1000})
    decode(page, QUESTION)
    move(page, 3)
    path = Path(os.environ.get("SCREENSHOT", tmp_path / "app.png"))
    page.screenshot(path=path, full_page=True)
    assert 10_000 < path.stat().st_size < 300_000


@contextmanager
def served(command, folder, **environment):
    """The program with a free port in its environment; what it has said, its process, and the address of its page."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "PYTHONUNBUFFERED": "1"} | environment
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen([sys.executable, *command], cwd=folder, env=environment, **pipes) as process:
        said = ""
        for line in process.stdout:
            said += line
            if "Running on" in line:
                break
        try:
            yield said, process, f"http://127.0.0.1:{port}/"
        finally:
            process.kill()


def test_the_command_serves_the_page_until_it_is_interrupted():
    with served(["-m", "hf_flashdlm", "app", "--device", "cpu"], ROOT) as (said, process, address):
        with urlopen(address) as response:
            assert response.status == 200 and address.rstrip("/") in said
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=30)
    assert "Traceback" not in rest and process.returncode == 130


def test_a_space_starts_from_what_it_contains(chromium, models, tmp_path):
    space = export_space(tmp_path / "space", "o/page")
    carried = space / "hf_flashdlm" / "app" / "page.py"
    carried.write_text(carried.read_text(encoding="utf-8") + 'TITLE = "carried"\n', encoding="utf-8")
    with served([str(space / "app.py")], tmp_path, PYTHONPATH="") as (said, _, address):
        assert "Traceback" not in said
        page = chromium.new_page()
        page.goto(address)
        decode(page, SHORT)
        assert page.inner_text("h1") == "carried"
        assert [answer(panel) for panel in panels(page)] == expected(models, SHORT)[1]
        page.close()
