"""Vector quantisation: every position of a latent becomes the nearest vector of a learned codebook.

    k = argmin_j || z - e_j ||^2        q = e_k        d loss / d z := d loss / d q        (straight-through)
    codebook    || sg[z] - q ||^2       commitment    || z - sg[q] ||^2                    (sg: no gradient)

van den Oord et al. 2017, eq. 1 to 3: the loss is codebook + beta commitment with beta 0.25. The authors' code of
VQGAN once weighed the other term by beta; here both are given plainly and weighed by who trains.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ldm.types import Latent

MAX_SCORES = 1 << 25
"""Distances held at once: positions are taken in pieces, or 32 images of 64x64 against 8192 codes would take 4 GB."""

Codes = Int[Tensor, "b h w"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Quantized:
    """A latent in the words of a codebook.

    Attributes:
        latent: the codes' vectors, shape (b, c, h, w); its gradient goes to the latent that came in, unchanged.
        codes: number of the code at each position, shape (b, h, w).
        codebook_loss: mean squared distance of each row, whose gradient moves the codes; shape (b,).
        commitment_loss: the same number, whose gradient moves the encoder; shape (b,).
    """

    latent: Latent
    codes: Codes
    codebook_loss: Float[Tensor, "b"]
    commitment_loss: Float[Tensor, "b"]


class VectorQuantizer(nn.Module):
    """A codebook of `num_codes` vectors; begins uniform in [-1 / num_codes, 1 / num_codes], as VQGAN does."""

    def __init__(self, num_codes: int, channels: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_codes, channels)
        nn.init.uniform_(self.embedding.weight, -1.0 / num_codes, 1.0 / num_codes)

    def forward(self, latent: Latent) -> Quantized:
        """Return the nearest codes, their vectors and both terms of the loss, means over a row's numbers."""
        codes = self.codes(latent)
        chosen = self.vectors(codes)
        # Written so that the value is the code's own to the last bit; z + (q - z) would round.
        straight_through = chosen.detach() + (latent - latent.detach())
        return Quantized(
            latent=straight_through,
            codes=codes,
            codebook_loss=(chosen - latent.detach()).square().flatten(1).mean(dim=1),
            commitment_loss=(chosen.detach() - latent).square().flatten(1).mean(dim=1),
        )

    @torch.no_grad()
    def codes(self, latent: Latent) -> Codes:
        """Return the number of the nearest code at each position; found in at least single precision."""
        dtype = torch.promote_types(latent.dtype, torch.float32)
        positions = latent.to(dtype).movedim(1, -1).flatten(0, -2)  # bhw c
        book = self.embedding.weight.to(dtype)
        half_norms = 0.5 * book.square().sum(dim=1)
        pieces = positions.split(max(1, MAX_SCORES // len(book)))
        # || z - e ||^2 = || z ||^2 + 2 (|| e ||^2 / 2 - z e), and the first term is the same for all codes.
        with _exact_products(latent.device.type):
            nearest = [torch.addmm(half_norms, piece, book.T, alpha=-1.0).argmin(dim=1) for piece in pieces]
        batch, _, height, width = latent.shape
        return torch.cat(nearest).reshape(batch, height, width)

    def vectors(self, codes: Codes) -> Latent:
        """Return the codes' vectors."""
        found: Tensor = self.embedding(codes)
        return found.movedim(-1, 1)


def _exact_products(device_type: str) -> AbstractContextManager[object]:
    """Keep autocast, where the device has it, from rounding the distances."""
    is_known = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if is_known else nullcontext()


def code_shares(codes: Int[Tensor, "*_"], num_codes: int) -> Float[Tensor, " codes"]:
    """Return how often each code is used, as a share of all positions."""
    counts = torch.bincount(codes.flatten(), minlength=num_codes)
    return counts.double() / counts.sum()


def usage(codes: Int[Tensor, "*_"], num_codes: int) -> float:
    """Return the share of the codebook that is used at all."""
    return float(usage_of_counts(torch.bincount(codes.flatten(), minlength=num_codes)))


def perplexity(codes: Int[Tensor, "*_"], num_codes: int) -> float:
    """Return exp of the entropy of the codes: how many equally frequent codes would carry as much."""
    return float(perplexity_of_counts(torch.bincount(codes.flatten(), minlength=num_codes)))


def usage_of_counts(counts: Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """Return the share of the codebook that is used at all, from how often each code is; left on the device."""
    return (counts > 0).double().mean()


def perplexity_of_counts(counts: Int[Tensor, " codes"]) -> Float[Tensor, ""]:
    """Return exp of the entropy of the codes, from how often each one is used; left on the device."""
    return torch.special.entr(counts.double() / counts.sum()).sum().exp()
