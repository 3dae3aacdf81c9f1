"""Draws a grid of prompts x guidance scales with a finished model, or a file of prompts into tars of pictures.

python -m jobs.sample [RECIPE] [--home DIR] [--prompts "a red heart" "a green apple"] [--guidance 1 3 7]
    --height 128 --width 256 [--tile 64]     larger than trained
    --is-separate                            each picture in a file of its own
    --safety.watermark-file KEY.txt          marked invisibly, see jobs.detect; filters of your own: --safety.*
python -m jobs.sample TASK [RECIPE] ...
    vary --picture FILE --strength 0.6       pictures like one that is given
    inpaint --picture FILE --mask FILE       a picture anew where the mask is light
    outpaint --picture FILE --margins 0 0 32 0   a picture with more around it: left, top, right, bottom
    upscale --small FILE                     a small picture larger
    interpolate --prompts "a sun" "a moon"   the way from one to the other
python -m jobs.sample --repeat PICTURE.png   draws what the settings in a picture say
python -m jobs.sample [RECIPE] [--home DIR] --prompts-from FILE --guidance 3 [--dry-run] [--bulk.verify]
    --bulk.images-per-prompt 4 --bulk.carry id   four pictures of each row, its id in their JSON
"""

from __future__ import annotations

import sys

from jobs.command_line import from_command_line, report_errors
from jobs.recipes import SAMPLE
from jobs.session import is_main_process, prepare
from jobs.wiring.generate import draw_file
from jobs.wiring.publishing import publish_picture
from jobs.wiring.sample import sample_worker
from jobs.wiring.sample_tasks import with_task
from jobs.wiring.training import launch
from ldm import storage
from ldm.training.local_launch import Outcome


@report_errors()
def main() -> None:
    """Draw the pictures, unless these very ones are there."""
    prepare()
    asked = from_command_line("sample", SAMPLE, with_task(sys.argv[1:]))
    if asked.config.prompts_from:
        sys.exit(draw_file(asked.config, dry_run=asked.dry_run))
    config, dry_run = asked.config.identified(), asked.dry_run
    paths = config.picture_paths()
    is_there = all(map(storage.exists, paths))
    if dry_run:
        print(f"{len(config.rows())} rows x {len(config.guidance)} scales, {config.num_steps} steps:")
        print("\n".join(paths))
        print("drawn already" if is_there else "not drawn yet")
        return
    outcome: Outcome = {"pictures": paths, "num_refused": 0}
    if not is_there:
        storage.check_writable(config.root)
        outcome = launch(sample_worker, config, config.launch, "sample", works_alone=True)
    if is_main_process():
        paths = outcome["pictures"]
        for path in paths:
            if not is_there:
                publish_picture(config, path)
            print(f"picture   {path}")
        if outcome["num_refused"]:
            print(f"refused   {outcome['num_refused']} of {outcome['num_drawn']} pictures, by the filter")


if __name__ == "__main__":
    main()
