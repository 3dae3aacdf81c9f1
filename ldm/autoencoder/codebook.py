"""How a codebook is trained beside the decoder's gradient: the two terms' weights, moving averages, dead codes.

    loss        weight ( codebook + beta commitment )             van den Oord et al. 2017, eq. 3; beta stands before
                weight ( beta codebook + commitment )             the other term in VQGAN's code ("legacy")
    averages    N_i <- g N_i + (1 - g) n_i        m_i <- g m_i + (1 - g) sum_j z_ij        e_i = m_i / N^_i
                N^_i = N (N_i + eps) / (N + K eps), N = sum_i N_i                         (ibid., appendix A.1; Laplace)
    dead codes  a code that no position chose for so many samples becomes an encoder output of this batch

All sums run over the global batch, and the draws are functions of (seed, clock): every process ends with the same
codebook, which is that of one process with the joined batch.

Letters: b batch, c latent channel, h latent row, w latent column, k code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.autoencoder.quantizer import Codes, Quantized, VectorQuantizer, perplexity_of_counts, usage_of_counts
from ldm.config import Config
from ldm.randomness import Draw, generator
from ldm.types import Latent

LAPLACE_EPSILON = 1e-5


class CommitmentForm(StrEnum):
    """Which of the codebook loss's two terms beta stands before."""

    FIXED = "fixed"
    """The commitment, as in the papers."""
    LEGACY = "legacy"
    """The codebook's, as in the code that VQGAN's and latent diffusion's VQ models were trained with."""


class CodebookUpdate(StrEnum):
    """What moves the codes."""

    GRADIENT = "gradient"
    """The codebook term of the loss."""
    MOVING_AVERAGE = "moving_average"
    """The moving average of what they stand for; they get no gradient, and the codebook term falls away."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodebookConfig(Config):
    """How a codebook is trained; vq only."""

    weight: float = 1.0
    """Weight of the whole codebook loss beside the mean pixel error."""
    beta: float = 0.25
    """Weight of the commitment term beside the codebook term."""
    form: CommitmentForm = CommitmentForm.FIXED
    """fixed: beta stands before the commitment, as published. legacy: before the other term, as the authors' code."""
    update: CodebookUpdate = CodebookUpdate.GRADIENT
    """gradient: codes follow the loss. moving_average: codes are averages of the encoder outputs that chose them."""
    half_life_samples: int = 1_000
    """Half-life of those averages; the usual decay of 0.99 a step is one of 69 batches. moving_average only."""
    revive_after_samples: int = 0
    """A code that nothing chose for so many samples becomes an encoder output drawn from the batch; 0 leaves it."""

    def __post_init__(self) -> None:
        if self.weight < 0 or self.beta < 0 or self.revive_after_samples < 0:
            raise ValueError(
                "codebook.weight, codebook.beta and codebook.revive_after_samples can't be negative, "
                f"got {self.weight}, {self.beta} and {self.revive_after_samples}"
            )
        if self.half_life_samples < 1:
            raise ValueError(f"codebook.half_life_samples must be at least 1, got {self.half_life_samples}")

    @property
    def moves_trained_codes(self) -> bool:
        """Whether codes are moved beside the optimizer that trains them."""
        return self.revive_after_samples > 0 and self.update is CodebookUpdate.GRADIENT

    @property
    def term_weights(self) -> tuple[float, float]:
        """Weights of the codebook term and of the commitment."""
        match self.form:
            case CommitmentForm.FIXED:
                codebook, commitment = self.weight, self.weight * self.beta
            case CommitmentForm.LEGACY:
                codebook, commitment = self.weight * self.beta, self.weight
        return (0.0 if self.update is CodebookUpdate.MOVING_AVERAGE else codebook), commitment


def codebook_loss(config: CodebookConfig, quantized: Quantized) -> Float[Tensor, ""]:
    """Return the weighed sum of both terms, a mean over rows."""
    codebook_weight, commitment_weight = config.term_weights
    loss = commitment_weight * quantized.commitment_loss.mean()
    return loss + codebook_weight * quantized.codebook_loss.mean() if codebook_weight else loss


@dataclass(frozen=True, kw_only=True, slots=True)
class Chosen:
    """What one process's share of a batch chose.

    Attributes:
        latent: what the encoder gave, before quantising, shape (b, c, h, w).
        codes: the number of the code at each position, shape (b, h, w).
        rows: each row's place in the global batch, shape (b,).
    """

    latent: Latent
    codes: Codes
    rows: Int[Tensor, "b"]


