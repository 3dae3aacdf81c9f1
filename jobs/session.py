"""What surrounds a job: a Ray of its own or the cluster's, quiet libraries, the code's version, a progress bar.

This is the one place that touches the process's environment.
"""

from __future__ import annotations

import io
import json
import logging
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn
from rich.table import Column
from rich.text import Text

from ldm.training.pace import rate_in_words

if TYPE_CHECKING:  # it would bring torch into jobs that have no use for it
    from ldm.training.loop import Progress as TrainProgress

# glibc gives memory back after each step and faults it in again at the next one, a tenth of a CPU training's time.
ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
    "MALLOC_TOP_PAD_": str(256 << 20),
}
QUIET = {
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # paths stay relative to where the job was started
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_COLOR_PREFIX": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "GIT_PYTHON_REFRESH": "quiet",
    "TOKENIZERS_PARALLELISM": "false",
}
SUBMITTED_JOB = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray for a submitted job's driver: JSON of its settings."""
TOO_SLOW = "timed out during startup"
"""What Ray says where a busy machine takes more than half a minute to start it."""
PROJECT = Path(__file__).resolve().parents[1]
LINE_EVERY_SECONDS = 15.0


def prepare() -> None:
    """Quiet the libraries; settings that a person has made stay."""
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    if not os.environ.get("RAY_ADDRESS"):
        # Nobody reads the metrics of a Ray that ends with its job, and the thread that sends them may abort its end.
        os.environ.setdefault("RAY_enable_metrics_collection", "0")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    for name in ("ray", "ray.train", "ray.data", "mlflow", "alembic", "deepspeed", "DeepSpeed", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)
    # It sets its level when it is imported, and warns then of every machine without a GPU; a filter stays.
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def without_warnings() -> Iterator[None]:
    """Keep what a library advises its own developers off the terminal."""
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # some reset the filters while they are imported
        warnings.simplefilter("ignore")
        yield


def is_main_process() -> bool:
    """Say whether this is the only process, or the first of torchrun's."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def ray_session() -> Iterator[str]:
    """Use the cluster that the job was submitted to, or a local Ray that ends with the block; yields its address."""
    # Optional: a machine without Ray trains with --launch.where here.
    import ray

    if ray.is_initialized():
        yield ray.get_runtime_context().gcs_address
        return
    # A submitted job finds its cluster in RAY_ADDRESS; its workers get the same code by the job's working directory.
    cluster = os.environ.get("RAY_ADDRESS", "")
    paths = [str(PROJECT), *filter(None, [os.environ.get("PYTHONPATH", "")])]
    for_workers = {**_passed_on(), "PYTHONPATH": os.pathsep.join(paths)}
    if not cluster:
        os.environ.update(for_workers)  # inherited; workers that wait in store can't take a job's own settings
        os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")  # nobody takes this machine away
        # A driver that waits for Ray's first workers waits for ever if one of them is killed while it starts.
        os.environ.setdefault("RAY_prestart_worker_first_driver", "0")
    settings: dict[str, Any] = {
        "address": cluster or "local",
        "include_dashboard": None if cluster else False,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "configure_logging": False,
        "runtime_env": {"env_vars": for_workers} if cluster else None,
    }
    with _stderr_closed():
        is_started = _is_in_time(lambda: ray.init(**settings)) or _is_in_time(lambda: ray.init(**settings))
    if not is_started:
        raise ValueError("this machine is too busy to start Ray, which gave up twice: start again when less runs on it")
    try:
        yield ray.get_runtime_context().gcs_address
    finally:
        ray.shutdown()


def _is_in_time(start: Callable[[], Any]) -> bool:
    """Start Ray and say whether it was there before it gave up by itself."""
    # Optional: a machine without Ray trains with --launch.where here.
    import ray

    try:
        start()
    except Exception as error:  # Ray raises no finer one
        if TOO_SLOW not in str(error):
            raise
        ray.shutdown()
        return False
    return True


@contextmanager
def _stderr_closed() -> Iterator[None]:
    """Keep Ray's C++ core from announcing its log level; what goes wrong in the block is raised, not printed."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def _passed_on() -> dict[str, str]:
    return {**ALLOCATOR, **{name: os.environ[name] for name in QUIET if name in os.environ}}


def code_version() -> dict[str, str]:
    """Return the git commit of the code and whether it has changes; of a job submitted to Ray, its package's name.

    Ray names the package of a submitted working directory by a digest of what is in it. Nothing is known elsewhere.
    """
    try:
        commit = _git("rev-parse", "HEAD")
        changes = _git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        submitted = json.loads(os.environ.get(SUBMITTED_JOB, "{}"))
        package = submitted.get("runtime_env", {}).get("working_dir", "")
        return {"code_package": package} if package else {}
    return {"mlflow.source.git.commit": commit, "code_commit": commit, "code_has_changes": str(bool(changes)).lower()}


def _git(*words: str) -> str:
    done = subprocess.run(["git", "-C", str(PROJECT), *words], check=True, capture_output=True, text=True, timeout=20)
    return done.stdout.strip()


