"""The law of all engines: steps on two real ranks are the steps of one process on the joined batches."""

from __future__ import annotations

import json
import shutil
from functools import partial
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from ldm.precision import Precision
from ldm.training.ema import EmaConfig
from ldm.training.engine import Engine, EngineConfig, EngineKind, LocalEngine
from ldm.training.engines import build_engine
from ldm.training.optim import Decay, OptimConfig, learning_rate
from ldm.training.stopwatch import StepPhase, Timed
from ldm.training.world import World
from ldm.training.zero_config import zero_settings
from tests.ranks import alone, run_ranks

BATCH, MICRO, STEPS = 8, 2, 6
ON_CPU = {"device": "cpu"}
ZERO: dict[str, dict[str, object]] = {
    "zero0": {"stage": 0},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2},
    "zero3": {"stage": 3},
    "zero2-offload": {"stage": 2, "offload_optimizer": ON_CPU},
    "zero3-offload": {"stage": 3, "offload_optimizer": ON_CPU, "offload_param": ON_CPU},
}
KINDS = ["local", *ZERO]
OPTIM = OptimConfig(lr=1e-2, clip_grad_norm=0.5)
# The first is on its ramp to the end, the second leaves it at the third step, the last at the first.
EMA = EmaConfig(half_life_samples=64, rampup_share=0.5, further_half_lives=(12, 4))
HOUSE = Path(__file__).parents[1]


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 31), nn.SiLU(), nn.Linear(31, 4))


def rows_of_step(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 8, generator=generator), torch.randn(BATCH, 4, generator=generator)


def train_steps(engine: Engine, world: World, steps: range) -> list[float]:
    """Train on this rank's rows of each batch and return the gradient norms."""
    norms = []
    for step in steps:
        inputs, targets = (rows[world.rank :: world.size] for rows in rows_of_step(step))
        losses = [
            partial(micro_loss, engine, inputs[start : start + MICRO], targets[start : start + MICRO])
            for start in range(0, len(inputs), MICRO)
        ]
        norms.append(float(engine.update(losses, OPTIM.lr, ((step + 1) * BATCH, BATCH))))
    return norms


def micro_loss(engine: Engine, inputs: Tensor, targets: Tensor) -> Tensor:
    loss: Tensor = (engine.wrapped(inputs) - targets).square().mean()
    return loss


@pytest.mark.parametrize("size", [1, 2])
def test_fp16_begins_with_overflows_that_change_nothing_and_then_learns(size: int, tmp_path: Path) -> None:
    run_ranks(size, train_in_fp16, tmp_path)


def train_in_fp16(world: World, folder: Path) -> None:
    config = EngineConfig(precision=Precision.FP16)
    engine = LocalEngine(small_network(), OPTIM, EMA, config, world)
    before = {name: weight.clone() for name, weight in engine.raw.state_dict().items()}
    inputs, targets = (rows[world.rank :: world.size] for rows in rows_of_step(0))
    losses = []

    def loss_of(scale: float) -> Tensor:
        output = engine.wrapped(inputs)
        assert output.dtype is torch.float16
        loss: Tensor = scale * (output.float() - targets).square().mean()
        losses.append(loss.item() / scale)
        return loss

    # Gradients of 1e3 times 65,536 do not fit into fp16, whose largest number is 65,504.
    lost = 0
    while not (norm := engine.update([partial(loss_of, 1e3)], OPTIM.lr, (8, 8))).isfinite():
        lost += 1
        assert all(torch.equal(weight, before[name]) for name, weight in engine.raw.state_dict().items())
    assert 1 <= lost < 16
    assert norm.isfinite()
    engine.save(folder / "fp16")
    world.barrier()
    resumed = LocalEngine(small_network(), OPTIM, EMA, config, world)
    resumed.load(folder / "fp16")
    # The scale came along: nothing overflows again.
    engine = resumed
    for step in range(60):
        assert engine.update([partial(loss_of, 1e3)], OPTIM.lr, ((step + 2) * 8, 8)).isfinite()
    assert losses[-1] < 0.5 * losses[0]


