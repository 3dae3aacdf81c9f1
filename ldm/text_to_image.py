"""A whole text-to-image model: what turns prompts into images.

Order: prompts → token states → guided denoising of seeded noise → raw latent → decoder → pixels.

Letters: n number of prompts, b batch, c latent channel, h latent row, w latent column, y pixel row, x pixel column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ldm import storage
from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.tiling import tiled_decode, tiled_encode
from ldm.conditioning.conditioner import TextUse
from ldm.conditioning.rows import RowConditions, null_condition
from ldm.conditioning.text import TextEncoder, text_encoder_digest
from ldm.conditioning.text_embedding import blended, embedded_condition, numbered_condition
from ldm.denoiser import denoiser_digests, load_denoiser, unet_config
from ldm.diffusion.schedule import Schedule
from ldm.drawing import (
    Drawing,
    Given,
    Pixels,
    check_strength,
    check_tile,
    check_told,
    checked_size,
    images_of,
    pixels_of,
)
from ldm.interop.diffusers import load_autoencoder, weights_digest
from ldm.model_card import AUTOENCODER_FOLDER, ModelCard, load_card
from ldm.remembered import steps_share
from ldm.samplers.guidance import Network, guided_denoiser
from ldm.samplers.network import NetworkForms
from ldm.samplers.sample import Denoiser, OnStep, SamplerConfig, sample
from ldm.samplers.tasks import Prompt, Seed, Start, ends, latent_mask, sample_from, seeded_noise
from ldm.samplers.tiles import OVERLAP_SHARE, tiled_network
from ldm.types import Condition, Image, Latent, LatentBatch, Moments

Part = TypeVar("Part", bound=nn.Module)
OnDrawn = Callable[[float, int], None]
"""(images drawn so far, those under way in part; number of the step that was made)."""


class TextToImage:
    """A loaded model.

    Args:
        unet: the denoiser, any network of its signature.
        shrinks: by what the denoiser shrinks a latent's sides at most, which they must be multiples of.
        autoencoder: what decodes its latents.
        text_encoder: what its prompts go through.
        card: how they fit together.
        device: where they lie.
    """

    def __init__(
        self,
        *,
        unet: Network,
        autoencoder: Autoencoder,
        text_encoder: TextEncoder,
        card: ModelCard,
        device: torch.device,
        shrinks: int = 1,
    ) -> None:
        self.card = card
        self._shrinks = shrinks
        self._unet = unet
        self._forms = NetworkForms(unet)
        self._autoencoder = autoencoder
        self._text_encoder = text_encoder
        self._schedule = Schedule(card.schedule)
        self.device = device

    def generate(
        self,
        prompts: Sequence[Prompt],
        *,
        seeds: Sequence[Seed],
        guidance: Sequence[float] | None = None,
        negative_prompts: Sequence[str] | None = None,
        drawing: Drawing | None = None,
        given: Given | None = None,
        batch_size: int = 16,
        on_step: OnDrawn | None = None,
    ) -> Pixels:
        """Return one image for each prompt.

        Args:
            prompts: n texts, or what lies between two.
            seeds: n seeds, or what lies between two; an image depends on its own prompt, seed and guidance, not on the
                others: not on a bit where as many are sampled together, else by what the device rounds otherwise for
                other shapes.
            guidance: n guidance scales; the card's where not given.
            negative_prompts: n texts that guidance leads away from; the empty one where not given.
            drawing: sampler, guidance's form and size; the card's sampler and the size of the training where not given.
            given: n pictures to begin with, masks, classes, layouts, maps or small pictures; what the model is told
                beside text, it must be given.
            batch_size: images sampled together.
            on_step: called after each step with the images done so far, those under way in part, and the step's number.

        Raises:
            ValueError: for no prompts, another number of anything else than of prompts, a size that the networks can't
                draw, a picture of another size, or what the model is not told.
        """
        if not prompts:
            raise ValueError("there are no prompts to draw")
        count = len(prompts)
        scales = list(guidance) if guidance is not None else [self.card.guidance] * count
        led_away = list(negative_prompts) if negative_prompts is not None else [""] * count
        numbers = {"seeds": len(seeds), "guidance": len(scales), "negative_prompts": len(led_away)}
        given = given or Given()
        numbers |= given.counts()
        if wrong := [f"{number} {name}" for name, number in numbers.items() if number != count]:
            raise ValueError(f"as many are needed of each as there are prompts, {count}: got {', '.join(wrong)}")
        drawing = drawing or Drawing(sampler=self.card.sampler)
        check_told(self.card.conditioning, given, drawing.noise_level)
        check_strength(drawing.strength, has_picture=given.pixels is not None, has_mask=given.masks is not None)
        size = checked_size(drawing, given, self.trained_size, self.multiple)
        check_tile(drawing.tile, self.multiple)
        condition = self.condition(prompts)
        null_text = self.condition(led_away if len(set(led_away)) > 1 else led_away[:1])
        parts: list[Pixels] = []
        for start in range(0, count, batch_size):
            stop = min(start + batch_size, count)
            away = null_text if null_text.num_rows == 1 else null_text.rows(start, stop)
            begun = given.rows(start, stop)
            told = self._told(condition.rows(start, stop), begun, seeds[start:stop], size, drawing)
            denoise = self._denoiser(told, away, scales[start:stop], drawing)
            watch = None if on_step is None else partial(_tell, on_step, start, stop, drawing.num_steps)
            with steps_share(self._network(drawing)):
                latent = self._sampled(denoise, seeds[start:stop], size, drawing, begun, watch)
            parts.append(begun.kept_in(pixels_of(self._decoded(latent, drawing.tile))))
        return np.concatenate(parts)

    @property
    def max_tokens(self) -> int:
        """Tokens of a prompt that are read."""
        return self._text_encoder.max_tokens

    def is_cut(self, prompt: str) -> bool:
        """Say whether a prompt is longer than what is read of it."""
        reads = self.card.conditioning.text is not TextUse.NONE
        return reads and self._text_encoder.count_truncated([prompt]) > 0

    @property
    def trained_size(self) -> tuple[int, int]:
        """Pixel rows and columns of the training."""
        rows, columns = self.card.latent_size
        return rows * self._autoencoder.config.factor, columns * self._autoencoder.config.factor

    @property
    def multiple(self) -> int:
        """What pixel rows and columns must be multiples of."""
        return self._autoencoder.config.factor * self._shrinks

    def condition(self, prompts: Sequence[Prompt]) -> Condition:
        """Return the prompts as the denoiser sees them; between two of them lies the blend of their states.

        Raises:
            ValueError: if a blend is wanted of numbers of tokens.
        """
        one, other, shares = ends(prompts)
        return self._encoded(one) if one == other else blended(self._encoded(one), self._encoded(other), shares)

    def _encoded(self, prompts: Sequence[str]) -> Condition:
        encoder = self._text_encoder
        match self.card.conditioning.text:
            case TextUse.FROZEN:
                # Each alone: in a batch of several, its neighbours' number would decide its last bits.
                encode = partial(encoder.encode_tokens, batch_size=1)
                told = embedded_condition(encoder.token_ids(list(prompts)), encode, encoder.max_tokens)
            case TextUse.TRAINED:
                told = numbered_condition(encoder.token_ids(list(prompts)), encoder.max_tokens)
            case TextUse.NONE:
                told = Condition()
        return told.to(self.device, torch.float32)

    @torch.no_grad()
    def images(
        self, condition: Condition, seeds: Sequence[Seed], scales: Sequence[float], sampler: SamplerConfig
    ) -> Image:
        """Return one batch of images, shape (b, 3, y, x), about in [-1, 1]."""
        latent = self.latents(condition, seeds, scales, sampler)
        return self._decoded(latent)

    @torch.no_grad()
    def latents(
        self, condition: Condition, seeds: Sequence[Seed], scales: Sequence[float], sampler: SamplerConfig
    ) -> Latent:
        """Return one batch of scaled latents, shape (b, c, h, w)."""
        size = self.card.latent_size if condition.spatial is None else condition.spatial.shape[-2:]
        shape = (self.card.space.num_channels, int(size[0]), int(size[1]))
        denoise = self._denoiser(condition, self.condition([""]), scales, Drawing(sampler=sampler))
        noise, draw_noise = seeded_noise(seeds, shape)
        with steps_share(self._unet):
            return sample(denoise, noise.to(self.device), self._schedule, sampler, draw_noise)

    @torch.no_grad()
    def _told(
        self, text: Condition, given: Given, seeds: Sequence[Seed], size: tuple[int, int], drawing: Drawing
    ) -> Condition:
        """Return what the denoiser is told of a batch: its text, and what is given beside it, as of a cache's rows."""
        config, factor, count = self.card.conditioning, self._autoencoder.config.factor, len(seeds)
        columns = given.columns(count, size)
        if config.has_masked_image and given.pixels is not None and given.masks is not None:
            hidden = torch.from_numpy(given.masks)[:, None].float()
            seen = images_of(given.pixels, torch.device("cpu")) * (1.0 - hidden)
            middle = factor // 2  # the nearest pixel to the middle of each latent's, as in a cache
            columns["mask"] = hidden[:, :, middle::factor, middle::factor]
            columns["masked_moments"] = self._encode(seen.to(self.device), drawing.tile).float().cpu()
        batch = LatentBatch(
            keys=("",) * count,
            samples=torch.tensor([seed % 2**63 for seed in ends(seeds)[0]]),  # int64 holds no more
            moments=torch.empty(count, 0, size[0] // factor, size[1] // factor),
            condition=text.to(torch.device("cpu"), torch.float32),
            columns=columns,
        )
        rows = RowConditions(config=config, space=self.card.space, factor=factor, seed=0)
        return rows.whole(batch, drawing.noise_level).to(self.device, torch.float32)

    def _denoiser(
        self, condition: Condition, null_text: Condition, scales: Sequence[float], drawing: Drawing
    ) -> Denoiser:
        tile = drawing.tile // self._autoencoder.config.factor
        network, dtype = self._network(drawing), drawing.precision.dtype
        condition, null_text = (each.to(self.device, dtype) for each in (condition, null_text))
        return guided_denoiser(
            tiled_network(network, tile) if tile else network,
            self._schedule,
            self.card.prediction,
            condition,
            null_condition(self.card.conditioning, condition, null_text),
            torch.tensor(scales, device=self.device),
            drawing.form,
        )

    def _network(self, drawing: Drawing) -> Network:
        return self._forms.of(drawing.precision, is_compiled=drawing.is_compiled)

    @torch.no_grad()
    def _sampled(
        self,
        denoise: Denoiser,
        seeds: Sequence[Seed],
        size: tuple[int, int],
        drawing: Drawing,
        given: Given,
        on_step: OnStep | None,
    ) -> Latent:
        factor = self._autoencoder.config.factor
        shape = (self.card.space.num_channels, size[0] // factor, size[1] // factor)
        drawn, draw_noise = seeded_noise(seeds, shape)
        noise = drawn.to(self.device)
        is_told_masks = self.card.conditioning.has_masked_image  # and knows by itself what is to stay
        if given.pixels is None or (is_told_masks and drawing.strength == 1):
            return sample(denoise, noise, self._schedule, drawing.sampler, draw_noise, on_step)
        clean = self.card.space.scaled_mode(self._encode(images_of(given.pixels, self.device), drawing.tile))
        mask = None
        if given.masks is not None and not is_told_masks:
            mask = latent_mask(torch.from_numpy(given.masks).to(self.device), factor)
        start = Start(clean, mask)
        return sample_from(
            denoise, start, noise, self._schedule, drawing.sampler, drawing.strength, draw_noise, on_step
        )

    def _encode(self, images: Image, tile: int) -> Moments:
        if not tile:
            return self._autoencoder.encode(images)
        return tiled_encode(self._autoencoder, images, tile=tile, overlap=self._overlap(tile))

    @torch.no_grad()
    def _decoded(self, latent: Latent, tile: int = 0) -> Image:
        raw = self.card.space.unscaled(latent)
        if not tile:
            return self._autoencoder.decode(raw)
        return tiled_decode(self._autoencoder, raw, tile=tile, overlap=self._overlap(tile))

    def _overlap(self, tile: int) -> int:
        """Return how many pixels neighbouring tiles share."""
        factor = self._autoencoder.config.factor
        return max(1, tile // factor // OVERLAP_SHARE) * factor


def _tell(on_step: OnDrawn, start: int, stop: int, num_steps: int, index: int, _: Latent) -> None:
    on_step(start + (stop - start) * (index + 1) / num_steps, index + 1)


def load_text_to_image(folder: str, device: torch.device) -> TextToImage:
    """Return the model in a folder or at a URL.

    Raises:
        ValueError: if a part is missing or is not the one that the description names, showing both digests.
    """
    card = load_card(folder)
    denoiser = load_denoiser(folder, card.conditioning)
    autoencoder = load_autoencoder(storage.join(folder, AUTOENCODER_FOLDER))
    unet, conditioner = denoiser_digests(unet_config(denoiser), card.conditioning, denoiser.state_dict())
    found = {
        "unet": (card.unet_digest, unet),
        "conditioner": (card.conditioner_digest, conditioner),
        "autoencoder": (card.autoencoder_digest, weights_digest(autoencoder.state_dict(), autoencoder.config)),
        "text encoder": (card.text_digest, text_encoder_digest(card.text)),
    }
    _refuse_other_parts(found, folder)
    return TextToImage(
        unet=_ready(denoiser, device),
        autoencoder=_ready(autoencoder, device),
        text_encoder=TextEncoder(card.text, device),
        card=card,
        device=device,
        shrinks=2 ** (len(unet_config(denoiser).channel_mult) - 1),
    )


def _ready(part: Part, device: torch.device) -> Part:
    """Return a network as it draws, its convolutions' channels side by side: faster by `tests.benchmarks.sample`."""
    return part.to(memory_format=torch.channels_last).to(device).eval().requires_grad_(False)


def _refuse_other_parts(found: Mapping[str, tuple[str, str]], folder: str) -> None:
    for part, (named, there) in found.items():
        if named != there:
            raise ValueError(f"{folder} names {part} {named}, but what is there has digest {there}")
