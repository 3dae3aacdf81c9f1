"""THE DeepSpeed file: optimizer state, gradients and weights sharded by ZeRO (Rajbhandari et al. 2020).

What DeepSpeed owns (stage, offload, buckets) is read from a JSON file; batch, precision, clipping and learning rate
are ours, and a file that sets them too is refused. Under stages 1 to 3 a process holds its slices of the float32
weights, of their moments and of each moving average in flat tensors, one for each of DeepSpeed's groups; checkpoints
are fragments of them, which any engine on any number of processes reads (`ldm.training.fragments`). Stage 0 is data
parallel as the local engine is: whole weights in float32, the forward pass in the precision asked for.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.utils import logger as deepspeed_logger
from torch import Tensor, nn

from ldm.precision import Precision, autocast
from ldm.training.ema import Ema, EmaConfig, averages_of, swapped_in
from ldm.training.engine import (
    EngineConfig,
    buffers_of,
    loss_scaler,
)
from ldm.training.fragments import (
    MOMENTS,
    WEIGHT,
    Fragment,
    begin_moments,
    fragments_snapshot,
    load_fragments,
    shapes_of,
    whole_fragments,
)
from ldm.training.optim import OptimConfig, build_optimizer, leave_out, set_learning_rate
from ldm.training.snapshot import Snapshot
from ldm.training.stopwatch import StepPhase, Stopwatch
from ldm.training.world import World, join_alone
from ldm.training.zero_config import stage_of, zero_settings

COLLECTIVES = (
    "all_reduce",
    "all_reduce_coalesced",
    "reduce",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_gather",
    "all_gather_into_tensor",
    "all_gather_coalesced",
    "broadcast",
    "all_to_all_single",
)
"""What DeepSpeed's backend exchanges in an update."""

# This op serves only inference_all_reduce; building it needs a compiler and costs minutes at the first run.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _time_collectives(watch: Stopwatch) -> None:
    """Have the backend, which all engines of a process share, tell this one's stopwatch what it waits for."""
    backend = deepspeed.comm.comm.cdb
    for name in COLLECTIVES:
        collective = getattr(type(backend), name).__get__(backend)
        setattr(backend, name, watch.around(collective, StepPhase.COMMUNICATION))


@dataclass(frozen=True, kw_only=True, slots=True)
class _Slice:
    """What a process holds of a weight: `numel` elements from `start` on, at `offset` of a flat tensor."""

    flat: int
    offset: int
    start: int
    numel: int

    def of(self, flats: Sequence[Tensor]) -> Tensor:
        return flats[self.flat].narrow(0, self.offset, self.numel)


