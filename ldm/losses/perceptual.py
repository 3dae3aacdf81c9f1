"""Perceptual distances: how differently a trained image classifier responds to two images.

    d_b = sum_l mean_{h,w} sum_c w_lc ( f_lc / |f_l| - g_lc / |g_l| )^2        (Zhang et al. 2018, eq. 1)

f and g are the activations of layer l for the image and its reconstruction, w_l >= 0 is calibrated on human judgements.
Two families of weights: ST-LPIPS (Ghildyal and Liu 2022), whose blurred trunk and heads ship whole in a package; and
LPIPS, whose heads ship in the package `lpips` and whose trunk is torchvision's classifier file: given by path or URL,
or fetched from where torchvision publishes it and kept in torch's cache.

Letters: b batch, c feature channel, h row, w column, l layer.
"""

from __future__ import annotations

import importlib.util
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm import storage
from ldm.config import Config
from ldm.types import Image

SHIFT = (-0.030, -0.088, -0.188)
SCALE = (0.458, 0.448, 0.450)
"""ImageNet's mean and deviation, for pixels in [-1, 1]."""
NORM_EPSILON = 1e-10
ST_PACKAGE = "stlpips_pytorch"
ST_WEIGHTS = "weights/vST0.0/alex_shift_tolerant.pth"
ST_KERNEL = 11
ST_SMALLEST_SIDE = 21
NUM_LAYERS = 5
TRUNK_URLS = {
    "alex": "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
    "vgg": "https://download.pytorch.org/models/vgg16-397923af.pth",
}
"""Where torchvision publishes the classifiers; the end of a name is the beginning of its content's sha256."""


