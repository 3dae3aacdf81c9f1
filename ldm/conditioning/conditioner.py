"""What a denoiser is told, and the networks that are trained with it to understand that (Rombach et al. 2022, eq. 3).

    beside the text of a frozen encoder: a class (one token), a caption's tokens or a layout (a transformer's states)
    beside the noisy latent: a semantic map's channels, a small image, a masked image's latent and its mask, and where
    a layout's objects are read as boxes its own row and column

Token states of several conditions lie one after the other. Every condition can be dropped to its null, by itself: the
empty caption, one more class, the empty layout, a map without classes.

Letters: b batch, c latent channel, h latent row, w latent column, k channel of a spatial condition, l token, d width,
y pixel row, x pixel column, n class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from enum import StrEnum
from functools import partial

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from ldm.conditioning.layout import POSITION_CHANNELS, BoxReader, LayoutForm, num_objects
from ldm.conditioning.noise_levels import MOST_LEVELS
from ldm.conditioning.transformer import TokenTransformer, TokenTransformerConfig
from ldm.config import Config, added_later
from ldm.remembered import Remembering
from ldm.types import ClassNumbers, Condition, Latent, SemanticMap, SpatialCondition, TextMask, TextStates

LAYOUT_TRANSFORMER = TokenTransformerConfig(vocab_size=8_192, max_tokens=92, depth=16)
IMAGE_CHANNELS = 3
MASK_CHANNELS = 1


class TextUse(StrEnum):
    """What becomes of a row's caption."""

    FROZEN = "frozen"
    """The states of a frozen text encoder, as they are cached."""
    TRAINED = "trained"
    """The tokens of its tokenizer, read by a transformer that is trained with the denoiser."""
    NONE = "none"
    """Nothing: the denoiser is not told."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig(Config):
    """What the denoiser is told of a row."""

    text: TextUse = TextUse.FROZEN
    """What becomes of the caption: frozen (an encoder's states), trained (a transformer of our own) or none."""
    text_transformer: TokenTransformerConfig = TokenTransformerConfig()
    """The transformer, where text is trained; its cache is made with text_storage online."""
    num_classes: int = 0
    """Classes that rows have, read from the cache's class column; 0 tells no class. One more is the null class."""
    class_dropout: float = 0.1
    """Share of rows whose class is replaced by the null class."""
    has_layout: bool = False
    """Whether the boxes of the cache's layout column are told."""
    layout_transformer: TokenTransformerConfig = LAYOUT_TRANSFORMER
    """The transformer that reads layouts; the paper's has a vocabulary of 8,192 and 92 tokens. Boxes are numbered as
    its tokens are (vocab_size, max_tokens) and go through no transformer."""
    layout_dropout: float = 0.1
    """Share of rows whose layout is replaced by the empty one."""
    map_classes: int = 0
    """Classes of the cache's semantic map; 0 tells no map."""
    map_channels: int = 3
    """Channels that a map becomes beside the noisy latent."""
    map_dropout: float = 0.0
    """Share of rows whose map is replaced by one without classes."""
    has_low_res: bool = False
    """Whether the cache's small copy of the image lies beside the noisy latent, for super-resolution."""
    has_masked_image: bool = False
    """Whether a mask and the latent of the image without it lie beside the noisy latent, for inpainting."""
    has_sizes: bool = False
    """Whether the original size and the crop are told, as in SDXL."""
    noise_levels: int = added_later(0)
    """Levels of noise that may lie over the small copy: the first timesteps of a linear schedule of 1,000 (350 in
    Stable Diffusion's upscaler). Training draws one for each row; 0 lays none."""
    layout_form: LayoutForm = added_later(LayoutForm.TOKENS)
    """How layouts are read: tokens (the paper) or boxes (one token an object, learned sooner)."""
    layout_classes: int = added_later(0)
    """Classes that boxes have; 0 is as many as the vocabulary has numbers for."""

    def __post_init__(self) -> None:
        for name in ("num_classes", "map_classes"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} can't be negative, got {getattr(self, name)}")
        if self.map_channels < 1:
            raise ValueError(f"map_channels must be at least 1, got {self.map_channels}")
        for name in ("class_dropout", "layout_dropout", "map_dropout"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} must lie in [0, 1], got {getattr(self, name)}")
        if self.has_layout:
            num_objects(self.layout_transformer)
        if self.layout_form is LayoutForm.BOXES:
            self._check_boxes()
        most = self.layout_transformer.vocab_size - 1 if self.has_layout else 0
        if not 0 <= self.layout_classes <= most:
            raise ValueError(
                f"layout_classes, from 0 to {most}, are of the boxes that has_layout tells, got {self.layout_classes} "
                f"and has_layout {self.has_layout}"
            )
        if not 0 <= self.noise_levels <= MOST_LEVELS or (self.noise_levels and not self.has_low_res):
            raise ValueError(
                f"noise_levels, from 0 to {MOST_LEVELS}, are of the small copy that has_low_res tells, "
                f"got {self.noise_levels} and has_low_res {self.has_low_res}"
            )

    @property
    def box_numbers(self) -> int:
        """Below which the numbers of boxes' classes lie."""
        return self.layout_classes or self.layout_transformer.vocab_size - 1

    def _check_boxes(self) -> None:
        if not self.has_layout:
            raise ValueError("layout_form boxes is of layouts: has_layout is needed")
        number = self.layout_transformer.vocab_size
        side = math.isqrt(number)
        if side < 2 or side * side == number:
            raise ValueError(
                f"boxes need four cells at least, and a last number of the vocabulary that is none of them (no square, "
                f"such as 1,025), got {number}"
            )

    @property
    def is_trained(self) -> bool:
        """Whether any condition goes through weights that are trained with the denoiser."""
        return self.text is TextUse.TRAINED or bool(self.num_classes or self.has_layout or self.map_classes)

    @property
    def is_text_only(self) -> bool:
        """Whether a caption is all that the denoiser is told."""
        more = self.num_classes, self.has_layout, self.map_classes, self.has_low_res, self.has_masked_image
        return not any(more) and not self.has_sizes and self.text is not TextUse.NONE

    @property
    def has_states(self) -> bool:
        """Whether the denoiser attends to anything."""
        return self.text is not TextUse.NONE or bool(self.num_classes or self.has_layout)

    def spatial_channels(self, latent_channels: int) -> int:
        """Return how many channels lie beside a noisy latent."""
        return self.given_channels(latent_channels) + (self.map_channels if self.map_classes else 0)

    def given_channels(self, latent_channels: int) -> int:
        """Return how many of them go through no weights of ours before the denoiser's."""
        masked = latent_channels + MASK_CHANNELS if self.has_masked_image else 0
        small = IMAGE_CHANNELS if self.has_low_res else 0
        return masked + small + (POSITION_CHANNELS if self.has_positions else 0)

    @property
    def has_positions(self) -> bool:
        """Whether each latent's place in the picture is told, for boxes to be found by."""
        return self.has_layout and self.layout_form is LayoutForm.BOXES


class ClassTable(nn.Module):
    """A token for each class, and one more for the null class."""

    def __init__(self, num_classes: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_classes + 1, width)

    def forward(self, class_id: ClassNumbers) -> TextStates:
        """Return one token a row, shape (b, 1, d)."""
        tokens: Tensor = self.embedding(class_id)
        return tokens[:, None]


class MapRescaler(nn.Module):
    """A semantic map as channels of a latent's size: shares of the classes in each latent's pixels, then mixed.

    The paper halves a one-hot map bilinearly as often as the autoencoder halves an image, which is that mean, and maps
    its channels without a bias.
    """

    def __init__(self, num_classes: int, channels: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.mix = nn.Conv2d(num_classes, channels, 1, bias=False)

    def forward(self, semantic_map: SemanticMap, size: tuple[int, int]) -> SpatialCondition:
        """Return channels of so many rows and columns; a pixel of no class counts for none."""
        table = F.pad(self.mix.weight.flatten(1).T, (0, 0, 0, 1))  # the last row is of no class
        numbers = torch.where(semantic_map < 0, self.num_classes, semantic_map)
        # The mix of the shares is the mean of the pixels' mixes, which never makes a channel for each class.
        pixels = F.embedding(numbers, table).movedim(-1, 1)  # b k y x
        return F.adaptive_avg_pool2d(pixels, size)


class Conditioner(Remembering):
    """The trained part of what a denoiser is told: numbers of classes, tokens and pixels to states and channels."""

    def __init__(self, config: ConditioningConfig, width: int) -> None:
        super().__init__()
        self.config = config
        self.text = TokenTransformer(config.text_transformer, width) if config.text is TextUse.TRAINED else None
        self.class_table = ClassTable(config.num_classes, width) if config.num_classes else None
        self.layout = _layout_reader(config, width) if config.has_layout else None
        self.semantic_map = MapRescaler(config.map_classes, config.map_channels) if config.map_classes else None

    def forward(self, condition: Condition, size: tuple[int, int]) -> Condition:
        """Return the condition with states and channels made of its numbers.

        Args:
            condition: as it comes from the data.
            size: rows and columns of the latent.

        Raises:
            ValueError: if a part is missing that the config tells the denoiser.
        """
        # A tile's condition is made anew at each step; what is read of it is the same.
        read = condition.states, condition.mask, condition.tokens, condition.class_id, condition.layout
        states, mask = self.remembered(read, partial(self._states, condition))
        spatial = [] if condition.spatial is None else [condition.spatial]
        if self.semantic_map is not None:
            spatial.append(self.semantic_map(_there(condition, "semantic_map"), size))
        return replace(
            condition,
            states=states,
            mask=mask,
            spatial=torch.cat(spatial, dim=1) if spatial else None,
            tokens=None,
            class_id=None,
            layout=None,
            semantic_map=None,
        )

    def _states(self, condition: Condition) -> tuple[TextStates | None, TextMask | None]:
        made = [] if condition.states is None else [condition.states]
        readers = (("tokens", self.text), ("class_id", self.class_table), ("layout", self.layout))
        made += [reader(_there(condition, name)) for name, reader in readers if reader is not None]
        if not made:
            return None, None
        states = torch.cat(made, dim=1)
        if condition.mask is None:
            return states, None
        return states, F.pad(condition.mask, (0, states.shape[1] - condition.mask.shape[1]), value=True)


class ConditionalDenoiser(nn.Module):
    """A denoiser and the networks that read its conditions, as one module: one forward, one optimizer, one average."""

    def __init__(self, unet: nn.Module, conditioner: Conditioner) -> None:
        super().__init__()
        self.unet = unet
        self.conditioner = conditioner

    def forward(self, noisy: Latent, timestep: Float[Tensor, "b"], condition: Condition) -> Latent:
        """Return the prediction for each row; see `UNet.forward`."""
        # Not as a module's call: ZeRO-3's hooks look into what such a call returns, and a condition is no tensor.
        told = self.conditioner.forward(condition, (noisy.shape[-2], noisy.shape[-1]))
        prediction: Tensor = self.unet(noisy, timestep, told)
        return prediction


def _layout_reader(config: ConditioningConfig, width: int) -> nn.Module:
    reader = BoxReader if config.layout_form is LayoutForm.BOXES else TokenTransformer
    return reader(config.layout_transformer, width)


def _there(condition: Condition, name: str) -> Tensor:
    part: Tensor | None = getattr(condition, name)
    if part is None:
        raise ValueError(f"the denoiser is told {name}, and the condition has none")
    return part
