"""The forecast of a denoiser's memory: its pass traced on data without numbers, under every engine and DeepSpeed file.

So are its FLOPs counted.

Nothing is read of the data but its shapes, and nothing is taken of the memory that it is about.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from jobs.session import PROJECT
from ldm.conditioning.conditioner import ConditioningConfig, TextUse
from ldm.denoiser import build_denoiser
from ldm.precision import Precision
from ldm.training.activations import Pass, traced
from ldm.training.engine import EngineConfig, EngineKind
from ldm.training.flops import counted_flops
from ldm.training.memory import FP32, MOMENTS, UNSHARDED, Memory, Sharding, Step, forecast, read_sharding, unit_of
from ldm.types import Condition
from ldm.unet.model import UNetConfig
from pipeline.latent_summary import cached_size
from pipeline.store.manifest import Manifest

DEEPSPEED_FILES = PROJECT / "infra" / "deepspeed"
COLUMNS = ("weights", "gradients", "optimizer", "averages", "buffers", "activations", "device", "host")
GIGA = 1e9


@dataclass(frozen=True, kw_only=True, slots=True)
class Told:
    """The largest rows of a latent cache, as a denoiser sees them.

    Attributes:
        size: rows and columns of a latent.
        pixels: rows and columns of its picture.
        max_tokens: of a caption.
        text_width: of the text's states.
        pooled_width: of the text's vector; None where there is none.
    """

    size: tuple[int, int]
    pixels: tuple[int, int]
    max_tokens: int
    text_width: int
    pooled_width: int | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Denoising:
    """A stage-2 training, as far as its memory goes.

    Attributes:
        unet: the denoiser.
        conditioning: what it is told.
        told: the rows.
        engine: what is configured.
        num_averages: how many moving averages are kept.
        num_ranks: ranks that train together.
        num_rows: rows of a batch on one rank.
        is_on_cpu: whether they train on CPUs.
        saves_in_background: whether a copy of what the rank saves lies in the host's memory.
    """

    unet: UNetConfig
    conditioning: ConditioningConfig
    told: Told
    engine: EngineConfig
    num_averages: int
    num_ranks: int
    num_rows: int
    is_on_cpu: bool
    saves_in_background: bool = False

    @property
    def configured(self) -> Sharding:
        """The sharding that the engine's configuration asks for."""
        return UNSHARDED if self.engine.kind is EngineKind.LOCAL else read_sharding(self.engine.zero_config)

    def memory(self, sharding: Sharding) -> Memory:
        """Return what the main rank holds at the moment of a step when that is most."""
        step = self.step(sharding)
        memory = forecast(sharding, step)
        if not self.saves_in_background:
            return memory
        saved = step.passed.num_weights // (self.num_ranks if sharding.stage else 1)
        copied = saved * (FP32 + MOMENTS + FP32 * self.num_averages)
        if self.is_on_cpu:
            return replace(memory, buffers=memory.buffers + copied)
        return replace(memory, host=memory.host + copied)

    def with_least_rows(self) -> Denoising:
        """Return the training with the micro-batch that needs least, if which it will be is yet to be found."""
        if not self.engine.finds_micro_batch:
            return self
        return replace(self, engine=replace(self.engine, micro_batch_size=1, finds_micro_batch=False))

    def row_flops(self, size: tuple[int, int]) -> float:
        """Return the FLOPs of a row's forward and backward, for a latent of (rows, columns)."""
        factor = self.told.pixels[0] // self.told.size[0]
        told = replace(self.told, size=size, pixels=(size[0] * factor, size[1] * factor))
        return denoiser_flops(self.unet, self.conditioning, told)

    def dtypes(self, sharding: Sharding) -> tuple[torch.dtype, torch.dtype | None]:
        """Return that of the weights that compute, and that of autocast over them, if there is one."""
        precision = self.engine.precision
        if precision is Precision.FP32:
            return torch.float32, None
        # The local engine's weights stay in float32, and so do stage 0's.
        return (precision.dtype, None) if sharding.stage else (torch.float32, precision.dtype)

    def step(self, sharding: Sharding) -> Step:
        """Return what a step is like under a sharding."""
        micro_batches = self.engine.micro_batches(self.num_rows)
        weights, autocast = self.dtypes(sharding)
        rows = micro_batches[0][1]
        return Step(
            passed=denoiser_pass(
                self.unet,
                self.conditioning,
                self.told,
                rows,
                weights=weights,
                autocast=autocast,
            ),
            num_ranks=self.num_ranks,
            num_micro_batches=len(micro_batches),
            weight_bytes=weights.itemsize,
            num_averages=self.num_averages,
            is_on_cpu=self.is_on_cpu,
        )


