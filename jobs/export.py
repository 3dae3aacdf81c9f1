"""Writes a finished model as a folder that diffusers loads: `StableDiffusionPipeline.from_pretrained(TARGET)`.

python -m jobs.export MODEL TARGET        a model that was told masks becomes a StableDiffusionInpaintPipeline
"""

from __future__ import annotations

from typing import Annotated

import tyro

from jobs.command_line import placed, report_errors
from jobs.session import prepare
from ldm import storage
from ldm.interop.pipeline_folder import export_pipeline


@report_errors()
def main() -> None:
    """Write the folder."""
    prepare()
    tyro.cli(_export, description=__doc__)


def _export(model: Annotated[str, tyro.conf.Positional], target: Annotated[str, tyro.conf.Positional]) -> None:
    """Write a model for diffusers.

    Args:
        model: folder or URL of a finished model, as `train_ldm` leaves it.
        target: folder or URL to write to.
    """
    target = placed(target)
    storage.check_writable(target)
    name = export_pipeline(placed(model), target)
    print(f"pipeline  {target}: diffusers.{name}.from_pretrained reads it")


if __name__ == "__main__":
    main()
