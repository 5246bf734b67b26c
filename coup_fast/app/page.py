"""The page: gradio's parts laid out, and what happens when one of them is used."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from coup_fast import methods
from coup_fast.app import drawing
from coup_fast.app.bench import Bench
from coup_fast.app.experiment import Choices, Progress, Result, experiment
from coup_fast.app.pictures import Chosen, read_upload, samples

REFRESH = 0.1  # seconds between two pictures of a run that is under way
WAITING = 16  # requests that may wait for the device
AT_ONCE: dict[str, Any] = {"queue": False, "show_progress": "hidden", "api_visibility": "private"}
ON_DEVICE: dict[str, Any] = {
    "concurrency_id": "device",
    "concurrency_limit": 1,
    "api_visibility": "private",
}
REFUSED = (ValueError, TypeError, FloatingPointError)  # requests; the error says why
FAILED = (RuntimeError, AssertionError, MemoryError)  # inside a network

_NUMBERS = {"t_star": "t*", "num_steps": "Steps", "guidance_scale": "λ"}
_STEPS = {"t_star": 0.01, "guidance_scale": 0.5}  # of the arrows beside a number
_OPTIONS = (*_NUMBERS, "solver")


def build(bench: Bench) -> gr.Blocks:
    """The page for these networks."""
    return _Page(bench).blocks


@dataclass
class Visit:
    """What the page knows of one visitor. Handlers share it, also while a run is under way.

    chosen: the picture. result: the last run that ended, of that picture or one before. running: a
    run is under way, and only it writes to the page. stop: it is to end.
    """

    chosen: Chosen | None
    result: Result | None = None
    running: bool = False
    stop: bool = False


class _Page:
    """The parts of the page, and what they do."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench
        self.samples = samples(bench)
        first = self.samples[0] if self.samples else None
        with gr.Blocks(
            title="coup_fast", analytics_enabled=False, delete_cache=(600, 3600), fill_width=True
        ) as self.blocks:
            gr.HTML(_heading(bench), elem_id="heading")
            self.visit = gr.State(Visit(first))
            with gr.Row(elem_id="columns"):
                with gr.Column(scale=0, min_width=380, elem_id="settings"):
                    self._lay_out_picture()
                    self._lay_out_attack()
                    self._lay_out_purification()
                    self.run = gr.Button("Purify", variant="primary", size="lg", elem_id="run")
                    self.stop = gr.Button("Stop", size="lg", visible=False, elem_id="stop")
                with gr.Column(scale=1, min_width=420, elem_id="results"):
                    attack = bench.classifier is not None
                    self.stage = gr.HTML(drawing.preview(first, attack), elem_id="stage")
                    self.status = gr.HTML(elem_id="status")
                    self.step = gr.Slider(
                        0, 1, 1, step=1, label="Step", visible=False, elem_id="step"
                    )
                    self.summary = gr.HTML(elem_id="summary")
            self._connect()
        self.blocks.queue(max_size=WAITING)

    def _lay_out_picture(self) -> None:
        with gr.Column(elem_classes="section"):
            gr.HTML("<h2>Picture</h2>")
            self.gallery = gr.Gallery(
                [drawing.picture(sample.pixels) for sample in self.samples],
                visible=bool(self.samples),
                columns=5,
                allow_preview=False,
                show_label=False,
                buttons=[],
                interactive=False,
                container=False,
                format="png",
                elem_id="samples",
            )
            self.upload = gr.UploadButton("Upload a picture", size="md", elem_id="upload")
            self.message = gr.HTML(_seen_as(self.bench), elem_id="message")

    def _lay_out_attack(self) -> None:
        possible = self.bench.classifier is not None
        with gr.Column(elem_classes="section", visible=possible):
            gr.HTML("<h2>Attack</h2>")
            with gr.Row():
                self.attack = gr.Checkbox(
                    possible,
                    label="Attack it first (weak)",
                    info="PGD on the classifier; it does not know the purifier",
                    scale=3,
                    min_width=200,
                    elem_id="attack",
                )
                self.epsilon = gr.Textbox(
                    self.bench.epsilon, label="ε", scale=1, min_width=80, elem_id="epsilon"
                )

    def _lay_out_purification(self) -> None:
        start = next(iter(self.bench.methods))
        shown = self.bench.shown_options(start)
        with gr.Column(elem_classes="section"):
            gr.HTML("<h2>Purification</h2>")
            self.method = gr.Dropdown(
                list(self.bench.methods),
                value=start,
                label="Method",
                filterable=False,
                elem_id="method",
            )
            self.about = gr.HTML(_about(start), elem_id="about")
            with gr.Row():
                numbers = [
                    gr.Number(
                        shown.get(name),
                        label=label,
                        visible=name in shown,
                        precision=0 if name == "num_steps" else None,
                        step=_STEPS.get(name, 1),
                        min_width=70,
                        elem_id=name,
                    )
                    for name, label in _NUMBERS.items()
                ]
                self.seed = gr.Number(0, label="Seed", precision=0, min_width=70, elem_id="seed")
            solver = gr.Radio(
                ["euler", "exponential"],
                value=shown.get("solver"),
                visible="solver" in shown,
                label="Solver (exponential: made for 10 to 20 steps)",
                elem_id="solver",
            )
            self.options = [*numbers, solver]

    def _connect(self) -> None:
        # The order of what `_fresh`, `_under_way`, `_done` and `_refused` return.
        shown = [self.stage, self.step, self.summary, self.status, self.run, self.stop]
        visit, attack = self.visit, self.attack
        self.run.click(
            self.purify,
            [visit, attack, self.epsilon, self.method, *self.options, self.seed],
            shown,
            show_progress="minimal",
            show_progress_on=self.status,
            **ON_DEVICE,
        )
        self.stop.click(self.stop_run, [visit], None, **AT_ONCE)
        self.gallery.select(self.choose_sample, [visit, attack], [self.message, *shown], **AT_ONCE)
        self.upload.upload(
            self.choose_upload,
            [visit, self.upload, attack],
            [self.message, *shown],
            **AT_ONCE,
        )
        attack.change(self.switch_attack, [visit, attack], [self.epsilon, self.stage], **AT_ONCE)
        self.method.change(self.start_method, [self.method], [self.about, *self.options], **AT_ONCE)
        self.step.input(
            self.show_step,
            [visit, self.step],
            [self.stage],
            trigger_mode="always_last",
            **AT_ONCE,
        )

    # --- what happens

    def choose_sample(self, visit: Visit, attack: bool, event: gr.SelectData) -> list[Any]:
        """Take one of the pictures that come with the package."""
        return [_seen_as(self.bench), *_choose(visit, self.samples[event.index], attack)]

    def choose_upload(self, visit: Visit, path: str, attack: bool) -> list[Any]:
        """Take the user's picture, or say what is wrong with it."""
        chosen = None
        try:
            chosen = read_upload(Path(path), self.bench)
            message = drawing.remarks((chosen.name, *chosen.remarks))
        except REFUSED as error:
            message = drawing.problem(str(error))
        return [message, *_choose(visit, chosen, attack)]

    def switch_attack(self, visit: Visit, attack: bool) -> list[Any]:
        """The radius is asked for, and has a place among the pictures, where there is an attack."""
        waiting = visit.result is None and not visit.running
        stage = drawing.preview(visit.chosen, attack) if waiting else gr.skip()
        return [gr.update(visible=attack), stage]

    def start_method(self, method: str) -> list[Any]:
        """The fields of a method, with the values that it starts from."""
        shown = self.bench.shown_options(method)
        fields = [gr.update(value=shown.get(name), visible=name in shown) for name in _OPTIONS]
        return [_about(method), *fields]

    def show_step(self, visit: Visit, step: float) -> Any:
        """The run after so many steps."""
        result = visit.result
        if result is None or visit.running:
            return gr.skip()
        return drawing.stage(self.bench, result, min(int(step), result.steps))

    def stop_run(self, visit: Visit) -> None:
        """Ask the run to end; it answers."""
        visit.stop = True

    def purify(
        self, visit: Visit, attack: bool, epsilon: str, method: str, *values: Any
    ) -> Iterator[list[Any]]:
        """Run an experiment, and show it while it runs."""
        chosen = visit.chosen
        if chosen is None:
            yield _refused("Choose a picture first")
            return
        shown = self.bench.shown_options(method)
        options = {n: v for n, v in zip(_OPTIONS, values, strict=False) if n in shown}
        choices = Choices(method, options, values[-1], epsilon if attack else None)
        visit.running, visit.stop = True, False
        try:
            yield from self._run(visit, chosen, choices)
        except REFUSED as error:
            yield _refused(str(error))
        except FAILED as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            size = " × ".join(map(str, chosen.pixels.shape))
            yield _refused(f"A network failed on the picture [{size}]: {reason}")
        finally:
            visit.running = False

    def _run(self, visit: Visit, chosen: Chosen, choices: Choices) -> Iterator[list[Any]]:
        attack, last = choices.epsilon is not None, 0.0
        for item in experiment(self.bench, chosen, choices):
            if visit.stop:
                visit.result = None
                yield _fresh(visit.chosen, attack)
                return
            if isinstance(item, Result):
                visit.result = item
                yield self._done(item)
            elif time.perf_counter() - last > REFRESH:
                yield _under_way(chosen, attack, item)
                last = time.perf_counter()

    def _done(self, result: Result) -> list[Any]:
        return [
            drawing.stage(self.bench, result, result.steps),
            gr.update(minimum=0, maximum=result.steps, value=result.steps, visible=True),
            drawing.summary(result),
            "",
            *_buttons(running=False),
        ]


