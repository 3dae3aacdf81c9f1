"""CompVis' checkpoints against a network that is written in their names, and against diffusers' own conversion."""

from __future__ import annotations

import pickle
import zipfile
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import safetensors.torch
import torch
from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

from ldm.autoencoder import zoo
from ldm.autoencoder.model import Autoencoder
from ldm.autoencoder.regularizer import LatentKind, mode
from ldm.first_stage import load_autoencoder
from ldm.interop import compvis
from ldm.interop.diffusers import save_autoencoder
from tests.compvis_network import CompVisNetwork

KL = {"ch_mult": (1, 2), "z_channels": 4, "embed_dim": 4}
KINDS = {
    "kl": KL,
    "kl with attention inside levels": {**KL, "ch_mult": (1, 1, 2), "attn_resolutions": (8, 4), "num_res_blocks": 2},
    "vq": {"n_embed": 24, "ch_mult": (1, 2, 2)},
    "vq without attention": {"n_embed": 24, "attn_type": "none", "num_res_blocks": 2},
    "vq with narrow codes": {"n_embed": 24, "z_channels": 6, "embed_dim": 2, "attn_resolutions": (16,)},
}


@pytest.fixture(params=KINDS)
def theirs(request: pytest.FixtureRequest) -> CompVisNetwork:
    return CompVisNetwork(**KINDS[request.param])


