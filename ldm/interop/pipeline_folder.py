"""A trained text-to-image model as a folder that diffusers' `StableDiffusionPipeline.from_pretrained` loads.

    folder/   model_index.json, unet/, vae/, text_encoder/, tokenizer/, scheduler/

A model that is told masks becomes a `StableDiffusionInpaintPipeline`: what lies beside the latent comes in one order
in both. That one draws the masked image's latent from its posterior, ours is the mode; and it takes a mask's pixel in
the corner of each latent's, ours in the middle: masks whose borders are those of latents are the same in both.

Those pipelines know one number between raw and scaled latents, ours are a mean and a standard deviation for each
channel. Both are linear, and so are the 1x1 convolutions on either side of the raw latents: where one number will not
do, ours go into them.

    decode  post_quant_conv(std z + mean)        encode  (mean(x) - mean) / std, log var(x) - 2 log std
"""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import torch

from ldm import storage
from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.regularizer import LatentKind
from ldm.conditioning.conditioner import TextUse
from ldm.conditioning.text import TextEncoderKind, encoder_folder
from ldm.conditioning.text_files import CONFIG_FILE, TOKENIZER_FILES, weight_files
from ldm.diffusion.schedule import ScheduleKind
from ldm.interop.diffusers import CONFIG_NAME, load_autoencoder, save_autoencoder
from ldm.interop.diffusers_scheduler import PREDICTIONS, scheduler_facts
from ldm.latents import LatentSpace
from ldm.model_card import AUTOENCODER_FOLDER, ModelCard, load_card
from ldm.text_to_image import load_text_to_image

INDEX_FILE = "model_index.json"
LAYOUT_VERSION = "0.36.0"
"""The release whose layout this is; the inpainting pipeline does not load without one."""
CLASS, INPAINTING_CLASS = "StableDiffusionPipeline", "StableDiffusionInpaintPipeline"
INPAINTING_CHANNELS = 4
"""Of the latents, with which alone that class looks at what lies beside them."""
PARTS = {
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "scheduler": ["diffusers", "DDIMScheduler"],
}
ABSENT = ("safety_checker", "feature_extractor", "image_encoder")
"""What those pipelines may have besides, and ours have not."""
UNET = "unet"


def check_exportable(card: ModelCard) -> None:
    """Refuse a model that no such pipeline can be.

    Raises:
        ValueError: naming what it is told, made of or trained with that those pipelines do not know.
    """
    is_inpainting, channels = card.conditioning.has_masked_image, card.space.num_channels
    lacks = {
        "its text encoder is not CLIP's text tower": card.text.kind is not TextEncoderKind.CLIP,
        "it is told more than a frozen text encoder's states and a masked image": not (
            replace(card.conditioning, has_masked_image=False).is_text_only and card.conditioning.text is TextUse.FROZEN
        ),
        f"it inpaints latents of {channels} channels, not {INPAINTING_CHANNELS}": is_inpainting
        and channels != INPAINTING_CHANNELS,
        "its latents are a codebook's": card.latent_kind is not LatentKind.KL_MOMENTS,
        f"its schedule is {card.schedule.kind.value}": card.schedule.kind in (ScheduleKind.EDM, ScheduleKind.FLOW),
        f"it predicts {card.prediction.value}": card.prediction not in PREDICTIONS,
        f"its text encoder is read at layer {card.text.read_layer}": card.text.read_layer != -1,
    }
    if found := [reason for reason, holds in lacks.items() if holds]:
        raise ValueError(f"{pipeline_class(card)} can't be this model: {'; '.join(found)}")


def pipeline_class(card: ModelCard) -> str:
    """Return the name of the pipeline that a model becomes."""
    return INPAINTING_CLASS if card.conditioning.has_masked_image else CLASS


