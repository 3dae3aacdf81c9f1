"""From a network to a denoiser, with or without classifier-free guidance.

    out = null + scale (conditional - null)        (Ho and Salimans 2022, eq. 6, with scale = 1 + w)

What a network predicts and the clean latent differ by an affine map, so guiding either is the same.

Letters: b batch, c latent channel, h row, w column, l token, d width, p width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.process import Prediction, clean_from
from ldm.diffusion.schedule import Schedule
from ldm.samplers.sample import Denoiser
from ldm.types import Condition, Latent

Network = Callable[[Latent, Float[Tensor, " b"], Condition], Latent]
"""(noisy latent, timestep of each row, condition) → output, whose meaning is a `Prediction`."""


def conditional_denoiser(
    network: Network, schedule: Schedule, prediction: Prediction, condition: Condition
) -> Denoiser:
    """Return the denoiser of a network under one condition, without guidance."""

    def denoise(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
        output = network(noisy, timestep, condition)
        return clean_from(prediction, output, noisy, schedule.scales(timestep))

    return denoise


def guided_denoiser(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    condition: Condition,
    null_condition: Condition,
    scale: float | Float[Tensor, " b"],
) -> Denoiser:
    """Return the guided denoiser; where every scale is 1, or there is nothing to drop, the network sees batch b only.

    Args:
        network: any callable (noisy, timestep, condition) → output; called once with batch 2b.
        schedule: the schedule it was trained with.
        prediction: what its output means.
        condition: of b rows.
        null_condition: the condition that training dropped to, of b rows or of one for all.
        scale: guidance scale of all rows or of each; 1 is the conditional prediction, 0 the null one.

    Raises:
        ValueError: if the conditions do not match each other.
    """
    is_null = all(getattr(condition, part.name) is getattr(null_condition, part.name) for part in fields(Condition))
    if is_null or bool((torch.as_tensor(scale) == 1).all()):
        return conditional_denoiser(network, schedule, prediction, condition)
    both = joined(condition, null_condition)

    def denoise(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
        output = network(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), both)
        conditional, null = output.chunk(2)
        guided = null + _per_row(scale, output) * (conditional - null)
        return clean_from(prediction, guided, noisy, schedule.scales(timestep))

    return denoise


def joined(condition: Condition, null_condition: Condition) -> Condition:
    """Return the rows of a condition and then as many null ones, padded to one length and masked where they differ.

    Raises:
        ValueError: if one has a part that the other has not, or widths or numbers of rows don't match.
    """
    names = [part.name for part in fields(Condition)]
    pairs = {name: (getattr(condition, name), getattr(null_condition, name)) for name in names if name != "mask"}
    there = {name: (own, null) for name, (own, null) in pairs.items() if own is not None or null is not None}
    if lacking := [name for name, (own, null) in there.items() if own is None or null is None]:
        raise ValueError(
            f"guidance needs {' and '.join(map(_named, lacking))} in both the condition and the null condition, "
            "or in neither"
        )
    num_rows = max((len(own) for own, _ in there.values()), default=1)
    parts = {name: _stacked(name, own, null, num_rows) for name, (own, null) in there.items() if name != "states"}
    return Condition(**parts, **_joined_states(condition, null_condition, num_rows))


def _joined_states(condition: Condition, null_condition: Condition, num_rows: int) -> dict[str, Tensor]:
    """Return states and mask, padded to one length; no mask where nothing is padded."""
    states, null_states = condition.states, null_condition.states
    if states is None or null_states is None:
        return {}
    longest = max(states.shape[1], null_states.shape[1])
    padded, null_padded = (_padded_states(part, longest) for part in (states, null_states))
    together = {"states": _stacked("states", padded, null_padded, num_rows)}
    if condition.mask is None and null_condition.mask is None and states.shape[1] == null_states.shape[1]:
        return together
    masks = _padded_mask(condition, longest), _padded_mask(null_condition, longest).expand(num_rows, -1)
    return together | {"mask": torch.cat(masks)}


def _stacked(name: str, own: Tensor, null: Tensor, num_rows: int) -> Tensor:
    if len(null) not in (1, num_rows) or null.shape[1:] != own.shape[1:]:
        raise ValueError(
            f"the null condition needs {_named(name)} of 1 or {num_rows} rows of shape {tuple(own.shape[1:])}, "
            f"got {len(null)} rows of shape {tuple(null.shape[1:])}"
        )
    return torch.cat([own, null.expand(num_rows, *null.shape[1:])])


def _named(part: str) -> str:
    match part:
        case "states":
            return "token states"
        case "pooled":
            return "pooled text"
        case _:
            return part


def _padded_states(states: Tensor, length: int) -> Tensor:
    return F.pad(states, (0, 0, 0, length - states.shape[1]))


def _padded_mask(condition: Condition, length: int) -> Tensor:
    assert condition.states is not None
    mask = condition.mask
    if mask is None:
        mask = torch.ones(condition.states.shape[:2], dtype=torch.bool, device=condition.states.device)
    return F.pad(mask, (0, length - mask.shape[1]), value=False)


def _per_row(scale: float | Tensor, like: Tensor) -> float | Tensor:
    if not isinstance(scale, Tensor):
        return scale
    return scale.to(like.device, like.dtype).reshape(-1, 1, 1, 1)
