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
    """A copy of a network whose weights have another number format; latents come and go in the caller's.

    Args:
        network: stays as it is.
        precision: of the copy.
    """

    def __init__(self, network: nn.Module, precision: Precision) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).to(precision.dtype)
        self._dtype = precision.dtype

    def forward(self, noisy: Latent, timestep: Float[Tensor, " b"], condition: Condition) -> Latent:
        """Return the prediction; the condition must have the network's format, made once for all steps."""
        output: Tensor = self.network(noisy.to(self._dtype), timestep, condition)
        return output.to(noisy.dtype)


class NetworkForms:
    """A denoiser's forms, each made when it is first asked for."""

    def __init__(self, network: Network) -> None:
        self._network = network
        self._made: dict[tuple[Precision, bool], Network] = {}

    def of(self, precision: Precision, *, is_compiled: bool) -> Network:
        """Return the form; what is no module has one only.

        A compiled form shares no work between steps (`ldm.remembered`): its graph takes what it is given.

        Raises:
            ValueError: if another is asked of a callable that is no module.
        """
        if precision is Precision.FP32 and not is_compiled:
            return self._network
        if not isinstance(self._network, nn.Module):
            raise ValueError(f"{precision.value} and compiling are of a loaded denoiser, this is another callable")
        form = precision, is_compiled
        if form not in self._made:
            cast = self._network if precision is Precision.FP32 else CastNetwork(self._network, precision)
            self._made[form] = torch.compile(cast) if is_compiled else cast
        return self._made[form]
