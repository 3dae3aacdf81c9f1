"""The whole pipeline on the embedded default: every job, one after the other, as a person would start them.

python -m jobs.demo [--home DIR] [--stage1 train]: what is there is not done again; one Ray serves all the jobs, as a
cluster would.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from jobs.command_line import placed, report_errors
from jobs.recipes.emoji import sample, train_ldm
from jobs.session import PROJECT, prepare, ray_session
from jobs.wiring.demo import Stage, Stage1, announcement, stages
from jobs.wiring.process import run_job
from jobs.wiring.recording import run_of
from ldm import storage
from pipeline.store.manifest import load_manifest


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run every job on the emoji recipe."""

    home: str = "runs/emoji"
    """Folder that everything is put under."""
    stage1: Stage1 = Stage1.SHIPPED
    """Whether the autoencoder is the one that comes with the project, or is trained too."""


@report_errors()
def main() -> None:
    """Run the jobs; stop at the first that fails, and say how to go on."""
    prepare()
    asked = tyro.cli(Demo)
    home, console = placed(asked.home), Console()
    jobs = stages(home, asked.stage1)
    print(announcement(asked.stage1))
    seconds: list[float] = []
    is_done = all(storage.exists(f"{home}/{stage.place}") for stage in jobs)
    with nullcontext("") if is_done else ray_session() as os.environ["RAY_ADDRESS"]:
        for number, stage in enumerate(jobs, start=1):
            console.rule(f"[bold]{number}/{len(jobs)} jobs/{stage.job}.py", align="left")
            started = time.monotonic()
            if code := run_job([f"jobs.{stage.job}", "emoji", "--home", home, *stage.words], str(PROJECT)):
                console.print(f"{stage.job} ended with code {code}; the same command goes on from what is there")
                sys.exit(code)
            seconds.append(time.monotonic() - started)
    _report(console, home, jobs, seconds)


def _report(console: Console, home: str, jobs: Sequence[Stage], seconds: Sequence[float]) -> None:
    table = Table("stage", "rows", "seconds", "result", title=f"in {home}", title_justify="left")
    for stage, taken in zip(jobs, seconds, strict=True):
        has_rows = stage.place in ("dataset", "latents")
        rows = sum(shard.num_rows for shard in load_manifest(f"{home}/{stage.place}").shards) if has_rows else 0
        table.add_row(stage.job, f"{rows:,}" if rows else "", f"{taken:.0f}", stage.place)
    table.add_row("all", "", f"{sum(seconds):.0f}", "")
    console.print(table)
    run = run_of((config := train_ldm(home)).record)
    print(f"picture  {sample(home).picture_paths()[0]}")
    print(f"MLflow   {sys.prefix}/bin/mlflow ui --backend-store-uri {config.tracking.uri} --port 5000")
    print(f"         then open http://127.0.0.1:5000/#/experiments/{run['experiment_id']}/runs/{run['run_id']}")


if __name__ == "__main__":
    main()
