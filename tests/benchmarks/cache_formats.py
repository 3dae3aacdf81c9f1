"""Bytes a row of caches of latents: ours, and the same rows as others store them, by writing them.

What others keep is read from their scripts: a drawn latent or the moments, of one caption, with its padding.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch


class CachedRow(NamedTuple):
    """One row: moments (m, h, w), and the token states (l, d) of its first caption without padding, both float16."""

    moments: np.ndarray
    states: np.ndarray
    caption: str


def bytes_per_row(rows: Sequence[CachedRow], max_tokens: int, ours: Path) -> dict[str, float]:
    """Return the bytes a row of every form; `ours` is the folder of our shards, which hold every caption of a row."""
    forms: dict[str, Callable[[CachedRow, int], int]] = {
        "MDS: drawn latent and padded states, fp16 (mosaicml/diffusion)": _mds,
        "tar: moments .npy fp32 and caption, no states (MLPerf)": _tar_of_moments,
        "npz a picture: drawn latent fp32, no states (kohya)": _npz,
        "npy and npz a picture: moments fp32, states compressed (PixArt)": _npy_and_npz,
        "pt a picture: moments and padded states, fp32": _pickle,
    }
    sizes = {form: sum(size(row, max_tokens) for row in rows) / len(rows) for form, size in forms.items()}
    own = sum(path.stat().st_size for path in ours.rglob("*") if path.suffix in (".tar", ".index", ".safetensors"))
    return {"ours: moments fp16, states of all captions": own / len(rows)} | sizes


def _mds(row: CachedRow, max_tokens: int) -> int:
    """Three columns of bytes behind their lengths, and the row's offset, 4 bytes each."""
    latent, states = row.moments.size // 2, max_tokens * row.states.shape[1]
    return 4 * 4 + 2 * latent + 2 * states + len(row.caption.encode())


def _tar_of_moments(row: CachedRow, _: int) -> int:
    members = (_npy(row.moments.astype(np.float32)), row.caption.encode())
    return sum(512 + -(-len(member) // 512) * 512 for member in members)


def _npz(row: CachedRow, _: int) -> int:
    file = io.BytesIO()
    size, crop = np.array([64, 64]), np.zeros(4, int)
    np.savez(file, latents=_mean(row).astype(np.float32), original_size=size, crop_ltrb=crop)
    return len(file.getvalue())


def _npy_and_npz(row: CachedRow, max_tokens: int) -> int:
    file = io.BytesIO()
    mask = np.arange(max_tokens) < len(row.states)
    np.savez_compressed(file, caption_feature=_padded(row, max_tokens).astype(np.float32), attention_mask=mask)
    return len(_npy(row.moments.astype(np.float32))) + len(file.getvalue())


def _pickle(row: CachedRow, max_tokens: int) -> int:
    file = io.BytesIO()
    states = torch.from_numpy(_padded(row, max_tokens)).float()
    torch.save({"moments": torch.from_numpy(row.moments).float(), "states": states, "caption": row.caption}, file)
    return len(file.getvalue())


def _mean(row: CachedRow) -> np.ndarray:
    return row.moments[: len(row.moments) // 2]


def _padded(row: CachedRow, max_tokens: int) -> np.ndarray:
    states = np.zeros((max_tokens, row.states.shape[1]), np.float16)
    states[: len(row.states)] = row.states
    return states


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
