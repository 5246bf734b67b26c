"""What the page shows, as HTML: pictures side by side, the classifier's views, times, messages.

Plain functions from results to text. Whatever a user or a file has named is escaped.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from html import escape

from PIL import Image
from torch import Tensor

from coup_fast.app.bench import Bench
from coup_fast.app.experiment import ATTACK_STEPS, Progress, Result
from coup_fast.app.pictures import Chosen
from coup_fast.integrations.pictures import to_whole_numbers

TOP = 5  # classes shown
WEAK = (
    "PGD on the classifier is a weak attack: it does not know the purifier. It shows that "
    "purification works, not how robust it is."
)


def picture(pixels: Tensor) -> Image.Image:
    """Pixels [1 or 3, H, W] as a pillow image; values outside [0, 1] are shown as the nearest."""
    values = to_whole_numbers(pixels.float().cpu())[0].permute(1, 2, 0).numpy()
    return Image.fromarray(values[:, :, 0] if values.shape[2] == 1 else values)


def preview(chosen: Chosen | None, attack: bool) -> str:
    """The chosen picture, and places for what a run will show."""
    waiting = [_empty("Attacked")] if attack else []
    given = _empty("Input") if chosen is None else _card("Input", chosen.pixels, chosen.name)
    return _cards([given, *waiting, _empty("Purified")])


def running(chosen: Chosen, attack: bool, progress: Progress) -> str:
    """The picture on its way."""
    if progress.state is None:
        return preview(chosen, attack)
    cards = [_card("Input", chosen.pixels, chosen.name)]
    if progress.attacked is not None:
        cards.append(_card("Attacked", progress.attacked, f"{chosen.name}, attacked"))
    title = _step_title(progress.done, progress.total)
    return _cards([*cards, _card(title, progress.state, title)])


def stage(bench: Bench, result: Result, step: int) -> str:
    """Input, attacked picture and the state after `step` steps, each as the classifier sees it."""
    name, views, classes = result.chosen.name, result.views, _shown_classes(result)
    title = "Purified" if step == result.steps else _step_title(step, result.steps)
    seen = None if views is None else int(views.original.argmax())
    first = "" if views is None else _view(bench, views.original, classes)
    cards = [_card("Input", result.chosen.pixels, name, first)]
    if result.attacked is not None and views is not None and views.attacked is not None:
        view = _view(bench, views.attacked, classes, seen)
        cards.append(_card("Attacked", result.attacked, f"{name}, attacked", view))
    last = "" if views is None else _view(bench, views.states[step], classes, seen)
    return _cards([*cards, _card(title, result.states[step], title, last)])


def summary(result: Result) -> str:
    """Settings and times of a run, and what its attack is worth."""
    purifier, steps = result.purifier, result.steps
    options = {key: v for key, v in purifier.options.items() if key != "image_shape"}
    settings = [*(f"{key} {value}" for key, value in options.items()), f"seed {purifier.seed}"]
    fewer = purifier.plan.num_steps - steps
    early = f" ({fewer} fewer than planned: the method stopped by itself)" if fewer else ""
    lines = [
        f"<b>{_duration(result.seconds_per_step)} a step</b> (median), "
        f"{_duration(sum(result.seconds))} for {steps} step{'s' * (steps != 1)}{early}.",
        escape(f"{purifier.method}: {', '.join(settings)}."),
    ]
    if result.epsilon is not None:
        lines.append(f"ℓ∞ attack of {ATTACK_STEPS} steps, ε = {result.epsilon:.4g}. {WEAK}")
    return "".join(f"<p>{line}</p>" for line in lines)


def status(progress: Progress) -> str:
    """A bar that says how far a run is."""
    share = 100 * progress.done / progress.total
    words = "Attacking …"
    if progress.state is not None:
        words = f"Step {progress.done} of {progress.total}"
    return (
        f'<div class="cf-status" role="status"><div style="--share:{share:.1f}%"></div>'
        f"<span>{words}</span></div>"
    )


def remarks(sentences: Sequence[str]) -> str:
    """What was done to an upload."""
    return "".join(f'<p class="cf-remark">{escape(sentence)}</p>' for sentence in sentences)


def problem(sentence: str) -> str:
    """Why something was refused."""
    return f'<div class="cf-problem" role="alert">{escape(sentence.removesuffix("."))}.</div>'


def _cards(cards: Sequence[str]) -> str:
    return f'<div class="cf-cards">{"".join(cards)}</div>'


def _card(title: str, pixels: Tensor, alt: str, view: str = "") -> str:
    encoded = io.BytesIO()
    picture(pixels).save(encoded, format="PNG")
    data = base64.b64encode(encoded.getvalue()).decode()
    image = f'<img alt="{escape(alt)}" src="data:image/png;base64,{data}">'
    return f"<figure><figcaption>{escape(title)}</figcaption>{image}{view}</figure>"


def _step_title(step: int, steps: int) -> str:
    return "Start" if step == 0 else f"After step {step} of {steps}"


def _empty(title: str) -> str:
    return f'<figure><figcaption>{title}</figcaption><div class="cf-empty"></div></figure>'


def _view(bench: Bench, view: Tensor, classes: Sequence[int], expected: int | None = None) -> str:
    """What the classifier sees: its class, whether that is the expected one, and bars."""
    first = int(view.argmax())
    same = (
        "&nbsp;"
        if expected is None
        else "as the input"
        if first == expected
        else "not as the input"
    )
    mark = "" if expected is None else " cf-same" if first == expected else " cf-other"
    bars = "".join(
        f'<li style="--share:{100 * float(view[number]):.1f}%">'
        f"<span>{escape(bench.class_name(number))}</span>"
        f"<span>{_percent(float(view[number]))}</span></li>"
        for number in classes
    )
    return (
        f'<p class="cf-view{mark}"><b>{escape(bench.class_name(first))}</b> '
        f"{_percent(float(view[first]))} <small>{same}</small></p><ul>{bars}</ul>"
    )


def _shown_classes(result: Result) -> list[int]:
    """The likeliest classes of input, attacked and purified picture together."""
    if result.views is None:
        return []
    likely = result.views.original.maximum(result.views.states[-1])
    if result.views.attacked is not None:
        likely = likely.maximum(result.views.attacked)
    return likely.topk(min(TOP, len(likely))).indices.tolist()


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


def _duration(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 0.9995 else f"{seconds:.2f} s"
