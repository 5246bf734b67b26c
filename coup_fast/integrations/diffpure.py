"""The runners of DiffPure and COUP by name: their evaluation scripts run with imports changed.

    from coup_fast.integrations.diffpure import (
        Diffusion, GuidedDiffusion, LDGuidedDiffusion, OdeGuidedDiffusion, RevGuidedDiffusion)

Same constructors, same reading of `args` and `config`, same `image_editing_sample`, images in
[-1, 1] on both sides. Written from the scripts' interface and the papers; see docs/integrations.md
for what differs. Facts from Nie et al. (ICML 2022) and the code released with it.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from coup_fast import checks
from coup_fast.integrations.diffpure_files import RunFolder, load_score_model
from coup_fast.options import PurifierOptions
from coup_fast.plan import Plan, start_row
from coup_fast.purifier import Purifier
from coup_fast.score_model import ClassifierFunction, ScoreModel

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "CoupDiffusion",
    "Diffusion",
    "GuidedDiffusion",
    "LDGuidedDiffusion",
    "OdeGuidedDiffusion",
    "RevGuidedDiffusion",
]


class _Runner(nn.Module):
    """What the runners share.

    Args:
        args: the script's arguments: `t` (noise level, index + 1), `sample_step`, `log_dir`, and
            those that a runner names. They are read at every call.
        config: the script's configuration: `data.dataset` and `model`.
        device: where to run; default CUDA where there is one.
        score_model: a `ScoreModel` to use instead of the checkpoint under `pretrained/`.
        model_dir: folder of the checkpoint, instead of the script's.
        pictures: write the pictures and tensors of the first two batches to `args.log_dir`.
        fresh_draws: new noise for every call, from torch's global generator, so that the script's
            `torch.manual_seed` decides it; False: the same noise in every call, by `args.seed`.
        **options: of the `Purifier` and its method, as in `coup_fast.options`.

    Raises ValueError for a dataset or score type that the runner has no network for, and
    FileNotFoundError if the checkpoint is not there.
    """

    method: str
    gradient = "exact"
    clamps = False  # the input once and the output once, to [-1, 1]; nothing between the rounds

    def __init__(
        self,
        args: Any,
        config: Any,
        device: torch.device | str | None = None,
        *,
        score_model: ScoreModel | None = None,
        model_dir: str | Path | None = None,
        pictures: bool = True,
        fresh_draws: bool = True,
        **options: Unpack[PurifierOptions],
    ) -> None:
        super().__init__()
        self.args, self.config = args, config
        usual = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = torch.device(usual if device is None else device)
        if score_model is None:
            score_model = load_score_model(self._checkpoint_kind(), config, model_dir)
        self.score_model = score_model.eval().to(self.device)
        self.pictures = checks.flag("pictures", pictures)
        self.fresh_draws = checks.flag("fresh_draws", fresh_draws)
        self.options = {"gradient": self.gradient, "check_values": False} | options
        self.classifier: ClassifierFunction | None = None
        self.purifier: Purifier | None = None
        self._built_for: object = None

    @property
    def model(self) -> Any:
        """The network."""
        return self.score_model.network

    @property
    def betas(self) -> Tensor:
        """β of the discrete forward process, float32 [N] on the runner's device."""
        schedule: Any = self.score_model.schedule
        return torch.tensor(schedule.discrete().betas, device=self.device)

    def image_editing_sample(
        self,
        img: Tensor,
        bs_id: float = 0,
        tag: str | None = None,
        *,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Purified images of `args.sample_step` rounds, [sample_step * B, C, H, W] in [-1, 1].

        img: [B, C, H, W] in [-1, 1] (nothing is checked or clamped that the method does not).
        bs_id: number of the batch; those below 2 leave files in `args.log_dir/bs{bs_id}_{tag}`.
        tag: default "rnd" and a random number. noise: for each round the tensors [M, B, C, H, W]
        to use instead of generated noise. Each round starts from the result of the one before.

        Raises FloatingPointError if a result is not finite.
        """
        if not isinstance(img, Tensor) or img.ndim != 4:
            got = list(img.shape) if isinstance(img, Tensor) else type(img).__name__
            raise TypeError(f"img must be a tensor [B, C, H, W], got {got}")
        rounds = checks.integer("args.sample_step", self.args.sample_step, 1)
        tag = f"rnd{random.randint(0, 10000)}" if tag is None else tag
        folder = None
        if self.pictures and bs_id < 2:
            folder = RunFolder(Path(self.args.log_dir) / f"bs{bs_id}_{tag}")
        x = img.to(self.device).clamp(-1, 1) if self.clamps else img.to(self.device)
        if folder is not None:
            folder.picture("original_input", x)
        results = []
        for k in range(rounds):
            x = self._round(k, x, folder, noise[k] if noise is not None else None)
            results.append(x)
        return torch.cat(results).clamp(-1, 1) if self.clamps else torch.cat(results)

    def _round(self, k: int, x: Tensor, folder: RunFolder | None, noise: Tensor | None) -> Tensor:
        """One purification of x in [-1, 1]."""
        purifier = self._purifier()
        images = 0.5 * x + 0.5
        draw = int(torch.randint(2**62, ()).item()) if self.fresh_draws else 0
        noise = self._noise(images) if noise is None else noise
        if folder is not None:
            _, start = next(purifier.trajectory(images, draw=draw, noise=noise))
            folder.picture(f"init_{k}", 2 * start - 1)
        result: Tensor = 2 * purifier(images, draw=draw, noise=noise) - 1
        if not bool(result.detach().isfinite().all()):
            raise FloatingPointError(
                f"round {k} of {self.method} gave inf or NaN; run its purifier with "
                "check_values=True to learn which step did"
            )
        if folder is not None:
            folder.tensor(f"samples_{k}", result)
            folder.picture(f"samples_{k}", result)
        return result

    def _purifier(self) -> Purifier:
        """The purifier that the arguments ask for now; kept for as long as they ask for it."""
        level = self._noise_level()
        options = self._method_options() | self.options
        seed = int(getattr(self.args, "seed", 0))
        settings = (level, self.args.t, seed, repr(sorted(options.items())), self.classifier)
        if self.purifier is None or settings != self._built_for:
            purifier = Purifier(
                self.score_model,
                self.classifier,
                method=self.method,
                seed=seed,
                **options,
            )
            if level != self.args.t:
                assert isinstance(purifier.plan, Plan)
                schedule: Any = self.score_model.schedule
                noised = float(schedule.discrete().alpha_bar(level - 1))
                purifier = purifier.with_plan(replace(purifier.plan, start=start_row(noised)))
            self.purifier, self._built_for = purifier, settings
        return self.purifier

    def _noise_level(self) -> int:
        """Steps of forward diffusion; the reverse run always starts from `args.t`."""
        return int(self.args.t)

    def _method_options(self) -> dict[str, Any]:
        """Options of the method that the arguments decide."""
        schedule: Any = self.score_model.schedule
        return {"t_star": self.args.t / schedule.discrete().num_steps}

    def _noise(self, images: Tensor) -> Tensor | None:
        """Noise that the arguments fix; None: generated."""
        return None

    def _checkpoint_kind(self) -> str:
        """ "score_sde" or "guided_diffusion", by dataset and score type, which must agree."""
        kinds = {"CIFAR10": "score_sde", "ImageNet": "guided_diffusion"}
        dataset = self.config.data.dataset
        if dataset not in kinds:
            raise ValueError(
                f"there is no checkpoint for dataset {dataset!r} ({', '.join(kinds)} have one); "
                "pass score_model="
            )
        kind = kinds[dataset]
        asked = getattr(self.args, "score_type", kind)
        if asked != kind:
            raise ValueError(
                f"the {dataset} checkpoint is of score type {kind}, args.score_type is {asked!r}"
            )
        return kind


class RevGuidedDiffusion(_Runner):
    """DiffPure (`--diffusion_type sde`): forward diffusion to `args.t`, reverse VP-SDE.

    `args.rand_t` varies the forward level by up to ± `args.t_delta`; the reverse run starts from
    `args.t` all the same, as released. `args.use_bm` chooses between two samplers of the same
    Brownian motion there and nothing here. Differentiable: exactly, where the original solves an
    adjoint SDE. Arguments: see `_Runner`.
    """

    method = "diffpure"

    def _noise_level(self) -> int:
        return _varied_level(self.args)


def _varied_level(args: Any) -> int:
    """`args.t`, varied by up to ± `args.t_delta` where `args.rand_t` says so."""
    level = int(args.t)
    if getattr(args, "rand_t", False):
        level += int(np.random.randint(-args.t_delta, args.t_delta))  # noqa: NPY002
        if level < 1:
            raise ValueError(
                f"args.t={args.t} with args.t_delta={args.t_delta} came to {level} steps of noise; "
                "t_delta must be less than t"
            )
    return level


class CoupDiffusion(_Runner):
    """COUP (`--diffusion_type sde` of its script): the reverse VP-SDE guided by the classifier.

    The interface is that of `RevGuidedDiffusion` in COUP's released repository, whose script calls
    `image_editing_sample(x, bs_id=…, tag=…, mode=args.mode, cls=classifier)`. `args.Guide` turns
    the guidance on (default True), `args.lmd_guide` is its scale λ (default 1; our older name
    `args.guidance_scale` means the same). The input is clamped once, the output once, and nothing
    between the rounds. The gradient is that of the run, where the released adjoint leaves the
    guidance out. Arguments: see `_Runner`.

    classifier: used where a call names no `cls`; pixels in [0, 1] -> logits.
    pictures: as there; the released runner writes none, hence the default.
    """

    method = "coup"
    clamps = True

    def __init__(
        self,
        args: Any,
        config: Any,
        device: torch.device | str | None = None,
        classifier: ClassifierFunction | None = None,
        *,
        pictures: bool = False,
        **keywords: Any,
    ) -> None:
        super().__init__(args, config, device, pictures=pictures, **keywords)
        self._own_classifier = (classifier,)  # a tuple, so that it is no submodule
        self._mode = "sde"

    def image_editing_sample(  # the released order of arguments
        self,
        img: Tensor,
        bs_id: float = 0,
        tag: str | None = None,
        mode: str = "sde",
        cls: ClassifierFunction | None = None,
        *,
        noise: Sequence[Tensor] | None = None,
    ) -> Tensor:
        """Purified images of `args.sample_step` rounds, [sample_step * B, C, H, W] in [-1, 1].

        mode: "sde" or "de" starts from the images, "diffPure" diffuses them to `args.t` first (by
        another level where `args.rand_t` varies it). cls: the classifier that is defended, pixels
        in [0, 1] -> logits. The other arguments and errors are those of the other runners.

        Raises ValueError for another mode, and if `args.Guide` asks for a classifier that is not
        there.
        """
        if mode not in _FORWARD_NOISE:
            known = ", ".join(map(repr, _FORWARD_NOISE))
            raise ValueError(
                f"mode must be one of {known}, got {mode!r}; the released runner prints an error "
                "for it and runs 'sde'"
            )
        classifier = self._own_classifier[0] if cls is None else cls
        if classifier is None and self._guided():
            raise ValueError(
                "args.Guide is on and there is no classifier: pass cls=classifier, or set "
                "args.Guide = False"
            )
        self._mode, self.classifier = mode, classifier
        return super().image_editing_sample(img, bs_id, tag, noise=noise)

    def _guided(self) -> bool:
        return bool(getattr(self.args, "Guide", True))

    def _noise_level(self) -> int:
        if _FORWARD_NOISE[self._mode]:
            return _varied_level(self.args)
        if getattr(self.args, "rand_t", False):
            raise ValueError(
                f"mode {self._mode!r} adds no forward noise, so args.rand_t has nothing to vary"
            )
        return int(self.args.t)

    def _method_options(self) -> dict[str, Any]:
        names = ("lmd_guide", "guidance_scale")
        given = [getattr(self.args, name) for name in names if hasattr(self.args, name)]
        if len(given) > 1:
            raise ValueError("args.lmd_guide and args.guidance_scale are one number: give one")
        if not self._guided() and "guidance_scale" in self.options:
            raise ValueError("args.Guide is off, and guidance_scale= was given: give one of them")
        return super()._method_options() | {
            "guidance_scale": (given or [1.0])[0] if self._guided() else 0.0,
            "forward_noise": _FORWARD_NOISE[self._mode],
            "clamp_output": False,
        }


_FORWARD_NOISE = {"sde": False, "de": False, "diffPure": True}  # by mode


class OdeGuidedDiffusion(_Runner):
    """DiffPure's ablation (`ode`): forward diffusion, probability-flow ODE by Euler steps.

    `args.step_size` is the step; `args.fix_rand` gives every image the normals of a torch generator
    seeded with `args.seed`, the numbers that the original draws. Arguments: see `_Runner`.
    """

    method = "vp-ode"

    def _method_options(self) -> dict[str, Any]:
        return super()._method_options() | {"step_size": getattr(self.args, "step_size", 1e-3)}

    def _noise(self, images: Tensor) -> Tensor | None:
        if not getattr(self.args, "fix_rand", False):
            return None
        generator = torch.Generator().manual_seed(int(self.args.seed))
        noise = torch.empty(1, *images.shape[1:]).normal_(generator=generator)
        return noise.to(images.device).expand(images.shape)[None]


class LDGuidedDiffusion(_Runner):
    """DiffPure's ablation (`ldsde`): Langevin dynamics about the input.

    `args.sigma2`, `args.lambda_ld` and `args.eta`; the step is 1e-2 as released. One round only:
    the original's second would be tied to the first's input. Arguments: see `_Runner`.
    """

    method = "ldsde"

    def _method_options(self) -> dict[str, Any]:
        if int(self.args.sample_step) != 1:
            raise ValueError(
                f"ldsde runs one round, args.sample_step is {self.args.sample_step}; a longer run "
                "is a larger args.t"
            )
        names = ("sigma2", "lambda_ld", "eta")
        given = {name: getattr(self.args, name) for name in names if hasattr(self.args, name)}
        return super()._method_options() | given


class GuidedDiffusion(_Runner):
    """DDPM sampling (`ddpm`) with a guided-diffusion network: x̂0 clipped, learned variance.

    `config.model.learn_sigma` and `sigma_small` decide the variance; `timestep_respacing` must
    leave every step in. Runs under `no_grad`, as the original; `gradient="exact"` differentiates.
    Arguments: see `_Runner`.
    """

    method = "ddpm"
    gradient = "none"

    def _method_options(self) -> dict[str, Any]:
        model = self.config.model
        respacing = str(getattr(model, "timestep_respacing", ""))
        steps = self.score_model.schedule.discrete().num_steps  # type: ignore[union-attr]
        if respacing not in ("", str(steps)):
            raise ValueError(
                f"config.model.timestep_respacing is {respacing!r}; only all {steps} steps are "
                "supported here (method 'ddpm' takes num_steps)"
            )
        fixed = "fixed-small" if getattr(model, "sigma_small", False) else "fixed-large"
        variance = "learned" if getattr(model, "learn_sigma", False) else fixed
        return super()._method_options() | {"variance": variance, "clip_denoised": True}

    def _checkpoint_kind(self) -> str:
        return "guided_diffusion"


class Diffusion(_Runner):
    """DDPM sampling (`celebahq-ddpm`): x̂0 not clipped, variance by `config.model.var_type`.

    The checkpoint is `celeba_hq.ckpt` where torch.hub, which the original asks, has put it; nothing
    is downloaded here. Runs under `no_grad`, as the original; `gradient="exact"` differentiates.
    Arguments: see `_Runner`.
    """

    method = "ddpm"
    gradient = "none"

    def _method_options(self) -> dict[str, Any]:
        variances = {"fixedsmall": "fixed-small", "fixedlarge": "fixed-large"}
        kind = getattr(self.config.model, "var_type", "fixedsmall")
        checks.choice("config.model.var_type", kind, variances)
        return super()._method_options() | {"variance": variances[kind]}

    def _checkpoint_kind(self) -> str:
        if self.config.data.dataset != "CelebA_HQ":
            raise ValueError(
                f"there is no checkpoint for dataset {self.config.data.dataset!r} (CelebA_HQ has "
                "one); pass score_model="
            )
        return "ddpm"
