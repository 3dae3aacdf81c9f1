"""Checkpoints in object storage: a training stopped and resumed there is the one on disk, whatever the store does."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import s3fs
import torch

from jobs.wiring.train_ldm import TrainLdmConfig, train_ldm_worker
from ldm import storage
from ldm.interop.weights import load_weights
from ldm.training.local_launch import ignore
from ldm.training.world import World
from tests.cached_shards import connected
from tests.chaos_proxy import chaos_proxy
from tests.ranks import run_ranks
from tests.servers import S3Server
from tests.test_elastic_training import stop_after, with_engine
from tests.tiny_latents import write_latents
from tests.tiny_training import WEIGHTS, run, stopping_after, tiny_config


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("remote")
    write_latents(path)
    run(tiny_config(path, "unbroken"))
    return path


@pytest.fixture(autouse=True)
def no_clients_of_other_servers(s3: S3Server) -> Iterator[None]:
    s3fs.S3FileSystem.clear_instance_cache()
    yield
    s3fs.S3FileSystem.clear_instance_cache()


def stored(folder: Path, s3_root: str, name: str) -> TrainLdmConfig:
    """Return the unbroken training with its root in object storage."""
    return replace(tiny_config(folder, name), root=f"{s3_root}/{name}")


def weights_of(folder: Path, root: str) -> dict[str, torch.Tensor]:
    return load_weights(storage.local_copy(storage.join(root, WEIGHTS), str(folder / "copies")))


def is_as_on_disk(folder: Path, root: str) -> bool:
    one, other = load_weights(str(folder / "unbroken" / WEIGHTS)), weights_of(folder, root)
    return set(one) == set(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_training_through_a_store_that_fails_one_request_in_five_is_the_one_on_disk(
    folder: Path, s3: S3Server, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = stored(folder, s3_root, "chaos")
    with chaos_proxy(s3.endpoint, 4) as proxy, connected(proxy.url, monkeypatch):
        stopping_after(config, 3)
        assert run(config)["is_finished"]
        assert min(proxy.troubles[trouble] for trouble in ("busy", "drop", "cut", "delay")) > 0, proxy.troubles
    assert is_as_on_disk(folder, config.root)


@pytest.mark.parametrize("damage", ["flipped", "truncated", "missing", "unfinished"])
def test_what_was_stored_wrong_is_named_and_the_checkpoint_before_it_used(
    folder: Path, s3: S3Server, s3_root: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = stored(folder, s3_root, damage)
    stopping_after(config, 5)
    root = f"{config.root}/checkpoints"
    newest = f"{root}/{storage.read_text(f'{root}/latest')}"
    client, weights = s3.client(), f"{newest}/unet/fragments-00000.pt"
    content = bytearray(client.cat_file(weights))
    content[len(content) // 2] ^= 1
    match damage:
        case "flipped":
            client.pipe_file(weights, bytes(content))
        case "truncated":
            client.pipe_file(weights, bytes(content[: len(content) // 2]))
        case "missing":
            client.rm_file(weights)
        case "unfinished":  # killed before the last file of an upload
            client.rm_file(f"{newest}/state.json")
    assert run(config)["is_finished"]
    told = {"missing": "is missing", "unfinished": "it has no state.json"}
    assert told.get(damage, "is not the file that was saved") in caplog.text
    assert is_as_on_disk(folder, config.root)


def train_in(world: World, config: TrainLdmConfig, num_steps: int) -> None:
    train_ldm_worker(config, world, ignore, stop_after(num_steps))


def test_two_ranks_store_their_slices_in_the_background_and_go_on_from_them(folder: Path, s3_root: str) -> None:
    whole = with_engine(tiny_config(folder, "two-ranks"), 2, folder)
    run_ranks(2, train_in, whole, 0)
    behind = replace(whole.loop, saves_in_background=True)
    stopped = replace(whole, root=f"{s3_root}/two-ranks", loop=behind)
    run_ranks(2, train_in, stopped, 3)
    names = storage.list_files(f"{stopped.root}/checkpoints/000000000024/unet")
    assert names == ["fragments-00000.pt", "fragments-00001.pt"]
    run_ranks(2, train_in, stopped, 0)
    one, other = load_weights(str(folder / "two-ranks" / WEIGHTS)), weights_of(folder, stopped.root)
    assert all(torch.equal(one[name], other[name]) for name in one)