def test_a_compiled_engine_makes_the_same_steps() -> None:
    plain = LocalEngine(small_network(), OPTIM, EMA, EngineConfig(micro_batch_size=MICRO), alone())
    compiled = LocalEngine(small_network(), OPTIM, EMA, EngineConfig(micro_batch_size=MICRO, is_compiled=True), alone())
    norms = [train_steps(engine, alone(), range(STEPS)) for engine in (plain, compiled)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-5)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    weights = [engine.weights() for engine in (plain, compiled)]
    assert list(weights[0]) == list(weights[1])
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, rtol=1e-5, atol=1e-6)


def engine_of(kind: str, world: World, folder: Path, precision: Precision = Precision.FP32) -> Engine:
    """Return a DeepSpeed engine of a ZeRO stage, or the local one."""
    if kind == "local":
        config = EngineConfig(micro_batch_size=MICRO)
    else:
        path = folder / f"{kind}.json"
        if world.is_main:
            own = {"zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False}
            path.write_text(json.dumps({**own, "zero_optimization": ZERO[kind]}))
        world.barrier()
        config = EngineConfig(
            kind=EngineKind.DEEPSPEED, zero_config=str(path), micro_batch_size=MICRO, precision=precision
        )
    return build_engine(small_network(), OPTIM, EMA, config, world, BATCH // world.size)


def all_weights(engine: Engine) -> dict[str, Tensor]:
    """Return the weights of every average by half-life and name."""
    return {f"{each} {name}": weight for each in EMA.half_lives for name, weight in engine.weights(each).items()}


@torch.no_grad()
def averaged_outputs(engine: Engine) -> Tensor:
    """Return what the network gives under every average, one after another."""
    outputs = []
    for half_life in EMA.half_lives:
        with engine.averaged(half_life):
            outputs.append(engine.wrapped(rows_of_step(0)[0]))
    return torch.stack(outputs)


def train_and_save(world: World, kinds: list[str], folder: Path) -> None:
    for kind in kinds:
        engine = engine_of(kind, world, folder)
        norms = train_steps(engine, world, range(STEPS))
        assert isinstance(engine, Timed)
        phases = engine.stopwatch.take()
        assert set(phases) == set(StepPhase), f"{kind}: {phases}"
        assert all(seconds > 0 for seconds in phases.values())
        content = {"norms": norms, "ema": all_weights(engine), "averaged_outputs": averaged_outputs(engine)}
        if world.is_main:
            torch.save(content, folder / f"{kind}.pt")
        refuse_what_is_not_finite(engine, world, kind)


def refuse_what_is_not_finite(engine: Engine, world: World, kind: str) -> None:
    """A gradient of one rank that is no number changes no weight on any, and the next step goes on."""
    inputs, targets = (rows[world.rank :: world.size] for rows in rows_of_step(STEPS))
    spoilt = targets * (float("nan") if world.rank == world.size - 1 else 1.0)
    losses = [
        partial(micro_loss, engine, inputs[start : start + MICRO], spoilt[start : start + MICRO])
        for start in range(0, len(inputs), MICRO)
    ]
    before = [held(weight, world).detach().clone() for weight in engine.raw.parameters()]
    norm = engine.update(losses, OPTIM.lr, ((STEPS + 1) * BATCH, BATCH))
    assert not norm.isfinite(), kind
    assert all(torch.equal(held(w, world), old) for w, old in zip(engine.raw.parameters(), before, strict=True)), kind
    assert train_steps(engine, world, range(STEPS + 1, STEPS + 2))[0] < float("inf")
    moved = [not torch.equal(held(w, world), old) for w, old in zip(engine.raw.parameters(), before, strict=True)]
    assert any(moved), kind
    assert all(held(weight, world).isfinite().all() for weight in engine.raw.parameters()), kind


def test_two_ranks_equal_one_for_every_engine_with_accumulation_clipping_and_ema(tmp_path: Path) -> None:
    engine = engine_of("local", alone(), tmp_path)
    norms = train_steps(engine, alone(), range(STEPS))
    reference, outputs = all_weights(engine), averaged_outputs(engine)
    assert all(float((one - other).abs().max()) > 1e-3 for one, other in combinations(outputs, 2))
    run_ranks(2, train_and_save, KINDS, tmp_path)
    for kind in KINDS:
        found = torch.load(tmp_path / f"{kind}.pt", weights_only=True)
        assert found["norms"] == pytest.approx(norms, rel=1e-5), kind
        torch.testing.assert_close(found["averaged_outputs"], outputs, rtol=1e-5, atol=1e-6)
        for name, weight in reference.items():
            torch.testing.assert_close(found["ema"][name], weight, rtol=1e-5, atol=1e-6, msg=f"{kind} {name}")


def resume_and_save(world: World, kinds: list[str], folder: Path) -> None:
    for kind in kinds:
        unbroken = engine_of(kind, world, folder)
        train_steps(unbroken, world, range(STEPS))
        broken = engine_of(kind, world, folder)
        train_steps(broken, world, range(3))
        broken.save(folder / f"save-{kind}")
        world.barrier()
        resumed = engine_of(kind, world, folder)
        resumed.load(folder / f"save-{kind}")
        train_steps(resumed, world, range(3, STEPS))
        left, right = all_weights(unbroken), all_weights(resumed)
        assert all(torch.equal(left[name], right[name]) for name in left), f"averages differ under {kind}"
        for mine, other in zip(unbroken.raw.parameters(), resumed.raw.parameters(), strict=True):
            assert torch.equal(held(mine, world), held(other, world)), f"weights differ under {kind}"


def held(weight: Tensor, world: World) -> Tensor:
    """Return what this rank holds of a weight; the last slice of ZeRO-3 is filled up with memory as it was found."""
    if not hasattr(weight, "ds_tensor"):
        return weight
    part: Tensor = weight.ds_tensor
    return part[: max(0, weight.ds_numel - world.rank * len(part))]  # type: ignore[attr-defined]


def test_a_resumed_engine_is_the_unbroken_one_bit_for_bit(tmp_path: Path) -> None:
    run_ranks(2, resume_and_save, KINDS, tmp_path)


def save_halfway(world: World, kinds: list[str], folder: Path) -> None:
    for kind in kinds:
        engine = engine_of(kind, world, folder)
        train_steps(engine, world, range(3))
        place = folder / f"{world.size}-ranks-{kind}"
        engine.save(place)
        averages = all_weights(engine)
        if world.is_main:
            torch.save(averages, place / "averages")
        world.barrier()


def go_on_from_each(world: World, kinds: list[str], folder: Path) -> None:
    """Every engine takes over what every other saved, without a bit's loss, and ends where one process ends."""
    reference = torch.load(folder / "reference", weights_only=True)
    for place in sorted(folder.glob("*-ranks-*")):
        averages = torch.load(place / "averages", weights_only=True)
        for kind in kinds:
            engine = engine_of(kind, world, folder)
            train_steps(engine, world, range(20, 21))  # what a load must replace, moments too
            engine.load(place)
            found = all_weights(engine)
            assert all(torch.equal(found[name], averages[name]) for name in averages), f"{place.name} in {kind}"
            norms = train_steps(engine, world, range(3, STEPS))
            assert norms == pytest.approx(reference["norms"][3:], rel=1e-5), f"{place.name} in {kind}"
            found = engine.weights()
            for name, weight in reference["ema"].items():
                torch.testing.assert_close(
                    found[name], weight, rtol=1e-5, atol=1e-6, msg=f"{place.name} in {kind}: {name}"
                )


@pytest.fixture(scope="module")
def halfway(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What every engine saved after three steps, and what six steps give."""
    folder = tmp_path_factory.mktemp("halfway")
    engine = engine_of("local", alone(), folder)
    norms = train_steps(engine, alone(), range(STEPS))
    torch.save({"norms": norms, "ema": engine.weights()}, folder / "reference")
    save_halfway(alone(), ["local"], folder)
    run_ranks(2, save_halfway, KINDS, folder)
    return folder


@pytest.mark.parametrize(
    "size, kinds",
    [
        (2, ["local", "zero2", "zero3"]),
        (1, ["local", "zero2-offload"]),
        pytest.param(4, ["zero3"], marks=pytest.mark.slow),
    ],
)
def test_every_engine_goes_on_from_what_any_other_saved_on_other_ranks(
    halfway: Path, size: int, kinds: list[str]
) -> None:
    run_ranks(size, go_on_from_each, kinds, halfway)


def test_a_checkpoint_of_another_network_or_with_a_file_missing_is_refused_with_what_is_missing(
    halfway: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(halfway / "2-ranks-zero2", tmp_path / "damaged"))
    engine = engine_of("local", alone(), tmp_path)
    (place / "fragments-00001.pt").unlink()
    with pytest.raises(ValueError, match="does not hold all of the weight of"):
        engine.load(place)
    torch.manual_seed(0)
    other = nn.Sequential(nn.Linear(8, 30), nn.SiLU(), nn.Linear(30, 4), nn.Linear(4, 4))
    engine = LocalEngine(other, OPTIM, EMA, EngineConfig(), alone())
    with pytest.raises(ValueError, match=r"another network: it lacks 3.bias, 3.weight; of another shape are 0.bias"):
        engine.load(place)


def test_averages_are_swapped_in_only_for_the_block() -> None:
    engine = LocalEngine(small_network(), OPTIM, EMA, EngineConfig(), alone())
    train_steps(engine, alone(), range(2))
    trained = {name: weight.detach().clone() for name, weight in engine.raw.named_parameters()}
    for half_life in (0, *EMA.further_half_lives):
        with engine.averaged(half_life):
            inside = dict(engine.raw.named_parameters())
            assert all(torch.equal(inside[name], weight) for name, weight in engine.weights(half_life).items())
            assert not torch.equal(inside["0.weight"], trained["0.weight"])
    assert all(torch.equal(weight, trained[name]) for name, weight in engine.raw.named_parameters())


def test_a_deepspeed_file_that_sets_what_is_ours_is_refused_with_both_values(tmp_path: Path) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"train_batch_size": 7, "zero_optimization": {"stage": 2}}))
    config = EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path))
    with pytest.raises(ValueError, match=r"sets 'train_batch_size' to 7, but batch size decides it \(now 16\)"):
        zero_settings(config, OPTIM, rows=8, world_size=2)


@pytest.mark.parametrize(
    "content, precision, message",
    [
        ({"stage": 0}, Precision.FP16, "stage 0, which has no fp16: take stage 1, or engine.kind local"),
        ({"stage": 3, "offload_param": {"device": "nvme"}}, Precision.BF16, "offload_param must be all on the cpu"),
        ({"stage": 2, "offload_optimizer": {"device": "cpu", "ratio": 0.5}}, Precision.BF16, "must be all on the cpu"),
    ],
)
def test_a_deepspeed_file_that_asks_for_what_is_not_supported_is_refused(
    tmp_path: Path, content: dict[str, object], precision: Precision, message: str
) -> None:
    path = tmp_path / "zero.json"
    path.write_text(json.dumps({"zero_optimization": content}))
    config = EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path), precision=precision)
    with pytest.raises(ValueError, match=message):
        zero_settings(config, OPTIM, rows=8, world_size=2)


def test_shipped_deepspeed_files_leave_batch_rate_and_precision_to_us() -> None:
    for path in sorted((HOUSE / "infra" / "deepspeed").glob("*.json")):
        config = EngineConfig(kind=EngineKind.DEEPSPEED, zero_config=str(path), micro_batch_size=2)
        settings = zero_settings(config, OPTIM, rows=8, world_size=2)
        assert settings["train_batch_size"] == 16
        assert settings["gradient_accumulation_steps"] == 4


def test_learning_rate_warms_up_and_decays_to_its_share() -> None:
    config = OptimConfig(lr=1.0, warmup_samples=100, decay=Decay.COSINE, final_lr_share=0.1)
    assert learning_rate(config, 49, 1000) == pytest.approx(0.5, rel=0.02)
    rates = [learning_rate(config, seen, 1000) for seen in range(100, 1001, 100)]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.1)


def test_micro_batches_that_do_not_divide_the_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="micro_batch_size 3 does not divide the 8 rows"):
        EngineConfig(micro_batch_size=3).micro_batches(8)
