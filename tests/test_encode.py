"""Laws of the latent cache: the same bytes however it was made, refused where it is wrong, readable by anyone."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
import webdataset
from PIL import Image

from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.regularizer import LOG_VARIANCE_RANGE
from ldm.conditioning.text import TextEncoder, TextEncoderConfig, TextEncoderKind, text_encoder_digest
from ldm.interop.diffusers import save_autoencoder, weights_digest
from ldm.precision import Precision
from pipeline.images import decode_pixels, image_of_pixels
from pipeline.latent_gate import GateConfig
from pipeline.latent_plan import check_latents, plan_latents
from pipeline.latent_shard import MOMENTS
from pipeline.latent_summary import summarize
from pipeline.moment_statistics import StatisticsBuilder, merged, statistics_of
from pipeline.plan import ShardTask, Stage
from pipeline.store.manifest import Manifest, ShardRecord, claim_root, load_manifest, read_records, verify
from pipeline.store.schema import Split
from pipeline.store.shards import read_rows, write_shard
from pipeline.text_table import open_text_table
from tests.tiny_latents import (
    IMAGE_SIZE,
    carry_out,
    image_row,
    latents_config,
    write_autoencoder,
    write_dataset,
    write_latents,
)
from tests.tiny_text import encoder_config, write_clip, write_sdxl


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("made")
    write_latents(folder)
    return folder


@pytest.fixture(scope="module")
def made_with_pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents whose captions went through a pair of towers, which has a pooled output."""
    folder = tmp_path_factory.mktemp("pair")
    write_latents(folder, text=pair_config(write_sdxl(folder / "text")))
    return folder


def pair_config(folder: Path) -> TextEncoderConfig:
    return encoder_config(TextEncoderKind.SDXL, folder)


