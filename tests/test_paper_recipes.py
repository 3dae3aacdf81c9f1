"""Laws of the paper's recipes: each network fits what it is told and its first stage, to the parameter."""

from __future__ import annotations

import pytest

from jobs.command_line import from_command_line
from jobs.recipes import PRECOMPUTE_LATENTS, TRAIN_AUTOENCODER, TRAIN_LDM, paper
from jobs.recipes.paper import MODELS
from jobs.wiring.train_autoencoder import TrainAutoencoderConfig
from jobs.wiring.train_ldm import TrainLdmConfig, num_parameters
from ldm.autoencoder import zoo as autoencoders
from ldm.conditioning.conditioner import TextUse
from ldm.denoiser import check_denoiser
from pipeline.latent_config import TextStorage
from pipeline.order import check_world

# Parameters of the UNet, those of what reads the conditions, and the first stage: the paper's counts, from its configs.
CLASS_TOKENS, MAP_MIX = 1001 * 512, 182 * 3
LAYOUT_READER = 58_858_496 - 8_192 * 513
FIRST_STAGES = {
    "celebahq_ldm_vq_4": (274_056_163, autoencoders.vq_f4),
    "ffhq_ldm_vq_4": (274_056_163, autoencoders.vq_f4),
    "lsun_bedrooms_ldm_vq_4": (274_056_163, autoencoders.vq_f4),
    "lsun_churches_ldm_kl_8": (294_966_916, autoencoders.kl_f8),
    "cin_ldm_vq_f8": (394_984_196 + CLASS_TOKENS, autoencoders.vq_f8),
    "cin256_v2": (400_920_579 + CLASS_TOKENS, autoencoders.vq_f4),
    "text2img256": (403_623_939 + 166_590_080, autoencoders.vq_f4),
    "txt2img_1p4b": (872_300_484 + 581_994_042 - 30_522 * 1281, autoencoders.kl_f8),
    "stable_diffusion_v1": (859_520_964, autoencoders.kl_f8),
    "layout2img_openimages256": (246_277_379 + LAYOUT_READER, autoencoders.vq_f4),
    "semantic_synthesis256": (215_229_315 + MAP_MIX, autoencoders.vq_f4),
    "semantic_synthesis512": (215_229_315 + MAP_MIX, autoencoders.vq_f4),
    "inpainting_big": (387_245_827, autoencoders.vq_f4_noattn),
    "bsr_sr": (113_622_563, autoencoders.vq_f4),
}


def test_every_model_of_the_table_is_a_recipe_of_both_jobs():
    assert set(FIRST_STAGES) == set(MODELS) <= set(TRAIN_LDM)
    assert set(MODELS) <= set(PRECOMPUTE_LATENTS)


@pytest.mark.parametrize("name", FIRST_STAGES)
def test_recipe_fits_its_first_stage_and_has_the_papers_parameters(name):
    count, first_stage = FIRST_STAGES[name]
    config = TRAIN_LDM[name]("home")
    latents = PRECOMPUTE_LATENTS[name]("home")
    assert num_parameters(config) == count
    text_width = config.unet.context_width if config.conditioning.text is TextUse.FROZEN else 384
    check_denoiser(
        config.unet,
        config.conditioning,
        latent_channels=first_stage().latent_channels,
        text_width=text_width or 0,
        pooled_width=None,
    )
    assert (latents.text_storage is TextStorage.ONLINE) == (config.conditioning.text is not TextUse.FROZEN)
    assert (latents.root, latents.autoencoder, latents.text) == (config.latents, config.autoencoder, config.text)
    check_world(world=config.launch.num_workers, num_streams=config.num_streams, batch_size=config.batch_size)
    config.engine.micro_batches(config.batch_size // config.launch.num_workers)
    assert config.num_streams >= config.batch_size // 32  # no fewer streams than anyone has GPUs for such a batch
    assert config.ema.half_life_samples == pytest.approx(6931 * config.batch_size, rel=1e-3)
    assert TrainLdmConfig.from_yaml(config.to_yaml()) == config


@pytest.mark.parametrize("name", paper.FIRST_STAGES)
def test_first_stage_of_the_paper_learns_at_its_rate_and_keeps_its_checkpoints_whole(name):
    config = TRAIN_AUTOENCODER[name]("home")
    assert config.autoencoder == getattr(autoencoders, name)()
    assert config.optim.lr == pytest.approx(4.5e-6 * config.batch_size)
    assert config.loss.adversarial_start % config.batch_size == 0  # the paper's counts are steps of the autoencoder
    assert TrainAutoencoderConfig.from_yaml(config.to_yaml()) == config


def test_recipe_of_the_paper_is_changed_field_by_field_on_the_command_line():
    line = ["cin256_v2", "--home", "h", "--conditioning.num-classes", "10", "--conditioning.class-dropout", "0.2"]
    config = from_command_line("train_ldm", TRAIN_LDM, line).config
    assert (config.conditioning.num_classes, config.conditioning.class_dropout) == (10, 0.2)
