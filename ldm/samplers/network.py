"""The forms in which a loaded denoiser is called: as it is, in half precision, compiled.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

import copy

import torch
from jaxtyping import Float
from torch import Tensor, nn

from ldm.precision import Precision
from ldm.samplers.guidance import Network
from ldm.types import Condition, Latent


class CastNetwork(nn.Module):
    """A network in one number format, called with latents of another and returning that.

    Args:
        network: its floating-point weights are of `dtype`.
        dtype: number format.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.network = network
        self._dtype = dtype

    def forward(self, noisy: Latent, timestep: Float[Tensor, " b"], condition: Condition) -> Latent:
        """Return the prediction; the condition must have the network's format, made once for all steps."""
        output: Tensor = self.network(noisy.to(self._dtype), timestep, condition)
        return output.to(noisy.dtype)


class NetworkForms:
    """A denoiser's forms, each made when it is first asked for and kept: its weights must not change after that."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._made: dict[tuple[Precision, bool], Network] = {}

    def of(self, precision: Precision, *, is_compiled: bool) -> Network:
        """Return the form; what is no module has one only.

        Raises:
            ValueError: if another is asked of a callable that is no module.
        """
        if precision is Precision.FP32 and not is_compiled:
            return self._network
        if not isinstance(self._network, nn.Module):
            raise ValueError(f"{precision.value} and compiling are of a loaded denoiser, this is another callable")
        form = precision, is_compiled
        if form not in self._made:
            if is_compiled:
                self._made[form] = torch.compile(self.of(precision, is_compiled=False))
            else:
                self._made[form] = CastNetwork(_cast_copy(self._network, precision.dtype), precision.dtype)
        return self._made[form]


def _cast_copy(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return a copy whose weights have another number format, without a copy of them in their own."""
    cast: dict[int, object] = {
        id(weight): nn.Parameter(weight.detach().to(dtype), requires_grad=False) for weight in network.parameters()
    }
    cast |= {id(kept): kept.to(dtype) if kept.is_floating_point() else kept.clone() for kept in network.buffers()}
    return copy.deepcopy(network, cast)
