"""Which jobs the demo runs, and with which autoencoder."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from jobs.recipes import emoji
from ldm.first_stage import evaluation_of


class Stage1(StrEnum):
    """Where the autoencoder comes from."""

    SHIPPED = "shipped"
    """It is the one that comes with the project."""
    TRAIN = "train"
    """It is trained, on the same drawings; some minutes more."""


@dataclass(frozen=True)
class Stage:
    """One job of the demo.

    Attributes:
        job: its name.
        place: what it makes, inside the home.
        words: what it is told beside recipe and home.
    """

    job: str
    place: str
    words: tuple[str, ...] = ()


def stages(home: str, stage1: Stage1) -> list[Stage]:
    """Return the jobs in their order."""
    own = emoji.train_autoencoder(home).model_folder
    words = ("--autoencoder", own) if stage1 is Stage1.TRAIN else ()
    stage1_jobs = [Stage("train_autoencoder", "autoencoder/model")] if stage1 is Stage1.TRAIN else []
    return [
        Stage("shard_dataset", "dataset"),
        *stage1_jobs,
        Stage("precompute_latents", "latents", words),
        Stage("train_ldm", "ldm/model", words),
        Stage("evaluate", "ldm/evaluation.json"),
        Stage("sample", "samples"),
    ]


def announcement(stage1: Stage1) -> str:
    """Say which autoencoder the pictures will be encoded with."""
    if stage1 is Stage1.TRAIN:
        return "stage 1: an autoencoder is trained on these drawings"
    psnr = (evaluation_of(emoji.AUTOENCODER) or {})["validation_psnr_db"]
    return (
        f"stage 1: the autoencoder {emoji.AUTOENCODER} comes with the project ({psnr:.1f} dB on held-out pictures); "
        "--stage1 train trains one here"
    )
