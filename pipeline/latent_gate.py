"""What a shard of latents must pass before it is published: no broken number, a plausible spread, a good round trip.

Order: every batch is counted (non-finite values, values that fp16 cannot hold) and adds to the statistics → rows spread
evenly over the shard keep their crops → at the end those are decoded from what will be stored, and compared.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float16
from torch import Tensor

from ldm import storage
from ldm.config import Config
from ldm.evaluation.scores import psnr
from ldm.types import Image, Moments
from pipeline.moment_statistics import MomentStatistics, StatisticsBuilder
from pipeline.plan import ShardTask

EVALUATION_FILE = "evaluation.json"
"""Beside an autoencoder's weights: what its training measured on held-out rows at the end."""
LARGEST_STORED = float(np.finfo(np.float16).max)
MAX_LISTED = 5
_LARGEST_PSNR = 200.0
"""An exact reconstruction has an infinite one, which JSON cannot hold."""

Moments16 = Float16[np.ndarray, "b m h w"]
Decode = Callable[[Moments], Image]
"""Returns the images of stored moments, on the CPU."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateConfig(Config):
    """What the latents of a shard must reach; a shard that fails is not published."""

    rows: int = 8
    """Rows of each shard that are decoded again and compared with their crops."""
    min_psnr: float | None = None
    """Least mean PSNR of those rows, in decibels; none takes what the autoencoder reached when it was evaluated, less
    `margin_db`, or where it has no evaluation `unproven_psnr`."""
    margin_db: float = 6.0
    """How far the few rows of a shard may fall below the autoencoder's own evaluation, in decibels."""
    unproven_psnr: float = 15.0
    """Least mean PSNR for an autoencoder that comes without an evaluation, in decibels."""
    std_range: tuple[float, float] = (1e-3, 1e3)
    """Between which bounds the standard deviation of every latent channel must lie: outside the channel is dead or the
    weights are not an autoencoder's."""
    max_mean: float = 1e3
    """Largest absolute mean of a latent channel."""

    def __post_init__(self) -> None:
        low, high = self.std_range
        if self.rows < 1 or not 0 <= low < high:
            raise ValueError(f"rows must be at least 1 and std_range ascend from 0, got {self.rows}, {self.std_range}")

    def floor(self, evaluated_psnr: float | None) -> float:
        """Return the least mean PSNR, given that of the autoencoder's own evaluation, if it has one."""
        if self.min_psnr is not None:
            return self.min_psnr
        return self.unproven_psnr if evaluated_psnr is None else evaluated_psnr - self.margin_db


@dataclass(frozen=True, kw_only=True, slots=True)
class EncodedBatch:
    """Moments of some rows, ready to be stored, with what the gate must know of them.

    Attributes:
        first: number of the first row in its shard; the others follow.
        forms: fp16 moments, plain and, where the config asks for them, of the mirrored images.
        faults: values that cannot be stored, by kind, over all forms.
        is_bad: which rows hold such values.
        crops: images of the rows that the gate decodes, in order; shape (k, 3, y, x).
    """

    first: int
    forms: list[Moments16]
    faults: Counter[str]
    is_bad: Bool[np.ndarray, " b"]
    crops: Image


def stored_form(moments: Moments) -> tuple[Moments16, Counter[str], Bool[np.ndarray, " b"]]:
    """Return moments as fp16, how many values it cannot hold, by kind, and in which rows."""
    if bool(moments.abs().amax() <= LARGEST_STORED):  # false for NaN too; one pass over the numbers instead of five
        return _halved(moments), Counter(), np.zeros(len(moments), bool)
    found = {
        "NaN": moments.isnan(),
        "infinite": moments.isinf(),
        "saturated": moments.isfinite() & (moments.abs() > LARGEST_STORED),
    }
    is_bad = torch.stack(list(found.values())).any(dim=0).flatten(1).any(dim=1)
    faults = Counter({name: int(where.sum()) for name, where in found.items()})
    return _halved(moments), faults, is_bad.cpu().numpy()


def _halved(moments: Moments) -> Moments16:
    stored: Moments16 = moments.half().cpu().numpy()
    return stored


