"""What has to be said beside the table of an evaluation."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coup_fast.attacks import WEAK_GRADIENTS

if TYPE_CHECKING:
    from coup_fast.evaluation.report import Report


def notes(report: Report) -> list[str]:
    """What has to be said beside the table."""
    k = report.config.draws
    found = [
        "final iterate: the attack's result under one draw of the defence's noise, which the "
        f"attack never saw; average, worst and majority: of {k} such draws. "
        f"“clean, worst of {k}” is the control for “worst of {k}”.",
        "The defences are randomised: an attack needs fresh draws at each iterate (EOT), and "
        "of AutoAttack the version `rand` is the right one.",
    ]
    for models, names in _named_models(report).items():
        found.append(f"Networks of {models}: {', '.join(f'“{name}”' for name in names)}.")
    if report.comparisons:
        found.append(
            "difference: accuracy of a less that of b under draw 0, in points, with Newcombe's "
            "95 % interval for paired proportions. won : lost: images that only a, and only b, "
            f"got right; p of McNemar's exact test, and Holm's for the {len(report.comparisons)} "
            "comparisons that were stated before the run."
        )
    if any(row.attack is not None and row.attack.noise == "fixed" for row in report.config.rows):
        found.append(
            "Rows of fixed noise are another case: the attack was made on the first draws (as "
            "many as its EOT), and they count in final iterate, average, worst and majority."
        )
    weak = {line.weakness for line in report.lines}
    found += [
        f"weak ({gradient}): the attack {reason}; not a measure of robustness."
        for gradient, reason in WEAK_GRADIENTS.items()
        if reason in weak
    ]
    found += [f"{name}: {words}." for name, words in report.foreign().items()]
    if any(line.row.defence.guided for line in report.lines):
        found.append(
            "Guided defences use the classifier's gradient inside. AutoAttack's check for "
            "dynamic defences looks for functions named `grad` or `backward` and misses the "
            "same gradient computed in C++. “exact” differentiates through it to second order."
        )
        found += [_guidance_note(name, found) for name, found in report.guidance().items()]
    if any(row.attack is not None and row.attack.stop_when_fooled for row in report.config.rows):
        stopped = sum(int((line.attack_run or {}).get("stopped", 0)) for line in report.lines)
        found.append(
            "“stopped when fooled”: an image rests once it is misclassified under all draws of "
            f"one iterate, here {stopped} times. Average, final iterate and majority can be "
            "higher than without; worst only by a stopped image that is right under all of "
            "the judge's draws."
        )
    if any(line.union for line in report.lines):
        found.append(
            "Accuracy under an attack is an upper bound of robustness. The closest one here is "
            "that under the worst attack on each image, weak ones included: where the loss is "
            "too curved for its steps, an attack with the right gradient can be the worse one."
        )
    codes = report.codes()
    if len(codes) > 1:
        listed = "; ".join(f"{count} under {code}" for code, count in codes.items())
        found.append(f"The batches were computed by different code of coup_fast: {listed}.")
    if report.images < 512:
        found.append(f"{report.images} images are few: mind the intervals.")
    return found


def _named_models(report: Report) -> dict[str, list[str]]:
    """The defences that name their own models, by that name."""
    found: dict[str, list[str]] = {}
    for row in report.config.rows:
        if row.attack is None and row.defence.models:
            found.setdefault(row.defence.models, []).append(row.defence.name)
    return found


def _guidance_note(name: str, found: dict[str, Any]) -> str:
    """A sentence about `Stiffness.as_dict()`."""
    low, median, high = found["steepness"].values()
    return (
        f"{name}: explicit steps of its guidance overshoot (c a²/4 > 2) at "
        f"{found['stiff_share']:.1%} of the guided states of {found['images']} images; a, the norm "
        f"of the margin's gradient in diffusion space, has median {median:.3g} (10 to 90 %: "
        f"{low:.3g} to {high:.3g})."
    )
