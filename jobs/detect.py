"""Says whether pictures carry the invisible watermark of a key, as `jobs.sample --safety.watermark` puts it in.

python -m jobs.detect PICTURE... --key-file FILE    or --key KEY, which stays in the shell's history
    --is-crop                                       parts of marked pictures, wherever they were cut out

Exits with 0 if all are marked, 1 if one is not, 2 if one can't be read.
"""

from __future__ import annotations

import sys
from io import BytesIO
from typing import Annotated

import numpy as np
import tyro
from PIL import Image as PILImage

from jobs.command_line import placed, report_errors
from jobs.session import prepare
from ldm import storage
from ldm.safety import key_in
from ldm.watermark import MARKED_BELOW, Picture, detect, detect_crop

EXIT_NOT_MARKED = 1


@report_errors()
def main() -> None:
    """Look for the key in each picture."""
    prepare()
    tyro.cli(_detect, description=__doc__)


def _detect(
    pictures: Annotated[tuple[str, ...], tyro.conf.Positional],
    key: str = "",
    key_file: str = "",
    is_crop: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False,
) -> None:
    """Say of each picture its score, its p-value, and whether it is marked.

    Args:
        pictures: files or URLs.
        key: the watermark's key.
        key_file: file or URL of the key, in its place.
        is_crop: look at all places that a part of a picture may come from; takes 64 times as long.
    """
    if not pictures or bool(key) == bool(key_file):
        raise ValueError("pictures and one key are needed: python -m jobs.detect PICTURE... --key-file FILE (or --key)")
    key = key or key_in(key_file)
    is_all_marked = True
    width = max(map(len, pictures))
    for path in pictures:
        found = (detect_crop if is_crop else detect)(_pixels(placed(path)), key)
        is_all_marked &= found.is_marked
        said = "marked" if found.is_marked else f"not marked (p must be below {MARKED_BELOW:g})"
        print(f"{path:{width}}  z {found.score:6.2f}  p {found.p_value:8.2g}  {said}")
    sys.exit(0 if is_all_marked else EXIT_NOT_MARKED)


def _pixels(path: str) -> Picture:
    try:
        with PILImage.open(BytesIO(storage.read_bytes(path))) as image:
            return np.asarray(image.convert("RGB"))
    except (*storage.PLACE_ERRORS, PILImage.DecompressionBombError) as error:  # what is no picture is an OSError
        raise ValueError(f"the picture {path} can't be read: {type(error).__name__} {error}") from error


if __name__ == "__main__":
    main()
