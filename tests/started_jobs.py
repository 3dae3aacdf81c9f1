"""Jobs in processes of their own, as a person starts them, small; and killed or stopped at a moment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

HOUSE = Path(__file__).parents[1]
SMALL = {
    "shard_dataset": "--picture.image-size 32 --source.max-labels 160 --source.rows-per-shard 40",
    "train_autoencoder": (
        "--loop.total-samples 256 --loop.checkpoint-every 32 --loop.validate-every 0 --loop.log-every 64 "
        "--loss.adversarial-start 64 --autoencoder.base-channels 8 --optim.warmup-samples 0 --batch-size 16"
    ),
    "precompute_latents": "--image-size 32 --gate.min-psnr 0",
    "train_ldm": (
        "--loop.total-samples 256 --loop.checkpoint-every 32 --loop.validate-every 128 --loop.log-every 32 "
        "--loop.picture-every 0 --unet.base-channels 32 --batch-size 16 --optim.warmup-samples 0"
    ),
    "evaluate": (
        "--protocol.num-images 8 --protocol.image-size 32 --protocol.sampler.num-steps 2 --gate.min-psnr-db 0 "
        "--launch.where here"
    ),
    "sample": "--prompts heart star --guidance 1 3 --sampler.num-steps 4 --launch.where here",
}
ORDER = tuple(SMALL)
MADE = dict(zip(ORDER, ("dataset", "autoencoder", "latents", "ldm"), strict=False))
"""The folder that each job makes bit by bit; the other jobs read a model and keep nothing on their way."""
WEIGHTS = {"train_autoencoder": "autoencoder/model", "train_ldm": "ldm/model/unet"}
"""Where a training's weights lie in a home."""


def command(job: str, home: Path, *more: str) -> list[str]:
    own = ["--autoencoder", f"{home}/autoencoder/model"] if job in ("precompute_latents", "train_ldm") else []
    return [sys.executable, "-m", f"jobs.{job}", "emoji", "--home", str(home), *own, *SMALL[job].split(), *more]


def start(job: str, home: Path, *more: str, ray_address: str = "") -> subprocess.Popen[str]:
    """Start a job on a Ray that runs, or with one of its own."""
    return subprocess.Popen(
        command(job, home, *more),
        cwd=HOUSE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "RAY_ADDRESS": ray_address},
        start_new_session=True,
        # A shell that started these tests in the background made them, and their children, deaf to Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(job: str, home: Path, ray_address: str = "") -> str:
    """Run a job to its end and return what it printed."""
    process = start(job, home, ray_address=ray_address)
    output, _ = process.communicate(timeout=400)
    assert process.returncode == 0, output
    return output


def kill_when(job: str, home: Path, is_time: Callable[[], bool]) -> None:
    """Start a job and kill it without warning as soon as `is_time` says so."""
    process = start(job, home)
    deadline = time.monotonic() + 200
    while not is_time():
        assert process.poll() is None, f"{job} ended before it could be killed: {process.communicate()[0]}"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def kill_after_line(job: str, home: Path, begins: str) -> None:
    """Start a job and kill it without warning as soon as it prints a line that begins so."""
    process = start(job, home)
    assert process.stdout is not None
    printed: list[str] = []
    for line in process.stdout:
        printed.append(line)
        if line.startswith(begins):
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            return
    raise AssertionError(f"{job} never printed {begins!r}: {printed}")


def stop_when(
    job: str, home: Path, is_time: Callable[[], bool], *more: str, by: signal.Signals = signal.SIGINT
) -> tuple[int, str]:
    """Start a job and press Ctrl-C, or terminate it, as soon as `is_time` says so; return its exit code and output."""
    process = start(job, home, *more)
    while not is_time():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    process.send_signal(by)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output
