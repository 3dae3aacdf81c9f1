"""The whole pipeline on the embedded default: every job, one after the other, as a person would start them.

python -m jobs.demo [--home DIR]       what is already there is not done again
"""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro
from rich.console import Console
from rich.table import Table

from jobs.recipes.emoji import sample, train_ldm
from jobs.session import PROJECT, prepare
from jobs.wiring.recording import run_of
from pipeline.store.manifest import load_manifest

PR_SET_PDEATHSIG = 1
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


def main() -> None:
    """Run the jobs; stop at the first that fails, and say how to go on."""
    prepare()
    home = tyro.cli(Demo).home
    console = Console()
    seconds: dict[str, float] = {}
    for number, job in enumerate(STAGES, start=1):
        console.rule(f"[bold]{number}/{len(STAGES)} jobs/{job}.py", align="left")
        started = time.monotonic()
        code = _run([sys.executable, "-m", f"jobs.{job}", "emoji", "--home", home])
        seconds[job] = time.monotonic() - started
        if code:
            console.print(f"jobs/{job}.py ended with code {code}; `make demo` goes on from what is there")
            sys.exit(code)
    _report(console, home, seconds)


def _run(command: list[str]) -> int:
    """Run a job and return its exit code; Ctrl-C reaches the job, which saves, and a dead demo takes it along."""
    job = subprocess.Popen(command, cwd=PROJECT, preexec_fn=_die_with_parent)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: job.terminate())
    code = job.wait()
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _report(console: Console, home: str, seconds: dict[str, float]) -> None:
    table = Table(title="what was done", title_justify="left")
    for column, justify in (("stage", "left"), ("rows", "right"), ("seconds", "right"), ("result", "left")):
        table.add_column(column, justify="right" if justify == "right" else "left")
    for job, place in STAGES.items():
        table.add_row(job, _rows(home, job), f"{seconds[job]:.0f}", str(Path(home) / place))
    table.add_row("all", "", f"{sum(seconds.values()):.0f}", "")
    console.print(table)
    config = train_ldm(home)
    run = run_of(config.record)
    print(f"picture   {sample(home).picture_path()}")
    print(f"MLflow    .venv/bin/mlflow ui --backend-store-uri {config.tracking.uri} --port 5000")
    print(f"          then open http://127.0.0.1:5000/#/experiments/{run['experiment_id']}/runs/{run['run_id']}")


def _rows(home: str, job: str) -> str:
    if job not in ("shard_dataset", "precompute_latents"):
        return ""
    return f"{sum(shard.num_rows for shard in load_manifest(str(Path(home) / STAGES[job])).shards):,}"


if __name__ == "__main__":
    main()
