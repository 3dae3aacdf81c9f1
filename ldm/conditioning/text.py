"""Token states and pooled output of a frozen text encoder (Rombach et al. 2022, section 3.3; Podell et al. 2023, 2.1).

Order: folder of weights → tokens → captions grouped by equal length → hidden states of one layer → fp16 rows, unpadded.
An encoder has one tower or, as in SDXL, two: their states lie side by side, and the last one's pooled output counts.

Letters: b batch, l token, d embedding width, p width of the pooled output.
"""

from __future__ import annotations

import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from jaxtyping import Float, Float16, Int, Int32
from torch import Tensor
from transformers.utils import logging as untyped_logging

from ldm.conditioning.text_embedding import TextEmbedding
from ldm.conditioning.text_files import (
    PICKLE_PATTERNS,
    SAFETENSORS_PATTERNS,
    TowerKind,
    TowerPlace,
    files_digest,
    local_folder,
    weight_files,
)
from ldm.config import Config, added_later
from ldm.types import TextMask

transformers_logging: Any = untyped_logging

LAST_LAYER = -1
IN_THE_FOLDER = TowerPlace()
SDXL_PLACES = (
    TowerPlace(model="text_encoder", tokenizer="tokenizer"),
    TowerPlace(model="text_encoder_2", tokenizer="tokenizer_2"),
)


class TextEncoderKind(StrEnum):
    """Which family of frozen text encoders."""

    MINILM = "minilm"
    """all-MiniLM-L6-v2 as it ships in a package: 22.7 M parameters, width 384, no download."""
    BERT = "bert"
    """Any BERT-like encoder of the hub's layout; padding is masked, so it is never stored."""
    CLIP = "clip"
    """CLIP's text tower; its padding is attended, as in Stable Diffusion, so it is stored; pooled is its end token."""
    T5 = "t5"
    """T5's encoder, also of a whole T5; padding is masked, so it is never stored, and any length has positions."""
    CLIP_PROJECTION = "clip_projection"
    """CLIP's text tower with its projection, as OpenCLIP bigG in SDXL; pooled is the projected end token."""
    SDXL = "sdxl"
    """CLIP-L and OpenCLIP bigG side by side, in the layout of diffusers: text_encoder, text_encoder_2, tokenizers."""

    @property
    def towers(self) -> tuple[tuple[TowerKind, TowerPlace], ...]:
        """What the encoder is made of, and where that lies in its folder."""
        match self:
            case TextEncoderKind.MINILM | TextEncoderKind.BERT:
                return ((TowerKind.BERT, IN_THE_FOLDER),)
            case TextEncoderKind.T5:
                return ((TowerKind.T5, IN_THE_FOLDER),)
            case TextEncoderKind.CLIP:
                return ((TowerKind.CLIP, IN_THE_FOLDER),)
            case TextEncoderKind.CLIP_PROJECTION:
                return ((TowerKind.CLIP_PROJECTION, IN_THE_FOLDER),)
            case TextEncoderKind.SDXL:
                return ((TowerKind.CLIP, SDXL_PLACES[0]), (TowerKind.CLIP_PROJECTION, SDXL_PLACES[1]))

    @property
    def own_layer(self) -> int:
        """The layer that is read where none is named."""
        return -2 if self is TextEncoderKind.SDXL else LAST_LAYER

    @property
    def has_attended_pads(self) -> bool:
        """Whether every embedding is stored with its padding, `max_tokens` rows long."""
        return any(tower.has_attended_pads for tower, _ in self.towers)

    @property
    def pooled_output(self) -> str | None:
        """Transformers' name of the pooled output, if the encoder has one."""
        match self.towers[-1][0]:
            case TowerKind.BERT | TowerKind.T5:
                return None
            case TowerKind.CLIP:
                return "pooler_output"
            case TowerKind.CLIP_PROJECTION:
                return "text_embeds"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig(Config):
    """Which text encoder, and how many tokens of a caption it may see."""

    kind: TextEncoderKind = TextEncoderKind.MINILM
    """Family of the encoder."""
    path: str = ""
    """Folder or hub name of weights and tokenizer; empty is the packaged MiniLM."""
    max_tokens: int = 77
    """Longest caption in tokens, special ones included; longer captions are truncated."""
    layer: int | None = added_later(None)
    """Hidden layer that is read: -1 the last with its final norm, -2 the last but one; none is -2 for sdxl, else -1."""

    def __post_init__(self) -> None:
        if self.max_tokens < 2:
            raise ValueError(f"max_tokens must leave room for the start and end tokens (2), got {self.max_tokens}")
        if self.kind is not TextEncoderKind.MINILM and not self.path:
            raise ValueError(f"a text encoder of kind {self.kind.value!r} needs a path: a folder or a hub name")

    @property
    def read_layer(self) -> int:
        """The hidden layer that is read."""
        return self.kind.own_layer if self.layer is None else self.layer


