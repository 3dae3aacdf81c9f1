"""From a network to a denoiser, with or without classifier-free guidance.

    out = null + scale (conditional - null)        (Ho and Salimans 2022, eq. 6, with scale = 1 + w)

What a network predicts and the clean latent differ by an affine map, so guiding either is the same.

Letters: b batch, c latent channel, h row, w column, l token, d width, p width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable

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
    """Return the guided denoiser; where every scale is 1 the network sees the condition only, with batch b.

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
    if bool((torch.as_tensor(scale) == 1).all()):
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
        ValueError: if one has states or pooled text and the other has none, or widths or numbers of rows don't match.
    """
    states, null_states = condition.states, null_condition.states
    if states is None or null_states is None:
        raise ValueError("guidance needs token states in both the condition and the null condition")
    rows, length, width = states.shape
    null_rows, null_length, null_width = null_states.shape
    if null_rows not in (1, rows) or null_width != width:
        raise ValueError(
            f"the null condition needs 1 or {rows} rows of width {width}, got {null_rows} rows of width {null_width}"
        )
    pooled = _joined_pooled(condition.pooled, null_condition.pooled, rows)
    longest = max(length, null_length)
    null_states = null_states.expand(rows, -1, -1)
    together = torch.cat([_padded_states(states, longest), _padded_states(null_states, longest)])
    is_plain = condition.mask is None and null_condition.mask is None and length == null_length
    if is_plain:
        return Condition(states=together, pooled=pooled)
    mask = _padded_mask(condition, longest)
    null_mask = _padded_mask(null_condition, longest).expand(rows, -1)
    return Condition(states=together, mask=torch.cat([mask, null_mask]), pooled=pooled)


def _joined_pooled(pooled: Tensor | None, null_pooled: Tensor | None, rows: int) -> Tensor | None:
    if pooled is None and null_pooled is None:
        return None
    if pooled is None or null_pooled is None:
        raise ValueError("guidance needs pooled text in both the condition and the null condition, or in neither")
    null_rows, null_width = null_pooled.shape
    if null_rows not in (1, rows) or null_width != pooled.shape[1]:
        raise ValueError(
            f"the null condition needs pooled text of 1 or {rows} rows of width {pooled.shape[1]}, "
            f"got {null_rows} rows of width {null_width}"
        )
    return torch.cat([pooled, null_pooled.expand(rows, -1)])


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