class CodebookMemory(nn.Module):
    """What a codebook's training remembers of the batches before; its buffers belong to the checkpoint."""

    counts: Tensor
    sums: Tensor
    last_used: Tensor

    def __init__(self, quantizer: VectorQuantizer, config: CodebookConfig, seed: int) -> None:
        """Begin with every code standing for itself once.

        Under `moving_average` the quantizer's codes are freed of gradients here, before any engine is built on them.
        """
        super().__init__()
        self._config = config
        self._seed = seed
        weight = quantizer.embedding.weight
        weight.requires_grad_(config.update is CodebookUpdate.GRADIENT)
        self.register_buffer("counts", weight.new_ones(len(weight), dtype=torch.float64))
        self.register_buffer("sums", weight.detach().double().clone())
        self.register_buffer("last_used", weight.new_zeros(len(weight), dtype=torch.int64))

    @torch.no_grad()
    def update(
        self,
        quantizer: VectorQuantizer,
        chosen: Chosen,
        clock: tuple[int, int],
        total: Callable[[Tensor], Tensor] = lambda values: values,
    ) -> dict[str, Tensor]:
        """Move the codes as configured after a step, and return what to log, the same on every process.

        Args:
            quantizer: whose codes are moved in place.
            chosen: this process's share of the batch.
            clock: (samples seen at the end of the step, samples of the step), over all processes.
            total: sum of a tensor over all processes; left out for one.
        """
        counts = total(torch.bincount(chosen.codes.flatten(), minlength=len(self.counts)))
        metrics = {"codebook_usage": usage_of_counts(counts), "codebook_perplexity": perplexity_of_counts(counts)}
        self.last_used[counts > 0] = clock[0]
        if self._config.update is CodebookUpdate.MOVING_AVERAGE:
            self._average(quantizer, chosen, counts, clock[1], total)
        if self._config.revive_after_samples:
            metrics["codebook_revived"] = self._revive(quantizer, chosen, clock, total)
        return metrics

    def _average(
        self,
        quantizer: VectorQuantizer,
        chosen: Chosen,
        counts: Tensor,
        num_samples: int,
        total: Callable[[Tensor], Tensor],
    ) -> None:
        positions = chosen.latent.double().movedim(1, -1).flatten(0, -2)  # bhw c
        # Accumulated by index_put, which on a GPU too adds in one order; index_add does not.
        sums = torch.zeros_like(self.sums).index_put_((chosen.codes.flatten(),), positions, accumulate=True)
        share = 1.0 - 0.5 ** (num_samples / self._config.half_life_samples)
        self.counts.lerp_(counts.double(), share)
        self.sums.lerp_(total(sums), share)
        all_counts = self.counts.sum()
        smoothed = (self.counts + LAPLACE_EPSILON) / (all_counts + len(self.counts) * LAPLACE_EPSILON) * all_counts
        quantizer.embedding.weight.copy_(self.sums / smoothed[:, None])

    def _revive(
        self,
        quantizer: VectorQuantizer,
        chosen: Chosen,
        clock: tuple[int, int],
        total: Callable[[Tensor], Tensor],
    ) -> Tensor:
        """Give dead codes encoder outputs and return how many there were."""
        now, num_samples = clock
        dead = (now - self.last_used >= self._config.revive_after_samples).nonzero().flatten()
        if len(dead):
            vectors = total(_drawn_outputs(chosen, len(dead), num_samples, generator_key=(self._seed, now)))
            quantizer.embedding.weight[dead] = vectors.to(quantizer.embedding.weight.dtype)
            self.counts[dead] = 1.0
            self.sums[dead] = vectors
            self.last_used[dead] = now
        return torch.tensor(float(len(dead)), device=dead.device)


def _drawn_outputs(
    chosen: Chosen, num_wanted: int, num_rows: int, generator_key: tuple[int, int]
) -> Float[Tensor, "k c"]:
    """Return encoder outputs at places drawn from the global batch, zeros where the place is another process's."""
    _, channels, height, width = chosen.latent.shape
    num_places = num_rows * height * width
    drawn = generator(generator_key[0], Draw.CODE, generator_key[1])
    places = torch.from_numpy(drawn.choice(num_places, num_wanted, replace=num_wanted > num_places))
    rows, positions = places // (height * width), places % (height * width)
    is_mine = rows[:, None] == chosen.rows.cpu()[None, :]  # k b
    wanted = is_mine.any(dim=1).nonzero().flatten()
    outputs = chosen.latent.double().flatten(2)  # b c hw
    vectors = outputs.new_zeros(num_wanted, channels)
    mine = is_mine[wanted].long().argmax(dim=1)
    vectors[wanted.to(vectors.device)] = outputs[mine.to(outputs.device), :, positions[wanted].to(outputs.device)]
    return vectors
