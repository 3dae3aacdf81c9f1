"""The forecast of stage 1's memory: two networks with an optimizer each, and a perceptual one that is frozen.

    autoencoder      its pass goes through the perceptual network and the discriminator, both frozen
    discriminator    its pass comes after, while the autoencoder's gradients still lie beside its weights

Letters: b batch, c latent channel, h latent row, w latent column.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from ldm.autoencoder.codebook import codebook_loss
from ldm.autoencoder.model import Autoencoder, AutoencoderConfig, Reconstruction
from ldm.autoencoder.regularizer import Regularizer
from ldm.losses.autoencoder import adaptive_weight, discriminator_loss, generator_loss, gradient_penalty, pixel_loss
from ldm.losses.discriminator import Discriminator
from ldm.losses.perceptual import perceptual_distance
from ldm.training.activations import Pass, traced
from ldm.training.flops import counted_flops
from ldm.training.memory import (
    FP32,
    MOMENTS,
    UNSHARDED,
    Memory,
    Sharding,
    Step,
    combined,
    forecast,
    read_sharding,
    resting,
    unit_of,
)
from ldm.training.reconstruction_config import ReconstructionConfig

GIGA = 1e9
LEAST_FILE = "infra/deepspeed/zero2.json"
"""The DeepSpeed file under which a rank needs least, of those that stage 1 goes with."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reconstructing:
    """A stage-1 training, as far as its memory goes.

    Attributes:
        autoencoder: the network.
        loss: its terms.
        side: of the images.
        has_averages: whether moving averages are kept.
        is_bf16: whether the passes compute in bfloat16.
        num_ranks: ranks that train together.
        num_rows: rows of a batch on one rank.
        sharding: how the engines spread the networks over ranks.
        is_on_cpu: whether they train on CPUs.
    """

    autoencoder: AutoencoderConfig
    loss: ReconstructionConfig
    side: int
    has_averages: bool
    is_bf16: bool
    num_ranks: int
    num_rows: int
    sharding: Sharding = UNSHARDED
    is_on_cpu: bool = True


