"""How well a network denoises held-out latents: the same noise and the same evenly spaced timesteps every time.

    row i of n:   t_i = T (i + 1/2) / n        loss = mean_i || output - target ||^2        (Ho et al. 2020, eq. 14)

With fixed draws two measurements differ only by the network, so a curve of them is smooth, and two runs of one
schedule and prediction compare.

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from ldm.diffusion.process import Prediction, corrupt
from ldm.diffusion.schedule import Schedule
from ldm.latents import LatentSpace
from ldm.losses.diffusion import per_sample_loss
from ldm.randomness import Draw, normal
from ldm.samplers.guidance import Network
from ldm.types import Condition, LatentBatch, SampleIndex

VALIDATION_SEED = 1_000_003


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """What a denoising loss is measured under.

    Attributes:
        schedule: the noise schedule.
        prediction: what the network's output means.
        space: raw and scaled latents.
        num_rows: n, the rows of the whole measurement, over which timesteps are spread.
    """

    schedule: Schedule
    prediction: Prediction
    space: LatentSpace
    num_rows: int

    def timesteps(self, samples: SampleIndex) -> Float[Tensor, " b"]:
        """Return t_i of each row."""
        return ((samples.double() + 0.5) / self.num_rows * self.schedule.num_timesteps).floor().float()

    @torch.no_grad()
    def losses(self, network: Network, batch: LatentBatch, condition: Condition | None = None) -> Float[Tensor, " b"]:
        """Return the unweighted loss of each row.

        Args:
            network: on the device and in the dtype of the batch.
            batch: rows whose `samples` count from 0 to n over the measurement.
            condition: taken instead of the batch's own, if given.
        """
        rows = batch.samples.tolist()
        device = batch.moments.device
        channels, height, width = self.space.num_channels, *batch.moments.shape[-2:]
        noise = normal(VALIDATION_SEED, Draw.NOISE, rows, (channels, height, width)).to(device)
        clean = self.space.scaled_mode(batch.moments.float())
        timestep = self.timesteps(batch.samples).to(device)
        at = self.schedule.scales(timestep)
        noisy = corrupt(clean, noise, at)
        output = network(noisy, timestep, condition or batch.condition).float()
        return per_sample_loss(self.prediction, output, clean, noise, at)
