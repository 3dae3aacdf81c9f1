"""Terms of the first stage's loss, each on its own (Esser et al. 2021, eq. 5 to 7; Rombach et al. 2022, eq. 25).

    autoencoder     mean_b [ reconstruction + kl_weight KL ] + disc_weight lambda generator
    discriminator   hinge(real, fake)

Reconstruction and KL are sums over a row's pixels and latent elements, as in the paper: its kl_weight 1e-6 is meant for
sums. With means over elements the same weight is 1e-6 (latent elements) / (pixel values).

Letters: b batch, p and q patches.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.types import Image

ADAPTIVE_EPSILON = 1e-4
MAX_ADAPTIVE_WEIGHT = 1e4

Logits = Float[Tensor, "b 1 p q"]
Scalar = Float[Tensor, ""]


def reconstruction_loss(
    image: Image, reconstruction: Image, distance: Float[Tensor, " b"], perceptual_weight: float
) -> Float[Tensor, " b"]:
    """Return the sum over a row's pixel values of |image - reconstruction| + perceptual_weight * distance.

    The perceptual distance stands once for every pixel value, as in the authors' code with log-variance 0.
    """
    num_values = image[0].numel()
    return (image - reconstruction).abs().sum(dim=(1, 2, 3)) + perceptual_weight * num_values * distance


def hinge_discriminator_loss(real: Logits, fake: Logits) -> Scalar:
    """Return the discriminator's hinge loss (Lim and Ye 2017, eq. 3), halved as in the authors' code."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Logits, fake: Logits) -> Scalar:
    """Return the discriminator's cross-entropy (Goodfellow et al. 2014, eq. 1), halved."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Logits) -> Scalar:
    """Return what the decoder minimises to look real: minus the mean logit (Lim and Ye 2017, eq. 4)."""
    return -fake.mean()


def adaptive_weight(reconstruction_loss: Scalar, generator_loss: Scalar, last_layer: nn.Parameter) -> Scalar:
    """Return lambda, the ratio of gradient norms at the decoder's last layer (Esser et al. 2021, eq. 7), a constant.

    The graph of both losses is kept, so that the sum can still be differentiated.
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (generator_gradient,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    ratio: Tensor = reconstruction_gradient.norm() / (generator_gradient.norm() + ADAPTIVE_EPSILON)
    return ratio.clamp(0.0, MAX_ADAPTIVE_WEIGHT).detach()