class PerceptualKind(StrEnum):
    """Which perceptual distance."""

    ST_LPIPS_ALEX = "st_lpips_alex"
    """Shift-tolerant LPIPS on AlexNet; its weights come with a package."""
    LPIPS_ALEX = "lpips_alex"
    """LPIPS 0.1 on AlexNet, torchvision's alexnet-owt-7be5be79.pth."""
    LPIPS_VGG = "lpips_vgg"
    """LPIPS 0.1 on VGG-16, torchvision's vgg16-397923af.pth; the paper's."""
    NONE = "none"
    """Distance 0: no perceptual term."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PerceptualConfig(Config):
    """Which perceptual distance the first stage is trained with."""

    kind: PerceptualKind = PerceptualKind.ST_LPIPS_ALEX
    """Which distance."""
    trunk_weights: str | None = None
    """Path or URL of torchvision's classifier weights; for the LPIPS kinds only. None fetches torchvision's own."""

    def __post_init__(self) -> None:
        has_trunk = self.kind in (PerceptualKind.LPIPS_ALEX, PerceptualKind.LPIPS_VGG)
        if not has_trunk and self.trunk_weights is not None:
            raise ValueError(f"{self.kind} brings its own weights, got trunk_weights={self.trunk_weights!r}")


def perceptual_distance(config: PerceptualConfig) -> nn.Module:
    """Return a frozen module (image, reconstruction), both in [-1, 1], → distance of each row, shape (b,).

    Gradients reach the reconstruction only; the image's features are computed without a graph.

    Raises:
        ValueError: if the weights are not there or do not fit.
    """
    match config.kind:
        case PerceptualKind.ST_LPIPS_ALEX:
            weights = _shift_tolerant_weights()
            heads = [weights[f"lin{layer}.model.1.weight"] for layer in range(NUM_LAYERS)]
            return PerceptualDistance(ShiftTolerantAlexNet(weights), heads)
        case PerceptualKind.LPIPS_ALEX:
            return _lpips("alex", config.trunk_weights)
        case PerceptualKind.LPIPS_VGG:
            return _lpips("vgg", config.trunk_weights)
        case PerceptualKind.NONE:
            return NoDistance()


class PerceptualDistance(nn.Module):
    """A frozen trunk that gives the activations of several layers, and the weights of their channels."""

    shift: Tensor
    scale: Tensor

    def __init__(self, trunk: nn.Module, heads: Sequence[Tensor]) -> None:
        super().__init__()
        self.trunk = trunk
        self.heads = nn.ParameterList([nn.Parameter(head.flatten().clone()) for head in heads])
        self.register_buffer("shift", torch.tensor(SHIFT)[:, None, None])
        self.register_buffer("scale", torch.tensor(SCALE)[:, None, None])
        self.requires_grad_(False)
        self.eval()

    def forward(self, image: Image, reconstruction: Image) -> Float[Tensor, " b"]:
        """Return the distance of each row."""
        with torch.no_grad():
            wanted = self._directions(image)
        layers = zip(self.heads, wanted, self._directions(reconstruction), strict=True)
        return torch.stack([_layer_distance(head, left, right) for head, left, right in layers]).sum(dim=0)

    def _directions(self, image: Image) -> list[Tensor]:
        return [_direction(activation) for activation in self.trunk((image - self.shift) / self.scale)]


class NoDistance(nn.Module):
    """The distance that is always 0."""

    def forward(self, image: Image, reconstruction: Image) -> Float[Tensor, " b"]:
        """Return zeros."""
        return torch.zeros_like(reconstruction[:, 0, 0, 0])


class ShiftTolerantAlexNet(nn.Module):
    """AlexNet with stride 1 at first and blurred down-sampling after it (Ghildyal and Liu 2022, section 4).

    The first convolution and the blur after it are both linear, so they are done as one convolution with stride 2 on
    blocks of 2x2 pixels: a quarter of the work, and the large full-resolution activation never exists. Its last row and
    column, where the reflected border gives the blur other taps, have kernels of their own.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        super().__init__()
        stem = weights["net.slice1.0.weight"]
        inner, edge = (0.25, 0.5, 0.25), (0.5, 0.5, 0.0)
        self.stem_inner = _frozen(_blurred_kernel(stem, inner, inner))
        self.stem_right = _frozen(_blurred_kernel(stem, inner, edge))
        self.stem_bottom = _frozen(_blurred_kernel(stem, edge, inner))
        self.stem_corner = _frozen(_blurred_kernel(stem, edge, edge))
        self.stem_bias = _frozen(weights["net.slice1.0.bias"])
        self.blur2 = _frozen(weights["net.slice2.4.filt"])
        self.blur3 = _frozen(weights["net.slice3.8.filt"])
        names = ("net.slice2.5", "net.slice3.9", "net.slice4.11", "net.slice5.13")
        self.kernels = nn.ParameterList([_frozen(weights[f"{name}.weight"]) for name in names])
        self.biases = nn.ParameterList([_frozen(weights[f"{name}.bias"]) for name in names])

    def forward(self, image: Image) -> list[Float[Tensor, "b c h w"]]:
        """Return the activations of the five layers, for a normalised image."""
        if min(image.shape[2:]) < ST_SMALLEST_SIDE:
            raise ValueError(f"ST-LPIPS needs images of at least {ST_SMALLEST_SIDE} px, got {tuple(image.shape[2:])}")
        layer1 = F.relu(self._stem(image))
        layer2 = self._convolved(0, _downsampled(layer1, self.blur2))
        layer3 = self._convolved(1, _downsampled(layer2, self.blur3))
        layer4 = self._convolved(2, layer3)
        layer5 = self._convolved(3, layer4)
        return [layer1, layer2, layer3, layer4, layer5]

    def _convolved(self, index: int, activation: Tensor) -> Tensor:
        kernel = self.kernels[index]
        return F.relu(F.conv2d(activation, kernel, self.biases[index], padding=kernel.shape[-1] // 2))

    def _stem(self, image: Image) -> Tensor:
        """Return blur(conv(image)) before the activation function, as one convolution.

        Along an axis of s pixels the plain convolution has n = s - 6 outputs f_i. The blur reflects them by 2 and takes
        every second: its first output repeats its second; its last does the same where n is odd; where n is even, its
        last is (f_{n-2} + f_{n-1}) / 2.
        """
        height, width = image.shape[2:]
        is_even_height, is_even_width = height % 2 == 0, width % 2 == 0
        # Two pixels of zeros around are the convolution's own; the rest completes the blocks of 2x2.
        padded = F.pad(image, (2, 4 if is_even_width else 3, 2, 4 if is_even_height else 3))
        blocks = F.pixel_unshuffle(padded, 2).contiguous(memory_format=torch.channels_last)
        side = self.stem_inner.shape[-1]
        rows = slice(0, -1) if is_even_height else slice(None)
        columns = slice(0, -1) if is_even_width else slice(None)
        blurred = F.conv2d(blocks[:, :, rows, columns], self.stem_inner, self.stem_bias)
        if is_even_width:
            right = F.conv2d(blocks[:, :, rows, -side:], self.stem_right, self.stem_bias)
            blurred = torch.cat([blurred, right], dim=3)
        if is_even_height:
            bottom = F.conv2d(blocks[:, :, -side:, columns], self.stem_bottom, self.stem_bias)
            if is_even_width:
                corner = F.conv2d(blocks[:, :, -side:, -side:], self.stem_corner, self.stem_bias)
                bottom = torch.cat([bottom, corner], dim=3)
            blurred = torch.cat([blurred, bottom], dim=2)
        return F.pad(blurred, (1, int(not is_even_width), 1, int(not is_even_height)), mode="replicate")


def _blurred_kernel(kernel: Tensor, rows: Sequence[float], columns: Sequence[float]) -> Tensor:
    """Return the kernel of `rows` x `columns` after `kernel`, for images in blocks of 2x2 pixels as channels."""
    composed = torch.zeros(*kernel.shape[:2], ST_KERNEL + 3, ST_KERNEL + 3, dtype=torch.float64)
    for top, row in enumerate(rows):
        for left, column in enumerate(columns):
            composed[:, :, top : top + ST_KERNEL, left : left + ST_KERNEL] += row * column * kernel.double()
    return F.pixel_unshuffle(composed, 2).to(kernel.dtype)


def _downsampled(activation: Tensor, blur: Tensor) -> Tensor:
    largest = F.max_pool2d(activation, 3, stride=1)
    return F.conv2d(F.pad(largest, (2, 2, 2, 2), mode="reflect"), blur, stride=2, groups=activation.shape[1])


def _frozen(weight: Tensor) -> nn.Parameter:
    # Channels last: pooling and blurs run 5 to 10 times faster on a CPU than channels first.
    layout = torch.channels_last if weight.dim() == 4 else torch.contiguous_format
    return nn.Parameter(weight.clone(memory_format=layout), requires_grad=False)


def _direction(activation: Tensor) -> Tensor:
    """Return f / |f| over channels; where all of f is 0 it stays 0 and its gradient stays finite."""
    precise = activation.to(torch.promote_types(activation.dtype, torch.float32))
    norm = precise.square().sum(dim=1, keepdim=True).clamp(min=NORM_EPSILON**2).sqrt()
    return precise / (norm + NORM_EPSILON)


def _layer_distance(head: Tensor, left: Tensor, right: Tensor) -> Tensor:
    difference = (left - right).square()
    return torch.einsum("bchw,c->b", difference, head) / (difference.shape[2] * difference.shape[3])


def _shift_tolerant_weights() -> dict[str, Tensor]:
    # The package is found, never imported: its modules import notebooks' and plotting packages that nothing here needs.
    spec = importlib.util.find_spec(ST_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    if not folders:
        raise ValueError(f"ST-LPIPS needs the package {ST_PACKAGE.replace('_', '-')}, which is not installed")
    weights: dict[str, Tensor] = torch.load(Path(folders[0]) / ST_WEIGHTS, map_location="cpu", weights_only=True)
    return weights


def _lpips(net: str, trunk_weights: str | None) -> PerceptualDistance:
    # Imported here because it takes torchvision and torch's compiler with it: 5 s that the default never needs.
    import lpips

    network = lpips.LPIPS(net=net, pnet_rand=True, verbose=False)
    given = _published_trunk(net) if trunk_weights is None else _trunk_at(trunk_weights)
    # The trunk's `sliceK.I.weight` is torchvision's `features.I.weight`.
    wanted = {name: f"features.{name.split('.', 1)[1]}" for name in network.net.state_dict()}
    missing = sorted(set(wanted.values()) - set(given))
    if missing:
        origin = trunk_weights or TRUNK_URLS[net]
        raise ValueError(f"{origin} is not torchvision's {net} classifier: it lacks {', '.join(missing)}")
    network.net.load_state_dict({name: given[source] for name, source in wanted.items()})
    return PerceptualDistance(network.net, [head.model[-1].weight.detach() for head in network.lins])


def _trunk_at(path: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = torch.load(io.BytesIO(storage.read_bytes(path)), map_location="cpu", weights_only=True)
    return weights


def _published_trunk(net: str) -> dict[str, Tensor]:
    """Return torchvision's weights, from torch's cache or fetched into it and checked against the hash in their name.

    Raises:
        ValueError: if they can't be fetched, saying what to give instead.
    """
    url = TRUNK_URLS[net]
    try:
        weights: dict[str, Tensor] = torch.hub.load_state_dict_from_url(
            url, map_location="cpu", progress=False, check_hash=True, weights_only=True
        )
    except (OSError, RuntimeError) as error:
        raise ValueError(
            f"{url} could not be fetched ({error}): fetch it where there is a way to it and give its path as "
            "perceptual.trunk_weights, or take st_lpips_alex, whose weights come with a package"
        ) from error
    return weights
