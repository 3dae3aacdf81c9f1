"""A folder of diffusers' `StableDiffusionPipeline` as a model of ours, to draw with and to train on.

    folder/   model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/
    target/   model.json, unet/, vae/, text/ (encoder and tokenizer, which model.json names by path)

Order: address → folder → every part read and checked → target. Weights become float32; those of a variant (`fp16`) are
read where there are no others, and so are several files that an index names. Pickles are not read. A UNet with a mask
and a masked image's latent beside its own, as `StableDiffusionInpaintPipeline` has it, hears them in our order already.

    scaled = scaling_factor raw        is a latent space of mean 0 and deviation 1 / scaling_factor
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ldm import storage
from ldm.autoencoder.model import Autoencoder
from ldm.conditioning.conditioner import MASK_CHANNELS, ConditioningConfig
from ldm.conditioning.text import TextEncoder, TextEncoderConfig, TextEncoderKind, text_encoder_digest
from ldm.conditioning.text_files import CONFIG_FILE, TOKENIZER_FILES
from ldm.denoiser import check_denoiser, denoiser_digests, save_denoiser
from ldm.hub import HUB_SCHEME, HubName, NotAtTheHubError, fetched, hub_name, may_be_at_the_hub
from ldm.interop.diffusers import (
    CONFIG_NAME,
    WEIGHTS_STEM,
    load_autoencoder,
    load_unet,
    save_autoencoder,
    weights_digest,
)
from ldm.interop.diffusers_scheduler import Noising, noising_of
from ldm.interop.pipeline_folder import ABSENT, CLASS, INDEX_FILE, INPAINTING_CLASS, PARTS
from ldm.interop.weights import VARIANTS, load_weights, safetensors_files, save_weights
from ldm.model_card import AUTOENCODER_FOLDER, MODEL_FILE, ModelCard, save_card
from ldm.unet.model import UNet

CLASSES = (CLASS, "StableDiffusionImg2ImgPipeline", INPAINTING_CLASS)
"""Pipelines of the same parts."""
TEXT_FOLDER = "text"
GUIDANCE = 7.5
"""Those pipelines' own scale; their 50 steps are our samplers' too."""
SCALING_FACTOR = 0.18215
"""Where a file of before 2023 says none."""
_TEXT_STEM = "model"
_STEMS = {"unet": WEIGHTS_STEM, "vae": WEIGHTS_STEM, "text_encoder": _TEXT_STEM}
_OTHER_NAMES = {"CLIPTokenizerFast": "CLIPTokenizer"}
_MOVED = ("shift_factor", "latents_mean", "latents_std")
_POSITIONS = 77
"""Of CLIP, where a file does not say how many."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What an import made.

    Attributes:
        card: of the model.
        notices: a sentence for everything in which its drawings differ from the pipeline's by default.
    """

    card: ModelCard
    notices: tuple[str, ...]


def import_pipeline(where: str, target: str, image_size: int = 0) -> Imported:
    """Write the model's folder; what lies there under the same names is replaced.

    Args:
        where: folder, URL that files can be listed at, or name at the hub, `org/name[@revision][/inside]`.
        target: local folder to write to: text encoders are read from local folders.
        image_size: pixels of a side that are drawn if nothing else is said; 0 is what the UNet's file says.

    Raises:
        ValueError: if there is no such folder, or a part of it is what ours can't be, by name; nothing is written then.
    """
    folder = find_pipeline(where)
    if not storage.is_local(target):
        raise ValueError(f"a model's text encoder is read from a local folder: the target must be one, got {target}")
    if storage.is_same_place(target, folder):
        raise ValueError(f"{target} holds the pipeline itself: give the model a folder of its own")
    _check_index(folder)
    noising = noising_of(_facts(storage.join(folder, "scheduler", "scheduler_config.json")), f"{folder}/scheduler")
    unet = load_unet(storage.join(folder, "unet"))
    autoencoder = load_autoencoder(storage.join(folder, AUTOENCODER_FOLDER))
    deviation = _deviation(storage.join(folder, AUTOENCODER_FOLDER))
    size = _latent_size(folder, autoencoder, image_size, unet.config.factor)
    with tempfile.TemporaryDirectory() as staged:
        max_tokens = _stage_text(folder, Path(staged))
        text = TextEncoderConfig(kind=TextEncoderKind.CLIP, path=staged, max_tokens=max_tokens)
        conditioning = _conditioning(folder, unet, autoencoder, TextEncoder(text, torch.device("cpu")).width)
        digests = _write_networks(unet, autoencoder, conditioning, target)
        for path in sorted(Path(staged).iterdir()):
            storage.copy_file(str(path), storage.join(target, TEXT_FOLDER, path.name))
    text = TextEncoderConfig(kind=TextEncoderKind.CLIP, path=storage.join(target, TEXT_FOLDER), max_tokens=max_tokens)
    card = ModelCard(
        unet_digest=digests[0],
        autoencoder_digest=digests[1],
        text=text,
        text_digest=text_encoder_digest(text),
        schedule=noising.schedule,
        prediction=noising.prediction,
        latent_mean=(0.0,) * autoencoder.config.latent_channels,
        latent_std=(deviation,) * autoencoder.config.latent_channels,
        latent_size=size,
        sampler=noising.sampler,
        guidance=GUIDANCE,
        conditioning=conditioning,
        lineage={"imported_from": where, "autoencoder_digest": digests[1]},
    )
    save_card(card, target)
    return Imported(card=card, notices=_notices(folder, noising, conditioning))


def find_pipeline(where: str) -> str:
    """Return the folder or URL of a pipeline; from the hub it is fetched.

    Raises:
        ValueError: if there is none.
    """
    if where.startswith(HUB_SCHEME) or ("://" not in where and not storage.exists(where) and may_be_at_the_hub(where)):
        try:
            folder = _at_the_hub(hub_name(where.removeprefix(HUB_SCHEME)))
        except NotAtTheHubError as error:
            raise ValueError(f"there is no pipeline at {where}: no such folder here, and {error}") from error
    else:
        folder = where.rstrip("/")
    if not storage.exists(storage.join(folder, INDEX_FILE)):
        raise ValueError(f"there is no pipeline at {where}: it has no {INDEX_FILE}")
    return folder


def _at_the_hub(name: HubName) -> str:
    """Fetch what is needed of a repository: whole weights, and those of variants where there are no others."""
    inside = f"{name.inside}/" if name.inside else ""
    small = ("model_index.json", "*/*.json", "tokenizer/merges.txt")
    files = [f"{inside}{each}" for each in small]
    for variant in VARIANTS:
        dotted = f".{variant}" if variant else ""
        ends = (dotted, f"-?????-of-?????{dotted}", f"{dotted}-?????-of-?????")
        weights = [f"{inside}{part}/{stem}{end}.safetensors" for part, stem in _STEMS.items() for end in ends]
        folder = Path(fetched(name, [*files, *weights]), name.inside)
        if all(safetensors_files(str(folder / part), stem) for part, stem in _STEMS.items()):
            break
    return str(folder)


def _check_index(folder: str) -> None:
    """Refuse a pipeline of other parts, or one whose weights are no safetensors."""
    index = _facts(storage.join(folder, INDEX_FILE))
    name = index.get("_class_name")
    if name not in CLASSES:
        raise ValueError(f"{folder} must hold a {' or '.join(CLASSES)}, got {name}")
    classes = {part: entry[1] for part, entry in index.items() if isinstance(entry, list) and entry and entry[-1]}
    for part, (_, expected) in PARTS.items():
        found = classes.pop(part, None)
        # A scheduler is judged by its own file.
        if part != "scheduler" and _OTHER_NAMES.get(found, found) != expected:
            raise ValueError(f"{folder}: {part} must be a {expected}, got {found}")
    if others := sorted(classes.keys() - set(ABSENT)):
        raise ValueError(f"{folder} has parts that a {name} has not: {', '.join(others)}")
    for part, stem in _STEMS.items():
        place = storage.join(folder, part)
        _facts(storage.join(place, CONFIG_NAME))
        if not safetensors_files(place, stem):
            there = ", ".join(storage.list_names(place)) or "nothing"
            raise ValueError(
                f"{place} has no weights as safetensors: expected {stem}.safetensors, got {there}; load and save the "
                "pipeline with safe_serialization once"
            )


def _deviation(folder: str) -> float:
    """Return the raw latents' standard deviation that a file implies.

    Raises:
        ValueError: if its latents are also moved, which these pipelines never do.
    """
    facts = _facts(storage.join(folder, CONFIG_NAME))
    if moved := [name for name in _MOVED if facts.get(name)]:
        raise ValueError(
            f"{folder}: {' and '.join(moved)} must be absent, since {CLASS} does not look at it and draws without, "
            f"got {facts[moved[0]]!r}"
        )
    factor = facts.get("scaling_factor", SCALING_FACTOR)
    if not isinstance(factor, int | float) or factor <= 0:
        raise ValueError(f"{folder}: scaling_factor must be a positive number, got {factor!r}")
    return 1 / factor


def _latent_size(folder: str, autoencoder: Autoencoder, image_size: int, shrinks: int) -> tuple[int, int]:
    factor = autoencoder.config.factor
    if image_size < 0 or image_size % (factor * shrinks):
        raise ValueError(f"image_size must be a multiple of {factor * shrinks}, or 0, got {image_size}")
    if image_size:
        return image_size // factor, image_size // factor
    said = _facts(storage.join(folder, "unet", CONFIG_NAME)).get("sample_size")
    match said:
        case int():
            return said, said
        case [int() as rows, int() as columns]:
            return rows, columns
    raise ValueError(f"{folder}/unet/{CONFIG_NAME} says no sample_size: give the pixels of a side, image_size")


def _conditioning(folder: str, unet: UNet, autoencoder: Autoencoder, text_width: int) -> ConditioningConfig:
    """Return what the denoiser is told, which its number of input channels says.

    Raises:
        ValueError: if its channels or widths are those of neither a text's nor a masked image's denoiser.
    """
    channels = autoencoder.config.latent_channels
    conditioning = ConditioningConfig(has_masked_image=unet.config.in_channels == 2 * channels + MASK_CHANNELS)
    try:
        check_denoiser(unet.config, conditioning, latent_channels=channels, text_width=text_width, pooled_width=None)
    except ValueError as error:
        raise ValueError(f"{folder}/unet: {error}") from error
    return conditioning


def _stage_text(folder: str, staged: Path) -> int:
    """Put encoder and tokenizer into one local folder, and return how many tokens a prompt has.

    Raises:
        ValueError: if the encoder is another than CLIP's text tower, as those pipelines use it.
    """
    place = storage.join(folder, "text_encoder")
    facts = _facts(storage.join(place, CONFIG_FILE))
    if facts.get("use_attention_mask"):
        raise ValueError(f"{place}: use_attention_mask must be off, since our CLIP attends to padding, got True")
    (staged / CONFIG_FILE).write_text(json.dumps(facts, indent=2, sort_keys=True) + "\n")
    save_weights(_text_weights(place), str(staged / f"{_TEXT_STEM}.safetensors"))
    tokenizer = storage.join(folder, "tokenizer")
    for name in TOKENIZER_FILES:
        if storage.exists(storage.join(tokenizer, name)):
            storage.copy_file(storage.join(tokenizer, name), str(staged / name))
    positions = int(facts.get("max_position_embeddings", _POSITIONS))
    said = storage.join(tokenizer, "tokenizer_config.json")
    longest = _facts(said).get("model_max_length", positions) if storage.exists(said) else positions
    return min(int(longest), positions)


def _text_weights(place: str) -> dict[str, Tensor]:
    weights: dict[str, Tensor] = {}
    for path in safetensors_files(place, _TEXT_STEM):
        weights |= load_weights(path)
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}


def _write_networks(
    unet: UNet, autoencoder: Autoencoder, conditioning: ConditioningConfig, target: str
) -> tuple[str, str]:
    """Write both networks and return their digests."""
    storage.remove_file(storage.join(target, MODEL_FILE))  # it makes the folder whole, and comes back last
    weights = unet.state_dict()
    save_denoiser(unet.config, conditioning, weights, target)
    save_autoencoder(autoencoder, storage.join(target, AUTOENCODER_FOLDER))
    unet_digest, _ = denoiser_digests(unet.config, conditioning, weights)
    return unet_digest, weights_digest(autoencoder.state_dict(), autoencoder.config)


def _notices(folder: str, noising: Noising, conditioning: ConditioningConfig) -> tuple[str, ...]:
    index = _facts(storage.join(folder, INDEX_FILE))
    has_checker = bool((index.get(ABSENT[0]) or [None])[0])
    found = ["the safety checker is left out: nothing looks at what is drawn"] if has_checker else []
    if conditioning.has_masked_image:
        found.append("a masked image's latent is its posterior's mode, and there a draw from it")
    return (*found, *noising.notices)


def _facts(path: str) -> dict[str, Any]:
    if not storage.exists(path):
        raise ValueError(f"{path} is missing")
    try:
        facts = json.loads(storage.read_text(path))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from error
    if not isinstance(facts, dict):
        raise ValueError(f"{path} must hold a mapping, got {type(facts).__name__}")
    return facts