def image() -> torch.Tensor:
    return torch.rand(2, 3, 16, 24, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


def assert_same(ours: Autoencoder, theirs: CompVisNetwork) -> None:
    """In float64 only the order of sums is left to differ."""
    ours = ours.double().eval()
    with torch.no_grad():
        moments = theirs.encode(image())
        torch.testing.assert_close(ours.encode(image()), moments, rtol=1e-9, atol=1e-9)
        latent = moments[:, : theirs.embed_dim]
        decoded = theirs.decode(latent)
        assert decoded.std() > 0.1
        torch.testing.assert_close(ours.decode(latent), decoded, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(ours.reconstruct(image()), decoded, rtol=1e-9, atol=1e-9)


def write(folder: Path, theirs: CompVisNetwork, name: str = "model.safetensors", config: str | None = None) -> str:
    safetensors.torch.save_file(theirs.state_dict, folder / name)
    if config is not None:
        (folder / "config.yaml").write_text(config)
    return str(folder / name)


def test_checkpoint_with_its_yaml_computes_what_its_names_say(theirs: CompVisNetwork, tmp_path: Path) -> None:
    assert_same(load_autoencoder(write(tmp_path, theirs, config=theirs.yaml())), theirs)


def test_checkpoint_without_yaml_has_the_same_config_as_with_it_and_says_what_it_could_not_know(
    theirs: CompVisNetwork, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = write(tmp_path, theirs)
    by_shapes = load_autoencoder(path)
    assert_same(by_shapes, theirs)
    assert f"{path} has no YAML beside it" in caplog.text
    assert "granted: 32 groups a normalisation, no tanh behind the decoder" in caplog.text
    assert by_shapes.config == compvis.config_of_yaml(theirs.yaml(), path)


def test_checkpoint_saved_in_diffusers_layout_loads_back_the_same(theirs: CompVisNetwork, tmp_path: Path) -> None:
    model = load_autoencoder(write(tmp_path, theirs))
    save_autoencoder(model, str(tmp_path / "ours"))
    again = load_autoencoder(str(tmp_path / "ours"))
    assert again.config == model.config
    assert_same(again, theirs)


@pytest.mark.parametrize("name", ["model.ckpt", "model.pt"])
def test_first_stage_of_a_whole_model_under_state_dict_loads(theirs: CompVisNetwork, name: str, tmp_path: Path) -> None:
    whole = {f"first_stage_model.{key}": tensor for key, tensor in theirs.state_dict.items()}
    whole |= {"model.diffusion_model.out.2.weight": torch.zeros(4, 4), "betas": torch.zeros(1000)}
    whole |= {"model_ema.num_updates": torch.tensor(3), "cond_stage_model.encoder.conv_in.weight": torch.zeros(1)}
    torch.save({"state_dict": whole, "global_step": 7, "epoch": 1}, tmp_path / name)
    (tmp_path / "model.yaml").write_text(theirs.yaml(inside_ldm=True))
    (tmp_path / "config.yaml").write_text("other: true")  # the one of the same name wins
    assert_same(load_autoencoder(str(tmp_path / name)), theirs)


def test_discriminator_and_averages_of_a_training_are_left_out(tmp_path: Path) -> None:
    theirs = CompVisNetwork(**KL)
    more = {"loss.discriminator.main.0.weight": torch.zeros(1), "loss.logvar": torch.zeros(())}
    more["model_ema.encoderconv_inweight"] = torch.zeros(1)
    safetensors.torch.save_file(theirs.state_dict | more, tmp_path / "model.safetensors")
    assert_same(load_autoencoder(str(tmp_path / "model.safetensors")), theirs)


PUBLISHED = {"ch": 128, "num_res_blocks": 2, "resolution": 256, "device": "meta"}
F8, F16 = {"ch_mult": (1, 2, 2, 4), "attn_resolutions": (32,)}, {"ch_mult": (1, 1, 2, 2, 4), "attn_resolutions": (16,)}
F32 = {"ch_mult": (1, 1, 2, 2, 4, 4), "attn_resolutions": (16, 8)}
ZOO = {
    "kl_f4": ({"z_channels": 3, "embed_dim": 3, "ch_mult": (1, 2, 4)}, 55_312_063),
    "kl_f8": ({"z_channels": 4, "embed_dim": 4, "ch_mult": (1, 2, 4, 4)}, 83_653_863),
    "kl_f16": ({"z_channels": 16, "embed_dim": 16, **F16}, 69_610_963),
    "kl_f32": ({"z_channels": 64, "embed_dim": 64, **F32}, 103_880_131),
    "vq_f4": ({"n_embed": 8192, "ch_mult": (1, 2, 4)}, 55_322_782),
    "vq_f4_noattn": ({"n_embed": 8192, "ch_mult": (1, 2, 4), "attn_type": "none"}, 53_219_486),
    "vq_f8": ({"n_embed": 16384, "z_channels": 4, "embed_dim": 4, **F8}, 67_717_295),
    "vq_f8_n256": ({"n_embed": 256, "z_channels": 4, "embed_dim": 4, **F8}, 67_652_783),
    "vq_f16": ({"n_embed": 16384, "z_channels": 8, "embed_dim": 8, **F16}, 69_593_371),
}
"""The published YAMLs, and how many parameters their networks have."""


@pytest.mark.parametrize("name", ZOO)
def test_published_yaml_and_its_tensors_both_give_the_zoo_config(name: str) -> None:
    described, num_parameters = ZOO[name]
    theirs = CompVisNetwork(**PUBLISHED, **described)
    shapes = {key: tuple(tensor.shape) for key, tensor in theirs.weights.items()}
    assert sum(tensor.numel() for tensor in theirs.weights.values()) == num_parameters
    config = getattr(zoo, name)()
    assert compvis.config_of_yaml(theirs.yaml(), name) == config
    assert compvis.config_of_shapes(shapes, name) == config
    with torch.device("meta"):
        ours = Autoencoder(config).state_dict()
    last = len(config.widths) - 1
    numbers = {compvis.renamed(key, last): tensor.numel() for key, tensor in theirs.weights.items()}
    assert numbers == {key: tensor.numel() for key, tensor in ours.items()}


def test_kl_checkpoint_agrees_with_diffusers_own_conversion(tmp_path: Path) -> None:
    """Of the middle's attention only: that conversion knows no other."""
    theirs = CompVisNetwork(**KL)
    ours = load_autoencoder(write(tmp_path, theirs)).eval()
    save_autoencoder(ours, str(tmp_path / "ours"))
    config = diffusers.AutoencoderKL.load_config(str(tmp_path / "ours"))
    oracle = diffusers.AutoencoderKL.from_config(config).eval()
    oracle.load_state_dict(convert_ldm_vae_checkpoint(dict(theirs.state_dict), config))
    pixels = image().float()
    with torch.no_grad():
        posterior = oracle.encode(pixels).latent_dist
        torch.testing.assert_close(ours.encode(pixels), posterior.parameters, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(ours.decode(posterior.mean), oracle.decode(posterior.mean).sample, atol=1e-5, rtol=0)


def test_kind_follows_the_codebook(tmp_path: Path) -> None:
    vq, kl = CompVisNetwork(**KINDS["vq"]), CompVisNetwork(**KL)
    loaded = [load_autoencoder(write(tmp_path, each, f"{i}.safetensors")) for i, each in enumerate((vq, kl))]
    assert [model.config.latent_kind for model in loaded] == [LatentKind.VQ_LATENTS, LatentKind.KL_MOMENTS]
    assert [model.config.moment_channels for model in loaded] == [3, 8]
    moments = torch.zeros(1, 8, 2, 2)
    assert mode(moments).shape[1] == loaded[1].config.latent_channels


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("in_channels: 3", "in_channels: 4", "ddconfig.in_channels must be 3, got 4"),
        ("dropout: 0.0", "tanh_out: true", "ddconfig.tanh_out must be False, got True"),
        ("dropout: 0.0", "attn_type: linear", "ddconfig.attn_type must be 'vanilla' or .*'none', got 'linear'"),
        ("double_z: true", "double_z: false", "double_z goes with KL and n_embed with VQ"),
        ("z_channels: 4", "zed_channels: 4", "lacks ddconfig.z_channels"),
        ("embed_dim: 4", "embed_dim: 5", "embed_dim must be z_channels for KL, got 5 and 4"),
        ("ch: 32", "ch: 64", r"misshapen: .*expected \(64,"),
        ("ch_mult:", "ch_mult: {", "no YAML"),
        ("params:", "parameters:", "must describe the autoencoder under model.params"),
    ],
)
def test_yaml_of_another_network_is_refused_naming_what_differs(
    old: str, new: str, message: str, tmp_path: Path
) -> None:
    theirs = CompVisNetwork(**KL)
    assert old in theirs.yaml()
    path = write(tmp_path, theirs, config=theirs.yaml().replace(old, new))
    with pytest.raises(ValueError, match=message) as refusal:
        load_autoencoder(path)
    assert path in str(refusal.value)


def test_attention_of_a_yaml_is_placed_by_its_resolution(tmp_path: Path) -> None:
    theirs = CompVisNetwork(**KINDS["kl with attention inside levels"])
    text = theirs.yaml()
    assert compvis.config_of_yaml(text, "x").attention_factors == (2, 4)
    larger = text.replace("resolution: 16", "resolution: 32")
    assert compvis.config_of_yaml(larger, "x").attention_factors == (4,)
    with pytest.raises(ValueError, match="lacks ddconfig.resolution"):
        compvis.config_of_yaml(text.replace("resolution: 16", "other: 1"), "x")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"encoder.conv_out.weight": torch.zeros(4, 64, 3, 3)}, "KL ends with 8 channels, got 4"),
        ({"decoder.conv_in.weight": None}, "its tensors show no autoencoder: 'decoder.conv_in.weight'"),
        ({"encoder.mid.block_1.norm1.bias": None}, "1 missing: encoder.mid_block.resnets.0.norm1.bias"),
        ({"stranger": torch.zeros(1)}, "1 unexpected: stranger"),
        ({"encoder.conv_in.weight": None}, "no autoencoder in the layout of CompVis: no encoder.conv_in.weight"),
    ],
)
def test_tensors_of_another_network_are_refused_naming_what_differs(
    change: dict[str, torch.Tensor | None], message: str, tmp_path: Path
) -> None:
    weights = CompVisNetwork(**KL).state_dict | change
    path = tmp_path / "model.safetensors"
    safetensors.torch.save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path)
    with pytest.raises(ValueError, match=message) as refusal:
        load_autoencoder(str(path))
    assert str(path) in str(refusal.value)