def _choose(visit: Visit, chosen: Chosen | None, attack: bool) -> list[Any]:
    """Show the picture; if a run is under way, end it, and it will."""
    visit.chosen = chosen
    if visit.running:
        visit.stop = True
        return [gr.skip()] * 6
    visit.result = None
    return _fresh(chosen, attack)


def _fresh(chosen: Chosen | None, attack: bool) -> list[Any]:
    hidden = gr.update(visible=False)
    return [drawing.preview(chosen, attack), hidden, "", "", *_buttons(running=False)]


def _under_way(chosen: Chosen, attack: bool, progress: Progress) -> list[Any]:
    stage = drawing.running(chosen, attack, progress)
    hidden = gr.update(visible=False)
    return [stage, hidden, "", drawing.status(progress), *_buttons(running=True)]


def _refused(reason: str) -> list[Any]:
    """The pictures stay as they are."""
    same = gr.skip()
    return [same, same, same, drawing.problem(reason), *_buttons(running=False)]


def _buttons(running: bool) -> list[Any]:
    return [gr.update(visible=not running), gr.update(visible=running)]


def _heading(bench: Bench) -> str:
    return (
        "<h1>coup_fast</h1><p>An attack is a small change that fools a classifier. A purifier "
        "takes it out, step by step, before the classifier looks.</p>"
        f"<p><small>{escape(bench.name)}, on {bench.device}</small></p>"
    )


def _seen_as(bench: Bench) -> str:
    """What becomes of an upload."""
    colours = {1: "grey", 3: "RGB"}.get(bench.channels, f"{bench.channels} channels")
    size = "its own size" if bench.size is None else f"{bench.size[1]} × {bench.size[0]} pixels"
    return drawing.remarks([f"The networks see it in {colours}, at {size}."])


def _about(method: str) -> str:
    """The first line of a method's own description."""
    return escape((methods.METHODS[method].__doc__ or "").strip().splitlines()[0])
