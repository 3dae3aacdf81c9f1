"""The whole pipeline on the embedded default: every job, one after the other, as a person would start them.

python -m jobs.demo [--home DIR]: what is there is not done again; one Ray serves all the jobs, as a cluster would.
"""

from __future__ import annotations

import os
import sys
import time
from contextlib import nullcontext
from dataclasses import dataclass

import tyro
from rich.console import Console
from rich.table import Table

from jobs.command_line import placed, report_errors
from jobs.recipes.emoji import sample, train_ldm
from jobs.session import PROJECT, prepare, ray_session
from jobs.wiring.process import run_job
from jobs.wiring.recording import run_of
from ldm import storage
from pipeline.store.manifest import load_manifest

STAGES = {
    "shard_dataset": "dataset",
    "train_autoencoder": "autoencoder/model",
    "precompute_latents": "latents",
    "train_ldm": "ldm/model",
    "evaluate": "ldm/evaluation.json",
    "sample": "samples",
}


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Run every job on the emoji recipe."""

    home: str = "runs/emoji"
    """Folder that everything is put under."""


@report_errors()
def main() -> None:
    """Run the jobs; stop at the first that fails, and say how to go on."""
    prepare()
    home = placed(tyro.cli(Demo).home)
    console = Console()
    seconds: dict[str, float] = {}
    is_done = all(storage.exists(f"{home}/{place}") for place in STAGES.values())
    with nullcontext("") if is_done else ray_session() as os.environ["RAY_ADDRESS"]:
        for number, job in enumerate(STAGES, start=1):
            console.rule(f"[bold]{number}/{len(STAGES)} jobs/{job}.py", align="left")
            started = time.monotonic()
            if code := run_job([f"jobs.{job}", "emoji", "--home", home], str(PROJECT)):
                console.print(f"jobs/{job}.py ended with code {code}; the same command goes on from what is there")
                sys.exit(code)
            seconds[job] = time.monotonic() - started
    _report(console, home, seconds)


def _report(console: Console, home: str, seconds: dict[str, float]) -> None:
    table = Table("stage", "rows", "seconds", "result", title=f"in {home}", title_justify="left")
    for job, place in STAGES.items():
        shards = load_manifest(f"{home}/{place}").shards if job in ("shard_dataset", "precompute_latents") else ()
        rows = sum(shard.num_rows for shard in shards)
        table.add_row(job, f"{rows:,}" if rows else "", f"{seconds[job]:.0f}", place)
    table.add_row("all", "", f"{sum(seconds.values()):.0f}", "")
    console.print(table)
    config = train_ldm(home)
    run = run_of(config.record)
    print(f"picture  {sample(home).picture_path()}")
    print(f"MLflow   {sys.prefix}/bin/mlflow ui --backend-store-uri {config.tracking.uri} --port 5000")
    print(f"         then open http://127.0.0.1:5000/#/experiments/{run['experiment_id']}/runs/{run['run_id']}")


if __name__ == "__main__":
    main()