def told_of(manifest: Manifest, image_size: int) -> Told:
    """Return the largest rows of a cache at one of its image sizes."""
    asked = cached_size(manifest, image_size)
    shapes = [shape for shape in manifest.summary["shapes"] if shape["image_size"] == asked]
    largest = max(shapes, key=lambda shape: shape["moment_shape"][1] * shape["moment_shape"][2])
    width, height = largest["size"]
    return Told(
        size=(largest["moment_shape"][1], largest["moment_shape"][2]),
        pixels=(height, width),
        max_tokens=int(manifest.identity["max_tokens"]),
        text_width=int(manifest.summary.get("text_width", 0)),
        pooled_width=manifest.summary.get("pooled_width"),
    )


@lru_cache(maxsize=16)
def denoiser_pass(
    unet: UNetConfig,
    conditioning: ConditioningConfig,
    told: Told,
    num_rows: int,
    *,
    weights: torch.dtype,
    autocast: torch.dtype | None,
) -> Pass:
    """Return what a micro-batch's forward and backward take."""
    return traced(
        lambda: build_denoiser(unet, conditioning),
        lambda network: _loss(network, unet, conditioning, told, num_rows),
        weights=weights,
        autocast=autocast,
    )


@lru_cache(maxsize=256)
def denoiser_flops(unet: UNetConfig, conditioning: ConditioningConfig, told: Told) -> float:
    """Return the FLOPs of one row's forward and backward; what checkpointing computes again is not counted."""
    once = replace(unet, checkpoint_activations=False)
    return counted_flops(
        lambda: build_denoiser(once, conditioning), lambda network: _loss(network, once, conditioning, told, 1)
    )


def _loss(network: nn.Module, unet: UNetConfig, conditioning: ConditioningConfig, told: Told, num_rows: int) -> Tensor:
    dtype = next(network.parameters()).dtype
    noisy = torch.zeros(num_rows, unet.out_channels, *told.size, dtype=dtype)
    condition = _condition(conditioning, told, num_rows, unet.out_channels, dtype)
    output: Tensor = network(noisy, torch.zeros(num_rows), condition)
    return (output.float() - noisy.float()).square().mean()


def denoiser_loss(network: nn.Module, training: Denoising, num_rows: int) -> Tensor:
    """Return a loss of a micro-batch that says nothing, on the default device."""
    return _loss(network, training.unet, training.conditioning, training.told, num_rows)


def _condition(
    config: ConditioningConfig, told: Told, rows: int, latent_channels: int, dtype: torch.dtype
) -> Condition:
    """Return a condition of the right shapes that says nothing."""
    has_text = config.text is not TextUse.NONE
    is_frozen = config.text is TextUse.FROZEN
    beside = config.given_channels(latent_channels)
    states = torch.zeros(rows, told.max_tokens, told.text_width, dtype=dtype) if is_frozen else None
    tokens = torch.zeros(rows, told.max_tokens, dtype=torch.int64) if config.text is TextUse.TRAINED else None
    layout = torch.zeros(rows, config.layout_transformer.max_tokens, dtype=torch.int64) if config.has_layout else None
    return Condition(
        states=states,
        mask=torch.ones(rows, told.max_tokens, dtype=torch.bool) if is_frozen else None,
        pooled=torch.zeros(rows, told.pooled_width, dtype=dtype) if has_text and told.pooled_width else None,
        sizes=torch.zeros(rows, 6) if config.has_sizes else None,
        spatial=torch.zeros(rows, beside, *told.size, dtype=dtype) if beside else None,
        tokens=tokens,
        class_id=torch.zeros(rows, dtype=torch.int64) if config.num_classes else None,
        layout=layout,
        semantic_map=torch.zeros(rows, *told.pixels, dtype=torch.int64) if config.map_classes else None,
        level=torch.zeros(rows, dtype=torch.int64) if config.noise_levels else None,
    )


