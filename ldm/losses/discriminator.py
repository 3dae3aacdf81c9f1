"""Patch discriminator: a small convolutional network that judges overlapping patches of an image.

Order: convolution with stride 2 → `num_layers` - 1 times (stride 2, batch norm) → once (stride 1, batch norm) → one
logit for each patch (Isola et al. 2017, section 3.2 and appendix 6.1.2; as in Esser et al. 2021).

Letters: b batch, n rows of one batch or of two, y and x pixels, p and q patches.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.losses.batch_norm import GlobalBatchNorm
from ldm.types import Image

KERNEL = 4
LEAK = 0.2
MAX_WIDENING = 8
INITIAL_STD = 0.02


class Discriminator(nn.Module):
    """PatchGAN with 2,765,633 parameters for 3 layers of 64 channels, 663,361 for 2 layers.

    Args:
        base_channels: width of the first layer.
        num_layers: strided layers.
        total: differentiable sum over all processes, so that batch norm sees the global batch; None where one process
            has all of it.
    """

    def __init__(
        self, base_channels: int = 64, num_layers: int = 3, total: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        super().__init__()
        if base_channels < 1 or num_layers < 1:
            raise ValueError(f"a discriminator needs channels and layers, got {base_channels} and {num_layers}")
        widths = [base_channels * min(2**level, MAX_WIDENING) for level in range(num_layers + 1)]
        stages: list[nn.Module] = [nn.Conv2d(3, widths[0], KERNEL, stride=2, padding=1), nn.LeakyReLU(LEAK)]
        for level in range(1, num_layers + 1):
            stride = 2 if level < num_layers else 1
            # A bias before batch norm would do nothing.
            stages += [
                nn.Conv2d(widths[level - 1], widths[level], KERNEL, stride=stride, padding=1, bias=False),
                nn.BatchNorm2d(widths[level]) if total is None else GlobalBatchNorm(widths[level], total),
                nn.LeakyReLU(LEAK),
            ]
        stages.append(nn.Conv2d(widths[-1], 1, KERNEL, stride=1, padding=1))
        self.stages = nn.Sequential(*stages)
        self.apply(_initialise)

    def forward(self, image: Image, made: Image | None = None) -> Float[Tensor, "n 1 p q"]:
        """Return a logit for each patch: positive for real, negative for reconstructed.

        Args:
            image: pictures.
            made: reconstructions, whose logits come behind those of the pictures; one forward for both, since a
                data-parallel wrapper synchronises only what its last one saw. Each half is normed by itself, as
                reconstructions are where the autoencoder is judged.
        """
        logits: Tensor = self.stages(image)
        return logits if made is None else torch.cat([logits, self.stages(made)])


def _initialise(module: nn.Module) -> None:
    """Draw weights as Radford et al. 2016 (section 3) do."""
    if isinstance(module, nn.Conv2d):
        nn.init.normal_(module.weight, 0.0, INITIAL_STD)
    if isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)
        nn.init.zeros_(module.bias)