def files_of(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def stored_moments(root: Path) -> np.ndarray:
    tars = sorted(root.rglob("*.tar"))
    return np.stack([np.load(io.BytesIO(row[MOMENTS])) for tar in tars for row in read_rows(str(tar))])


class CrashError(Exception):
    """What ends a worker."""


def crashing_stage(make: Callable[[], Stage], shards: int) -> Callable[[], Stage]:
    """Return a stage builder whose stage dies at its (shards + 1)-th shard, its files written but not committed."""

    def build() -> Stage:
        stage, left = make(), [shards]

        def call(task: ShardTask) -> ShardRecord:
            record = stage(task)
            left[0] -= 1
            if left[0] < 0:
                raise CrashError
            return record

        return call

    return build


def test_encode_crash_after_any_shard_and_resume_gives_the_same_bytes(made: Path, tmp_path: Path) -> None:
    config = latents_config(made, root=str(tmp_path / "latents"))
    plan = plan_latents(config)
    for shards in (0, 1):
        with pytest.raises(CrashError):
            carry_out(dataclasses.replace(plan, make_stage=crashing_stage(plan.make_stage, shards)))
    assert len(read_records(config.root)) == 1
    carry_out(plan)
    assert files_of(tmp_path / "latents") == files_of(made / "latents")
    assert verify(config.root) == []


def test_encode_statistics_do_not_depend_on_who_made_which_shard_when(made: Path, tmp_path: Path) -> None:
    plan = plan_latents(latents_config(made, root=str(tmp_path / "latents")))
    tasks = list(plan.tasks)
    random.Random(1).shuffle(tasks)
    claim_root(plan.root, plan.kind, plan.identity)
    carry_out(plan, tasks[:2])
    shuffled = carry_out(plan, tasks[2:])
    whole = load_manifest(str(made / "latents"))
    assert shuffled.summary == whole.summary
    assert shuffled.digest == whole.digest
    records = list(whole.shards)
    random.Random(2).shuffle(records)
    assert summarize(records, dataset_digest=str(whole.summary["dataset"])) == whole.summary


def test_encode_statistics_are_those_of_all_stored_moments_at_once(made: Path) -> None:
    means, log_variances = np.split(stored_moments(made / "latents").astype(np.float64), 2, axis=1)
    variances = np.exp(np.clip(log_variances, *LOG_VARIANCE_RANGE))
    summary = load_manifest(str(made / "latents")).summary
    np.testing.assert_allclose(summary["mean"], means.mean(axis=(0, 2, 3)), rtol=1e-12)
    std = np.sqrt(means.var(axis=(0, 2, 3)) + variances.mean(axis=(0, 2, 3)))
    np.testing.assert_allclose(summary["std"], std, rtol=1e-12)
    assert summary["min"] == means.min(axis=(0, 2, 3)).tolist()
    assert summary["max"] == means.max(axis=(0, 2, 3)).tolist()


def test_moment_statistics_do_not_depend_on_the_batches() -> None:
    moments = np.random.default_rng(1).normal(size=(700, 4, 3, 3)).astype(np.float16)
    for cuts in ([], [256], [1, 2, 255, 257, 600], list(range(0, 700, 32))):
        builder = StatisticsBuilder()
        for part in np.split(moments, cuts):
            builder.add(part)
        assert builder.total().to_dict() == statistics_of(moments).to_dict()


def test_moment_statistics_std_is_that_of_drawn_latents() -> None:
    rng = np.random.default_rng(0)
    moments = rng.normal([[[[1.0]], [[-0.5]]]], 1.0, (600, 2, 16, 16)).astype(np.float16)
    mean, log_variance = np.split(moments.astype(np.float64), 2, axis=1)
    drawn = mean + np.exp(log_variance / 2) * rng.standard_normal(mean.shape)
    found = statistics_of(moments)
    assert found.std[0] == pytest.approx(drawn.std(), rel=0.01)
    parts = merged([statistics_of(moments[:7]), statistics_of(moments[7:300]), statistics_of(moments[300:])])
    np.testing.assert_allclose(parts.std, found.std, rtol=1e-12)


def test_encode_moments_are_the_encoders_own_raw_ones(made: Path) -> None:
    model = write_autoencoder(made / "again").eval()
    rows = list(read_rows(str(made / "dataset" / "train" / "000000.tar")))
    with torch.no_grad():
        expected = model.encode(image_of_pixels([decode_pixels(row["png"]) for row in rows]))
    stored = [np.load(io.BytesIO(row[MOMENTS])) for row in read_rows(str(made / "latents" / "train" / "000000.tar"))]
    np.testing.assert_allclose(np.stack(stored), expected.numpy(), atol=1e-3)


def test_encode_tars_are_read_by_plain_webdataset(made: Path) -> None:
    tar = str(made / "latents" / "train" / "000000.tar")
    samples = list(webdataset.WebDataset(tar, shardshuffle=False).decode())
    source = [row["__key__"] for row in read_rows(str(made / "dataset" / "train" / "000000.tar"))]
    assert [sample["__key__"] for sample in samples] == source
    first = samples[0]
    assert first["moments.npy"].dtype == np.float16
    assert first["moments.npy"].shape == (4, 8, 8)
    assert first["txt"] == "red"
    assert first["json"]["captions"] == ["red", "a red square, number 0"]
    assert first["json"]["size"] == [30, 40]
    assert first["json"]["crops"] == [[0, 5, 30, 30]]  # top, left, height, width of what the dataset kept of it


def test_encode_text_table_holds_each_caption_once_and_the_empty_one_first(made: Path) -> None:
    encoder = TextEncoder(TextEncoderConfig(max_tokens=16), torch.device("cpu"))
    for tar in sorted((made / "latents").rglob("*.tar")):
        table = open_text_table(tar.with_suffix(".text.safetensors"))
        texts = [table.text(number) for number in range(len(table.offsets) - 1)]
        assert texts[0] == ""
        assert texts[1:] == sorted(set(texts[1:]) - {""})
        assert table.embedding(0).states.tobytes() == encoder.encode([""])[0].states.tobytes()
        for number, row in enumerate(read_rows(str(tar))):
            fact = json.loads(row["json"])
            chosen = table.choices[table.choice_offsets[number] : table.choice_offsets[number + 1]].tolist()
            assert chosen == fact["text_index"]
            assert [texts[caption] for caption in chosen] == fact["captions"]


def test_encode_text_table_of_an_encoder_without_pooled_output_is_the_six_tensors_it_always_was(made: Path) -> None:
    for tar in sorted((made / "latents").rglob("*.tar")):
        path = tar.with_suffix(".text.safetensors")
        stored = safetensors.numpy.load_file(path)
        assert sorted(stored) == ["choice_offsets", "choices", "letter_offsets", "letters", "offsets", "tokens"]
        assert safetensors.numpy.save(stored) == path.read_bytes()
    assert "pooled" not in load_manifest(str(made / "latents")).identity
    assert "pooled_width" not in load_manifest(str(made / "latents")).summary


def test_encode_text_table_holds_the_pooled_output_of_each_caption(made_with_pair: Path) -> None:
    manifest = load_manifest(str(made_with_pair / "latents"))
    assert manifest.identity["pooled"] == "text_embeds"
    assert (manifest.summary["text_width"], manifest.summary["pooled_width"]) == (80, 24)
    encoder = TextEncoder(pair_config(made_with_pair / "text"), torch.device("cpu"))
    for tar in sorted((made_with_pair / "latents").rglob("*.tar")):
        table = open_text_table(tar.with_suffix(".text.safetensors"))
        captions = [table.text(number) for number in range(len(table.offsets) - 1)]
        assert table.pooled.shape == (len(captions), 24)
        for number, own in enumerate([*encoder.encode([""]), *encoder.encode(captions[1:])]):
            stored = table.embedding(number)
            assert stored.states.tobytes() == own.states.tobytes()
            assert stored.pooled.tobytes() == own.pooled.tobytes()


def test_claim_root_of_latents_from_before_pooled_output_is_refused(made: Path, tmp_path: Path) -> None:
    text = encoder_config(TextEncoderKind.CLIP, write_clip(tmp_path / "text"))
    plan = plan_latents(latents_config(made, root=str(tmp_path / "latents"), text=text))
    before = {name: value for name, value in plan.identity.items() if name != "pooled"}
    claim_root(plan.root, plan.kind, before)
    with pytest.raises(ValueError, match='identity.pooled is null there, "pooler_output" here'):
        carry_out(plan)
    claim_root(plan.root, plan.kind, before)  # it is as it was


def test_encode_larger_image_is_scaled_down_to_the_crop(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset", sizes=(3,), image_size=20)
    model = write_autoencoder(tmp_path / "autoencoder").eval()
    carry_out(plan_latents(latents_config(tmp_path)))
    whole = Image.fromarray(decode_pixels(image_row(0, 20)["png"]))
    pixels = np.asarray(whole.resize((16, 16), Image.Resampling.BICUBIC))
    row = next(read_rows(str(tmp_path / "latents" / "train" / "000000.tar")))
    with torch.no_grad():
        expected = model.encode(image_of_pixels([pixels]))[0].numpy()
    np.testing.assert_allclose(np.load(io.BytesIO(row[MOMENTS])), expected, atol=1e-3)
    assert json.loads(row["json"])["crops"] == [[0, 5, 30, 30]]


@pytest.mark.parametrize("size, named", [(32, "more than the dataset's 16"), (15, "multiple of 2, got 15")])
def test_plan_image_size_that_does_not_fit_is_refused(made: Path, size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        plan_latents(latents_config(made, image_size=size))


def published(root: Path) -> list[str]:
    return [name for name in files_of(root) if not name.endswith("identity.json")]


def broken(model: Autoencoder, fault: float, layer: str) -> Autoencoder:
    with torch.no_grad():
        model.get_submodule(layer).bias[0] = fault
    return model


@pytest.mark.parametrize(
    "fault, layer, named",
    [
        (float("nan"), "quant_conv", r"\d+ NaN, 0 infinite, 0 saturated of \d+ values in 7 rows, first [0-9a-f]{24}"),
        (float("inf"), "quant_conv", "448 infinite"),
        (1e6, "quant_conv", "0 NaN, 0 infinite, 448 saturated"),
        (float("nan"), "decoder.conv_out", "mean PSNR of nan dB"),
    ],
)
def test_gate_autoencoder_with_broken_weights_is_refused_and_nothing_published(
    tmp_path: Path, fault: float, layer: str, named: str
) -> None:
    write_dataset(tmp_path / "dataset")
    save_autoencoder(broken(write_autoencoder(tmp_path / "autoencoder"), fault, layer), str(tmp_path / "autoencoder"))
    with pytest.raises(ValueError, match=f"shard train/000000 fails its gate: .*{named}"):
        carry_out(plan_latents(latents_config(tmp_path)))
    assert published(tmp_path / "latents") == []


def test_gate_reconstruction_below_the_floor_is_refused_with_its_figures(made: Path, tmp_path: Path) -> None:
    config = latents_config(made, root=str(tmp_path / "latents"), gate=GateConfig(min_psnr=60.0, rows=3))
    with pytest.raises(
        ValueError, match=r"mean PSNR of \d+\.\d\d dB .* the least is 60.00; rows: ([0-9a-f]{24} \S+ ?){3}"
    ):
        carry_out(plan_latents(config))
    assert published(tmp_path / "latents") == []


def test_gate_floor_is_the_autoencoders_own_evaluation_less_the_margin(made: Path, tmp_path: Path) -> None:
    autoencoder = tmp_path / "autoencoder"
    write_autoencoder(autoencoder)
    (autoencoder / "evaluation.json").write_text(json.dumps({"validation_psnr_db": 90.5}))
    config = latents_config(made, root=str(tmp_path / "latents"), autoencoder=str(autoencoder))
    with pytest.raises(ValueError, match=r"mean PSNR of \d+\.\d\d dB .* the least is 84\.50; rows"):
        carry_out(plan_latents(dataclasses.replace(config, gate=GateConfig())))
    with pytest.raises(ValueError, match="the least is 40.00"):
        carry_out(plan_latents(dataclasses.replace(config, gate=GateConfig(min_psnr=40.0))))
    (autoencoder / "evaluation.json").unlink()
    with pytest.raises(ValueError, match="the least is 15.00"):
        carry_out(plan_latents(dataclasses.replace(config, gate=GateConfig())))
    assert published(tmp_path / "latents") == []


@pytest.mark.parametrize("bounds", [{"std_range": (50.0, 1e3)}, {"max_mean": 1e-6}])
def test_gate_implausible_latents_are_refused_naming_the_channel(made: Path, tmp_path: Path, bounds: dict) -> None:
    config = latents_config(made, root=str(tmp_path / "latents"), gate=GateConfig(min_psnr=-100.0, **bounds))
    with pytest.raises(ValueError, match=r"train/000000 fails its gate: channel 0 has mean \S+ and standard deviation"):
        carry_out(plan_latents(config))
    assert published(tmp_path / "latents") == []


def test_gate_finds_what_overflows_in_fp16_and_not_in_fp32(tmp_path: Path) -> None:
    """Large features inside, plain moments at the end: fp32 holds both."""
    write_dataset(tmp_path / "dataset")
    model = write_autoencoder(tmp_path / "autoencoder")
    with torch.no_grad():
        model.encoder.conv_in.weight.mul_(1e6)
    save_autoencoder(model, str(tmp_path / "autoencoder"))
    carry_out(plan_latents(latents_config(tmp_path)))
    config = latents_config(tmp_path, root=str(tmp_path / "half"), precision=Precision.FP16)
    with pytest.raises(ValueError, match=r"\d+ NaN, .* an encoder in fp16 overflows where fp32 or bf16 does not"):
        carry_out(plan_latents(config))
    assert published(tmp_path / "half") == []


@pytest.mark.parametrize("precision, far", [(Precision.BF16, 0.05), (Precision.FP16, 0.01)])
def test_encode_in_half_precision_is_near_to_fp32(made: Path, tmp_path: Path, precision: Precision, far: float) -> None:
    carry_out(plan_latents(latents_config(made, root=str(tmp_path / "latents"), precision=precision)))
    np.testing.assert_allclose(stored_moments(tmp_path / "latents"), stored_moments(made / "latents"), atol=far)


def test_encode_tar_with_other_rows_than_its_manifest_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset")
    write_autoencoder(tmp_path / "autoencoder")
    plan = plan_latents(latents_config(tmp_path))
    write_shard(str(tmp_path / "dataset"), Split.TRAIN, "000000", [image_row(number) for number in range(3)])
    with pytest.raises(ValueError, match="000000.tar has 3 rows, its manifest says 7"):
        carry_out(plan)


def test_encode_flip_holds_the_moments_of_the_mirrored_image(tmp_path: Path) -> None:
    write_latents(tmp_path, flip=True)
    model = write_autoencoder(tmp_path / "again").eval()
    row = next(read_rows(str(tmp_path / "latents" / "train" / "000000.tar")))
    with torch.no_grad():
        mirrored = model.encode(image_of_pixels([decode_pixels(image_row(0)["png"])[:, ::-1]]))[0].numpy()
    np.testing.assert_allclose(np.load(io.BytesIO(row["moments_flipped.npy"])), mirrored, atol=1e-3)


def test_encode_autoencoder_that_changed_since_the_plan_was_made_is_refused(tmp_path: Path) -> None:
    write_dataset(tmp_path / "dataset")
    write_autoencoder(tmp_path / "autoencoder")
    plan = plan_latents(latents_config(tmp_path))
    write_autoencoder(tmp_path / "autoencoder", seed=1)
    with pytest.raises(ValueError, match="autoencoder has digest [0-9a-f]{64}, it had [0-9a-f]{64} when the job began"):
        carry_out(plan)
    assert published(tmp_path / "latents") == []


def test_claim_root_made_with_another_autoencoder_is_refused(made: Path, tmp_path: Path) -> None:
    write_autoencoder(tmp_path / "other", seed=1)
    config = latents_config(made, autoencoder=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="autoencoder is"):
        carry_out(plan_latents(config))
    with pytest.raises(ValueError, match="precision is"):
        carry_out(plan_latents(latents_config(made, precision=Precision.BF16)))


def test_check_latents_accepts_its_own_networks_and_refuses_others_with_both_digests(made: Path) -> None:
    manifest: Manifest = load_manifest(str(made / "latents"))
    model = write_autoencoder(made / "again")
    ours = weights_digest(model.state_dict(), model.config)
    text = text_encoder_digest(TextEncoderConfig(max_tokens=16))
    check_latents(manifest, ours, text)
    with pytest.raises(ValueError, match=f"autoencoder {ours}, the one given is abc"):
        check_latents(manifest, "abc", text)
    with pytest.raises(ValueError, match=f"text_encoder {text}, the one given is def"):
        check_latents(manifest, ours, "def")
    with pytest.raises(ValueError, match="'dataset'"):
        check_latents(load_manifest(str(made / "dataset")), ours, text)


def test_summary_names_dataset_counts_and_shapes(made: Path) -> None:
    summary = load_manifest(str(made / "latents")).summary
    assert summary["dataset"] == load_manifest(str(made / "dataset")).digest
    assert summary["num_rows"] == {"train": 18, "validation": 4}
    rows = {"train": 18, "validation": 4}
    assert summary["shapes"] == [{"image_size": 16, "size": [16, 16], "moment_shape": [4, 8, 8], "num_rows": rows}]
    assert summary["text_width"] == 384
    assert summary["num_values_per_channel"] == 22 * (IMAGE_SIZE // 2) ** 2
