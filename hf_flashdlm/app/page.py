"""The page: what a visitor types and presses, and what is shown for it.

Owns the layout, the style sheet, and the words for a visitor's mistakes. Knows nothing of arguments, of servers, or of
how decoding works.
"""

import os
from collections.abc import Generator
from contextlib import closing
from pathlib import Path


os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # Gradio reads it when it is imported

import gradio as gr

from ..console.checkpoint import Checkpoint
from ..guider import ARGuider
from .canvas import AUTHORS, GIVEN, GUIDER, MASK, MODEL, panel, plain
from .run import Settings, Trace, methods, race


VISITORS = 4  # whose decodes take turns; more wait in a queue
TITLE = "A diffusion language model at work"
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
# What `launch` of Gradio is given; the fonts are those of the system, so that nothing is fetched.
LOOK = {
    "head": f"<style>{STYLE}</style>",
    "theme": gr.themes.Default(
        primary_hue="indigo", neutral_hue="slate", font=["system-ui", "sans-serif"], font_mono=["ui-monospace"]
    ),
    "footer_links": [],
    "run_history": False,
    "max_file_size": "1kb",  # the page asks for no files
}
ABOUT = """
<p class="flash-about">The answer starts as a row of masks. Every forward of the model drafts all of it, and the drafts
that are trusted are written. The methods decode the same prompt on one clock: whenever you look, all have computed for
about the same time.</p>
"""
LEGEND = f"""
<ul class="flash-legend" aria-label="Legend">
<li><span class="flash-masked" aria-hidden="true">{MASK}</span> masked</li>
<li><span class="flash-token flash-{MODEL}">token</span> {AUTHORS[MODEL]}</li>
<li><span class="flash-token flash-{GUIDER}">token</span> {AUTHORS[GUIDER]}</li>
<li><span class="flash-given">token</span> {AUTHORS[GIVEN]}: the prompt</li>
<li><span class="flash-token flash-{MODEL} flash-fresh">token</span> written at this step</li>
</ul>
"""


def make_page(checkpoint: Checkpoint, guider: ARGuider | None, examples: list[str]) -> gr.Blocks:
    r"""
    The page.

    Args:
        checkpoint ([`Checkpoint`]): The model with its tokenizer.
        guider ([`ARGuider`], *optional*): Without it the guided method is left out.
        examples (`list[str]`): Prompts to choose from.
    """
    defaults = Settings.of(checkpoint)
    with gr.Blocks(title=TITLE, analytics_enabled=False) as page:
        gr.HTML(f"<h1>{TITLE}</h1>{ABOUT}", elem_id="about", elem_classes="flash")
        prompt = gr.Textbox(
            label="Prompt", value=examples[0], lines=1, max_lines=8, elem_id="prompt", info="Enter decodes it."
        )
        with gr.Row(elem_id="buttons"):
            start = gr.Button("Decode", variant="primary", scale=3, min_width=80, elem_id="start")
            stop = gr.Button("Stop", interactive=False, scale=1, min_width=80, elem_id="stop")
        gr.Examples([[example] for example in examples], [prompt], label="Examples", elem_id="examples")
        with gr.Accordion("Settings", open=False, elem_id="settings"), gr.Row():
            settings = make_settings(defaults)
        status = gr.HTML(said(""), elem_id="status", elem_classes="flash")
        gr.HTML(LEGEND, elem_classes="flash")
        stage = gr.HTML(elem_id="stage", elem_classes="flash")
        step = gr.Slider(
            0, 1, value=0, step=1, label="Step", interactive=False, elem_id="step", buttons=[],
            info="Moves all canvases to what they held after this many forwards.",
        )  # fmt: skip
        connect(checkpoint, guider, [prompt, *settings], [status, stage, step, start, stop])
    return page


NAMES = ("status", "stage", "step", "start", "stop", "shown")  # of what a decode changes on the page


