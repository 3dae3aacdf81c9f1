"""Laws of a training: resumed equals unbroken, another run's checkpoint is refused, losses stay what they were."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from jobs.wiring.sample import SampleConfig, sample_worker
from jobs.wiring.train_ldm import TrainLdmConfig, check_inputs, checkpoint_store, is_done
from ldm.interop.weights import load_weights
from ldm.model_card import MODEL_FILE, load_card
from ldm.samplers.sample import SamplerConfig
from ldm.text_to_image import load_text_to_image
from ldm.training.checkpoint import KEEP_FILE
from ldm.training.local_launch import Outcome, ignore
from ldm.training.state import is_due
from pipeline.store.manifest import load_manifest
from tests.ranks import alone
from tests.tiny_latents import write_autoencoder, write_latents
from tests.tiny_training import WEIGHTS, longer, run, same_weights, series, stopping_after, tiny_config

FURTHER_WEIGHTS = WEIGHTS.replace("model/", "model_half_life_8/", 1)
GOLDEN = Path(__file__).with_name("golden_losses.json")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("training")
    write_latents(path)
    return path


@pytest.fixture(scope="module")
def unbroken(folder: Path) -> Outcome:
    return run(tiny_config(folder, "unbroken"))


def test_a_disk_that_fills_up_is_said_and_the_run_goes_on_bit_for_bit_when_there_is_room(
    folder: Path, unbroken: Outcome, small_disk: Path
) -> None:
    config = replace(tiny_config(folder, "full"), root=str(small_disk / "run"))
    stopping_after(config, 3)
    with (small_disk / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
        while True:
            filler.write(bytes(100_000))
    with pytest.raises(ValueError, match=r"has no room for another checkpoint .* goes on from sample 24"):
        run(config)
    on_full_disk = replace(config, record=str(small_disk / "record"))
    with pytest.raises(ValueError, match=r"took no more of the record .* goes on from the latest checkpoint"):
        run(on_full_disk)
    (small_disk / "filler").unlink()
    run(config)
    one, other = (load_weights(str(root / WEIGHTS)) for root in (folder / "unbroken", small_disk / "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("steps", [1, 3, 4, 7])
def test_a_stopped_training_goes_on_as_the_unbroken_one_bit_for_bit(
    folder: Path, unbroken: Outcome, steps: int
) -> None:
    config = tiny_config(folder, f"stopped-{steps}")
    assert not stopping_after(config, steps)["is_finished"]
    resumed = run(config)
    assert resumed["is_finished"]
    assert same_weights(folder, "unbroken", f"stopped-{steps}")
    assert resumed["last_validation"] == unbroken["last_validation"]
    assert series(folder, f"stopped-{steps}", "loss") == series(folder, "unbroken", "loss")


def test_a_damaged_checkpoint_is_not_used_and_the_one_before_gives_the_same_end(
    folder: Path, unbroken: Outcome, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(folder, "damaged")
    stopping_after(config, 5)
    newest = sorted((folder / "damaged" / "checkpoints").glob("0*"))[-1] / "unet" / "fragments-00000.pt"
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes(content)
    run(config)
    assert "is not the file that was saved" in caplog.text
    assert same_weights(folder, "unbroken", "damaged")


@pytest.mark.parametrize("written", [b"", bytes(300), b'{"state": {}}'])
def test_a_state_that_a_power_loss_left_half_written_is_not_used(
    folder: Path, unbroken: Outcome, written: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(folder, f"half-{len(written)}")
    stopping_after(config, 5)
    checkpoints = folder / f"half-{len(written)}" / "checkpoints"
    newest = sorted(checkpoints.glob("0*"))[-1] / "state.json"
    newest.write_bytes(written)
    store = checkpoint_store(config, load_manifest(config.latents), alone())
    store.check_identity()
    latest = store.latest_state()
    assert latest is not None
    assert latest.samples_seen == 32
    run(config)
    assert "its state.json can't be read" in caplog.text
    assert same_weights(folder, "unbroken", f"half-{len(written)}")


def test_the_last_checkpoints_stay_and_older_ones_go(folder: Path, unbroken: Outcome) -> None:
    names = sorted(path.name for path in (folder / "unbroken" / "checkpoints").glob("0*"))
    assert names == ["000000000048", "000000000064"]
    assert (folder / "unbroken" / "checkpoints" / "latest").read_text() == names[-1]


def test_every_kth_checkpoint_and_one_that_a_person_marked_stay(folder: Path, unbroken: Outcome) -> None:
    config = tiny_config(folder, "kept")
    config = replace(config, loop=replace(config.loop, keep_every=24))
    stopping_after(config, 2)
    checkpoints = folder / "kept" / "checkpoints"
    (checkpoints / "000000000016" / KEEP_FILE).touch()
    run(config)
    names = sorted(path.name for path in checkpoints.glob("0*"))
    assert names == ["000000000016", "000000000024", "000000000048", "000000000064"]
    assert not (checkpoints / names[-1] / KEEP_FILE).exists()
    assert same_weights(folder, "unbroken", "kept")


def test_a_longer_run_goes_on_from_a_finished_one(folder: Path) -> None:
    run(tiny_config(folder, "short", 32))
    assert run(longer(tiny_config(folder, "short"), 64))["samples_seen"] == 64
    assert same_weights(folder, "unbroken", "short")


def test_a_checkpoint_of_another_configuration_is_refused_naming_each_difference(
    folder: Path, unbroken: Outcome
) -> None:
    config = tiny_config(folder, "unbroken", 128)
    other = replace(config, optim=replace(config.optim, lr=5e-4), seed=1)
    with pytest.raises(ValueError, match=r"(?s)optim.lr: the checkpoint has 0.001, this run 0.0005.*seed: .* 0, .* 1"):
        run(other)


def test_a_checkpoint_of_other_averages_is_refused(folder: Path, unbroken: Outcome) -> None:
    config = with_further_average(tiny_config(folder, "unbroken"))
    with pytest.raises(ValueError, match=r"ema.further_half_lives: the checkpoint has None, this run \[8\]"):
        checkpoint_store(config, load_manifest(config.latents), alone()).check_identity()


def test_latents_of_another_autoencoder_are_refused_with_both_digests(folder: Path) -> None:
    write_autoencoder(folder / "other-autoencoder", seed=1)
    config = replace(tiny_config(folder), autoencoder=str(folder / "other-autoencoder"))
    made_with = load_manifest(config.latents).identity["autoencoder"]
    with pytest.raises(ValueError, match=f"made with autoencoder {made_with}, the one given is "):
        check_inputs(config)


def test_a_unet_that_does_not_fit_the_latents_is_refused(folder: Path) -> None:
    config = tiny_config(folder)
    with pytest.raises(ValueError, match="ask for a UNet of 2 input and 2 output channels, got 3 and 2"):
        check_inputs(replace(config, unet=replace(config.unet, in_channels=3)))


def test_a_finished_training_is_done_and_a_longer_one_is_not(folder: Path, unbroken: Outcome) -> None:
    config = tiny_config(folder, "unbroken")
    manifest = load_manifest(config.latents)
    assert is_done(config, manifest)
    assert not is_done(longer(config, 128), manifest)
    assert not is_done(tiny_config(folder, "never"), manifest)


def with_further_average(config: TrainLdmConfig) -> TrainLdmConfig:
    return replace(config, ema=replace(config.ema, further_half_lives=(8,)))


def test_a_further_average_is_what_it_is_as_the_main_one_and_leaves_that_as_it_is(
    folder: Path, unbroken: Outcome
) -> None:
    config = with_further_average(tiny_config(folder, "both"))
    both = run(config)["last_validation"]
    single = tiny_config(folder, "single")
    alone = run(replace(single, ema=replace(single.ema, half_life_samples=8)))["last_validation"]
    assert same_weights(folder, "unbroken", "both")
    further, expected = (load_weights(str(folder / path)) for path in ("both/" + FURTHER_WEIGHTS, "single/" + WEIGHTS))
    assert all(torch.equal(further[name], expected[name]) for name in expected)
    assert both == {**unbroken["last_validation"], "validation_loss_half_life_8": alone["validation_loss"]}
    assert both["validation_loss_half_life_8"] != both["validation_loss"]


def test_every_average_is_a_model_to_draw_with_and_what_a_kill_left_out_is_made_up_for(
    folder: Path, tmp_path: Path
) -> None:
    config = with_further_average(tiny_config(folder, "published", 8))
    manifest = load_manifest(config.latents)
    run(config)
    assert is_done(config, manifest)
    main, further = Path(config.model_folder), Path(config.model_folders[8])
    assert [load_card(str(place)).lineage["half_life_samples"] for place in (main, further)] == ["32", "8"]
    grid = SampleConfig(
        root=str(tmp_path),
        record=config.record,
        model=str(further),
        prompts=("red",),
        guidance=(2.0,),
        sampler=SamplerConfig(num_steps=2),
    )
    assert Path(sample_worker(grid, alone(), ignore, lambda: False)["pictures"][0]).is_file()
    whole = {path: path.read_bytes() for place in (main, further) for path in place.rglob("*") if path.is_file()}
    assert len(whole) == 2 * 5
    for killed_in in (main, further):
        (killed_in / MODEL_FILE).unlink()
        (killed_in / "unet" / "diffusion_pytorch_model.safetensors").write_bytes(b"half of it")
        assert not is_done(config, manifest)
        run(config)
        assert is_done(config, manifest)
        assert all(path.read_bytes() == content for path, content in whole.items())


def test_the_finished_model_draws_the_same_image_for_the_same_seed_in_any_batch(
    folder: Path, unbroken: Outcome
) -> None:
    model = load_text_to_image(str(folder / "unbroken" / "model"), torch.device("cpu"))
    together = model.generate(["red", "a blue square", "red"], seeds=[1, 2, 3], guidance=[2.0, 1.0, 3.0])
    alone = model.generate(["a blue square"], seeds=[2], guidance=[1.0])
    assert abs(together[1].astype(int) - alone[0].astype(int)).max() <= 1
    assert (together[0] != together[2]).any()
    again = load_text_to_image(str(folder / "unbroken" / "model"), torch.device("cpu"))
    repeated = again.generate(["red", "a blue square", "red"], seeds=[1, 2, 3], guidance=[2.0, 1.0, 3.0])
    assert (together == repeated).all()


def test_a_model_folder_with_exchanged_weights_is_refused(folder: Path, unbroken: Outcome, tmp_path: Path) -> None:
    write_autoencoder(folder / "unbroken-copy" / "vae", seed=3)
    for part in ("unet", "model.json"):
        source = folder / "unbroken" / "model" / part
        target = folder / "unbroken-copy" / part
        for path in [source] if source.is_file() else source.iterdir():
            place = target if source.is_file() else target / path.name
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match="names autoencoder .* but what is there has digest"):
        load_text_to_image(str(folder / "unbroken-copy"), torch.device("cpu"))


def test_losses_of_the_tiny_training_are_the_golden_ones(folder: Path, unbroken: Outcome) -> None:
    """A change that is not meant to change numbers leaves these; rewrite the file only with a reason in the commit."""
    losses = series(folder, "unbroken", "loss")
    golden = {int(seen): loss for seen, loss in json.loads(GOLDEN.read_text())["loss"].items()}
    assert losses == pytest.approx(golden, rel=2e-4)
    validation = series(folder, "unbroken", "validation_loss")
    assert validation[64] == pytest.approx(json.loads(GOLDEN.read_text())["validation_loss"], rel=2e-4)


def test_intervals_are_due_once_for_each_multiple_whatever_the_batch() -> None:
    for batch in (7, 8, 30):
        times = [seen for seen in range(batch, 301, batch) if is_due(30, seen, batch)]
        assert len(times) == (300 // batch * batch) // 30
    assert not is_due(0, 100, 10)
