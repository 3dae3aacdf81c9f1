"""THE DeepSpeed file: optimizer state, gradients and weights sharded by ZeRO (Rajbhandari et al. 2020).

What DeepSpeed owns (stage, offload, buckets) is read from a JSON file; batch, precision, clipping and learning rate are
ours, and a file that sets them too is refused. The moving average lies where the weights lie: whole on every process
under stages 0 to 2, in the process's own slice under stage 3.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from ldm import storage
from ldm.training.ema import Ema, EmaConfig, swapped_in
from ldm.training.engine import EngineConfig, Precision
from ldm.training.optim import OptimConfig, build_optimizer, leave_out, set_learning_rate
from ldm.training.world import World

OURS = {
    "train_batch_size": "batch size",
    "train_micro_batch_size_per_gpu": "engine.micro_batch_size",
    "gradient_accumulation_steps": "engine.micro_batch_size",
    "gradient_clipping": "optim.clip_grad_norm",
    "optimizer": "optim",
    "scheduler": "optim",
    "fp16": "engine.precision",
    "bf16": "engine.precision",
}
TAG = "zero"

# This op serves only inference_all_reduce; building it needs a compiler and costs minutes at the first run.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def zero_settings(config: EngineConfig, optim: OptimConfig, rows: int, world_size: int) -> dict[str, Any]:
    """Return the whole DeepSpeed configuration: the file's settings and ours.

    Args:
        config: the engine's settings.
        optim: for the clipping norm.
        rows: rows of a batch on one process.
        world_size: number of processes.

    Raises:
        ValueError: if the file sets what our own configuration decides, naming both values.
    """
    settings = json.loads(storage.read_text(_located(config.zero_config)))
    micro_batches = config.micro_batches(rows)
    ours = {
        "train_batch_size": rows * world_size,
        "train_micro_batch_size_per_gpu": micro_batches[0][1],
        "gradient_accumulation_steps": len(micro_batches),
        "gradient_clipping": optim.clip_grad_norm,
        "bf16": {"enabled": config.precision is Precision.BF16},
    }
    for name, home in OURS.items():
        if name in settings:
            raise ValueError(
                f"{config.zero_config} sets {name!r} to {settings[name]!r}, but {home} decides it "
                f"(now {ours.get(name, 'unset')!r}); take it out of the file"
            )
    return {**settings, **ours, "steps_per_print": 1 << 62}


def _located(path: str) -> str:
    """Return a settings file where it lies: as given, or beside the project that this code belongs to."""
    beside = Path(__file__).resolve().parents[2] / path
    return path if storage.exists(path) or not beside.is_file() else str(beside)


class DeepSpeedEngine:
    """ZeRO stages 0 to 3."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, ema: EmaConfig, config: EngineConfig, world: World, rows: int
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        settings = zero_settings(config, optim, rows, world.size)
        self.raw = module
        self._world = world
        self._stage = int(settings.get("zero_optimization", {}).get("stage", 0))
        self._optimizer = build_optimizer(module.parameters(), optim)
        self._engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=self._optimizer,
            config=settings,
            dist_init_required=not torch.distributed.is_initialized(),
        )
        self._ema = Ema(self._local_weights(), ema) if ema.half_life_samples else None
        self.wrapped: Callable[..., Any] = self._engine

    def update(self, micro_losses: Sequence[Callable[[], Tensor]], lr: float, samples: tuple[int, int]) -> Tensor:
        """Make one step; see `Engine.update`. DeepSpeed itself divides by the number of micro-batches."""
        set_learning_rate(self._engine.optimizer, lr)
        norm = torch.zeros(())
        for micro_loss in micro_losses:
            self._engine.backward(micro_loss())
            if self._stage == 0:  # DeepSpeed clips here without telling the norm
                norm = nn.utils.get_total_norm([p.grad for p in self.raw.parameters() if p.grad is not None])
                leave_out(self._optimizer, ~norm.isfinite())  # the other stages do so by themselves
            self._engine.step()
        if self._ema is not None:
            self._ema.update(self._local_weights(), *samples)
        if self._stage == 0:
            return norm
        # A plain number where the step was left out.
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._world.device)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run a block with the averaged weights in `raw`."""
        if self._ema is None:
            yield
            return
        averages = self._ema.state_dict()
        with swapped_in(self._local_weights(), averages), swapped_in(*self._resident(averages)):
            yield

    def weights(self) -> dict[str, Tensor]:
        """Return the whole averaged weights, float32 on the CPU."""
        local = self._local_weights() if self._ema is None else self._ema.state_dict()
        parameters = dict(self.raw.named_parameters())
        return {name: self._whole(parameters[name], part).float().cpu().clone() for name, part in local.items()}

    def save(self, folder: Path) -> None:
        """Write every process's shard, and the averages."""
        folder.mkdir(parents=True, exist_ok=True)
        self._engine.save_checkpoint(str(folder), tag=TAG, save_latest=False)
        if self._ema is not None and (self._world.is_main or self._stage == 3):
            torch.save(self._ema.state_dict(), folder / self._ema_name())

    def load(self, folder: Path) -> None:
        """Take over what `save` wrote on as many processes."""
        loaded, _ = self._engine.load_checkpoint(str(folder), tag=TAG, load_lr_scheduler_states=False)
        if loaded is None:
            raise ValueError(f"{folder} holds no DeepSpeed checkpoint")
        if self._ema is not None:
            saved = torch.load(folder / self._ema_name(), map_location=self._world.device, weights_only=True)
            self._ema.load_state_dict(saved)

    def _ema_name(self) -> str:
        return f"ema-{self._world.rank if self._stage == 3 else 0:05d}.pt"

    def _local_weights(self) -> dict[str, Tensor]:
        """What this process holds of each weight: all of it, or under stage 3 its slice."""
        return {name: getattr(weight, "ds_tensor", weight) for name, weight in self.raw.named_parameters()}

    def _whole(self, weight: Any, part: Tensor) -> Tensor:
        """Return the whole of a weight from every process's flat slice (the last one padded)."""
        if not hasattr(weight, "ds_tensor"):
            return part
        slices = [torch.empty_like(part) for _ in range(self._world.size)]
        torch.distributed.all_gather(slices, part.contiguous())
        whole: Tensor = torch.cat(slices)[: weight.ds_numel].view(weight.ds_shape)
        return whole

    def _resident(self, averages: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Return the weights that stage 3 keeps whole on every process, and their whole averages."""
        parameters: list[tuple[str, Any]] = list(self.raw.named_parameters())
        whole = {
            name: weight
            for name, weight in parameters
            if hasattr(weight, "ds_tensor") and weight.ds_status is ZeroParamStatus.AVAILABLE
        }
        return {n: w.data for n, w in whole.items()}, {n: self._whole(w, averages[n]) for n, w in whole.items()}
