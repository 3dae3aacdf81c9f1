"""Laws of an autoencoder's address: each kind gives the same network, is fetched once, and says what it misses."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import huggingface_hub.constants
import pytest
import safetensors.torch
import torch

from jobs.wiring.first_stage import settled
from jobs.wiring.registering import register_model
from jobs.wiring.train_ldm import TrainLdmConfig
from ldm import storage
from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder
from ldm.first_stage import (
    SHIPPED,
    NoAutoencoderError,
    evaluation_of,
    find_autoencoder,
    load_autoencoder,
    settled_address,
)
from ldm.interop.diffusers import PICKLE_NAME, WEIGHTS_NAME, save_autoencoder, weights_digest
from ldm.registry import RegistryError, record_evaluation
from ldm.training.tracking import open_run
from ldm.training.tracking_config import TrackingConfig
from ldm.types import Image
from pipeline.ingest.picture import Measured, Picture
from pipeline.ingest.transforms import ImageFormat, PictureConfig, measure, render
from pipeline.latent_gate import evaluated_psnr
from pipeline.latent_plan import plan_latents
from pipeline.sources.emoji import EmojiConfig
from pipeline.store.schema import Split
from tests.compvis_network import CompVisNetwork
from tests.hub_server import FileServer, file_server
from tests.tiny_latents import carry_out, latents_config, write_autoencoder, write_dataset, write_latents
from tests.tiny_training import run, tiny_config


@pytest.fixture(autouse=True)
def copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's own folders, all for this test."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))
    monkeypatch.setattr("huggingface_hub.utils._cache_assets.HF_ASSETS_CACHE", str(tmp_path / "assets"))
    return tmp_path / "assets"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[FileServer]:
    (tmp_path / "served").mkdir()
    with file_server(tmp_path / "served") as server:
        yield server


@pytest.fixture
def hub(served: FileServer, monkeypatch: pytest.MonkeyPatch) -> FileServer:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", served.url)
    template = served.url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(huggingface_hub.constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    return served


def digest_of(model: Autoencoder) -> str:
    return weights_digest(model.state_dict(), model.config)


def drawn(content: bytes, side: int) -> Image:
    """Return a drawing's pixels as the emoji recipe makes them, in [-1, 1], shape (3, side, side)."""
    config = PictureConfig(image_size=side, image_format=ImageFormat.PNG)
    measured = measure(content, config)
    assert isinstance(measured, Measured)
    picture = render(content, measured, config)
    assert isinstance(picture, Picture)
    return torch.from_numpy(picture.pixels.copy()).permute(2, 0, 1) / 127.5 - 1


def write_checkpoint(folder: Path, name: str = "model.safetensors") -> CompVisNetwork:
    theirs = CompVisNetwork(z_channels=4, embed_dim=4)
    folder.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(theirs.state_dict, folder / name)
    return theirs


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_autoencoders_are_what_their_papers_say(name: str) -> None:
    where = f"shipped:{name}"
    model, folder = load_autoencoder(where), Path(find_autoencoder(where).path)
    assert model.config == getattr(zoo, name)()
    assert evaluated_psnr(where, model) is not None
    latents = json.loads((folder / "latent_statistics.json").read_text())
    assert latents["digest"] == digest_of(model)
    assert digest_of(model) in (folder / "README.md").read_text()
    assert settled_address(where) == where


def test_shipped_autoencoders_are_small() -> None:
    folder = Path(find_autoencoder(f"shipped:{SHIPPED[0]}").path).parent
    assert {path.name for path in folder.iterdir()} == set(SHIPPED)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 20_000_000


def test_shipped_small_f4_gives_back_drawings_that_it_never_saw() -> None:
    source = EmojiConfig(max_labels=400).build()
    rows = [row for name in source.shard_names(Split.VALIDATION) for row in source.open_shard_at_row(name, 0)]
    images = torch.stack([drawn(row.payload or b"", side=64) for row in rows])
    with torch.no_grad():
        made = load_autoencoder("shipped:small_f4").eval().reconstruct(images).clamp(-1, 1)
    psnr = -10 * torch.log10((images - made).square().mean(dim=(1, 2, 3)) / 4)
    assert len(images) > 20
    assert float(psnr.mean()) > 24


def test_unknown_shipped_autoencoder_is_refused_naming_those_that_are_there() -> None:
    with pytest.raises(NoAutoencoderError, match="no shipped autoencoder 'big'; there are small_f4, small_f8"):
        find_autoencoder("shipped:big")