@contextmanager
def stop_request() -> Iterator[Callable[[], bool]]:
    """Yield a question that is answered yes once Ctrl-C or SIGTERM came; a second Ctrl-C is not waited for."""
    asked: list[int] = []

    def remember(number: int, _: object) -> None:
        if asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def terminated_like_interrupted() -> Iterator[None]:
    """Take SIGTERM, the notice before a machine is taken away, for Ctrl-C; entered after Ray, which takes it too.

    It often comes twice, to a process and to its group: only the first counts.
    """
    has_come: list[bool] = []

    def interrupt(*_: object) -> None:
        if not has_come:
            has_come.append(True)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


class _Images(ProgressColumn):
    """Images done of all, once the workers have said how many there are."""

    def render(self, task: Task) -> Text:
        return Text(f"{task.completed:,.0f}/{task.total:,.0f}" if task.total else "")


class _Rate(ProgressColumn):
    """Images a second since the bar appeared."""

    def render(self, task: Task) -> Text:
        rate = task.fields.get("rate") or 0.0
        return Text(f"{rate:,.1f} img/s" if rate else "", style="cyan")


class _Remaining(ProgressColumn):
    """Time to the end at the shown rate; before the first report, the time that has passed."""

    def render(self, task: Task) -> Text:
        rate, total = task.fields.get("rate") or 0.0, task.total or 0.0
        if not rate:
            return Text(_clock(task.elapsed or 0.0))
        return Text(f"ETA {_clock((total - task.completed) / rate)}")


class TrainingBar:
    """Shows a training's progress: a live bar on a terminal, a line now and then elsewhere."""

    def __init__(self, title: str, console: Console | None = None) -> None:
        self._console = console or Console()
        self._title = title
        self._last_line = time.monotonic()
        self._latest: dict[str, float] = {}
        self._first: tuple[float, int] | None = None
        # The first that gives way in a narrow terminal is the bar itself.
        self._bar = Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True)),
            BarColumn(bar_width=30),
            _Images(table_column=Column(no_wrap=True)),
            _Rate(table_column=Column(no_wrap=True)),
            _Remaining(table_column=Column(no_wrap=True)),
            TextColumn("{task.fields[values]}", style="dim", table_column=Column(no_wrap=True)),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task(title, total=None, values="starting workers", rate=0.0)

    def _own_rate(self, done: int) -> float:
        """Images a second since the first report, for work that does not measure its own."""
        now = time.monotonic()
        self._first = self._first or (now, done)
        seconds, images = now - self._first[0], done - self._first[1]
        return images / seconds if seconds > 0 else 0.0

    def __enter__(self) -> TrainingBar:
        self._bar.start()
        if not self._console.is_terminal:
            self._console.print(f"{self._title}: starting")
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()
        if time_spent := _time_spent(self._latest):
            self._console.print(f"{self._title}: {time_spent}", highlight=False, soft_wrap=True)

    def __call__(self, progress: TrainProgress) -> None:
        """Show what the training reports."""
        if progress.notice:
            self._console.print(f"[yellow]{self._title}:[/] {escape(progress.notice)}", highlight=False, soft_wrap=True)
        if not progress.total:
            return
        self._latest |= progress.metrics
        rate = self._latest.get("images_per_second") or self._own_rate(progress.done)
        values = _short(self._latest)
        self._bar.update(self._task, completed=progress.done, total=progress.total, values=values, rate=rate)
        is_last = progress.done >= progress.total
        if not self._console.is_terminal and (is_last or time.monotonic() - self._last_line > LINE_EVERY_SECONDS):
            self._last_line = time.monotonic()
            left = (progress.total - progress.done) / rate if rate else 0.0
            speed = f"{rate:.1f} img/s, ETA {_clock(left)}" if rate else ""
            parts = (f"{progress.done:,}/{progress.total:,} images", speed, values)
            self._console.print(f"{self._title}: {', '.join(filter(None, parts))}", highlight=False, soft_wrap=True)


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def _time_spent(metrics: dict[str, float]) -> str:
    """Return where the time of the latest steps went, the most first; empty where nothing measured it."""
    prefix = "step_share/"
    shares = {name.removeprefix(prefix): share for name, share in metrics.items() if name.startswith(prefix)}
    told = [
        f"{name.replace('_', ' ')} {share:.1%}" for name, share in sorted(shares.items(), key=lambda pair: -pair[1])
    ]
    speed = []
    if "tflops_per_second" in metrics:
        speed.append(f"{metrics['tflops_per_second']:.3g} TFLOP/s a worker")
    if "mfu" in metrics:
        speed.append(f"MFU {metrics['mfu']:.1%}")
    if "forecast_share" in metrics:
        forecast = rate_in_words(metrics["images_per_second_forecast"])
        speed.append(f"{metrics['forecast_share']:.0%} of the forecast {forecast} img/s")
    return f"a step was {'; '.join(', '.join(part) for part in (told, speed) if part)}" if told else ""


def _short(metrics: dict[str, float]) -> str:
    shown = {"loss": "loss", "validation_loss": "val", "validation_psnr_db": "PSNR"}
    parts = [f"{label} {metrics[name]:.3f}" for name, label in shown.items() if name in metrics]
    if "steps_per_second" in metrics:
        parts.append(f"{rate_in_words(metrics['steps_per_second'])} steps/s")
    return "  ".join(parts)
