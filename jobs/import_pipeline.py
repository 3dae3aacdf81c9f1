"""Makes a model of a folder of diffusers' StableDiffusionPipeline, to draw with and to train on.

python -m jobs.import_pipeline FOLDER TARGET [--image-size 512]
"""

from __future__ import annotations

import sys
from typing import Annotated

import tyro

from jobs.command_line import placed, report_errors
from jobs.session import prepare
from ldm import storage
from ldm.interop.imported_pipeline import import_pipeline
from ldm.model_card import model_digest


@report_errors()
def main() -> None:
    """Write the model."""
    prepare()
    tyro.cli(_import, description=__doc__)


def _import(
    folder: Annotated[str, tyro.conf.Positional], target: Annotated[str, tyro.conf.Positional], image_size: int = 0
) -> None:
    """Read a pipeline of diffusers.

    Args:
        folder: folder or s3:// URL that holds model_index.json, or a name at the hub, org/name[@revision].
        target: local folder to write the model to; its text encoder and its tokenizer go into TARGET/text.
        image_size: pixels of a side that are drawn if nothing else is said; 0 is what the folder says.
    """
    target = placed(target)
    storage.check_writable(target)
    made = import_pipeline(folder, target, image_size)
    for notice in made.notices:
        print(f"note: {notice}", file=sys.stderr)
    print(f"model     {model_digest(made.card)} in {target}")
    print(f'          python -m jobs.sample folder --model {target} --prompts "a red heart"')
    print(f"          python -m jobs.train_ldm ... --initial {target} trains it further, on latents that are made with")
    print(
        f"          --autoencoder {target} --text.kind clip --text.path {made.card.text.path} "
        f"--text.max-tokens {made.card.text.max_tokens}"
    )


if __name__ == "__main__":
    main()