class TowerOutput(NamedTuple):
    """What one tower makes of a batch, in float32: states (b, l, d) and pooled output (b, p), if it has one."""

    states: Float[Tensor, "b l d"]
    pooled: Float[Tensor, "b p"] | None


class TextTower:
    """One tokenizer and one frozen transformer, in float32.

    Args:
        kind: family of the transformer.
        folder: the encoder's folder.
        place: where the tower's files lie in it.
        config: layer and number of tokens.
        device: where the transformer lies.

    Attributes:
        width: width d of its states.
        pooled_width: width p of its pooled output, if it has one.

    Raises:
        ValueError: if files or weights are missing, or the transformer lacks the positions or the layer asked for.
    """

    def __init__(
        self, kind: TowerKind, folder: Path, place: TowerPlace, config: TextEncoderConfig, device: torch.device
    ) -> None:
        self._kind, self._layer, self._max_tokens, self._device = kind, config.read_layer, config.max_tokens, device
        self._tokenizer = _load_tokenizer(kind, folder / place.tokenizer)
        self._model = _load_model(kind, folder / place.model)
        self._check_layer(folder / place.model)
        self._check_positions(folder / place.model)
        self._model.requires_grad_(False).eval().to(device)
        self.width = int(self._model.config.hidden_size)
        self.pooled_width = self._pooled_width()

    def tokens(self, captions: Sequence[str]) -> list[list[int]]:
        """Return each caption's token numbers, truncated; padded to `max_tokens` only where padding is attended."""
        if not captions:
            return []
        padding = "max_length" if self._kind.has_attended_pads else "do_not_pad"
        encoding = self._tokenizer(list(captions), truncation=True, max_length=self._max_tokens, padding=padding)
        tokens: list[list[int]] = encoding["input_ids"]
        return tokens

    def truncated(self, captions: Sequence[str]) -> list[bool]:
        """Return which captions lose tokens to `max_tokens`."""
        if not captions:
            return []
        tokens = self._tokenizer(list(captions), truncation=False, verbose=False)["input_ids"]
        return [len(row) > self._max_tokens for row in tokens]

    def output(self, tokens: Int[Tensor, "b l"], mask: TextMask | None = None) -> TowerOutput:
        """Return what the transformer makes of token numbers; `mask` hides padding where it is not attended."""
        attention_mask = None if mask is None else mask.to(self._device)
        is_last = self._layer == LAST_LAYER
        with torch.inference_mode():
            output = self._model(
                input_ids=tokens.to(self._device), attention_mask=attention_mask, output_hidden_states=not is_last
            )
        states: Tensor = output.last_hidden_state if is_last else output.hidden_states[self._layer]
        match self._kind:
            case TowerKind.BERT | TowerKind.T5:
                return TowerOutput(states.float(), None)
            case TowerKind.CLIP:
                return TowerOutput(states.float(), output.pooler_output.float())
            case TowerKind.CLIP_PROJECTION:
                return TowerOutput(states.float(), output.text_embeds.float())

    def _pooled_width(self) -> int | None:
        match self._kind:
            case TowerKind.BERT | TowerKind.T5:
                return None
            case TowerKind.CLIP:
                return self.width
            case TowerKind.CLIP_PROJECTION:
                return int(self._model.config.projection_dim)

    def _check_layer(self, folder: Path) -> None:
        num_layers = int(self._model.config.num_hidden_layers)
        if not -num_layers - 1 <= self._layer <= num_layers:
            raise ValueError(
                f"layer is {self._layer}, the encoder in {folder} has the layers {-num_layers - 1} to {num_layers}"
            )

    def _check_positions(self, folder: Path) -> None:
        if self._kind is TowerKind.T5:  # its positions are relative, so there are always enough
            return
        num_positions = int(self._model.config.max_position_embeddings)
        if self._max_tokens > num_positions:
            raise ValueError(f"max_tokens is {self._max_tokens}, the encoder in {folder} has {num_positions} positions")


