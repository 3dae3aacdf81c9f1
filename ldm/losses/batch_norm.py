"""Batch normalisation by the statistics of the global batch, whichever processes hold its rows.

    y = (x - m) / sqrt(v + eps) w + b        m, v over all rows and positions of all processes (Ioffe and Szegedy 2015)

The mean is taken first and then the squares around it: a difference of large sums would lose the variance. torch's own
synchronised form needs a GPU.

Letters: b batch, c channel, h row, w column.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn


class GlobalBatchNorm(nn.BatchNorm2d):
    """BatchNorm2d whose statistics in training are those of all processes' rows; its state is BatchNorm2d's.

    Args:
        channels: of the features.
        total: differentiable sum of a tensor over all processes.
    """

    def __init__(self, channels: int, total: Callable[[Tensor], Tensor]) -> None:
        super().__init__(channels)
        self._total = total

    def forward(self, input: Float[Tensor, "b c h w"]) -> Float[Tensor, "b c h w"]:
        """Return the normalised features; in evaluation by the running statistics."""
        if not self.training:
            return super().forward(input)
        precise = input.to(torch.promote_types(input.dtype, torch.float32))
        count = self._total(precise.new_tensor(float(precise.numel() // precise.shape[1])))
        mean = self._total(precise.sum(dim=(0, 2, 3))) / count
        centred = precise - mean[:, None, None]
        variance = self._total(centred.square().sum(dim=(0, 2, 3))) / count
        self._remember(mean.detach(), variance.detach() * count / (count - 1))
        scale = self.weight * torch.rsqrt(variance + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(input.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, unbiased_variance: Tensor) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        assert self.momentum is not None
        self.num_batches_tracked += 1
        self.running_mean.lerp_(mean, self.momentum)
        self.running_var.lerp_(unbiased_variance, self.momentum)