def connect(checkpoint: Checkpoint, guider: ARGuider | None, inputs: list, outputs: list) -> None:
    """Say what happens when something is pressed or moved; the components `outputs` are in the order of `NAMES`."""
    shown = gr.State(time_to_live=3600)  # what the slider shows again
    parts = dict(zip(NAMES, [*outputs, shown], strict=True))

    def decode(text: str, *values: float) -> Generator[dict, None, None]:
        with closing(follow(checkpoint, guider, text, values)) as updates:
            for update in updates:
                yield {parts[name]: value for name, value in update.items()}

    def stopped(traces: list[Trace] | None) -> dict:
        update = {"status": said("Stopped."), "step": replay_slider(traces or [])} | buttons(is_running=False)
        return {parts[name]: value for name, value in update.items()}

    def replay(traces: list[Trace] | None, number: float) -> str:
        return draw(checkpoint, traces or [], int(number))

    hidden: dict = {"show_progress": "hidden", "api_visibility": "private"}
    pressed = [inputs[0].submit, parts["start"].click]
    queued = {"trigger_mode": "once", "concurrency_limit": VISITORS}
    running = gr.on(pressed, decode, inputs, list(parts.values()), **queued, **hidden)
    parts["stop"].click(stopped, [shown], outputs, cancels=[running], queue=False, **hidden)
    latest = {"trigger_mode": "always_last", "queue": False}
    parts["step"].input(replay, [shown, parts["step"]], [parts["stage"]], **latest, **hidden)


def make_settings(defaults: Settings) -> list[gr.components.Component]:
    """The inputs of [`Settings`], in its order."""
    return [
        gr.Number(
            defaults.max_new_tokens, label="Tokens of the answer", precision=0, minimum=1, elem_id="max_new_tokens"
        ),
        gr.Number(defaults.block_length, label="Block length", precision=0, minimum=1, elem_id="block_length"),
        gr.Slider(
            0, 1, defaults.confidence_threshold, step=0.01, label="Threshold of FreeCache", buttons=[],
            elem_id="confidence_threshold", info="Tokens of at least this probability are written.",
        ),
    ]  # fmt: skip


def follow(checkpoint: Checkpoint, guider: ARGuider | None, text: str, values: tuple) -> Generator[dict, None, None]:
    """What changes on the page while a prompt is decoded, by `NAMES`."""
    if not text.strip():
        yield {"status": said("The prompt is empty: type one, or choose an example.", is_error=True)}
        return
    if None in values:
        yield {"status": said("A setting is empty: give it a number.", is_error=True)}
        return
    settings = Settings(*values)
    traces: list[Trace] = []
    beginning = {"status": said("Decoding."), "step": gr.Slider(interactive=False)} | buttons(is_running=True)
    with closing(race(checkpoint, text, methods(settings, guider), settings)) as watched:
        for traces in watched:
            yield {"stage": draw(checkpoint, traces), "shown": traces} | beginning
            beginning = {}
    yield outcome(traces) | buttons(is_running=False)


def outcome(traces: list[Trace]) -> dict:
    """What the page says in the end: a mistake that all methods share once, and in place of their canvases."""
    errors = {trace.error for trace in traces}
    if len(errors) == 1 and None not in errors:
        return {"status": said(str(errors.pop()), is_error=True), "stage": ""}
    done = [trace for trace in traces if trace.error is None]
    times = ", ".join(
        f"{trace.method.name} {len(trace.canvases)} forwards in {trace.seconds[-1]:.2f} s" for trace in done
    )
    return {"status": said(f"Done: {times}."), "step": replay_slider(traces)}


def draw(checkpoint: Checkpoint, traces: list[Trace], step: int | None = None) -> str:
    """All canvases after a step, see [`panel`]."""
    return f'<div class="flash-panels">{"".join(panel(checkpoint, trace, step) for trace in traces)}</div>'


def said(text: str, is_error: bool = False) -> str:
    """A message, which screen readers speak."""
    kind, role = ("flash-error", "alert") if is_error else ("flash-said", "status")
    return f'<p class="{kind}" role="{role}">{plain(text)}</p>'


def replay_slider(traces: list[Trace]):
    """The slider, at the last step of the longest decode."""
    steps = max((len(trace.canvases) for trace in traces), default=0)
    return gr.Slider(maximum=max(steps, 1), value=steps, interactive=steps > 0)


def buttons(is_running: bool) -> dict:
    """The two buttons."""
    return {"start": gr.Button(interactive=not is_running), "stop": gr.Button(interactive=is_running)}
