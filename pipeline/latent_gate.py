"""What a shard of latents must pass before it is published: no broken number, a plausible spread, a good round trip.

Order: every batch is counted (non-finite values, values that fp16 cannot hold) and adds to the statistics → rows spread
evenly over the shard keep their crops → at the end those are decoded from what will be stored, and compared.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float16, UInt8

from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.regularizer import LatentKind
from ldm.config import Config
from ldm.evaluation.scores import psnr
from ldm.first_stage import evaluation_of
from ldm.interop.diffusers import weights_digest
from ldm.types import Image, Moments
from pipeline.moment_statistics import MomentStatistics, StatisticsBuilder, merged
from pipeline.plan import ShardTask

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
    """Rows of one part, ready to be stored, with what the gate must know of them.

    Attributes:
        part: number of the part that the rows belong to.
        first: number of the first row in its part; the others follow.
        forms: fp16 moments by member, those of the first crop first.
        stored: further arrays of the rows by member, which are stored as they are.
        faults: values that cannot be stored, by kind, over all forms.
        is_bad: which rows hold such values.
        crops: images of the rows that the gate decodes, in order; shape (k, 3, y, x).
    """

    part: int
    first: int
    forms: dict[str, Moments16]
    stored: dict[str, UInt8[np.ndarray, "b ..."]]
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


def evaluated_psnr(where: str, autoencoder: Autoencoder) -> float | None:
    """Return the mean PSNR that an autoencoder's training measured at its end; None where nothing says so.

    Args:
        where: address of the autoencoder, beside whose weights its evaluation lies.
        autoencoder: what was loaded from there.

    Raises:
        ValueError: if the evaluation is that of other weights, showing both digests; old ones don't say whose.
    """
    evaluation = evaluation_of(where) or {}
    judged = evaluation.get("digest")
    if judged is not None:
        found = weights_digest(autoencoder.state_dict(), autoencoder.config)
        if judged != found:
            raise ValueError(
                f"{where}: its evaluation.json is of weights {judged}, what lies there has {found}; evaluate these, or "
                "delete the file, and gate.unproven_psnr or gate.min_psnr counts"
            )
    figure = evaluation.get("validation_psnr_db")
    return None if figure is None else float(figure)


class Chosen(NamedTuple):
    """A row that the gate decodes: number of its part, and of the row in it."""

    part: int
    row: int


class Gate:
    """Judges one shard, batch by batch.

    Attributes:
        chosen: the rows that are decoded again, spread evenly over all parts.
        statistics: of the moments of each part, once the shard is judged.
        figures: PSNR of the chosen rows in decibels, once the shard is judged.
        moment_shapes: shape (m, h, w) of a row's moments, for each part.
    """

    def __init__(
        self,
        config: GateConfig,
        floor: float,
        task: ShardTask,
        part_sizes: Sequence[int],
        plain: Sequence[str],
        kind: LatentKind = LatentKind.KL_MOMENTS,
    ) -> None:
        """Choose the rows to decode.

        Args:
            config: what the shard must reach.
            floor: least mean PSNR in decibels.
            task: the shard.
            part_sizes: rows of each of its parts.
            plain: members whose moments the statistics are of; the first one is decoded.
            kind: what the moments are.
        """
        self.config = config
        self.floor = floor
        self.task = task
        starts = np.cumsum([0, *part_sizes])
        places = np.unique(np.linspace(0, starts[-1] - 1, config.rows).round().astype(int))
        parts = np.searchsorted(starts, places, side="right") - 1
        self.chosen = tuple(
            Chosen(int(part), int(place - starts[part])) for part, place in zip(parts, places, strict=True)
        )
        self.figures: list[float] = []
        self.statistics: list[MomentStatistics] = []
        self.moment_shapes: list[tuple[int, ...]] = [()] * len(part_sizes)
        self._plain = tuple(plain)
        self._statistics = [StatisticsBuilder(kind) for _ in part_sizes]
        self._faults = Counter[str]()
        self._bad: list[str] = []
        self._pieces: list[tuple[Image, Moments16]] = []
        self._keys: list[str] = []
        self._num_values = 0

    def chosen_of(self, part: int, first: int, count: int) -> list[int]:
        """Return which of `count` rows of a part, from `first` on, are decoded, counted from the first of them."""
        return [row - first for number, row in self.chosen if number == part and first <= row < first + count]

    def take(self, batch: EncodedBatch, keys: Sequence[str]) -> None:
        """Count a batch and keep what is needed of it; `keys` are those of its rows."""
        plain = batch.forms[self._plain[0]]
        self._faults += batch.faults
        self._bad += [key for key, is_bad in zip(keys, batch.is_bad, strict=True) if is_bad]
        self._num_values += sum(form.size for form in batch.forms.values())
        self.moment_shapes[batch.part] = plain.shape[1:]
        if not self._faults.total():  # else it is refused, and sums of NaN would only warn
            for name in self._plain:
                self._statistics[batch.part].add(batch.forms[name])
        chosen = self.chosen_of(batch.part, batch.first, len(plain))
        if chosen:
            self._pieces.append((batch.crops, plain[chosen]))
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
        self.statistics = [builder.total() for builder in self._statistics]
        self._check_spread(merged(self.statistics))
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
        for crops, stored in _joined(self._pieces):
            decoded = decode(torch.from_numpy(stored).float()).clamp(-1.0, 1.0)
            self.figures += psnr(decoded, crops).clamp(max=_LARGEST_PSNR).tolist()
        mean = sum(self.figures) / len(self.figures)
        if not mean >= self.floor:
            shown = ", ".join(f"{key} {figure:.2f}" for key, figure in zip(self._keys, self.figures, strict=True))
            self._refuse(
                f"decoded latents have a mean PSNR of {mean:.2f} dB against their images, the least is "
                f"{self.floor:.2f}; rows: {shown}"
            )

    def _refuse(self, why: str) -> None:
        raise ValueError(f"shard {self.task.split.value}/{self.task.name} fails its gate: {why}")


def _joined(pieces: Sequence[tuple[Image, Moments16]]) -> Iterator[tuple[Image, Moments16]]:
    """Yield neighbouring pieces of one shape as one."""
    for _, alike in groupby(pieces, key=lambda piece: piece[0].shape[1:]):
        crops, moments = zip(*alike, strict=True)
        yield torch.cat(crops), np.concatenate(moments)
