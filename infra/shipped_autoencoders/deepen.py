"""Begin an autoencoder of factor 8 from one of factor 4 that is trained: what both have is taken over.

python infra/shipped_autoencoders/deepen.py SHALLOW DEEP

SHALLOW is the folder of a trained small_f4, DEEP gets a small_f8 for `jobs.train_autoencoder small_f8 --initial DEEP`.
The encoder's upper levels and the decoder's lower ones are the shallow network's; the new level of both, and what reads
and writes its latents, are drawn. In 12,000 samples it was where drawn weights were after 32,000.
"""

from __future__ import annotations

import argparse
import re

import torch
from torch import Tensor

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder
from ldm.first_stage import load_autoencoder
from ldm.interop.diffusers import save_autoencoder


def main() -> None:
    """Read, deepen, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shallow")
    parser.add_argument("deep")
    asked = parser.parse_args()
    torch.manual_seed(0)
    deep = Autoencoder(zoo.small_f8())
    shallow = load_autoencoder(asked.shallow).state_dict()
    deep.load_state_dict(shared_weights(shallow, deep.state_dict()), strict=False)
    save_autoencoder(deep, asked.deep)


def shared_weights(shallow: dict[str, Tensor], deep: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what the deep network takes over; the decoder's levels come one later, for its first one is new."""
    renamed = {
        re.sub(r"^decoder\.up_blocks\.(\d+)", lambda found: f"decoder.up_blocks.{int(found[1]) + 1}", name): weight
        for name, weight in shallow.items()
    }
    return {name: weight for name, weight in renamed.items() if name in deep and deep[name].shape == weight.shape}


if __name__ == "__main__":
    main()
