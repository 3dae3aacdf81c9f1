"""The choice of an engine by its configuration."""

from __future__ import annotations

from torch import nn

from ldm.training.ema import EmaConfig
from ldm.training.engine import Engine, EngineConfig, EngineKind, LocalEngine
from ldm.training.optim import OptimConfig
from ldm.training.world import World


def build_engine(
    module: nn.Module, optim: OptimConfig, ema: EmaConfig, config: EngineConfig, world: World, rows: int
) -> Engine:
    """Return the engine that trains `module` on `rows` rows of each batch a process.

    Raises:
        ValueError: if DeepSpeed is asked for and not installed, or its file sets what is ours.
    """
    match config.kind:
        case EngineKind.LOCAL:
            return LocalEngine(module, optim, ema, config, world)
        case EngineKind.DEEPSPEED:
            try:
                # Optional: a GPU box without DeepSpeed still trains with the local engine.
                from ldm.training.deepspeed_engine import DeepSpeedEngine
            except ImportError as error:
                raise ValueError(
                    "engine.kind is deepspeed, and DeepSpeed can't be imported: install it, or take local"
                ) from error
            return DeepSpeedEngine(module.to(world.device), optim, ema, config, world, rows)
