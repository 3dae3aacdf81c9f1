"""Terms of the first stage's loss, each on its own (Esser et al. 2021, eq. 5 to 7; Rombach et al. 2022, eq. 25).

    autoencoder     mean_b [ reconstruction + kl_weight KL ] + disc_weight lambda generator
    discriminator   hinge(real, fake) + r1_weight / 2 gradient penalty + lecam_weight anchor penalty

Reconstruction and KL are sums over a row's pixels and latent elements, as in the paper: its kl_weight 1e-6 is meant for
sums. With means over elements the same weight is 1e-6 (latent elements) / (pixel values).

Letters: b batch, p and q patches.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.autoencoder.regularizer import Regularizer
from ldm.types import Image

ADAPTIVE_EPSILON = 1e-4
MAX_ADAPTIVE_WEIGHT = 1e4


class PixelLoss(StrEnum):
    """How a pixel value's error is measured."""

    L1 = "l1"
    """Its absolute value, as in the paper."""
    L2 = "l2"
    """Its square."""


class AdversarialLoss(StrEnum):
    """What the discriminator learns from; the generator's term is minus the mean logit under both."""

    HINGE = "hinge"
    """Lim and Ye 2017, eq. 3; the paper's."""
    VANILLA = "vanilla"
    """Cross-entropy, Goodfellow et al. 2014, eq. 1."""


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


def pixel_loss(kind: PixelLoss, image: Image, reconstruction: Image) -> Scalar:
    """Return the mean error over all pixel values."""
    match kind:
        case PixelLoss.L1:
            return (image - reconstruction).abs().mean()
        case PixelLoss.L2:
            return (image - reconstruction).square().mean()


def kl_weight_on_means(weight_on_sums: float, *, latent_elements: int, pixel_values: int) -> float:
    """Return the weight of a mean KL beside a mean pixel error that equals a weight between their sums.

    (S_pixel + w S_kl) / n_pixel = M_pixel + w (n_latent / n_pixel) M_kl: the paper's 1e-6 is 6.25e-8 for kl-f4 and
    2.08e-8 for kl-f8, f16 and f32 at 256 pixels.
    """
    return weight_on_sums * latent_elements / pixel_values


def discriminator_loss(kind: AdversarialLoss, real: Logits, fake: Logits) -> Scalar:
    """Return what the discriminator minimises to tell both apart."""
    match kind:
        case AdversarialLoss.HINGE:
            return hinge_discriminator_loss(real, fake)
        case AdversarialLoss.VANILLA:
            return vanilla_discriminator_loss(real, fake)


def hinge_discriminator_loss(real: Logits, fake: Logits) -> Scalar:
    """Return the discriminator's hinge loss (Lim and Ye 2017, eq. 3), halved as in the authors' code."""
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def vanilla_discriminator_loss(real: Logits, fake: Logits) -> Scalar:
    """Return the discriminator's cross-entropy (Goodfellow et al. 2014, eq. 1), halved."""
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


def generator_loss(fake: Logits) -> Scalar:
    """Return what the decoder minimises to look real: minus the mean logit (Lim and Ye 2017, eq. 4)."""
    return -fake.mean()


def gradient_penalty(real: Logits, image: Image) -> Scalar:
    """Return R1, the mean over rows of the squared gradient of a row's summed logits (Mescheder et al. 2018, eq. 9).

    Args:
        real: the discriminator's logits of `image`.
        image: real images, which require a gradient.
    """
    (gradient,) = torch.autograd.grad(real.sum(), image, create_graph=True)
    return gradient.square().sum(dim=(1, 2, 3)).mean()


def anchor_penalty(real: Logits, fake: Logits, real_anchor: Scalar, fake_anchor: Scalar) -> Scalar:
    """Return LeCAM: squared distances of each side's logits to the other side's moving average (Tseng et al. 2021)."""
    return (real - fake_anchor).square().mean() + (fake - real_anchor).square().mean()


def accuracy(real: Logits, fake: Logits) -> Scalar:
    """Return the share of patches that the discriminator takes for what they are; 0.5 is a guess."""
    return 0.5 * ((real > 0).to(real.dtype).mean() + (fake < 0).to(fake.dtype).mean())


def max_adaptive_weight(regularizer: Regularizer, pixel_values: int) -> float:
    """Return the bound of the adaptive weight beside mean pixel errors.

    The authors bound it at 10,000: for VQ beside means, for KL beside sums over a picture's values, which is 0.051
    beside their mean at 256 pixels, and binds.
    """
    match regularizer:
        case Regularizer.KL:
            return MAX_ADAPTIVE_WEIGHT / pixel_values
        case Regularizer.VQ:
            return MAX_ADAPTIVE_WEIGHT


def adaptive_weight(
    reconstruction_loss: Scalar,
    generator_loss: Scalar,
    last_layer: nn.Parameter,
    mean: Callable[[Tensor], Tensor] = lambda values: values,
    largest: float = MAX_ADAPTIVE_WEIGHT,
) -> Scalar:
    """Return lambda, the ratio of gradient norms at the decoder's last layer (Esser et al. 2021, eq. 7), a constant.

    The graph of both losses is kept, so that the sum can still be differentiated.

    Args:
        reconstruction_loss: of this process's rows.
        generator_loss: of this process's rows.
        last_layer: the decoder's last weight.
        mean: mean of a tensor over all processes, so that the gradients are the global batch's; left out for one.
        largest: bound of the result.
    """
    (reconstruction_gradient,) = torch.autograd.grad(reconstruction_loss, last_layer, retain_graph=True)
    (generator_gradient,) = torch.autograd.grad(generator_loss, last_layer, retain_graph=True)
    ratio: Tensor = mean(reconstruction_gradient).norm() / (mean(generator_gradient).norm() + ADAPTIVE_EPSILON)
    return ratio.clamp(0.0, largest).detach()
