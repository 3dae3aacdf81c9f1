"""What diffusers' `scheduler_config.json` says of a training and its samplers, and ours, both ways.

Of the training: how variances grow and what a network puts out. What we can't be is refused by name, since a network
makes no sense of other noise. Of the sampler: formula and times; what we can't be becomes the nearest, and is told.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from ldm.diffusion.process import Prediction
from ldm.diffusion.schedule import ScheduleConfig, ScheduleKind, betas
from ldm.samplers.grids import Grid
from ldm.samplers.sample import SamplerConfig
from ldm.samplers.steppers import StepperKind

PREDICTIONS = {
    Prediction.NOISE: "epsilon",
    Prediction.CLEAN: "sample",
    Prediction.VELOCITY: "v_prediction",
}
SPACINGS = {Grid.TRAILING: "trailing", Grid.LINSPACE: "linspace", Grid.LEADING_TO_ONE: "leading"}
"""Other grids become trailing: those pipelines begin leading ones at timestep 1 whatever their scheduler says."""
SCHEDULES = {ScheduleKind.SCALED_LINEAR: "scaled_linear", ScheduleKind.LINEAR: "linear"}
CAPPED_COSINE = "squaredcos_cap_v2"
"""The very betas of our cosine schedule; written as numbers all the same, which need no agreement on a name."""
_LEADING, _LINSPACE = "leading", "linspace"
_STEPPERS = {
    "DDIMScheduler": (StepperKind.DDIM, _LEADING),
    "DDPMScheduler": (StepperKind.DDPM, _LEADING),
    "PNDMScheduler": (StepperKind.PLMS, _LEADING),
    "EulerDiscreteScheduler": (StepperKind.EULER, _LINSPACE),
    "EulerAncestralDiscreteScheduler": (StepperKind.EULER_ANCESTRAL, _LINSPACE),
    "HeunDiscreteScheduler": (StepperKind.HEUN, _LINSPACE),
    "DPMSolverMultistepScheduler": (StepperKind.DPM_SOLVER_PP_2M, _LINSPACE),
    "DPMSolverSinglestepScheduler": (StepperKind.DPM_SOLVER_PP_2S, _LINSPACE),
    "UniPCMultistepScheduler": (StepperKind.UNIPC, _LINSPACE),
}
"""Our formula of each class, and how it spreads timesteps where its file does not say that."""
_GRIDS = {"use_karras_sigmas": Grid.KARRAS, "use_lu_lambdas": Grid.LOG_SNR}
_NOT_OURS = ("thresholding", "use_exponential_sigmas", "use_beta_sigmas", "use_flow_sigmas")
_WITH_LAST_ALPHA = (StepperKind.DDIM, StepperKind.PLMS)
"""Formulas whose classes there have a choice of where they end."""
_WITH_EVEN_STEPS = (StepperKind.DDIM, StepperKind.DDPM, StepperKind.PLMS)
"""Formulas whose classes there step by the schedule's length over the number of steps, whatever time comes next."""
_SOLVERS: dict[str, dict[str, tuple[Any, ...]]] = {
    "DPMSolverMultistepScheduler": {
        "algorithm_type": ("dpmsolver++", "sde-dpmsolver++"),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
    },
    "DPMSolverSinglestepScheduler": {
        "algorithm_type": ("dpmsolver++",),
        "solver_order": (2,),
        "solver_type": ("midpoint",),
        "final_sigmas_type": ("zero",),
    },
    "UniPCMultistepScheduler": {
        "solver_order": (2,),
        "solver_type": ("bh2",),
        "predict_x0": (True,),
        "final_sigmas_type": ("zero",),
    },
    "DDPMScheduler": {"variance_type": ("fixed_small", "fixed_small_log")},
}
"""What our formulas are; a file that is silent means the first."""
_BETAS_TOLERANCE = 1e-5
"""Files hold what float32 made of them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Noising:
    """What a scheduler's file says.

    Attributes:
        schedule: the noise of the training.
        prediction: what the network puts out.
        sampler: formula and times.
        notices: a sentence for everything in which a drawing of ours will differ from one of that scheduler.
    """

    schedule: ScheduleConfig
    prediction: Prediction
    sampler: SamplerConfig
    notices: tuple[str, ...] = ()


def scheduler_facts(schedule: ScheduleConfig, prediction: Prediction, grid: Grid) -> dict[str, Any]:
    """Return what any scheduler of diffusers must know of the training, and how its steps are spread.

    Its DDIM takes our very steps on the grids trailing and leading_to_one where their number divides that of the
    timesteps; else, and on linspace, it steps to times beside those at which it calls the network next.
    """
    return {
        **_betas(schedule),
        "num_train_timesteps": schedule.num_timesteps,
        "rescale_betas_zero_snr": schedule.has_zero_terminal_snr,
        "prediction_type": PREDICTIONS[prediction],
        "timestep_spacing": SPACINGS.get(grid, "trailing"),
        "set_alpha_to_one": True,
        "steps_offset": int(grid is Grid.LEADING_TO_ONE),
        "clip_sample": False,
    }


def noising_of(facts: dict[str, Any], origin: str) -> Noising:
    """Return what the content of a `scheduler_config.json` says, in our words.

    Args:
        facts: the file's content.
        origin: whose it is, for the message.

    Raises:
        ValueError: if a network of that training can't be ours, naming the entry, what it may be and what came.
    """
    name = facts.get("_class_name")
    if name not in _STEPPERS:
        raise ValueError(f"{origin}: the scheduler must be {_or(_STEPPERS)}, got {name!r}")
    schedule = _schedule(facts, origin)
    prediction = _prediction(facts, origin)
    if prediction is Prediction.NOISE and schedule.ends_without_signal:
        raise ValueError(
            f"{origin}: prediction_type 'epsilon' goes without rescale_betas_zero_snr: at a last timestep without "
            "signal the noise tells nothing of the picture"
        )
    stepper, spacing = _STEPPERS[name]
    if stepper is StepperKind.DPM_SOLVER_PP_2M and str(facts.get("algorithm_type", "")).startswith("sde-"):
        stepper = StepperKind.DPM_SOLVER_PP_2M_SDE
    grid, notices = _grid(facts, spacing, schedule)
    notices += [f"{name} is set to {entry}, our samplers are not" for entry in _NOT_OURS if facts.get(entry)]
    for entry, ours in _SOLVERS.get(name, {}).items():
        if facts.get(entry, ours[0]) not in ours:
            notices.append(f"{name} has {entry} {facts[entry]!r}, our sampler is that of {_or(list(map(str, ours)))}")
    if stepper is StepperKind.PLMS and not facts.get("skip_prk_steps", False):
        notices.append(f"{name} begins with Runge-Kutta steps, our sampler does without (skip_prk_steps)")
    if not facts.get("set_alpha_to_one", stepper is not StepperKind.PLMS) and stepper in _WITH_LAST_ALPHA:
        notices.append(f"{name} ends at the noise of timestep 0, our samplers at the clean latent")
    if grid is Grid.LINSPACE and stepper in _WITH_EVEN_STEPS:
        notices.append(f"{name} steps to times beside those of linspace, our samplers to its next")
    return Noising(
        schedule=schedule,
        prediction=prediction,
        sampler=SamplerConfig(stepper=stepper, grid=grid),
        notices=tuple(notices),
    )


def _betas(schedule: ScheduleConfig) -> dict[str, Any]:
    named = SCHEDULES.get(schedule.kind)
    if named is None:
        return {"trained_betas": betas(schedule).tolist()}
    return {"beta_schedule": named, "beta_start": schedule.start, "beta_end": schedule.end}


def _schedule(facts: dict[str, Any], origin: str) -> ScheduleConfig:
    more = {
        "num_timesteps": facts.get("num_train_timesteps", 1000),
        "has_zero_terminal_snr": bool(facts.get("rescale_betas_zero_snr", False)),
    }
    try:
        if facts.get("trained_betas") is not None:
            return _schedule_of(facts["trained_betas"], **more)
        name = facts.get("beta_schedule", "linear")
        if name == CAPPED_COSINE:
            return ScheduleConfig(kind=ScheduleKind.COSINE, **more)
        kinds = {value: kind for kind, value in SCHEDULES.items()}
        if name not in kinds:
            raise ValueError(f"beta_schedule must be {_or([*kinds, CAPPED_COSINE])}, got {name!r}")
        start, end = facts.get("beta_start", 0.0001), facts.get("beta_end", 0.02)
        return ScheduleConfig(kind=kinds[name], start=start, end=end, **more)
    except (TypeError, ValueError) as error:  # what is no number where one is due
        raise ValueError(f"{origin}: {error}") from error


def _schedule_of(trained: Sequence[float], *, num_timesteps: int, has_zero_terminal_snr: bool) -> ScheduleConfig:
    """Return the schedule that has these variances."""
    given = torch.tensor(trained, dtype=torch.float64)
    start, end = float(given[0]), float(given[-1])
    candidates = [
        ScheduleConfig(kind=ScheduleKind.COSINE, num_timesteps=num_timesteps),
        *(ScheduleConfig(kind=kind, start=start, end=end, num_timesteps=num_timesteps) for kind in SCHEDULES),
    ]
    for config in candidates:
        found = betas(config)
        if found.shape == given.shape and torch.allclose(found, given, rtol=_BETAS_TOLERANCE, atol=0):
            return replace(config, has_zero_terminal_snr=has_zero_terminal_snr)
    kinds = _or([config.kind.value for config in candidates])
    raise ValueError(f"trained_betas must be {num_timesteps} variances of a schedule {kinds}, got {len(given)} others")


def _prediction(facts: dict[str, Any], origin: str) -> Prediction:
    named = {value: prediction for prediction, value in PREDICTIONS.items()}
    found = facts.get("prediction_type", "epsilon")
    if found not in named:
        raise ValueError(f"{origin}: prediction_type must be {_or(named)}, got {found!r}")
    return named[found]


def _grid(facts: dict[str, Any], default: str, schedule: ScheduleConfig) -> tuple[Grid, list[str]]:
    """Return the times of a scheduler, whatever its `steps_offset`: the pipelines put 1 in place of any other."""
    for entry, grid in _GRIDS.items():
        if facts.get(entry):
            return grid, []
    spacing = facts.get("timestep_spacing", default)
    named = {value: grid for grid, value in SPACINGS.items()}
    if spacing not in named:
        return Grid.TRAILING, [f"timesteps are spread {spacing!r} there, and trailing here"]
    if spacing == _LEADING and schedule.ends_without_signal:
        return Grid.TRAILING, ["timesteps are spread 'leading' there, which leaves pure noise out, and trailing here"]
    return named[spacing], []


def _or(names: Sequence[str] | dict[str, Any]) -> str:
    return " or ".join(map(repr, names))