def forecasts(training: Denoising) -> list[tuple[Sharding, Memory]]:
    """Return the forecast under the local engine, each stage, and each DeepSpeed file that comes with the project."""
    files = sorted(DEEPSPEED_FILES.glob("*.json"), key=lambda path: ("offload" in path.stem, path.stem))
    known = [UNSHARDED, *(read_sharding(str(path)) for path in files)]
    if training.configured not in known:
        known.append(training.configured)
    return [(sharding, training.memory(sharding)) for sharding in known]


def table(training: Denoising, there: int) -> str:
    """Return the forecasts as lines of a table, the configured one marked.

    Args:
        training: what is forecast.
        there: bytes that a rank has, as far as this machine tells.
    """
    found = forecasts(training)
    unit, size = unit_of(max(memory.device for _, memory in found))
    saved = training.step(training.configured).passed.saved_bytes / size
    rows = training.engine.micro_batches(training.num_rows)[0][1]
    lines = [
        f"memory    {unit} of a rank at the fullest moment of a step; {rows} rows keep {saved:,.2f} {unit} of "
        "activations for the backward pass",
        " " * 26 + "".join(f"{name:>12}" for name in COLUMNS) + "  moment",
    ]
    for sharding, memory in found:
        mark = "->" if sharding == training.configured else "  "
        figures = "".join(f"{getattr(memory, name) / size:12,.2f}" for name in COLUMNS)
        lines.append(f"       {mark} {sharding.name:16}{figures}  {memory.moment}")
    kind = "memory of this machine" if training.is_on_cpu else "of this machine's GPU"
    lines.append(f"there     {there / GIGA:.2f} GB a rank, free {kind} now")
    return "\n".join(lines)


def needed(training: Denoising) -> Memory:
    """Return what the configured engine needs."""
    return training.memory(training.configured)


def advice(training: Denoising) -> tuple[str, ...]:
    """Return what would need less, in the order in which to try it."""
    now = needed(training)
    found = [(sharding, memory) for sharding, memory in forecasts(training) if sharding.stage]
    stage = training.configured.stage or 0
    higher = [pair for pair in found if (pair[0].stage or 0) > stage and not pair[0].has_optimizer_on_host]
    offloaded = [] if training.is_on_cpu else [pair for pair in found if pair[0].has_optimizer_on_host]
    ways = [
        f"--engine.kind deepspeed --engine.zero-config {_file_of(sharding)}: {memory.device / GIGA:.1f} GB"
        + (f" and {memory.host / GIGA:.1f} GB of the host's" if memory.host else "")
        for sharding, memory in [*higher, *offloaded]
        if memory.device < now.device
    ]
    rows = training.engine.micro_batches(training.num_rows)[0][1]
    if rows > 1:
        smaller = next(part for part in range(rows // 2, 0, -1) if training.num_rows % part == 0)
        ways.append(f"--engine.micro-batch-size {smaller}, in place of {rows}: {_less(training, smaller)}")
    if not training.unet.checkpoint_activations:
        ways.append("--unet.checkpoint-activations, which computes a third more")
    return (*ways, "devices with more memory, or a smaller network")


def _less(training: Denoising, rows: int) -> str:
    smaller = replace(training, engine=replace(training.engine, micro_batch_size=rows))
    return f"{needed(smaller).device / GIGA:.1f} GB"


def _file_of(sharding: Sharding) -> Path:
    return (DEEPSPEED_FILES / f"{sharding.name}.json").relative_to(PROJECT)
