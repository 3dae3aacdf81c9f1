"""Every job as a person starts it: real processes, a real local Ray, killed in the middle and started again."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from functools import partial
from hashlib import sha256
from pathlib import Path

import mlflow
import pytest
import torch
from mlflow.tracking import MlflowClient
from PIL import Image

from ldm.interop.weights import load_weights
from tests.servers import ray_cluster, ray_that_runs
from tests.started_jobs import (
    HOUSE,
    MADE,
    ORDER,
    SMALL,
    WEIGHTS,
    command,
    finish,
    kill_after_line,
    kill_when,
    stop_when,
)

# A dozen real jobs stand behind the first test of each fixture.
pytestmark = pytest.mark.timeout(1800)


def digests(folder: Path) -> dict[str, str]:
    """The bytes of every file below a folder, as digests."""
    return {
        path.relative_to(folder).as_posix(): sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def has_words(file: Path, words: str) -> Callable[[], bool]:
    return lambda: file.exists() and words in file.read_text()


def has_any(folder: Path, pattern: str) -> Callable[[], bool]:
    return lambda: any(folder.glob(pattern))


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """A home in which every job ran once, without a break, and what each printed."""
    home = tmp_path_factory.mktemp("unbroken")
    with ray_that_runs(2) as address:
        return home, {job: finish(job, home, address) for job in ORDER}


@dataclass(frozen=True)
class Story:
    """What became of a job that was interrupted: its home, and what Ctrl-C gave if it was pressed."""

    home: Path
    code: int = 0
    output: str = ""
    checkpoints: tuple[str, ...] = ()


def home_with_inputs(job: str, whole: Path, folders: pytest.TempPathFactory) -> Path:
    """Return a new home with what the jobs before this one made."""
    home = folders.mktemp(job)
    for name in tuple(MADE.values())[: min(ORDER.index(job), 3)]:
        (home / name).symlink_to(whole / name)
    if job not in MADE:  # these write beside the model
        for name in ("ldm", "records"):
            shutil.copytree(whole / name, home / name, ignore=shutil.ignore_patterns("evaluation.json"))
        shutil.copy(whole / "mlflow.db", home)
    return home


class Interruption(StrEnum):
    """What happens to a job on its way."""

    KILL = "killed without warning, with its Ray"
    CTRL_C = "Ctrl-C"
    NOTICE = "SIGTERM, the notice before a machine is taken away"


SIGNALS = {Interruption.CTRL_C: signal.SIGINT, Interruption.NOTICE: signal.SIGTERM}


def interrupted(job: str, by: Interruption, whole: Path, folders: pytest.TempPathFactory, address: str) -> Story:
    """Interrupt a job on its way, start it again, and return what became of it."""
    home, made = home_with_inputs(job, whole, folders), MADE[job]
    if by is Interruption.KILL:
        story = Story(home)
        if job in WEIGHTS:
            kill_when(job, home, lambda: len(list(home.glob(f"{made}/checkpoints/0*"))) > 1)
        else:
            kill_when(job, home, has_any(home, f"{made}/*/*.record.json"))
    else:
        # No checkpoint falls due: what is there afterwards was saved because of the signal.
        has_measured = has_words(home / "records" / made / "record.jsonl", '"loss"')
        never = ("--loop.checkpoint-every", "1000000", "--loop.log-every", "16")
        code, output = stop_when(job, home, has_measured, *never, by=SIGNALS[by])
        story = Story(home, code, output, tuple(sorted(path.name for path in home.glob(f"{made}/checkpoints/0*"))))
    output = finish(job, home, address)
    assert "resumed at" in output or "already there" in output, output
    return story


def assert_made_the_same(whole: Path, story: Story, job: str) -> None:
    """Data to the byte, weights to the bit."""
    if job not in WEIGHTS:
        assert digests(whole / MADE[job]) == digests(story.home / MADE[job])
        return
    name = f"{WEIGHTS[job]}/diffusion_pytorch_model.safetensors"
    one, other = load_weights(str(whole / name)), load_weights(str(story.home / name))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def assert_saved_and_said_how_to_go_on(story: Story) -> None:
    assert story.code == 130, story.output
    assert "start the same command again to go on" in story.output
    assert "Traceback" not in story.output
    (saved,) = story.checkpoints
    assert 0 < int(saved) < 256


ALWAYS = {
    "train_ldm": Interruption.CTRL_C,
    "train_autoencoder": Interruption.KILL,
    "precompute_latents": Interruption.KILL,
}
"""How each job is interrupted in every run of the tests, the longest first; `make soak` has the other ways."""


@pytest.fixture(scope="module")
def broken(unbroken: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Story]:
    """Jobs that make data or weights, interrupted once and started again; two at a time, for most of it is starting."""
    with ray_that_runs(4) as address, ThreadPoolExecutor(2) as threads:
        again = partial(interrupted, whole=unbroken[0], folders=tmp_path_factory, address=address)
        return dict(zip(ALWAYS, threads.map(again, ALWAYS, ALWAYS.values()), strict=True))


@pytest.mark.parametrize("job", ALWAYS)
def test_a_job_interrupted_and_started_again_gives_the_same_bytes_and_weights(
    unbroken: tuple[Path, object], broken: dict[str, Story], job: str
) -> None:
    assert_made_the_same(unbroken[0], broken[job], job)


def test_ctrl_c_saves_and_says_how_to_go_on(broken: dict[str, Story]) -> None:
    assert_saved_and_said_how_to_go_on(broken["train_ldm"])


@pytest.mark.slow  # of data that are killed on their way tests/test_dataset_kills.py has a short form
@pytest.mark.parametrize(
    "job, by",
    [
        ("shard_dataset", Interruption.KILL),
        ("train_autoencoder", Interruption.NOTICE),
        ("train_autoencoder", Interruption.CTRL_C),
        ("train_ldm", Interruption.KILL),
        ("train_ldm", Interruption.NOTICE),
    ],
)
def test_a_job_interrupted_in_other_ways_gives_the_same_too(
    unbroken: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory, job: str, by: Interruption
) -> None:
    with ray_that_runs(4) as address:
        story = interrupted(job, by, unbroken[0], tmp_path_factory, address)
    assert_made_the_same(unbroken[0], story, job)
    if by is not Interruption.KILL:
        assert_saved_and_said_how_to_go_on(story)


def killed_at_its_start(job: str, whole: Path, folders: pytest.TempPathFactory) -> Path:
    """Run a job that keeps nothing on its way, killed as it begins and started again; return its home."""
    home = home_with_inputs(job, whole, folders)
    kill_after_line(job, home, f"{job}: starting")
    finish(job, home)
    return home


@pytest.mark.slow
def test_an_evaluation_killed_and_started_again_gives_the_same_figures(
    unbroken: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    homes = (unbroken[0], killed_at_its_start("evaluate", unbroken[0], tmp_path_factory))
    reports = [json.loads((home / "ldm" / "evaluation.json").read_text()) for home in homes]
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_a_sampling_killed_and_started_again_gives_the_same_pixels(
    unbroken: tuple[Path, object], tmp_path_factory: pytest.TempPathFactory
) -> None:
    homes = (unbroken[0], killed_at_its_start("sample", unbroken[0], tmp_path_factory))
    pictures = [Image.open(next((home / "samples").glob("grid-*.png"))) for home in homes]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    names = [sorted(path.name for path in (home / "samples").iterdir()) for home in homes]
    assert names[0] == names[1]


def test_a_second_run_of_every_job_does_nothing(unbroken: tuple[Path, object]) -> None:
    home, _ = unbroken
    before = digests(home)
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda job: finish(job, home), ORDER))
    changed = {path for path, digest in digests(home).items() if before.get(path) != digest}
    assert {path.split("/")[0] for path in changed} <= {"mlflow.db", "mlflow-artifacts"}, changed


def test_what_a_person_sees_names_results_and_verdicts(unbroken: tuple[Path, dict[str, str]]) -> None:
    home, printed = unbroken
    assert f"new shards, 0 shards already there: {home}/dataset" in printed["shard_dataset"]
    assert "img/s, ETA" in printed["train_ldm"]
    assert 'mlflow.pyfunc.load_model("models:/emoji-text-to-image/1")' in printed["train_ldm"]
    assert "reconstruction PSNR" in printed["evaluate"]
    picture = next((home / "samples").glob("grid-*.png"))
    assert f"picture   {picture}" in printed["sample"]
    assert not [job for job, output in printed.items() if "Traceback" in output]
    with Image.open(picture) as image:
        assert json.loads(image.text["settings"])["prompts"] == ["heart", "star"]


def test_the_run_in_mlflow_holds_configuration_curves_pictures_data_and_a_model(
    unbroken: tuple[Path, object],
) -> None:
    home, _ = unbroken
    uri = f"sqlite:///{home}/mlflow.db"
    run_id = json.loads((home / "records" / "ldm" / "run.json").read_text())["run_id"]
    client = MlflowClient(uri)
    run = client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["engine.kind"] == "deepspeed"
    assert run.data.params["launch.num_workers"] == "2"
    assert len(client.get_metric_history(run_id, "loss")) == 8
    assert {"validation_loss", "grad_norm", "system/rank_1/cpu_utilization_percentage"} <= set(run.data.metrics)
    assert "evaluation_reconstruction_psnr_db" in run.data.metrics
    assert run.inputs.dataset_inputs[0].dataset.name == "latents"
    assert len(client.list_artifacts(run_id, "pictures")) == 2
    mlflow.set_tracking_uri(uri)
    images = mlflow.pyfunc.load_model("models:/emoji-text-to-image/1").predict(["a red heart"], params={"num_steps": 2})
    assert images.shape == (1, 32, 32, 3)


def test_a_saved_configuration_repeats_its_run(unbroken: tuple[Path, object], tmp_path: Path) -> None:
    home, _ = unbroken
    saved = [sys.executable, "-m", "jobs.train_ldm", "--config", str(home / "ldm" / "run.yaml"), "--dry-run"]
    done = subprocess.run(
        [*saved, "--loop.total-samples", "512"], cwd=HOUSE, capture_output=True, text=True, check=True
    )
    assert "16 = 2 workers x 1 micro-batches x 8 rows" in done.stdout
    assert "512 samples = 32 steps" in done.stdout


def refused(job: str, home: Path, *flags: str) -> str:
    """Run a job that must be refused before any work and return its message."""
    done = subprocess.run([*command(job, home), *flags], cwd=HOUSE, capture_output=True, text=True, timeout=200)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stderr


def test_a_folder_that_holds_another_dataset_is_refused(unbroken: tuple[Path, object]) -> None:
    home, _ = unbroken
    assert "image_size" in refused("shard_dataset", home, "--picture.image-size", "48")


def test_another_configuration_on_the_same_folder_is_refused(unbroken: tuple[Path, object]) -> None:
    home, _ = unbroken
    assert "optim.lr: the checkpoint has 0." in refused("train_ldm", home, "--optim.lr", "0.01")


def test_an_output_that_cannot_be_written_is_refused(unbroken: tuple[Path, object], tmp_path: Path) -> None:
    home, _ = unbroken
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    message = refused("train_ldm", home, "--root", f"{blocker}/ldm")
    assert "cannot write into" in message or "holds" in message


def test_more_workers_than_the_cluster_has_are_refused(unbroken: tuple[Path, object], tmp_path: Path) -> None:
    home, _ = unbroken
    message = refused("train_ldm", home, "--root", str(tmp_path / "ldm"), "--launch.cpus-per-worker", "1000")
    assert "2 workers with 1000 CPU each need 2000 CPU" in message


def test_training_runs_without_ray_under_torchrun(unbroken: tuple[Path, object], tmp_path: Path) -> None:
    home, _ = unbroken
    flags = ["--root", str(tmp_path / "ldm"), "--record", str(tmp_path / "record"), "--launch.where", "here"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    words = [*torchrun, "-m", "jobs.train_ldm", *command("train_ldm", home)[3:], *flags, "--engine.kind", "local"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=HOUSE, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    name = "unet/diffusion_pytorch_model.safetensors"
    one, other = load_weights(str(home / "ldm/model" / name)), load_weights(str(tmp_path / "ldm/model" / name))
    for key, weight in one.items():
        torch.testing.assert_close(other[key], weight, rtol=1e-3, atol=1e-4)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """A running Ray cluster, and the home folder of the user that it runs under."""
    folder = tmp_path_factory.mktemp("cluster")
    with ray_cluster(folder) as address:
        yield address, folder


def submit(cluster: tuple[str, Path], job: str) -> str:
    """Submit a job as the README does, wait for its end and return what it printed."""
    address, _ = cluster
    flags = SMALL[job].replace("--launch.where here", "").split()
    words = [*("ray", "job", "submit", "--address", address, "--working-dir", ".", "--"), "python", f"jobs/{job}.py"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    words[0] = str(Path(sys.executable).with_name("ray"))
    done = subprocess.run(
        [*words, "emoji", "--home", "submitted", *flags],
        cwd=HOUSE,
        capture_output=True,
        text=True,
        timeout=400,
        env=environment,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_job_submitted_to_a_cluster_makes_the_same_bytes(
    unbroken: tuple[Path, object], cluster: tuple[str, Path]
) -> None:
    output = submit(cluster, "shard_dataset")
    home = cluster[1] / "submitted"
    assert f"0 shards already there: {home}/dataset" in output
    assert digests(home / "dataset") == digests(unbroken[0] / "dataset")


@pytest.mark.slow
def test_every_job_submitted_to_a_cluster_gives_what_it_gives_alone(
    unbroken: tuple[Path, object], cluster: tuple[str, Path]
) -> None:
    for job in ORDER:
        submit(cluster, job)
    alone, submitted = unbroken[0], cluster[1] / "submitted"
    assert digests(alone / "latents") == digests(submitted / "latents")
    for weights in ("autoencoder/model", "ldm/model/unet"):
        name = f"{weights}/diffusion_pytorch_model.safetensors"
        one, other = load_weights(str(alone / name)), load_weights(str(submitted / name))
        assert all(torch.equal(one[key], other[key]) for key in one)
    assert (submitted / "samples").is_dir()