class Bomb:
    """Runs code where a pickle of it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.marker,)  # type: ignore[return-value]


def test_pickle_that_runs_code_is_refused_unrun_and_the_way_out_is_named(tmp_path: Path) -> None:
    path, marker = tmp_path / "model.ckpt", tmp_path / "marker"
    torch.save({"state_dict": CompVisNetwork(**KL).state_dict, "callbacks": Bomb(marker)}, path)
    with pytest.raises(
        ValueError, match=r"model.ckpt cannot be loaded .*: Unsupported global: GLOBAL \S+\. If you .*save_file"
    ):
        load_autoencoder(str(path))
    assert not marker.exists()


def test_damaged_files_are_refused_with_their_names(tmp_path: Path) -> None:
    good = tmp_path / "good.ckpt"
    torch.save(CompVisNetwork(**KL).state_dict, good)
    whole = good.read_bytes()
    texts = {
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "page": b"<html>not found</html>",
        "pickle": pickle.dumps([1, 2]),
    }
    for name, content in texts.items():
        path = tmp_path / f"{name}.ckpt"
        path.write_bytes(content)
        with pytest.raises(ValueError, match=f"{name}.ckpt"):
            load_autoencoder(str(path))
    with zipfile.ZipFile(tmp_path / "zip.ckpt", "w") as archive:
        archive.writestr("a.txt", "a")
    with pytest.raises(ValueError, match=r"zip.ckpt"):
        load_autoencoder(str(tmp_path / "zip.ckpt"))
    torch.save(torch.zeros(3), tmp_path / "tensor.pt")
    with pytest.raises(ValueError, match=r"must hold named tensors, got Tensor"):
        load_autoencoder(str(tmp_path / "tensor.pt"))
    torch.save({"weights": torch.zeros(1), "step": 3}, tmp_path / "mixed.pt")
    with pytest.raises(ValueError, match=r"nothing but tensors, got others under step"):
        load_autoencoder(str(tmp_path / "mixed.pt"))
    with pytest.raises(FileNotFoundError, match=r"no autoencoder at .*none.ckpt: no such file"):
        load_autoencoder(str(tmp_path / "none.ckpt"))


def test_half_precision_checkpoint_loads_as_single_precision(tmp_path: Path) -> None:
    theirs = CompVisNetwork(**KL)
    halves = {name: tensor.half() for name, tensor in theirs.state_dict.items()}
    safetensors.torch.save_file(halves, tmp_path / "half.safetensors")
    loaded = load_autoencoder(str(tmp_path / "half.safetensors"))
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {torch.float32}
    rounded = replace(theirs, weights={name: tensor.double() for name, tensor in halves.items()})
    assert_same(loaded, rounded)
