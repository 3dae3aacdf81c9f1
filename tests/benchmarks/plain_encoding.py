"""The script that anyone would write: webdataset → torch DataLoader → diffusers' autoencoder and a transformer → tars.

It crops in the middle, pads captions to the longest of their batch, and keeps what a training step needs: moments and
token states as float16 .npy, and the caption. It does not check, count, digest, resume, or embed a caption only once.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset
from diffusers import AutoencoderKL
from PIL import Image
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import AutoModel, AutoTokenizer

Sample = dict[str, Any]


class PlainEncoding:
    """The script, with its networks loaded.

    Args:
        autoencoder: folder in the layout of diffusers.
        text_encoder: folder of a BERT-like encoder in transformers' layout.
        image_size: side of the crop.
        max_tokens: longest caption.
        batch_size: rows at once.
        device: where the networks lie.
        half: number format of the autoencoder's arithmetic, if it is not float32.
    """

    def __init__(
        self,
        autoencoder: str,
        text_encoder: Path,
        image_size: int,
        max_tokens: int,
        batch_size: int,
        device: str,
        half: torch.dtype | None,
    ) -> None:
        self.model = AutoencoderKL.from_pretrained(autoencoder).eval().requires_grad_(False).to(device)
        self.tokenizer = AutoTokenizer.from_pretrained(text_encoder)
        self.text = AutoModel.from_pretrained(text_encoder).eval().requires_grad_(False).to(device)
        steps = [v2.CenterCrop(image_size), v2.ToImage(), v2.ToDtype(torch.float32, scale=True)]
        self.transform = v2.Compose([*steps, v2.Normalize([0.5] * 3, [0.5] * 3)])
        self.max_tokens, self.batch_size, self.device, self.half = max_tokens, batch_size, device, half

    def __call__(self, tars: Sequence[str], target: Path, num_workers: int) -> None:
        """Encode every row of the tars into one tar; more than one worker shares the tars out."""
        rows = webdataset.WebDataset(tars, shardshuffle=False).map(Prepared(self.transform))
        loader = DataLoader(rows, self.batch_size, num_workers=num_workers, collate_fn=list)
        with webdataset.TarWriter(str(target), encoder=False) as writer:
            for samples in loader:
                for row in self._encoded(samples):
                    writer.write(row)

    @torch.inference_mode()
    def _encoded(self, samples: list[Sample]) -> Iterator[Sample]:
        images = torch.stack([sample["image"] for sample in samples]).to(self.device)
        with torch.autocast(self.device, self.half, enabled=self.half is not None):
            posterior = self.model.encode(images).latent_dist
        moments = posterior.parameters.half().cpu().numpy()
        captions = [caption for sample in samples for caption in sample["captions"]]
        tokens = self.tokenizer(
            captions, padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
        ).to(self.device)
        states = iter(self.text(**tokens).last_hidden_state.half().cpu().numpy())
        lengths = iter(tokens["attention_mask"].sum(1).tolist())
        for sample, one in zip(samples, moments, strict=True):
            text = {
                f"text{number}.npy": _npy(next(states)[: next(lengths)]) for number in range(len(sample["captions"]))
            }
            yield {"__key__": sample["key"], "moments.npy": _npy(one), **text, "json": sample["json"]}


class Prepared:
    """Turns a row's bytes into pixels and captions, in a worker."""

    def __init__(self, transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.transform = transform

    def __call__(self, row: Sample) -> Sample:
        with Image.open(io.BytesIO(row.get("jpg") or row["png"])) as image:
            pixels = self.transform(image.convert("RGB"))
        captions = json.loads(row["json"])["captions"]
        return {"key": row["__key__"], "image": pixels, "captions": captions, "json": row["json"]}


def _npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()
