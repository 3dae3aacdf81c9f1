"""Named arrays in one safetensors file, opened as views of a memory map: nothing but the header is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

DTYPES: dict[str, np.dtype[Any]] = {
    "F16": np.dtype("<f2"),
    "F32": np.dtype("<f4"),
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}


def mapped_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """Return the arrays of a local file by name."""
    content = np.asarray(np.memmap(path, np.uint8, mode="r"))
    body = 8 + int(content[:8].view("<u8")[0])
    header = json.loads(content[8:body].tobytes())
    arrays = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            arrays[name] = content[body + start : body + stop].view(DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return arrays
