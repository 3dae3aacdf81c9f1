"""Repeating a run from its page at MLflow alone: the same losses, and a word on what is not as it was."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from itertools import islice
from pathlib import Path
from unittest.mock import patch as patched

import pytest
from mlflow.tracking import MlflowClient

from jobs.command_line import from_command_line
from jobs.recipes import TRAIN_AUTOENCODER, TRAIN_LDM
from jobs.train_autoencoder import main as train_autoencoder
from jobs.train_ldm import main as train_ldm
from jobs.wiring.provenance import CUT, Provenance, cut, installed_packages, provenance, uncommitted_changes
from jobs.wiring.recording import run_of
from jobs.wiring.repeating import differences
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm.config import Config
from ldm.training.page import DataInput, RunPage
from ldm.training.tracking import open_run
from ldm.training.tracking_config import TrackingConfig
from pipeline.store.manifest import load_manifest
from tests.tiny_latents import write_dataset, write_latents
from tests.tiny_stage1 import stage1_config
from tests.tiny_training import longer, tiny_config

NUM_LOSSES = 20


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, uri: str) -> TrainLdmConfig:
    """A training that its job carried out and recorded in MLflow, every loss of it."""
    folder = tmp_path_factory.mktemp("trained")
    write_latents(folder)
    config = replace(
        longer(tiny_config(folder), total_samples=8 * NUM_LOSSES), tracking=TrackingConfig(uri=uri, experiment="again")
    )
    given = folder / "given.yaml"
    given.write_text(config.to_yaml())
    carry_out(train_ldm, "--config", str(given))
    return config


def carry_out(job: object, *words: str) -> None:
    """Run a job's main in this process, whose environment stays as it was."""
    with pytest.MonkeyPatch.context() as patch, patched.dict(os.environ):
        patch.setattr(sys, "argv", ["job", *words])
        assert callable(job)
        job()


def warnings_in(printed: str) -> list[str]:
    """Return the warnings but those of uncommitted changes: somebody may edit the code while this is tested."""
    return [line for line in printed.splitlines() if "warning" in line and "not committed" not in line]


def losses(uri: str, run_id: str) -> dict[int, float]:
    return {metric.step: metric.value for metric in MlflowClient(uri).get_metric_history(run_id, "loss")}


