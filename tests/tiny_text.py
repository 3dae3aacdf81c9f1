"""Random text encoders of a few thousand weights whose tokens are letters, in the layouts of their families."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)

from ldm.conditioning.text import TextEncoderConfig, TextEncoderKind

END = "<|endoftext|>"
LETTERS = sorted(ByteLevel.alphabet())
CLIP_TOKENS = [*LETTERS, *(f"{letter}</w>" for letter in LETTERS), "<|startoftext|>", END]
MAX_TOKENS = 16
CLIP_WIDTH = 32
BIG_WIDTH = 48
PROJECTED_WIDTH = 24
CAPTIONS = ["red heart", "", "a cat! with tears of joy, in openmoji style", "cat", "dog! face", "red heart"]


class Touch:
    """A pickle of it makes a file when it is loaded by plain pickle."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self._path}",)


def encoder_config(kind: TextEncoderKind, folder: Path, **fields: object) -> TextEncoderConfig:
    """Return the config of an encoder in a folder, of 16 tokens."""
    settings: dict[str, object] = {"kind": kind, "path": str(folder), "max_tokens": MAX_TOKENS}
    return TextEncoderConfig(**(settings | fields))  # type: ignore[arg-type]


def clip_text_config(width: int = CLIP_WIDTH, num_layers: int = 2) -> CLIPTextConfig:
    last = len(CLIP_TOKENS) - 1
    return CLIPTextConfig(
        vocab_size=len(CLIP_TOKENS),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=PROJECTED_WIDTH,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        max_position_embeddings=MAX_TOKENS,
        initializer_factor=5.0,  # tokens far apart
        bos_token_id=last - 1,
        eos_token_id=last,
        pad_token_id=last,
    )


def write_clip_tokenizer(folder: Path, pad: str = END) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary, merges = folder / "vocab.json", folder / "merges.txt"
    vocabulary.write_text(json.dumps({token: number for number, token in enumerate(CLIP_TOKENS)}))
    merges.write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(vocab=str(vocabulary), merges=str(merges), pad_token=pad, model_max_length=MAX_TOKENS)
    tokenizer.save_pretrained(folder)


def write_clip(folder: Path) -> Path:
    """Write CLIP's text tower."""
    write_clip_tokenizer(folder)
    torch.manual_seed(0)
    CLIPTextModel(clip_text_config()).save_pretrained(folder)
    return folder


def write_clip_projection(folder: Path) -> Path:
    """Write CLIP's text tower with its projection."""
    write_clip_tokenizer(folder)
    torch.manual_seed(1)
    CLIPTextModelWithProjection(clip_text_config()).save_pretrained(folder)
    return folder


def write_sdxl(folder: Path) -> Path:
    """Write a pair of towers in the layout of diffusers; the second tokenizer pads with token 0, as SDXL's does."""
    write_clip_tokenizer(folder / "tokenizer")
    write_clip_tokenizer(folder / "tokenizer_2", pad="!")
    torch.manual_seed(2)
    CLIPTextModel(clip_text_config()).save_pretrained(folder / "text_encoder")
    big = CLIPTextModelWithProjection(clip_text_config(BIG_WIDTH, num_layers=3))
    big.save_pretrained(folder / "text_encoder_2")
    return folder


def t5_config() -> T5Config:
    return T5Config(
        vocab_size=40,
        d_model=32,
        d_kv=8,
        d_ff=64,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
    )


def write_t5(folder: Path) -> Path:
    """Write the encoder of a T5."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz!,"]
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters]
    T5Tokenizer(vocab=vocabulary, extra_ids=0).save_pretrained(folder)
    torch.manual_seed(3)
    T5EncoderModel(t5_config()).save_pretrained(folder)
    return folder