class _Judged(nn.Module):
    """The autoencoder with what judges its reconstructions, which is frozen."""

    def __init__(self, network: Autoencoder, perceptual: nn.Module, judge: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.perceptual = perceptual.requires_grad_(False)
        self.judge = judge.requires_grad_(False)

    def forward(self, images: Tensor, noise: Tensor | None, loss: ReconstructionConfig) -> Tensor:
        made: Reconstruction = self.network(images, noise)
        shown = loss.perceptual_rows or len(images)
        reconstruction = pixel_loss(loss.pixel_loss, images, made.image)
        if loss.perceptual_weight:
            reconstruction = reconstruction + self.perceptual(images[:shown], made.image[:shown]).mean()
        whole = reconstruction
        if made.kl is not None:
            whole = whole + made.kl.mean()
        if made.quantized is not None:
            whole = whole + codebook_loss(loss.codebook, made.quantized)
        if not loss.adversarial_weight:
            return whole
        judged = generator_loss(self.judge(made.image))
        return whole + adaptive_weight(reconstruction, judged, self.network.last_layer) * judged


@lru_cache(maxsize=16)
def autoencoder_pass(training: Reconstructing) -> Pass:
    """Return what the autoencoder's forward and backward take."""
    build = partial(_judged, training, perceptual_distance(training.loss.perceptual))
    loss = partial(_autoencoder_loss, training)
    return traced(build, loss, weights=torch.float32, autocast=_autocast(training))


@lru_cache(maxsize=16)
def discriminator_pass(training: Reconstructing) -> Pass:
    """Return what the discriminator's forward and backward take."""
    build, loss = partial(_discriminator, training), partial(_discriminator_loss, training)
    return traced(build, loss, weights=torch.float32, autocast=_autocast(training))


@lru_cache(maxsize=16)
def row_flops(training: Reconstructing, is_adversarial: bool) -> float:
    """Return the FLOPs of a row's passes in a step, before the discriminator takes part or with it."""
    loss = replace(training.loss, adversarial_weight=training.loss.adversarial_weight * is_adversarial)
    counted = replace(training, loss=loss)
    with torch.random.fork_rng(devices=[]):
        perceptual = perceptual_distance(loss.perceptual)
    flops = counted_flops(partial(_judged, counted, perceptual), partial(_autoencoder_loss, counted))
    if is_adversarial:
        flops += counted_flops(partial(_discriminator, counted), partial(_discriminator_loss, counted))
    return flops / training.num_rows


def _judged(training: Reconstructing, perceptual: nn.Module) -> nn.Module:
    return _Judged(Autoencoder(training.autoencoder), perceptual, _discriminator(training))


def _autoencoder_loss(training: Reconstructing, judged: nn.Module) -> Tensor:
    # Channels last, as it is trained: copies to another layout are a part of what is alive.
    images = _images(training).contiguous(memory_format=torch.channels_last)
    config = training.autoencoder
    noise = torch.empty(training.num_rows, config.latent_channels, *(training.side // config.factor,) * 2)
    value: Tensor = judged(images, None if config.regularizer is Regularizer.VQ else noise, training.loss)
    return value


def _discriminator_loss(training: Reconstructing, judge: nn.Module) -> Tensor:
    config = training.loss
    images = _images(training).requires_grad_(config.r1_weight > 0)
    real, fake = judge(images, _images(training)).chunk(2)
    value = discriminator_loss(config.adversarial_loss, real, fake)
    return value + gradient_penalty(real, images) if config.r1_weight else value


def needed(training: Reconstructing) -> Memory:
    """Return what a rank holds at the moment of a step when that is most."""
    alone = replace(training, sharding=UNSHARDED, num_ranks=1)  # a pass is the same under every sharding
    passes = autoencoder_pass(alone), discriminator_pass(alone)
    return (_unsharded if training.sharding.stage is None else _sharded)(training, *passes)


def _sharded(training: Reconstructing, passed: Pass, judging: Pass) -> Memory:
    """Return the most of both networks' steps, each beside what the other holds meanwhile."""
    sharding = training.sharding
    step = Step(
        passed=passed,
        num_ranks=training.num_ranks,
        num_micro_batches=1,
        weight_bytes=FP32,
        num_averages=int(training.has_averages),
        is_on_cpu=training.is_on_cpu,
    )
    judges = replace(step, passed=judging)
    twice = judging.num_weights * FP32 + judging.frozen_bytes  # it is among the autoencoder's frozen ones too
    moments = [(step, judges, "autoencoder"), (judges, step, "discriminator")]
    found = [
        replace(both, moment=f"{name}, {both.moment}", weights=both.weights - twice)
        for moving, still, name in moments[: 2 if training.loss.adversarial_weight > 0 else 1]
        for both in [combined(forecast(sharding, moving), resting(sharding, still))]
    ]
    return max(found, key=lambda memory: memory.total)


def _unsharded(training: Reconstructing, passed: Pass, judging: Pass) -> Memory:
    is_adversarial = training.loss.adversarial_weight > 0
    own, other = passed.num_weights * FP32, judging.num_weights * FP32
    moved = passed.num_weights + (judging.num_weights if is_adversarial else 0)
    always = {
        "weights": own + passed.frozen_bytes,  # the discriminator is among the frozen ones
        "optimizer": moved * MOMENTS,
        "averages": (own + other) * training.has_averages,
        "buffers": own + other if training.num_ranks > 1 else 0,
    }
    left = other if is_adversarial else 0
    first = passed.peak_with_gradients_bytes - passed.peak_bytes
    moments = [
        Memory(moment="autoencoder", gradients=first + left, activations=passed.peak_bytes, **always),
        Memory(moment="update", gradients=own + left, **always),
    ]
    if is_adversarial:
        second = judging.peak_with_gradients_bytes - judging.peak_bytes
        moments.append(Memory(moment="discriminator", gradients=own + second, activations=judging.peak_bytes, **always))
    return max(moments, key=lambda memory: memory.total)


def described(training: Reconstructing, there: int) -> str:
    """Return the forecast as lines of a description.

    Args:
        training: what is forecast.
        there: bytes that a rank has, as far as this machine tells.
    """
    memory = needed(training)
    names = ("weights", "gradients", "optimizer", "averages", "buffers", "activations")
    unit, size = unit_of(memory.device)
    parts = ", ".join(f"{name} {getattr(memory, name) / size:.2f}" for name in names)
    return (
        f"memory    {memory.device / size:.2f} {unit} of a rank at the fullest moment of a step ({memory.moment}):\n"
        f"          {parts}\n"
        f"there     {there / GIGA:.2f} GB a rank, free on this machine now"
    )


def advice(training: Reconstructing) -> tuple[str, ...]:
    """Return what would need less, in the order in which to try it."""
    ways = [] if training.is_bf16 else ["--engine.precision bf16, where the hardware has it"]
    if training.num_rows > 1:
        ways += ["more workers, or a smaller --batch-size: it is divided among them, and rows are most of it"]
    if training.loss.perceptual_weight and training.loss.perceptual_rows != 1:
        ways += ["fewer --loss.perceptual-rows"]
    goes_with_stages = not training.is_bf16 and not training.loss.codebook.moves_trained_codes
    if training.num_ranks > 1 and goes_with_stages and (training.sharding.stage or 0) < 2:
        less = needed(replace(training, sharding=read_sharding(LEAST_FILE))).device
        if less < needed(training).device:
            ways += [f"--engine.kind deepspeed --engine.zero-config {LEAST_FILE}: {less / GIGA:.1f} GB"]
    return (*ways, "devices with more memory, or a smaller network")


def _images(training: Reconstructing) -> Tensor:
    return torch.empty(training.num_rows, 3, training.side, training.side)


def _discriminator(training: Reconstructing) -> Discriminator:
    return Discriminator(training.loss.discriminator_channels, training.loss.discriminator_layers)


def _autocast(training: Reconstructing) -> torch.dtype | None:
    return torch.bfloat16 if training.is_bf16 else None
