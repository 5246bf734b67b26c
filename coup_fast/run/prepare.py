"""Makes a run: every precondition and every ingredient, from top to bottom."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from coup_fast import checks
from coup_fast.noise import step_keys
from coup_fast.plan import AnyPlan
from coup_fast.run import validation
from coup_fast.run.assumptions import refuse_training_mode
from coup_fast.run.backends import choose_ops
from coup_fast.run.captured import Graphs
from coup_fast.run.first_look import Looks
from coup_fast.run.kept_graphs import GraphBytes
from coup_fast.run.model_calls import Compiled, ModelCalls, check_precision, wants_channels_last
from coup_fast.run.options import RunOptions
from coup_fast.run.sample_ids import Positions
from coup_fast.run.steps import RUNS, Run
from coup_fast.run.tables import Noise, Tables, tables_of
from coup_fast.score_model import ClassifierFunction, ScoreModel


@dataclass
class Kept:
    """What the runs of one purifier leave for the next."""

    tables: dict[tuple[torch.device, torch.dtype], Tables] = field(default_factory=dict)
    compiled: Compiled = field(default_factory=Compiled)
    graphs: Graphs = field(default_factory=Graphs)
    looks: Looks = field(default_factory=Looks)
    positions: Positions = field(default_factory=Positions)
    graph_bytes: GraphBytes = field(default_factory=dict)


def prepare(
    plan: AnyPlan,
    score_model: ScoreModel,
    classifier: ClassifierFunction | None,
    options: RunOptions,
    images: Tensor,
    sample_ids: Any = None,
    draw: int | Tensor = 0,
    noise: Tensor | None = None,
    *,
    seed: int = 0,
    kept: Kept,
) -> Run:
    """The run of this plan on these images, checked and ready to start; calls no network.

    Arguments and errors are those of `coup_fast.Purifier` and its `forward`.
    """
    validation.check_images(images)
    ops = choose_ops(options.backend, images)
    check_precision(options.precision, images)
    validation.check_model("score model", score_model, images)
    if plan.needs_classifier:
        validation.check_model("classifier", classifier, images)
    else:
        classifier = None
    refuse_training_mode(score_model, score_model.network, classifier)

    ids = validation.sample_ids_of(images, sample_ids)
    if noise is None:
        numel = images[0].numel() if len(images) else 0
        run_noise = Noise(keys=step_keys(seed, ids, draw, plan.num_noise, numel))
    else:
        checks.draw("draw", draw, len(images), images.device)
        validation.check_noise(noise, plan.num_noise, images, plan.method)
        recordable = torch.is_inference_mode_enabled() or not noise.is_inference()
        run_noise = Noise(tensors=noise.detach() if recordable else noise.clone())
    if options.check_values:
        validation.check_values(images)
        if isinstance(draw, Tensor) and draw.device.type != "cpu":
            checks.draw_values("draw", draw)
        if sample_ids is None and noise is None and plan.num_noise > 0:
            kept.positions.notice(images, draw)

    place = images.device, torch.promote_types(images.dtype, torch.float32)
    if place not in kept.tables:
        with torch.inference_mode(False):  # later runs may record gradients with them
            kept.tables[place] = tables_of(plan, *place, score_model.time_scale)

    calls = ModelCalls(
        score_model,
        classifier,
        options.precision,
        wants_channels_last(options.channels_last, score_model.network),
        options.compile,
        kept.compiled.form(score_model.network, options.compile),
        kept.compiled.form(classifier, options.compile),
    )
    return RUNS[type(plan)](plan, kept.tables[place], run_noise, calls, ops, options)
