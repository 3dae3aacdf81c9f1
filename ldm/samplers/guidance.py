"""From a network to a denoiser, with or without guidance.

    classifier-free    out = null + scale (conditional - null)      (Ho and Salimans 2022, eq. 6, with scale = 1 + w)
    autoguidance       out = weak + scale (conditional - weak)      (Karras et al. 2024a, eq. 4)
    classifier         clean += scale sigma^2 / alpha grad log p    (Dhariwal and Nichol 2021, alg. 1; Rombach et al.
                                                                     2022, appendix C, for images as guides)

What a network predicts and the clean latent differ by an affine map, so guiding either is the same.

Letters: b batch, c latent channel, h row, w column, l token, d width, p width of the pooled text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from ldm.config import Config
from ldm.diffusion.process import Prediction, clean_from
from ldm.diffusion.schedule import Scales, Schedule
from ldm.samplers.sample import Denoiser
from ldm.types import Condition, Latent

Network = Callable[[Latent, Float[Tensor, " b"], Condition], Latent]
"""(noisy latent, timestep of each row, condition) → output, whose meaning is a `Prediction`."""
Guider = Callable[[Latent, Float[Tensor, " b"]], Float[Tensor, " b"]]
"""(latent, timestep of each row) → log probability of what is wanted, up to a constant, for each row."""
Outputs = Callable[[Latent, Float[Tensor, " b"]], tuple[Latent, Latent]]
"""(noisy latent, timestep of each row) → what guidance leads to, and what it leads away from."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GuidanceForm(Config):
    """What is made of a guided prediction, and at which noise levels there is one."""

    rescale: float = 0.0
    """Share of the way back to the standard deviation of the prediction without guidance, for each row (Lin et al.
    2024, section 3.4, who take 0.7); 0 leaves it."""
    lowest_noise: float = 0.0
    """Below this noise level, sigma / alpha, nothing is guided (Kynkaanniemi et al. 2024)."""
    highest_noise: float = 0.0
    """Nor above this one; 0 is no bound."""
    threshold_quantile: float = 0.0
    """Dynamic thresholding (Saharia et al. 2022, section 2.3): a clean latent's values are clipped at this quantile of
    their sizes and divided by it, for each row; 0 leaves them."""
    threshold_floor: float = 1.0
    """A quantile below this is taken for it, and this is what values are clipped to in the end: 1 where they lie in
    [-1, 1]; scaled latents, of standard deviation 1, need about 3."""

    def __post_init__(self) -> None:
        for name in ("rescale", "threshold_quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.lowest_noise < 0 or (self.highest_noise and self.highest_noise <= self.lowest_noise):
            raise ValueError(
                f"lowest_noise must lie between 0 and highest_noise, got {self.lowest_noise} and {self.highest_noise}"
            )
        if self.threshold_floor <= 0:
            raise ValueError(f"threshold_floor must be positive, got {self.threshold_floor}")

    @property
    def has_interval(self) -> bool:
        """Whether some noise levels are not guided."""
        return self.lowest_noise > 0 or self.highest_noise > 0

    def is_guided(self, at: Scales) -> Tensor:
        """Say for each row whether it is guided, shape (b, 1, 1, 1)."""
        above = at.sigma >= self.lowest_noise * at.alpha
        return above & (at.sigma <= self.highest_noise * at.alpha) if self.highest_noise else above


PLAIN = GuidanceForm()


def conditional_denoiser(
    network: Network, schedule: Schedule, prediction: Prediction, condition: Condition, form: GuidanceForm = PLAIN
) -> Denoiser:
    """Return the denoiser of a network under one condition, without guidance; of the form it has thresholding only."""

    def denoise(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
        output = network(noisy, timestep, condition)
        return thresholded(form, clean_from(prediction, output, noisy, schedule.scales(timestep)))

    return denoise


def guided_denoiser(
    network: Network,
    schedule: Schedule,
    prediction: Prediction,
    condition: Condition,
    null_condition: Condition,
    scale: float | Float[Tensor, " b"],
    form: GuidanceForm = PLAIN,
) -> Denoiser:
    """Return the guided denoiser; where every scale is 1, or there is nothing to drop, the network sees batch b only.

    So it does at noise levels that are not guided.

    Args:
        network: any callable (noisy, timestep, condition) → output; called once with batch 2b.
        schedule: the schedule it was trained with.
        prediction: what its output means.
        condition: of b rows.
        null_condition: the condition that training dropped to, or what to lead away from (a negative prompt), of b
            rows or of one for all.
        scale: guidance scale of all rows or of each; 1 is the conditional prediction, 0 the null one.
        form: rescaling, interval and thresholding.

    Raises:
        ValueError: if the conditions do not match each other.
    """
    is_null = all(getattr(condition, part.name) is getattr(null_condition, part.name) for part in fields(Condition))
    alone = conditional_denoiser(network, schedule, prediction, condition, form)
    if is_null or _is_one(scale):
        return alone
    both = joined(condition, null_condition)

    def outputs(noisy: Latent, timestep: Float[Tensor, " b"]) -> tuple[Latent, Latent]:
        conditional, null = network(noisy.repeat(2, 1, 1, 1), timestep.repeat(2), both).chunk(2)
        return conditional, null

    return _led_away(outputs, alone, schedule, prediction, scale, form)


def autoguided_denoiser(
    network: Network,
    weak_network: Network,
    schedule: Schedule,
    prediction: Prediction,
    condition: Condition,
    scale: float | Float[Tensor, " b"],
    form: GuidanceForm = PLAIN,
) -> Denoiser:
    """Return the denoiser that leads away from what a weaker network makes of the same condition.

    Args:
        network: any callable (noisy, timestep, condition) → output.
        weak_network: one of the same latents, schedule, prediction and conditions: smaller, or trained for less long.
        schedule: the schedule that both were trained with.
        prediction: what their outputs mean.
        condition: of b rows.
        scale: guidance scale of all rows or of each; 1 is the network alone, and the weaker one is not called.
        form: rescaling, interval and thresholding.
    """
    alone = conditional_denoiser(network, schedule, prediction, condition, form)
    if _is_one(scale):
        return alone

    def outputs(noisy: Latent, timestep: Float[Tensor, " b"]) -> tuple[Latent, Latent]:
        return network(noisy, timestep, condition), weak_network(noisy, timestep, condition)

    return _led_away(outputs, alone, schedule, prediction, scale, form)


def steered_denoiser(
    denoise: Denoiser,
    schedule: Schedule,
    guider: Guider,
    scale: float | Float[Tensor, " b"],
    *,
    sees_clean: bool = False,
) -> Denoiser:
    """Return the denoiser that a differentiable guider steers: E(z_0 | z_t, what is wanted) for scale 1.

    Args:
        denoise: any denoiser.
        schedule: the schedule it was trained with.
        guider: log p(what is wanted | latent); a classifier that was trained on noisy latents, or any measure of
            clean ones.
        scale: of its gradient.
        sees_clean: whether the guider is given the estimate of the clean latent; the gradient then goes back through
            the network.
    """

    def steered(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
        at = schedule.scales(timestep)
        with torch.enable_grad():
            told = noisy.detach().requires_grad_()
            clean = denoise(told, timestep) if sees_clean else None
            value = guider(told if clean is None else clean, timestep)
            (gradient,) = torch.autograd.grad(value.sum(), told)
        estimate = denoise(noisy, timestep) if clean is None else clean.detach()
        # Without signal a noisy latent tells nothing of what is wanted, and the gradient is 0.
        weight = torch.where(at.alpha > 0, at.sigma.square() / at.alpha, 0.0)
        return estimate + _per_row(scale, noisy) * weight.to(noisy.dtype) * gradient

    return steered


def _led_away(
    outputs: Outputs,
    alone: Denoiser,
    schedule: Schedule,
    prediction: Prediction,
    scale: float | Tensor,
    form: GuidanceForm,
) -> Denoiser:
    def denoise(noisy: Latent, timestep: Float[Tensor, " b"]) -> Latent:
        at = schedule.scales(timestep)
        is_guided = form.is_guided(at) if form.has_interval else None
        if is_guided is not None and not bool(is_guided.any()):
            return alone(noisy, timestep)
        to, away = outputs(noisy, timestep)
        guided = away + _per_row(scale, to) * (to - away)
        guided = _rescaled(form, guided, to)
        if is_guided is not None:
            guided = torch.where(is_guided, guided, to)
        return thresholded(form, clean_from(prediction, guided, noisy, at))

    return denoise


def _rescaled(form: GuidanceForm, guided: Latent, conditional: Latent) -> Latent:
    if not form.rescale:
        return guided
    deviation, wanted = (output.std(dim=(1, 2, 3), keepdim=True) for output in (guided, conditional))
    return guided * (1 + form.rescale * (wanted / deviation - 1))


def thresholded(form: GuidanceForm, clean: Latent) -> Latent:
    """Return clean latents within the form's floor; unchanged where it has no quantile."""
    if not form.threshold_quantile:
        return clean
    sizes = clean.abs().flatten(1)
    quantile = torch.quantile(sizes.float(), form.threshold_quantile, dim=1)
    bound = quantile.clamp(min=form.threshold_floor).to(clean.dtype).reshape(-1, 1, 1, 1)
    return clean.clamp(-bound, bound) * (form.threshold_floor / bound)


def _is_one(scale: float | Tensor) -> bool:
    return bool((torch.as_tensor(scale) == 1).all())


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