def export_pipeline(model: str, target: str) -> str:
    """Write the pipeline's folder, and return the name of its class; what lies there under the same names is replaced.

    Args:
        model: folder or URL of a finished model.
        target: folder or URL to write to.

    Raises:
        ValueError: if no such pipeline can be the model (see `check_exportable`), a part of it is not the one that it
            names, or the folder is the model's own.
    """
    if storage.is_same_place(target, model):
        raise ValueError(f"{target} holds the model itself: give the pipeline a folder of its own")
    card = load_card(model)
    check_exportable(card)
    load_text_to_image(model, torch.device("cpu"))  # refuses parts that are not the trained ones
    storage.remove_file(storage.join(target, INDEX_FILE))  # it makes the folder whole, and comes back last
    _copy_unet(model, target, card)
    vae = storage.join(target, AUTOENCODER_FOLDER)
    autoencoder, scale = load_autoencoder(storage.join(model, AUTOENCODER_FOLDER)), one_scale(card.space)
    save_autoencoder(autoencoder if scale else folded(autoencoder, card.space), vae)
    sides = [side * autoencoder.config.factor for side in card.latent_size]
    _add_facts(vae, {"scaling_factor": scale or 1.0, "sample_size": max(sides)})
    _copy_text(card, target)
    facts = scheduler_facts(card.schedule, card.prediction, card.sampler.grid)
    scheduler = {"_class_name": "DDIMScheduler", **facts}
    storage.write_text(storage.join(target, "scheduler", "scheduler_config.json"), json.dumps(scheduler, indent=2))
    storage.write_text(storage.join(target, INDEX_FILE), json.dumps(_index(pipeline_class(card)), indent=2))
    return pipeline_class(card)


def one_scale(space: LatentSpace) -> float:
    """Return the number that is the whole way from raw to scaled latents; 0 where one is not enough."""
    is_one = not any(space.mean) and len(set(space.std)) == 1
    return 1 / space.std[0] if is_one else 0.0


def folded(autoencoder: Autoencoder, space: LatentSpace) -> Autoencoder:
    """Return an autoencoder whose raw latents are another's scaled ones."""
    made = copy.deepcopy(autoencoder)
    mean, std = (torch.tensor(numbers, dtype=torch.float64) for numbers in (space.mean, space.std))
    into, out = made.post_quant_conv, made.quant_conv
    assert into.bias is not None
    assert out.bias is not None
    with torch.no_grad():
        weight = into.weight.double()
        into.bias.copy_(into.bias.double() + torch.einsum("oiyx,i->o", weight, mean))
        into.weight.copy_(weight * std[None, :, None, None])
        scale = torch.cat([std, torch.ones_like(std)])
        shift = torch.cat([mean / std, 2 * std.log()])
        out.weight.copy_(out.weight.double() / scale[:, None, None, None])
        out.bias.copy_(out.bias.double() / scale - shift)
    return made


def _copy_unet(model: str, target: str, card: ModelCard) -> None:
    place = storage.join(target, UNET)
    for name in storage.list_files(storage.join(model, UNET)):
        storage.copy_file(storage.join(model, UNET, name), storage.join(place, name))
    rows, columns = card.latent_size
    _add_facts(place, {"sample_size": rows if rows == columns else [rows, columns]})


def _copy_text(card: ModelCard, target: str) -> None:
    source = encoder_folder(card.text)
    weights = weight_files(source)
    if pickles := [path.name for path in weights if path.suffix != ".safetensors"]:
        raise ValueError(f"{source} holds pickles, {', '.join(pickles)}: save it with safetensors first")
    for path in (source / CONFIG_FILE, *weights):
        storage.copy_file(str(path), storage.join(target, "text_encoder", path.name))
    for name in TOKENIZER_FILES:
        if (source / name).exists():
            storage.copy_file(str(source / name), storage.join(target, "tokenizer", name))
    _add_facts(storage.join(target, "tokenizer"), {"model_max_length": card.text.max_tokens}, "tokenizer_config.json")


def _add_facts(folder: str, facts: dict[str, Any], name: str = CONFIG_NAME) -> None:
    path = storage.join(folder, name)
    known = json.loads(storage.read_text(path)) if storage.exists(path) else {}
    storage.write_text(path, json.dumps({**known, **facts}, indent=2, sort_keys=True) + "\n")


def _index(name: str) -> dict[str, Any]:
    absent = {part: [None, None] for part in ABSENT}
    return {
        "_class_name": name,
        "_diffusers_version": LAYOUT_VERSION,
        **PARTS,
        **absent,
        "requires_safety_checker": False,
    }