def evaluated_psnr(autoencoder: str) -> float | None:
    """Return the mean PSNR that an autoencoder's training measured at its end; None where nothing says so."""
    path = storage.join(autoencoder, EVALUATION_FILE)
    if not storage.exists(path):
        return None
    figure = json.loads(storage.read_text(path)).get("validation_psnr_db")
    return None if figure is None else float(figure)


class Gate:
    """Judges one shard, batch by batch.

    Attributes:
        chosen: numbers of the rows that are decoded again.
        statistics: of the shard's moments, once it is judged.
        figures: PSNR of the chosen rows in decibels, once it is judged.
        moment_shape: shape (m, h, w) of a row's moments.
    """

    statistics: MomentStatistics

    def __init__(self, config: GateConfig, floor: float, task: ShardTask) -> None:
        """Choose the rows to decode from the number that the task announces."""
        self.config = config
        self.floor = floor
        self.task = task
        self.chosen: tuple[int, ...] = tuple(
            np.unique(np.linspace(0, task.num_rows - 1, config.rows).round().astype(int)).tolist()
        )
        self.figures: list[float] = []
        self.moment_shape: tuple[int, ...] = ()
        self._statistics = StatisticsBuilder()
        self._faults = Counter[str]()
        self._bad: list[str] = []
        self._crops: list[Image] = []
        self._moments: list[Moments16] = []
        self._keys: list[str] = []
        self._num_values = 0

    def chosen_of(self, first: int, count: int) -> list[int]:
        """Return which of `count` rows from `first` on are to be decoded, counted from the first of them."""
        return [row - first for row in self.chosen if first <= row < first + count]

    def take(self, batch: EncodedBatch, keys: Sequence[str]) -> None:
        """Count a batch and keep what is needed of it; `keys` are those of its rows."""
        plain = batch.forms[0]
        self._faults += batch.faults
        self._bad += [key for key, is_bad in zip(keys, batch.is_bad, strict=True) if is_bad]
        self._num_values += sum(form.size for form in batch.forms)
        self.moment_shape = plain.shape[1:]
        if not self._faults.total():  # else it is refused, and sums of NaN would only warn
            self._statistics.add(plain)
        chosen = self.chosen_of(batch.first, len(plain))
        self._crops.append(batch.crops)
        self._moments.append(plain[chosen])
        self._keys += [keys[row] for row in chosen]

    def judge(self, decode: Decode) -> None:
        """Let a shard pass that is fit to be published.

        Raises:
            ValueError: if it is not, naming rows and figures.
        """
        if self._faults.total():
            figures = ", ".join(f"{self._faults[name]} {name}" for name in ("NaN", "infinite", "saturated"))
            self._refuse(
                f"{figures} of {self._num_values} values in {len(self._bad)} rows, "
                f"first {', '.join(self._bad[:MAX_LISTED])}; an encoder in fp16 overflows where fp32 or bf16 does not"
            )
        self.statistics = self._statistics.total()
        self._check_spread(self.statistics)
        self._check_round_trip(decode)

    def _check_spread(self, statistics: MomentStatistics) -> None:
        low, high = self.config.std_range
        # Written so that NaN fails too.
        is_good = (statistics.std >= low) & (statistics.std <= high) & (np.abs(statistics.mean) <= self.config.max_mean)
        if not is_good.all():
            channel = int(np.flatnonzero(~is_good)[0])
            self._refuse(
                f"channel {channel} has mean {statistics.mean[channel]:.4g} and standard deviation "
                f"{statistics.std[channel]:.4g}; std_range is {low:g} to {high:g}, max_mean {self.config.max_mean:g}"
            )

    def _check_round_trip(self, decode: Decode) -> None:
        stored = torch.from_numpy(np.concatenate(self._moments)).float()
        crops: Tensor = torch.cat(self._crops)
        self.figures = psnr(decode(stored).clamp(-1.0, 1.0), crops).clamp(max=_LARGEST_PSNR).tolist()
        mean = sum(self.figures) / len(self.figures)
        if not mean >= self.floor:
            shown = ", ".join(f"{key} {figure:.2f}" for key, figure in zip(self._keys, self.figures, strict=True))
            self._refuse(
                f"decoded latents have a mean PSNR of {mean:.2f} dB against their images, the least is "
                f"{self.floor:.2f}; rows: {shown}"
            )

    def _refuse(self, why: str) -> None:
        raise ValueError(f"shard {self.task.split.value}/{self.task.name} fails its gate: {why}")