class _Passes(nn.Module):
    """A network as DeepSpeed runs it: its forward is all that leads to a loss.

    DeepSpeed begins a backward pass when a gradient reaches what its forward returned. Of a loss there is one, while
    the network's own output may be differentiated before, for a term of the loss that depends on gradients.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, passes: Callable[[], Any]) -> Any:
        return passes()


class DeepSpeedEngine:
    """ZeRO stages 0 to 3."""

    def __init__(
        self, module: nn.Module, optim: OptimConfig, ema: EmaConfig, config: EngineConfig, world: World, rows: int
    ) -> None:
        deepspeed_logger.setLevel(logging.WARNING)
        if world.size == 1:
            os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed must know, and nobody but a launcher says so
            join_alone(world.device)
        settings = zero_settings(config, optim, rows, world.size)
        self.raw = module.to(memory_format=torch.contiguous_format)  # the one that DeepSpeed sends and flattens
        self._world = world
        self._stage = stage_of(settings)
        if self._stage == 3 and not all(weight.requires_grad for weight in module.parameters()):
            raise ValueError(f"{config.zero_config} is stage 3, which slices weights that are not trained: take 2")
        self._precision = config.precision
        if config.is_compiled:
            module.compile()
        self._optimizer = build_optimizer(module.parameters(), optim)
        self._engine, *_ = deepspeed.initialize(
            model=_Passes(module),
            optimizer=self._optimizer,
            config=settings,
            dist_init_required=False,
        )
        if config.precision is Precision.FP16:  # the loop ends a run of lost steps, and says which rows they were
            self._engine.optimizer.loss_scaler.raise_error_at_min_scale = False
        self._weights: dict[str, Any] = dict(module.named_parameters())
        self._ema = Ema(self._averaged_weights(), ema) if ema.half_life_samples else None
        self.stopwatch = Stopwatch(world.device)
        self._is_updating = False
        self.wrapped: Callable[..., Any] = self._passed

    def update(self, micro_losses: Sequence[Callable[[], Tensor]], lr: float, samples: tuple[int, int]) -> Tensor:
        """Make one step; see `Engine.update`. DeepSpeed itself divides by the number of micro-batches."""
        watch = self.stopwatch
        watch.begin()
        _time_collectives(watch)
        set_learning_rate(self._engine.optimizer, lr)
        norm = torch.zeros(())
        for micro_loss in micro_losses:
            watch.enter(StepPhase.FORWARD)
            loss = self._loss(micro_loss)
            watch.enter(StepPhase.BACKWARD)
            self._engine.backward(loss)
            watch.enter(StepPhase.OPTIMIZER)
            if self._stage == 0:  # DeepSpeed clips here without telling the norm
                norm = nn.utils.get_total_norm([p.grad for p in self.raw.parameters() if p.grad is not None])
                leave_out(self._optimizer, ~norm.isfinite())  # the other stages do so by themselves
            self._engine.step()
        watch.enter(StepPhase.AVERAGES)
        if self._ema is not None:
            self._ema.update(self._averaged_weights(), *samples)
        watch.end()
        if self._stage == 0:
            return norm
        # A plain number where the step was left out.
        return torch.as_tensor(self._engine.get_global_grad_norm(), dtype=torch.float32, device=self._world.device)

    @contextmanager
    def averaged(self, half_life: int = 0) -> Iterator[None]:
        """Run a block with averaged weights in `raw`: under stage 3 in the slices, and whole where weights are."""
        averages = averages_of(self._ema, half_life)
        if not averages:
            yield
            return
        if self._stage < 3:
            with swapped_in(self._weights, {name: self._whole(name, averages) for name in self._weights}):
                yield
            return
        slices, flats = self._slices(), list(averages.values())
        held = {name: weight.ds_tensor.narrow(0, 0, slices[name].numel) for name, weight in self._trained().items()}
        resident = [n for n, w in self._trained().items() if w.ds_status is ZeroParamStatus.AVAILABLE]
        with (
            swapped_in(held, {name: slices[name].of(flats) for name in held}),
            swapped_in(
                {name: self._weights[name].data for name in resident},
                {name: self._whole(name, averages) for name in resident},
            ),
        ):
            yield

    def weights(self, half_life: int = 0) -> dict[str, Tensor]:
        """Return the whole averaged weights, float32 on the CPU; see `Engine.weights`."""
        averages = averages_of(self._ema, half_life)
        return {name: self._whole(name, averages).float().cpu().clone() for name in self._weights}

    def snapshot(self) -> Snapshot:
        """Return what this process holds that no other does."""
        if self._stage == 0 and not self._world.is_main:
            return Snapshot()
        extra = {"buffers": buffers_of(self.raw), "scaler": self._scaler_state()}
        untrained = {} if self._world.is_main else self._untrained()  # every process holds all of these
        own = {name: fragment for name, fragment in self._fragments().items() if name not in untrained}
        return fragments_snapshot(self._world.rank, own, shapes_of(self._weights), extra)

    def save(self, folder: Path) -> None:
        """Write the snapshot."""
        self.snapshot().write(folder)

    def load(self, folder: Path) -> None:
        """Take over what any engine's `save` wrote, on any number of processes."""
        held: Sequence[Tensor] = self._flats() if self._stage else list(self._weights.values())
        for tensor in held:
            begin_moments(self._optimizer, tensor, 0.0)
        loaded = load_fragments(folder, self._fragments(), shapes_of(self._weights))
        if self._stage == 0:
            for name, weight in self._weights.items():
                begin_moments(self._optimizer, weight, loaded.steps.get(name, 0.0))
        else:
            for flat in held:
                begin_moments(self._optimizer, flat, max(loaded.steps.values(), default=0.0))
            self._take_over_flats()
        self.raw.load_state_dict(loaded.extra["buffers"], strict=False)
        self._set_scaler_state(loaded.extra["scaler"])

    def _trained(self) -> dict[str, Any]:
        return {name: weight for name, weight in self._weights.items() if weight.requires_grad}

    def _untrained(self) -> dict[str, Any]:
        """The weights that no gradient moves, which DeepSpeed leaves whole under stages 1 and 2."""
        return {name: weight for name, weight in self._weights.items() if not weight.requires_grad}

    def _averaged_weights(self) -> dict[str, Tensor]:
        """What averages are kept of: weights by name, or under stages 1 to 3 flat tensors by number before them."""
        if self._stage == 0:
            return self._weights
        return {**{str(i): flat for i, flat in enumerate(self._flats())}, **self._untrained()}

    def _passed(self, *inputs: Any) -> Any:
        """Call the network; within an update that is a part of the loss, which DeepSpeed has begun already."""
        return self.raw(*inputs) if self._is_updating else self._engine(partial(self.raw, *inputs))

    def _loss(self, micro_loss: Callable[[], Tensor]) -> Tensor:
        def in_precision() -> Tensor:  # within DeepSpeed's forward, which leaves an autocast that stands around it
            with autocast(self._precision if self._stage == 0 else Precision.FP32, self._world.device):
                return micro_loss()

        self._is_updating = True
        try:
            loss: Tensor = self._engine(in_precision)
        finally:
            self._is_updating = False
        return loss

    def _flats(self) -> list[Tensor]:
        """The float32 weights that this process holds, flat and padded, one tensor for each of DeepSpeed's groups."""
        zero = self._engine.optimizer
        return list(zero.fp32_partitioned_groups_flat if self._stage == 3 else zero.single_partition_of_fp32_groups)

    def _slices(self) -> dict[str, _Slice]:
        """What this process holds of each weight; under stages 1 and 2 there are weights of which it holds nothing."""
        found = {}
        for name, weight in self._trained().items():
            if self._stage == 3:
                zero = self._engine.optimizer
                flat, offset, size = zero.grad_position[zero.get_param_id(weight)]
                start = self._world.rank * size
                numel = max(0, min(size, weight.ds_numel - start))  # the last ones are padded
                found[name] = _Slice(flat=flat, offset=offset, start=start, numel=numel)
            elif (mapping := weight._hp_mapping) is not None:
                found[name] = _Slice(
                    flat=mapping.param_group_index,
                    offset=mapping.hp_fragment_address.start,
                    start=mapping.lp_fragment_address.start,
                    numel=mapping.hp_fragment_address.numel,
                )
        return found

    def _fragments(self) -> dict[str, Fragment]:
        averages = {} if self._ema is None else self._ema.parts()
        if self._stage == 0:
            return whole_fragments(self._weights, self._optimizer, averages)
        flats = self._flats()
        states = [self._optimizer.state.get(flat, {}) for flat in flats]
        parts = {WEIGHT: flats, **{m: [state[m] for state in states] for m in MOMENTS if all(states)}}
        parts |= {part: list(average.values()) for part, average in averages.items()}
        sliced = {
            name: Fragment(
                start=held.start,
                parts={part: held.of(tensors) for part, tensors in parts.items()},
                steps=float(states[held.flat].get("step", 0.0)),
            )
            for name, held in self._slices().items()
        }
        whole = {
            name: Fragment(parts={WEIGHT: weight, **{part: average[name] for part, average in averages.items()}})
            for name, weight in self._untrained().items()
        }
        return {**sliced, **whole}

    def _whole(self, name: str, averages: dict[str, Tensor]) -> Tensor:
        """Return a whole average, or weight where there are none, float32, put together from every process's slice."""
        weight = self._weights[name]
        if self._stage == 0 or not weight.requires_grad:
            return averages[name] if averages else weight.detach()
        shape = shapes_of({name: weight})[name]
        whole = torch.zeros(math.prod(shape), device=self._world.device)
        held = self._slices().get(name)
        if held is not None:
            flats = list(averages.values()) or self._flats()
            whole.narrow(0, held.start, held.numel).copy_(held.of(flats).detach())
        torch.distributed.all_reduce(whole)
        return whole.view(shape)

    def _take_over_flats(self) -> None:
        """Bring what was loaded into the float32 weights to those that compute."""
        zero = self._engine.optimizer
        if self._stage < 3:
            zero.update_lp_params()
            return
        zero.checkpoint_event_prologue()
        for flat, computing in zip(self._flats(), zero.fp16_partitioned_groups_flat, strict=True):
            computing.data.copy_(flat.data)
        zero.checkpoint_event_epilogue()

    def _scaler_state(self) -> dict[str, Any]:
        """Return the loss scale as torch's own scaler has it; empty without one."""
        state = loss_scaler(self._precision, torch.device("cpu")).state_dict()
        if not state:
            return {}
        scaler = self._engine.optimizer.loss_scaler
        good_steps = scaler.cur_iter - scaler.last_overflow_iter - 1
        return {**state, "scale": float(scaler.cur_scale), "_growth_tracker": good_steps}

    def _set_scaler_state(self, state: dict[str, Any]) -> None:
        if self._precision is Precision.FP16:
            scaler = self._engine.optimizer.loss_scaler
            scaler.cur_scale = state["scale"]
            scaler.cur_iter = scaler.last_overflow_iter + 1 + state["_growth_tracker"]
