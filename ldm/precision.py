"""Number formats that networks compute in."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from enum import StrEnum
from typing import Any

import torch


class Precision(StrEnum):
    """Number format that a network computes in; weights that are trained are kept in float32."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"
    """Of a narrow range: Stable Diffusion XL's first autoencoder overflows in it, for one."""

    @property
    def dtype(self) -> torch.dtype:
        """The torch dtype of its name."""
        return {Precision.FP32: torch.float32, Precision.BF16: torch.bfloat16, Precision.FP16: torch.float16}[self]


def autocast(precision: Precision, device: torch.device) -> AbstractContextManager[Any]:
    """Return the block in which a forward pass over float32 weights computes in a precision."""
    if precision is Precision.FP32:
        return nullcontext()
    return torch.autocast(device.type, dtype=precision.dtype)
