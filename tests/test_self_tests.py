"""Laws of the self-tests: what is wrong is refused on every rank with both values, and a good run goes on unchanged."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from jobs.wiring.machine import free_host_bytes
from ldm.training.checked_task import Attempt, CheckedTask, PassingFaultError, begin
from ldm.training.checkpoint import CheckpointStore
from ldm.training.loop import Progress, Surroundings, train
from ldm.training.memory import Memory
from ldm.training.record import Record, SilentTracker
from ldm.training.self_tests import (
    Machine,
    check_exchange,
    check_memory,
    check_same,
    check_storage,
    source_digest,
    weight_sums,
)
from ldm.training.world import World
from tests.ranks import alone, run_ranks
from tests.servers import S3Server
from tests.tiny_latents import write_latents
from tests.tiny_stage1 import BATCH, KL, LOSS, DrawnLoader, Rows, batch_at, stage1_config, stage1_task
from tests.tiny_training import record_of, run, same_weights, series, stopping_after, tiny_config

SIMPLE = replace(LOSS, perceptual_weight=0.0, adversarial_weight=0.0)
GB = 10**9


class SameRows(DrawnLoader):
    """Forgets which rank it reads for."""

    def batches(self, samples_seen: int) -> Iterator[Rows]:
        while True:
            yield batch_at(samples_seen, World(rank=0, size=self._world.size, device=self._world.device))
            samples_seen += BATCH


def plenty(world: World) -> Machine:
    return Machine(name="node", device="cpu", free_device_bytes=9 * GB, free_host_bytes=9 * GB)


def attempt_of(world: World, folder: Path, report: Callable[[Progress], None]) -> Attempt:
    return Attempt(
        world=world,
        facts={"configuration": "one"},
        root=str(folder),
        goes_on=False,
        look=partial(plenty, world),
        needs=lambda: Memory(weights=GB // 4, activations=GB // 4),
        advice=tuple,
        report=report,
        clock=time.monotonic,
    )


def train_checked(world: World, folder: Path, fault: str = "") -> None:
    """Train the tiny first stage to its end, with the self-tests, and write down what was said."""
    said: list[str] = []
    attempt = attempt_of(world, folder, lambda progress: said.append(progress.notice) if progress.notice else None)
    findings = begin(attempt)
    config = stage1_config(folder, KL, SIMPLE)
    task = stage1_task(config, world)
    if fault == "unsynchronised":
        task.autoencoder.wrapped = task.autoencoder.raw
    if fault == "weights":
        with torch.no_grad():
            task.autoencoder.raw.decoder.conv_out.bias.add_(world.rank)
    tracker = Record(str(folder / "record"), None, said.append) if world.is_main else SilentTracker()
    around = Surroundings(
        world=world,
        batch_size=BATCH,
        checkpoints=CheckpointStore(str(folder), {}, 2, world),
        tracker=tracker,
        report=attempt.report,
        should_stop=lambda: False,
    )
    networks = {"autoencoder": task.autoencoder.raw}
    checked = CheckedTask(task=task, networks=networks, attempt=attempt, findings=findings, tracker=tracker)
    loader = SameRows(world) if fault == "rows" else DrawnLoader(world)
    assert train(checked, loader, config.loop, around).samples_seen == config.loop.total_samples
    (folder / f"said-{world.rank}.json").write_text(json.dumps(said))


Refusals = dict[str, str]


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory, s3: S3Server) -> tuple[Path, list[Refusals]]:
    """Two real ranks go through everything once; what each of them refused, by the name of the case."""
    folder = tmp_path_factory.mktemp("ranks")
    run_ranks(2, go_through_everything, folder, f"s3://{s3.bucket}/self-tests")
    return folder, [json.loads((folder / f"refusals-{rank}.json").read_text()) for rank in range(2)]


def go_through_everything(world: World, folder: Path, s3_root: str) -> None:
    facts = {"configuration": "old" if world.rank == 1 else "new", "data": "same"}
    roots = [folder / "main", folder / "other"]
    occupied = folder / "a-file" / "root"
    if world.is_main:
        occupied.parent.write_text("")
    world.barrier()
    node, wrong = f"node-{world.rank}", World(rank=0, size=2, device=world.device)
    cases: dict[str, Callable[[], object]] = {
        "same": lambda: check_same(world, {"data": "same"}),
        "other configuration": lambda: check_same(world, facts),
        "missing fact": lambda: check_same(world, {} if world.rank else {"code": "a"}),
        "shared folder": lambda: check_storage(world, str(folder / "shared"), node),
        "shared bucket": lambda: check_storage(world, s3_root, node),
        "other root": lambda: check_storage(world, str(roots[world.rank]), node),
        "no root": lambda: check_storage(world, str(occupied), node),
        "exchange": lambda: check_exchange(world, time.monotonic),
        "wrong sums": lambda: check_exchange(wrong, time.monotonic),
        "memory": lambda: look_at_memory(world, Memory(weights=GB, activations=2 * GB)),
        "well": lambda: train_checked(world, folder / "well"),
        **{fault: partial(train_checked, world, folder / fault, fault) for fault in FAULTS},
    }
    (folder / f"refusals-{world.rank}.json").write_text(json.dumps({name: refusal(cases[name]) for name in cases}))


def refusal(case: Callable[[], object]) -> str:
    try:
        case()
    except ValueError as error:
        return str(error)
    return ""


def look_at_memory(world: World, needed: Memory) -> None:
    """Refuse what is needed on the second rank, after less of it was only warned of."""
    free = (10 * GB, 2 * GB)[world.rank]
    machine = Machine(name=f"node-{world.rank}", device="cpu", free_device_bytes=free, free_host_bytes=free)
    check = partial(check_memory, world, look=lambda: machine, advice=lambda: ("shards", "less"), pause_seconds=0)
    figures, warning = check(Memory(weights=GB + 9 * GB // 10))
    assert figures == f"1.9 of {10 if not world.rank else 2}.0 GB forecast a rank"
    assert "\n  rank 1: 1.9 of 2.0 GB forecast a rank\n" in warning
    assert "rank 0" not in warning
    assert check(Memory(weights=GB))[1] == ""
    beside = Machine(name="one", device="cpu", free_device_bytes=8 * GB, free_host_bytes=8 * GB)
    assert check(Memory(weights=GB), look=lambda: beside)[0] == "1.0 of 4.0 GB forecast a rank"
    check(needed)


WELL = ("same", "shared folder", "shared bucket", "exchange", "well")
FAULTS = {
    "unsynchronised": r"after a step the ranks have other weights.*conv_in\.bias: -?\d+ on rank 0; -?\d+ on rank 1",
    "weights": r"before the first step the ranks have other weights.*\n  autoencoder.decoder.conv_out.bias: ",
    "rows": r"ranks 0, 1 were given the same rows: 2 positions .* first 0 \(rank 0 has drawn-0, rank 1 has drawn-0\)",
}
SAID = {
    "other configuration": r"do not run the same training.*configuration: new on rank 0; old on rank 1\n",
    "missing fact": r"code: a on rank 0; nothing on rank 1\n",
    "other root": r"rank 0 has \S+/main on node-0:\n  rank 1 \(\S+/other on node-1\) does not see the file that rank 0",
    "no root": r"rank 0 \(\S+a-file/root on node-0\) can't write there: .*rank 1 .* can't write there",
    "wrong sums": r"expected .*3 to 3.*rank 0: .*2 to 2.*rank 1: .*2 to 2",
    "memory": r"does not fit.*\n  rank 1: 3\.0 of 2\.0 GB forecast a rank\nWhat .* in order:\n  1\. shards\n  2\. less",
    **FAULTS,
}


@pytest.mark.parametrize("case", SAID)
def test_what_is_wrong_is_refused_with_both_values_on_every_rank(ranks: tuple[Path, list[Refusals]], case: str) -> None:
    for refusals in ranks[1]:
        assert re.search(SAID[case], refusals[case], re.DOTALL), refusals[case]


def test_what_is_well_is_not_refused(ranks: tuple[Path, list[Refusals]]) -> None:
    assert {refusals[case] for refusals in ranks[1] for case in WELL} == {""}
    assert all(sorted([*WELL, *SAID]) == sorted(refusals) for refusals in ranks[1])


def test_ranks_that_would_train_models_of_their_own_leave_no_checkpoint(ranks: tuple[Path, list[Refusals]]) -> None:
    assert {path.parent.name for path in ranks[0].glob("*/0*")} == {"well"}


def test_no_probe_is_left(ranks: tuple[Path, list[Refusals]], s3: S3Server) -> None:
    there = [*map(str, ranks[0].rglob("*")), *s3.client().find(f"s3://{s3.bucket}/self-tests")]
    assert [path for path in there if ".self-test" in path] == []


def test_a_good_run_says_so_once_and_records_the_bandwidth(ranks: tuple[Path, list[Refusals]]) -> None:
    sentence = (
        r"self-tests passed in \d+\.\d s: 2 ranks, same code and data, shared storage, all-reduce \d+\.\d GB/s, "
        r"equal weights after a step, 0\.5 of 4\.5 GB forecast a rank"
    )
    for rank in range(2):
        said = json.loads((ranks[0] / "well" / f"said-{rank}.json").read_text())
        assert [bool(re.fullmatch(sentence, notice)) for notice in said] == [True]
    lines = (ranks[0] / "well" / "record" / "record.jsonl").read_text().splitlines()
    metrics = [json.loads(line).get("metrics", {}) for line in lines]
    found = [values["all_reduce_gb_per_second"] for values in metrics if "all_reduce_gb_per_second" in values]
    assert len(found) == 1
    assert found[0] > 0


def test_a_single_rank_exchanges_nothing() -> None:
    assert check_exchange(alone(), time.monotonic) == 0


def test_weights_that_lie_in_slices_are_left_out() -> None:
    network = torch.nn.Linear(3, 2)
    network.weight.ds_numel = 6
    network.bias.ds_numel = 2
    network.weight.data = torch.empty(0)  # what ZeRO-3 leaves of a weight that it has dealt out
    assert list(weight_sums({"net": network})) == ["net.bias"]


def test_memory_that_a_killed_process_gives_back_late_is_waited_for() -> None:
    left = iter([GB, 5 * GB])
    look = lambda: Machine(name="", device="cpu", free_device_bytes=(free := next(left)), free_host_bytes=free)  # noqa: E731
    assert check_memory(alone(), Memory(weights=2 * GB), look, tuple, 0)[0] == "2.0 of 5.0 GB forecast a rank"


def test_what_was_well_before_is_no_refusal_but_a_fault_that_may_pass(tmp_path: Path) -> None:
    """Ray Train starts workers again after the one, and never after the other."""
    (tmp_path / "a-file").write_text("")
    first = attempt_of(alone(), tmp_path / "a-file" / "root", lambda _: None)
    with pytest.raises(ValueError, match="can't write there"):
        begin(first)
    with pytest.raises(PassingFaultError, match="can't write there"):
        begin(replace(first, goes_on=True))
    assert not issubclass(PassingFaultError, ValueError)


def test_device_and_host_are_asked_for_their_own_shares() -> None:
    world = World(rank=0, size=1, device=torch.device("cuda"))
    machine = Machine(name="", device="gpu", free_device_bytes=4 * GB, free_host_bytes=2 * GB)
    needed = Memory(weights=3 * GB, host=GB)
    figures, _ = check_memory(world, needed, lambda: machine, tuple, 0)
    assert figures == "3.0 of 4.0 GB forecast a rank, 1.0 of 2.0 GB of the host forecast a rank"
    with pytest.raises(ValueError, match=r"rank 0: 3\.0 of 2\.0 GB of the host forecast a rank\n"):
        check_memory(world, Memory(weights=GB, host=3 * GB), lambda: machine, tuple, 0)


def test_free_memory_is_that_of_the_control_group_where_it_is_less(tmp_path: Path) -> None:
    machine = free_host_bytes(tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    assert free_host_bytes(tmp_path) == pytest.approx(machine, rel=0.2)
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.current").write_text("700\n")
    (tmp_path / "memory.stat").write_text("anon 400\ninactive_file 200\nactive_file 100\n")
    assert free_host_bytes(tmp_path) == 500


def test_the_digest_of_the_code_is_of_names_and_contents(tmp_path: Path) -> None:
    folder = tmp_path / "ldm"
    folder.mkdir()
    (folder / "a.py").write_text("x = 1")
    first = source_digest([folder])
    (folder / "notes.txt").write_text("no code")
    assert source_digest([folder]) == first
    (folder / "a.py").rename(folder / "b.py")
    assert source_digest([folder]) != first


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("self-tests")
    write_latents(path)
    return path


def test_a_training_with_self_tests_is_bit_for_bit_the_one_without(latents: Path) -> None:
    said: list[str] = []
    tested, plain = tiny_config(latents, "tested"), replace(tiny_config(latents, "plain"), self_tests=False)
    stopping_after(tested, 3)
    run(tested, lambda progress: said.append(progress.notice))
    run(plain)
    assert same_weights(latents, "tested", "plain")
    assert series(latents, "tested", "loss") == series(latents, "plain", "loss")
    expected = r"self-tests passed in \d+\.\d s: 1 rank, storage that keeps what is written, 0\.\d{3} of \d+\.\d GB .*"
    assert len([notice for notice in said if re.fullmatch(expected, notice)]) == 1
    assert not [entry for entry in record_of(latents, "plain") if "self" in str(entry)]


def test_switching_the_self_tests_off_is_the_same_run() -> None:
    config = tiny_config(Path("nowhere"))
    assert config.digest() == replace(config, self_tests=True).digest()
    assert "self_tests" not in config.to_dict()