class TextEncoder:
    """A frozen text encoder in float32.

    Attributes:
        towers: its transformers; the last one gives the pooled output.
        width: embedding width d, of all towers together.
        pooled_width: width p of the pooled output, if the encoder has one.
        max_tokens: the most rows an embedding can have.
        digest: sha256 over the encoder's kind, layer, weights, config and tokenizer files.
    """

    def __init__(self, config: TextEncoderConfig, device: torch.device) -> None:
        """Load tokenizers and weights from a folder, the package, or the hub.

        Raises:
            ValueError: if files or weights are missing, or a tower lacks the positions or the layer asked for.
        """
        folder = encoder_folder(config)
        with _quiet():
            self.towers = tuple(TextTower(kind, folder, place, config, device) for kind, place in config.kind.towers)
        self.width = sum(tower.width for tower in self.towers)
        self.pooled_width = self.towers[-1].pooled_width
        self.max_tokens = config.max_tokens
        self.digest = text_encoder_digest(config)

    def encode(self, captions: Sequence[str], batch_size: int = 64) -> list[TextEmbedding]:
        """Return one embedding a caption, in the caller's order; the same list gives the same bytes.

        Raises:
            ValueError: if an embedding is not finite in fp16.
        """
        return self.encode_tokens(self.token_ids(captions), batch_size)

    def encode_tokens(
        self, tokens: Sequence[Int32[np.ndarray, "l towers"]], batch_size: int = 64
    ) -> list[TextEmbedding]:
        """Return one embedding for each caption that `token_ids` gave, as `encode` does."""
        encoded: dict[int, TextEmbedding] = {}
        for rows, embeddings in self.parts_of_tokens(tokens, batch_size):
            encoded.update(zip(rows, embeddings, strict=True))
        return [encoded[row] for row in range(len(tokens))]

    def token_ids(self, captions: Sequence[str]) -> list[Int32[np.ndarray, "l towers"]]:
        """Return what each tower's tokenizer makes of the captions, side by side: as long as their embeddings.

        Raises:
            ValueError: if the towers make different numbers of tokens of a caption.
        """
        rows = list(zip(*(tower.tokens(captions) for tower in self.towers), strict=True))
        for caption, row in zip(captions, rows, strict=True):
            if len({len(tokens) for tokens in row}) > 1:
                raise ValueError(f"the towers make {[len(tokens) for tokens in row]} tokens of the caption {caption!r}")
        return [np.array(row, np.int32).T for row in rows]

    def parts_of_tokens(
        self, tokens: Sequence[Int32[np.ndarray, "l towers"]], batch_size: int = 64
    ) -> Iterator[tuple[list[int], list[TextEmbedding]]]:
        """Yield numbers of captions and their embeddings, batch by batch, shortest first.

        Only captions of equal length share a forward, so nothing is padded and no row depends on its neighbours.

        Raises:
            ValueError: if an embedding is not finite in fp16.
        """
        order = sorted(range(len(tokens)), key=lambda row: (len(tokens[row]), tokens[row].T.tolist()))
        for rows in _equal_length_batches(order, [len(row) for row in tokens], batch_size):
            yield rows, self._embeddings([tokens[row] for row in rows])

    def count_truncated(self, captions: Sequence[str]) -> int:
        """Return how many captions lose tokens to `max_tokens`, in one tower or in several."""
        return sum(any(row) for row in zip(*(tower.truncated(captions) for tower in self.towers), strict=True))

    def _embeddings(self, tokens: Sequence[Int32[np.ndarray, "l towers"]]) -> list[TextEmbedding]:
        """Return embeddings of captions of equal length, given as each tower's token numbers."""
        numbers = torch.from_numpy(np.stack(tokens)).long().permute(2, 0, 1).contiguous()
        outputs = [tower.output(rows) for tower, rows in zip(self.towers, numbers, strict=True)]
        states = _stored(torch.cat([output.states for output in outputs], dim=-1))
        if outputs[-1].pooled is None:
            return [TextEmbedding(states=row) for row in states]
        pooled = _stored(outputs[-1].pooled)
        return [TextEmbedding(states=row, pooled=end) for row, end in zip(states, pooled, strict=True)]


