"""The purification methods as a scheduler of diffusers.

    scheduler = CoupScheduler.from_config(pipeline.scheduler.config, method="coup")

It steps through the rows of the method's plan with the same operators as the `Purifier`: for equal
network outputs and keys, equal bits. (A network whose weights require grad can differ from itself
in the last bits; the purifier calls it with them frozen: `unet.requires_grad_(False)`.) States are
in [-1, 1], as everywhere in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin, SchedulerOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from coup_fast import checks, methods
from coup_fast.models.diffusers_pipelines import discrete_schedule
from coup_fast.noise import step_keys
from coup_fast.options import MethodOptions
from coup_fast.plan import OUT_BIAS, OUT_SCALE, Plan
from coup_fast.run.backends import choose_ops
from coup_fast.run.guidance import confidence_gradient
from coup_fast.run.tables import Tables, tables_of
from coup_fast.schedules import DiscreteSchedule, FlowSchedule, Schedule, VPSchedule
from coup_fast.score_model import OnPath

_KINDS = {
    "epsilon": "eps",
    "sample": "x0",
    "score": "score",
    "v_prediction": "v",
    "flow_prediction": "velocity",
}


class CoupScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]  # as diffusers' own are
    """A scheduler that purifies: COUP, DiffPure and every other method but ADP.

    Args:
        num_train_timesteps: steps of the chain that the network was trained on, as in diffusers'
            own schedulers, like the next four.
        beta_start: first β.
        beta_end: last β.
        beta_schedule: "linear", "scaled_linear", "squaredcos_cap_v2" or "sigmoid".
        trained_betas: all β, instead of the three.
        prediction_type: what the network predicts: "epsilon", "sample", "score", "v_prediction",
            or "flow_prediction", the velocity of diffusers' flow-match schedulers. These have no
            betas, and their configuration does not say it, so it is to be given.
        time_scale: None: the network is told the index, as diffusers' are, or for a flow
            num_train_timesteps times the share of noise. A number: it was trained on continuous
            time t in [0, 1] and is told time_scale * t (999.0 for score_sde).
        method: a name in `coup_fast.methods.METHODS`.
        options: a dictionary of the method's options, `coup_fast.options.MethodOptions`.

    Raises:
        ValueError: the method or an option is unknown, the prediction type or noise schedule cannot
            be used, or the method is ADP, whose steps call the network twice.
    """

    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: str = "linear",
        trained_betas: Any = None,
        prediction_type: str = "epsilon",
        time_scale: float | None = None,
        method: str = "coup",
        options: MethodOptions | None = None,
    ) -> None:
        checks.choice("prediction_type", prediction_type, _KINDS)
        self.schedule: Schedule
        if prediction_type == "flow_prediction":
            self.schedule = FlowSchedule(data_at=0)
        else:
            chain = discrete_schedule(self.config)
            self.schedule = chain if time_scale is None else chain.continuous()
        self.init_noise_sigma = 1.0
        self.set_timesteps()

    def set_timesteps(
        self, num_inference_steps: int | None = None, device: str | torch.device | None = None
    ) -> None:
        """Start a run: of num_inference_steps steps, or as many as the options (or papers) say.

        `timesteps` then holds the network's time at each call, float32 or (for networks that are
        told the index) int64 [N] on `device`.
        """
        if self._facts.method == "adp":
            raise ValueError(
                "adp calls the network twice a step and chooses its step from both answers, which "
                "no scheduler can; use coup_fast.Purifier"
            )
        options = dict(self._facts.options or {})
        if num_inference_steps is not None:
            options.pop("step_size", None)
            options["num_steps"] = num_inference_steps
        kind = _KINDS[self._facts.prediction_type]
        plan = methods.plan(self._facts.method, self.schedule, kind, **options)
        assert isinstance(plan, Plan)
        if plan.guidance_norm == "stable":
            raise ValueError(
                'guidance_solver="stable" needs the classifier\'s margin at each step, which this '
                "scheduler's loop does not hand on; use coup_fast.Purifier"
            )
        coeffs = plan.coeffs.copy()
        coeffs[-1, [OUT_SCALE, OUT_BIAS]] = 1.0, 0.0  # diffusers stays in [-1, 1]
        self.plan = replace(plan, coeffs=coeffs)
        self._rows = np.flatnonzero(np.isfinite(plan.times)).tolist()
        self._tables: dict[tuple[torch.device, torch.dtype], Tables] = {}
        times = torch.as_tensor(plan.times[self._rows], dtype=torch.float64)
        told = times * self._time_scale
        if isinstance(self.schedule, DiscreteSchedule):
            self.timesteps = told.round().long().to(device)
        else:
            self.timesteps = told.float().to(device)
        self.num_inference_steps = len(self._rows)
        self.step_index = 0

    @property
    def _facts(self) -> Any:
        """The configuration; its entries are attributes, which its type does not say."""
        return self.config

    @property
    def _time_scale(self) -> float:
        """What times in [0, 1] are multiplied by for the network."""
        scale = self._facts.time_scale
        return float(self._facts.num_train_timesteps if scale is None else scale)

    @property
    def guided(self) -> bool:
        """Whether the coming step reads `guidance`."""
        return bool(self.plan.guided[self._row()])

    def noise_keys(
        self, images: Tensor, seed: int = 0, sample_ids: Any = None, draw: int = 0
    ) -> Tensor:
        """Keys of all the noise of a run, int64 [M, B, 2], for `start` and `step`.

        The noise is that of `Purifier(seed=seed)(images, sample_ids, draw)`.
        """
        ids = torch.arange(len(images)) if sample_ids is None else torch.as_tensor(sample_ids)
        numel = images[0].numel() if len(images) else 0
        return step_keys(seed, ids.to(images.device), draw, self.plan.num_noise, numel)

    def start(
        self,
        images: Tensor,
        generator: Any = None,
        keys: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """The state from which the loop starts, [-1, 1] and diffused where the method does that.

        Args:
            images: pixels [B, C, H, W] in [0, 1].
            generator: as in `step`.
            keys: as in `step`.
            noise: as in `step`.
        """
        ops = choose_ops("auto", images)
        index = 0 if self.plan.start_noisy else None
        source = self._noise(images, index, generator, keys, noise)
        return ops.perturb(images, self._tables_for(images).start, *source)

    def confidence_gradient(
        self, classifier: Callable[[Tensor], Tensor], sample: Tensor
    ) -> Tensor | None:
        """COUP's guidance at a state: ∇ₓ log max p of the classifier; None if the step takes none.

        Args:
            classifier: pixels [B, C, H, W] in [0, 1] -> logits [B, K].
            sample: the state.
        """
        if not self.guided:
            return None
        return confidence_gradient(classifier, sample.float(), choose_ops("auto", sample))

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The network's input: the state as it is, or of a flow the state on its path."""
        if not isinstance(self.schedule, FlowSchedule):
            return sample
        time = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        path: Tensor = OnPath(lambda x, t: x, self.schedule, self._time_scale)(sample, time)
        return path

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        guidance: Tensor | None = None,
        reference: Tensor | None = None,
        generator: Any = None,
        keys: Tensor | None = None,
        noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> SchedulerOutput | tuple[Tensor]:
        """The state after this step.

        Args:
            model_output: [B, C, H, W], or [B, 2C, H, W] with variance channels.
            timestep: `timesteps[step_index]`; steps are taken in order.
            sample: the state. float32; other dtypes are rounded after every step.
            guidance: [B, C, H, W], see `confidence_gradient`; needed where `guided`.
            reference: the attacked image in [-1, 1], for the methods that look back at it.
            generator: a torch generator, or a list of one for each sample. Give one of this, keys
                and noise; without all three, noise comes from torch's global generator.
            keys: those of `noise_keys`.
            noise: [B, C, H, W].
            return_dict: whether to return diffusers' `SchedulerOutput`, or a tuple.

        Raises:
            ValueError: the timestep is out of turn, or guidance or reference is missing.
        """
        row = self._row()
        expected = self.timesteps[self.step_index]
        if expected.device.type == "cpu" and float(timestep) != float(expected):
            raise ValueError(
                f"step {self.step_index} of this run is at timestep {expected.item()}, got "
                f"{float(timestep):g}; call set_timesteps to start anew"
            )
        if self.guided and guidance is None:
            raise ValueError(
                f"this step of {self.plan.method} is guided: pass "
                "guidance=scheduler.confidence_gradient(classifier, sample), or set the option "
                "guidance_scale=0"
            )
        if self.plan.uses_attacked and reference is None:
            raise ValueError(
                f"{self.plan.method} looks back at the attacked image: pass reference="
            )
        ops = choose_ops("auto", sample)
        x = sample.to(torch.promote_types(sample.dtype, torch.float32))
        tables = self._tables_for(x)
        out: Tensor | None = model_output
        if not self.plan.learned_variance:
            out = model_output[:, : sample.shape[1]]
        following = [*self._rows, self.plan.num_steps][self.step_index + 1]
        for k in range(row, following):  # the rows after the first call no network
            source = self._noise(x, self.plan.noise_index[k], generator, keys, noise)
            read = reference if k == row else None
            x = ops.reverse_step(
                x, out, tables.rows[k], source[0], guidance, read, source[1],
                self.plan.guidance_norm,
            )  # fmt: skip
            out = guidance = noise = None
        self.step_index += 1
        result = x.to(sample.dtype)
        return SchedulerOutput(prev_sample=result) if return_dict else (result,)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Forward diffusion √ᾱ x + √(1-ᾱ) z at the network times `timesteps` [B]."""
        times = timesteps.detach().cpu().double().numpy()
        if isinstance(self.schedule, DiscreteSchedule):
            alpha_bar = self.schedule.alpha_bar(times)
        else:
            assert isinstance(self.schedule, VPSchedule | FlowSchedule)
            alpha_bar = self.schedule.alpha_bar_told(times / self._time_scale)
        level = torch.as_tensor(alpha_bar).to(original_samples)
        level = level.reshape(-1, *[1] * (original_samples.ndim - 1))
        return level.sqrt() * original_samples + (1 - level).sqrt() * noise

    def __len__(self) -> int:
        """Steps of the forward process."""
        return int(self._facts.num_train_timesteps)

    def _row(self) -> int:
        """The plan's row of the coming step."""
        if self.step_index >= len(self._rows):
            raise ValueError("the run is over; call set_timesteps to start anew")
        row: int = self._rows[self.step_index]
        return row

    def _noise(
        self,
        x: Tensor,
        index: int | None,
        generator: Any,
        keys: Tensor | None,
        noise: Tensor | None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """(keys, noise) as the operators take them for noise tensor `index` of the run."""
        if index is None:
            return None, None
        if sum(given is not None for given in (generator, keys, noise)) > 1:
            raise ValueError("give one of generator, keys and noise")
        if keys is not None:
            return keys[index], None
        if noise is None:
            noise = randn_tensor(x.shape, generator=generator, device=x.device, dtype=torch.float32)
        return None, noise

    def _tables_for(self, x: Tensor) -> Tables:
        dtype = torch.promote_types(x.dtype, torch.float32)
        key = (x.device, dtype)
        if key not in self._tables:
            self._tables[key] = tables_of(self.plan, *key)
        return self._tables[key]