@pytest.mark.parametrize("subfolder", ["", "vae", "vqvae"])
def test_folder_or_the_root_of_a_pipeline_is_found(subfolder: str, tmp_path: Path) -> None:
    digest = digest_of(write_autoencoder(tmp_path / "model" / subfolder))
    for where in (str(tmp_path / "model"), f"{tmp_path}/model/", f"file://{tmp_path}/model"):
        assert digest_of(load_autoencoder(where)) == digest


def test_folder_of_before_safetensors_loads_from_its_plain_pickle(tmp_path: Path) -> None:
    model = write_autoencoder(tmp_path)
    torch.save(model.state_dict(), tmp_path / PICKLE_NAME)
    (tmp_path / WEIGHTS_NAME).unlink()
    assert digest_of(load_autoencoder(str(tmp_path))) == digest_of(model)


def test_relative_folder_wins_over_a_name_at_the_hub(
    tmp_path: Path, hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    digest = digest_of(write_autoencoder(tmp_path / "org" / "name"))
    assert digest_of(load_autoencoder("org/name")) == digest
    assert hub.seen == []


def test_s3_folder_and_checkpoint_are_copied_once_and_again_when_they_change(
    tmp_path: Path, s3_root: str, copies: Path
) -> None:
    first, second = write_autoencoder(tmp_path / "one"), write_autoencoder(tmp_path / "two", seed=1)
    where = f"{s3_root}/vae"
    for model in (first, first, second):
        save_autoencoder(model, where)
        assert digest_of(load_autoencoder(s3_root)) == digest_of(model)
        assert digest_of(load_autoencoder(where)) == digest_of(model)
    assert len(list(copies.rglob(WEIGHTS_NAME))) in (2, 3)  # some stores call the same bytes anew something new
    theirs = write_checkpoint(tmp_path / "compvis")
    storage.copy_file(str(tmp_path / "compvis" / "model.safetensors"), f"{s3_root}/first/model.safetensors")
    storage.write_text(f"{s3_root}/first/project.yaml", theirs.yaml())
    place = find_autoencoder(f"{s3_root}/first/model.safetensors")
    assert place.config == f"{s3_root}/first/project.yaml"
    assert load_autoencoder(f"{s3_root}/first/model.safetensors").config.norm_groups == 32


def test_web_folder_and_checkpoint_are_downloaded_once(served: FileServer) -> None:
    model = write_autoencoder(served.folder / "kl")
    theirs = write_checkpoint(served.folder / "compvis")
    (served.folder / "compvis" / "config.yaml").write_text(theirs.yaml())
    for _ in range(3):
        assert digest_of(load_autoencoder(f"{served.url}/kl")) == digest_of(model)
        assert load_autoencoder(f"{served.url}/compvis/model.safetensors?download=true").config.latent_channels == 4
    assert served.downloads(WEIGHTS_NAME) == 1
    assert served.downloads("model.safetensors") == 1


def test_processes_that_begin_together_download_once(served: FileServer) -> None:
    write_autoencoder(served.folder / "kl")
    threads = [threading.Thread(target=load_autoencoder, args=(f"{served.url}/kl",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert served.downloads(WEIGHTS_NAME) == 1


def test_hub_name_subfolder_revision_and_scheme_are_the_same_files(hub: FileServer) -> None:
    main = digest_of(write_autoencoder(hub.folder / "org" / "name" / "main" / "vae"))
    other = digest_of(write_autoencoder(hub.folder / "org" / "name" / "v2" / "deep" / "vae", seed=1))
    (hub.folder / "org" / "name" / "main" / "unet.safetensors").write_bytes(b"not asked for")
    for where in ("org/name", "org/name/vae", "hf://org/name", "org/name@main", "hf://org/name@main/vae"):
        assert digest_of(load_autoencoder(where)) == main
    for where in ("org/name@v2/deep", "org/name/deep/vae@v2", "hf://org/name/deep@v2"):
        assert digest_of(load_autoencoder(where)) == other
    assert hub.downloads(WEIGHTS_NAME) == 2
    assert hub.downloads("unet.safetensors") == 0


def test_hub_pickles_are_fetched_only_where_there_are_no_safetensors(hub: FileServer) -> None:
    folder = hub.folder / "org" / "name" / "main" / "vae"
    digest = digest_of(model := write_autoencoder(folder))
    torch.save(model.state_dict(), folder / PICKLE_NAME)
    assert digest_of(load_autoencoder("org/name")) == digest
    assert hub.downloads(PICKLE_NAME) == 0
    old = hub.folder / "org" / "old" / "main"
    write_autoencoder(old)
    torch.save(model.state_dict(), old / PICKLE_NAME)
    (old / WEIGHTS_NAME).unlink()
    assert digest_of(load_autoencoder("org/old")) == digest


def test_hub_checkpoint_comes_with_its_yaml(hub: FileServer) -> None:
    folder = hub.folder / "org" / "name" / "main" / "kl-f8"
    theirs = write_checkpoint(folder)
    (folder / "model.yaml").write_text(theirs.yaml())
    where = "org/name/kl-f8/model.safetensors"
    assert Path(find_autoencoder(where).config).read_text() == theirs.yaml()
    assert load_autoencoder(where).config.latent_channels == 4


def test_hub_without_the_repository_revision_or_network_is_refused_with_the_reason(
    hub: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(hub.folder / "org" / "name" / "main")
    with pytest.raises(FileNotFoundError, match=r"at org/none: no such folder here, and the hub gave no repository"):
        load_autoencoder("org/none")
    with pytest.raises(FileNotFoundError, match="no repository org/name at v9"):
        load_autoencoder("org/name@v9")
    with pytest.raises(FileNotFoundError, match=r"at org/name: expected one of .* a checkpoint is named by its file"):
        load_autoencoder("org/name")
    with pytest.raises(FileNotFoundError, match="at org/name/none.ckpt: no such file"):
        load_autoencoder("org/name/none.ckpt")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(FileNotFoundError, match="at org/other: no such folder here, and the hub gave no repository"):
        load_autoencoder("org/other")


@pytest.mark.parametrize(
    "where, message",
    [
        ("", "the autoencoder's address is empty"),
        ("./nowhere", "no autoencoder at ./nowhere: no such file or folder"),
        ("/nowhere/vae", "no such file or folder"),
        ("nowhere", "no such file or folder"),
        ("http://127.0.0.1:9/vae", "expected one of config.json, vae/config.json, vqvae/config.json"),
        ("hf://name", r"is org/name\[@revision\]\[/inside\], got 'name'"),
    ],
)
def test_address_of_nothing_is_refused_naming_what_was_expected(where: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_autoencoder(where)


def test_folder_of_other_things_is_refused_listing_them(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / "README.md").write_text("read")
    with pytest.raises(FileNotFoundError, match=r"got README.md, model.safetensors \(a checkpoint is named by its"):
        load_autoencoder(str(tmp_path))


def test_folder_that_is_not_whole_is_refused_naming_what_is_wrong(tmp_path: Path) -> None:
    write_autoencoder(tmp_path)
    (tmp_path / WEIGHTS_NAME).unlink()
    with pytest.raises(ValueError, match=f"no weights beside its config.json: expected .*{WEIGHTS_NAME}"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_text("<html>")
    (tmp_path / WEIGHTS_NAME).write_bytes(b"")
    with pytest.raises(ValueError, match=r"config.json is no JSON"):
        load_autoencoder(str(tmp_path))


def test_evaluation_lies_beside_the_weights_wherever_those_are(tmp_path: Path, hub: FileServer, s3_root: str) -> None:
    content = {"validation_psnr_db": 31.5}
    for folder in (tmp_path / "kl" / "vae", hub.folder / "kl" / "vae", hub.folder / "org" / "name" / "main"):
        write_autoencoder(folder)
        (folder / "evaluation.json").write_text(json.dumps(content))
    save_autoencoder(write_autoencoder(tmp_path / "plain"), f"{s3_root}/a")
    storage.write_text(f"{s3_root}/a/evaluation.json", json.dumps(content))
    for where in (str(tmp_path / "kl"), f"{hub.url}/kl", "org/name", f"{s3_root}/a"):
        assert evaluation_of(where) == content
    assert evaluation_of(str(tmp_path / "plain")) is None
    write_checkpoint(tmp_path / "kl" / "vae")
    assert evaluation_of(f"{tmp_path}/kl/vae/model.safetensors") is None


def test_evaluation_of_other_weights_is_refused_and_one_that_says_not_whose_is_taken(tmp_path: Path) -> None:
    where, model = str(tmp_path), write_autoencoder(tmp_path)
    assert evaluated_psnr(where, model) is None
    for digest in ({}, {"digest": digest_of(model)}):
        (tmp_path / "evaluation.json").write_text(json.dumps({"validation_psnr_db": 31.5, **digest}))
        assert evaluated_psnr(where, model) == 31.5
    (tmp_path / "evaluation.json").write_text(json.dumps({"validation_psnr_db": 31.5, "digest": "abc"}))
    with pytest.raises(
        ValueError, match=f"its evaluation.json is of weights abc, what lies there has {digest_of(model)}"
    ):
        evaluated_psnr(where, model)
    write_dataset(tmp_path / "dataset")
    with pytest.raises(ValueError, match="is of weights abc"):
        carry_out(plan_latents(latents_config(tmp_path, autoencoder=where)))


def test_cache_made_by_a_checkpoint_is_that_of_the_same_weights_in_a_folder(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset")
    write_checkpoint(tmp_path / "compvis")
    save_autoencoder(load_autoencoder(f"{tmp_path}/compvis/model.safetensors"), f"{tmp_path}/folder")
    made = [
        carry_out(plan_latents(latents_config(tmp_path, root=f"{tmp_path}/{i}", autoencoder=f"{tmp_path}/{where}")))
        for i, where in enumerate(("compvis/model.safetensors", "folder"))
    ]
    assert made[0].digest == made[1].digest


@pytest.fixture(scope="module")
def registered(tmp_path_factory: pytest.TempPathFactory) -> tuple[TrainLdmConfig, str, str]:
    """A tiny finished training that is registered: its config, the run and the name of its version."""
    folder = tmp_path_factory.mktemp("registered")
    write_latents(folder)
    tracking = TrackingConfig(uri=f"sqlite:///{folder}/mlflow.db", model_name="tiny")
    config = replace(tiny_config(folder, total_samples=8), tracking=tracking)
    run_id = open_run(tracking, config.record, "tiny", {}, {})
    run(config)
    version = register_model(config)
    assert version is not None
    record_evaluation(uri=tracking.uri, model=version, protocol_digest="p", metrics={}, has_passed=True)
    return config, run_id, version.uri


def test_registered_model_gives_its_autoencoder_by_version_alias_and_run(
    registered: tuple[TrainLdmConfig, str, str],
) -> None:
    config, run_id, uri = registered
    trained_on = digest_of(load_autoencoder(config.autoencoder))
    names = (uri, "models:/tiny@champion", f"runs:/{run_id}/text_to_image")
    for where in names:
        assert settled_address(where, config.tracking.uri) == f"{config.model_folder}/vae"
        assert digest_of(load_autoencoder(where)) == trained_on
        assert evaluation_of(where) is None
    assert settled_address("org/name") == "org/name"
    again = replace(config, autoencoder="models:/tiny@champion")
    assert settled(again) == replace(config, autoencoder=f"{config.model_folder}/vae")


def test_registered_autoencoder_that_changed_behind_its_pointer_is_refused(
    registered: tuple[TrainLdmConfig, str, str], tmp_path: Path
) -> None:
    config, _, uri = registered
    vae = Path(config.model_folder) / "vae"
    kept = (vae / WEIGHTS_NAME).read_bytes()
    write_autoencoder(vae, seed=5)
    with pytest.raises(ValueError, match=f"{uri} was registered with autoencoder [0-9a-f]+, in .*vae lies"):
        load_autoencoder(uri)
    (vae / WEIGHTS_NAME).write_bytes(kept)
    assert load_autoencoder(uri).config.latent_channels == 2


@pytest.mark.parametrize(
    "where", ["models:/none/1", "models:/tiny/9", "models:/tiny@nobody", "runs:/abc/text_to_image"]
)
def test_name_that_mlflow_does_not_know_is_refused(where: str, registered: tuple[TrainLdmConfig, str, str]) -> None:
    with pytest.raises(ValueError, match=f"{where} names no model that this project registered: expected artifacts/"):
        settled_address(where, registered[0].tracking.uri)


def test_run_without_a_pointer_is_refused(registered: tuple[TrainLdmConfig, str, str]) -> None:
    config, run_id, _ = registered
    with pytest.raises(ValueError, match=r"expected artifacts/pointer.json in it"):
        settled_address(f"runs:/{run_id}/pictures", config.tracking.uri)


def test_dead_registry_is_said_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(RegistryError, match="127.0.0.1"):
        settled_address("models:/tiny/1", "http://127.0.0.1:9")
    tracking = TrackingConfig(uri="http://127.0.0.1:9")
    with pytest.raises(ValueError, match="models:/tiny/1 was not found out: MLflow did not answer"):
        settled(replace(tiny_config(Path("x")), autoencoder="models:/tiny/1", tracking=tracking))