def text_encoder_digest(config: TextEncoderConfig) -> str:
    """Return the sha256 over weights, config and tokenizer files, without loading the model.

    `max_tokens` is no part of it, and neither is where the files lie.
    """
    # MINILM and BERT are computed alike, so the packaged MiniLM and a copy of it in a folder share a digest.
    header = f"attended pads {config.kind.has_attended_pads}"
    if config.kind in (TextEncoderKind.T5, TextEncoderKind.CLIP_PROJECTION, TextEncoderKind.SDXL):
        header += f", kind {config.kind.value}"
    if config.read_layer != config.kind.own_layer:
        header += f", layer {config.read_layer}"
    return files_digest(header, encoder_folder(config), [place for _, place in config.kind.towers])


def encoder_folder(config: TextEncoderConfig) -> Path:
    """Return the local folder of the encoder, fetched from the hub (once) where `path` is a hub name."""
    return local_folder(config.path, [place for _, place in config.kind.towers])


def _equal_length_batches(order: Sequence[int], lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Yield runs of `order` whose rows have one length, at most `batch_size` long."""
    start = 0
    for stop in range(1, len(order) + 1):
        is_full = stop - start == batch_size
        if stop == len(order) or is_full or lengths[order[stop]] != lengths[order[start]]:
            yield list(order[start:stop])
            start = stop


def _stored(output: Float[Tensor, "..."]) -> Float16[np.ndarray, "..."]:
    stored = output.half()
    if not stored.isfinite().all():
        raise ValueError(
            f"a text embedding reaches {output.abs().max().item():.4g}, float16 holds {torch.finfo(torch.float16).max}"
        )
    numbers: Float16[np.ndarray, "..."] = stored.cpu().numpy()
    return numbers


def _load_tokenizer(kind: TowerKind, folder: Path) -> Any:
    # Without them, transformers goes on with a vocabulary of a few special tokens.
    if kind.vocabularies and not any((folder / name).exists() for name in kind.vocabularies):
        raise ValueError(f"the tokenizer in {folder} has no {' or '.join(kind.vocabularies)}")
    # A folder's own Python is never run.
    return transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)


def _load_model(kind: TowerKind, folder: Path) -> Any:
    match kind:
        case TowerKind.BERT:
            loader: Any = transformers.AutoModel  # attributes of transformers load when they are first read
        case TowerKind.T5:
            loader = transformers.T5EncoderModel
        case TowerKind.CLIP:
            loader = transformers.CLIPTextModel
        case TowerKind.CLIP_PROJECTION:
            loader = transformers.CLIPTextModelWithProjection
    files = weight_files(folder)
    if not files:
        raise ValueError(f"{folder} has no weights: expected {SAFETENSORS_PATTERNS[0]} or {PICKLE_PATTERNS[0]}")
    options = {
        "local_files_only": True,
        "trust_remote_code": False,
        "use_safetensors": ".safetensors" in files[0].name,
        "weights_only": True,  # of a pickle nothing but tensors is read, no code is run
        "dtype": torch.float32,
        "output_loading_info": True,
    }
    try:
        model, report = loader.from_pretrained(folder, **options)
    except pickle.UnpicklingError as error:
        raise ValueError(f"the weights in {folder} are a pickle of more than tensors, which is not run") from error
    # The pooler is not read, so a checkpoint may lack it; any other absent weight would be random.
    missing = sorted(name for name in report["missing_keys"] if not name.startswith("pooler."))
    if missing:
        raise ValueError(f"the weights in {folder} lack {', '.join(missing[:5])} ({len(missing)} in all)")
    return model


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