def test_a_run_repeated_from_its_page_gives_the_same_first_losses(
    trained: TrainLdmConfig, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run_id = run_of(trained.record)["run_id"]
    Path(trained.root, "run.yaml").unlink()
    Path(trained.record, "run.yaml").unlink()  # nothing but the page is left
    command = ("--from-run", run_id, "--tracking.uri", uri, "--loop.validate-every", "64")
    carry_out(train_ldm, *command)
    printed = capsys.readouterr()
    assert not warnings_in(printed.err), "nothing has changed since"
    repeated = f"{trained.root}-repeat-{run_id[:8]}"
    assert printed.out.startswith(f"repeats   run {run_id}: {repeated}\n")
    again = run_of(f"{trained.record}-repeat-{run_id[:8]}")["run_id"]
    assert again != run_id
    assert MlflowClient(uri).get_run(again).data.tags["repeats"] == run_id
    one, other = losses(uri, run_id), losses(uri, again)
    assert len(one) == NUM_LOSSES
    assert one == other
    assert len(set(one.values())) == NUM_LOSSES
    carry_out(train_ldm, *command)
    assert f"model already there: {repeated}/model" in capsys.readouterr().out, "the same command finds its own work"


def test_an_attempt_is_repeated_as_well_as_its_training(trained: TrainLdmConfig, uri: str) -> None:
    run_id = run_of(trained.record)["run_id"]
    client = MlflowClient(uri)
    (attempt,) = client.search_runs(
        [client.get_run(run_id).info.experiment_id], f"tags.`mlflow.parentRunId` = '{run_id}'"
    )
    command = ["--from-run", attempt.info.run_id, "--tracking.uri", uri, "--root", "elsewhere", "--seed", "3"]
    asked = from_command_line("train_ldm", TRAIN_LDM, command)
    own = f"{trained.record}-repeat-{attempt.info.run_id[:8]}"
    assert asked.config == replace(trained, root="elsewhere", record=own, seed=3)
    assert asked.page is not None
    assert asked.page.digest_of_input == {
        "latents": load_manifest(trained.latents).digest[:36],
        "dataset": str(load_manifest(trained.latents).summary["dataset"])[:36],
    }


def test_an_autoencoder_is_repeated_from_its_page_too(
    tmp_path: Path, uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_dataset(tmp_path / "dataset", image_size=32)
    config = replace(
        stage1_config(tmp_path / "run"),
        dataset=str(tmp_path / "dataset"),
        tracking=TrackingConfig(uri=uri, experiment="stage 1"),
    )
    (tmp_path / "given.yaml").write_text(config.to_yaml())
    carry_out(train_autoencoder, "--config", str(tmp_path / "given.yaml"))
    run_id = run_of(config.record)["run_id"]
    carry_out(train_autoencoder, "--from-run", run_id, "--tracking.uri", uri)
    assert not warnings_in(capsys.readouterr().err)
    again = run_of(f"{config.record}-repeat-{run_id[:8]}")["run_id"]
    assert list(losses(uri, run_id)) == [4, 8, 12, 16, 20, 24]
    assert losses(uri, run_id) == losses(uri, again)


def refusal(capsys: pytest.CaptureFixture[str], *words: str, recipes: object = TRAIN_LDM) -> str:
    with pytest.raises(SystemExit) as stop:
        from_command_line("train", recipes, words)  # type: ignore[arg-type]
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_run_that_cannot_be_repeated_is_refused_with_the_reason(
    trained: TrainLdmConfig,
    uri: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    run_id = run_of(trained.record)["run_id"]
    place = ("--tracking.uri", uri)
    bare = open_run(TrackingConfig(uri=uri, experiment="bare"), str(tmp_path), "bare", {}, {})
    assert f"has no run '{'0' * 32}'" in refusal(capsys, "--from-run", "0" * 32, *place)
    assert f"run {bare} at {uri} has no run.yaml among its files" in refusal(capsys, "--from-run", bare, *place)
    assert "expects a TrainAutoencoderConfig, the file holds a TrainLdmConfig" in refusal(
        capsys, "--from-run", run_id, *place, recipes=TRAIN_AUTOENCODER
    )
    nowhere = f"sqlite:///{tmp_path}/none.db"
    assert f"no database at {nowhere}" in refusal(capsys, "--from-run", run_id, "--tracking.uri", nowhere)
    assert not (tmp_path / "none.db").exists()
    dead = "http://127.0.0.1:9"
    assert f"MLflow at {dead} does not answer" in refusal(capsys, "--from-run", run_id, "--tracking.uri", dead)
    for other in ("--config", "--home"):
        assert "brings its own config and paths" in refusal(capsys, "--from-run", run_id, *place, other, "x")
    assert "does not" in refusal(capsys, "--from-run", run_id, *place, recipes={"plain": lambda _: Config()})


PAGE = RunPage(
    run_id="r",
    config="",
    environment="# python==3.11.1\n# Linux-6\nnumpy==2.0\ntorch==2.11\n",
    tags={"code_commit": "c0ffee", "code_changes_digest": "d1"},
    digest_of_input={"latents": "0123"},
)
NOW = Provenance(tags=PAGE.tags, files={"environment.txt": b"# python==3.11.1\n# Linux-7\ntorch==2.11\nnumpy==2.0\n"})
LATENTS = DataInput(name="latents", uri="there", digest="012345", context="training", profile={})


def test_what_is_as_it_was_is_no_difference_and_each_other_thing_is_named() -> None:
    assert differences(PAGE, NOW, [LATENTS]) == []
    other_tags = {"code_commit": "beef"}
    packages = b"# python==3.12.0\nnumpy==2.1\ntyro==1\n"
    now = Provenance(tags=other_tags, files={"environment.txt": packages})
    assert differences(PAGE, now, [replace(LATENTS, digest="9"), replace(LATENTS, name="dataset")]) == [
        "its code commit is c0ffee, here it is beef",
        "it was made with changes that were not committed and are not here: changes.diff of its files",
        "4 packages differ: numpy 2.0 then, 2.1 here; python 3.11.1 then, 3.12.0 here; torch 2.11 then, absent here; "
        "tyro absent then, 1 here",
        "its latents had the digest 0123, the one at there has 9",
        "its page does not name its dataset",
    ]
    clean = replace(PAGE, tags={"code_commit": "c0ffee"}, environment="")
    assert differences(clean, NOW, []) == [
        "here are changes that were not committed, and it was made without",
        "its page has no environment.txt, so its packages are not known",
    ]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A git repository with one commit of two files."""
    folder = tmp_path / "code"
    folder.mkdir()
    git(folder, "init", "--quiet")
    (folder / "a.py").write_bytes(b"one\nlatin \xe9\n")
    (folder / "b.bin").write_bytes(bytes(range(256)))
    git(folder, "add", ".")
    git(folder, "-c", "user.name=t", "-c", "user.email=t@t", "commit", "--quiet", "-m", "first")
    return folder


def git(folder: Path, *words: str) -> None:
    subprocess.run(["git", "-C", str(folder), *words], check=True)


def test_uncommitted_changes_applied_to_the_commit_give_the_same_files(repository: Path, tmp_path: Path) -> None:
    assert uncommitted_changes(repository) == b""
    (repository / "a.py").write_bytes(b"two\nlatin \xe9\n")
    (repository / "b.bin").write_bytes(bytes(reversed(range(256))))
    (repository / "new.py").write_text("")
    git(repository, "add", "a.py")  # changes that are staged count as well
    changes = uncommitted_changes(repository)
    assert changes.startswith(b"# not committed and not in here: new.py\n")
    git(tmp_path, "clone", "--quiet", str(repository), "clone")
    (tmp_path / "changes.diff").write_bytes(changes)
    git(tmp_path / "clone", "apply", str(tmp_path / "changes.diff"))
    for name in ("a.py", "b.bin"):
        assert (tmp_path / "clone" / name).read_bytes() == (repository / name).read_bytes()


def test_changes_of_a_folder_that_is_not_gits_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert uncommitted_changes(tmp_path) == b""


def test_changes_too_large_to_keep_are_cut_and_say_so() -> None:
    assert cut(b"12345", max_bytes=5) == b"12345"
    assert cut(b"12345", max_bytes=2) == b"12\n" + CUT.format(left=3).encode()


def test_packages_are_those_that_are_imported_and_give_the_same_digest_each_time() -> None:
    lines = installed_packages().splitlines()
    assert f"# python=={'.'.join(map(str, islice(sys.version_info, 3)))}" in lines
    names = [line.partition("==")[0].lower() for line in lines if not line.startswith("#")]
    assert {"torch", "mlflow", "numpy"} <= set(names)
    assert names == sorted(names)
    assert provenance().tags == provenance().tags
