"""THE Ray Train file: the worker function of a training on Ray's workers, or of one that works alone as a plain task.

A board (an actor without CPU, on the driver's node) carries progress to the driver and the wish to stop to the workers.
Ray Train starts the workers again when one dies, alone or with its node, which the driver is told, as it is what they
wait for when nodes are missing. Each goes on from the latest checkpoint; what one refused is not tried again.
"""

from __future__ import annotations

import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import ray
import torch
from ray.exceptions import OutOfMemoryError, RayError
from ray.train import FailureConfig, RunConfig, ScalingConfig, UserCallback, get_context
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.train.v2._internal.execution.callback import ControllerCallback
from ray.train.v2._internal.execution.controller.state import ReschedulingState, RunningState, SchedulingState
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from ldm.training.local_launch import LaunchConfig, Outcome, Worker, alarms_of
from ldm.training.loop import Progress
from ldm.training.world import World, hosts_of

POLL_SECONDS = 0.5


class Board:
    """Carries progress one way and the wish to stop the other."""

    def __init__(self) -> None:
        self._news: list[Progress] = []
        self._outcome: Outcome = {}
        self._is_stopping = False
        self._is_waiting = False
        self._refusal = ""

    def put(self, progress: Progress) -> None:
        """Add a piece of news for the driver."""
        self._news.append(progress)

    def take(self) -> list[Progress]:
        """Return the news since the last call."""
        news, self._news = self._news, []
        return news

    def finish(self, outcome: Outcome) -> None:
        """Leave the main worker's outcome."""
        self._outcome = outcome

    def outcome(self) -> Outcome:
        """Return the main worker's outcome."""
        return self._outcome

    def refuse(self, why: str) -> None:
        """Leave what no repetition mends: the workers that are started again end at once."""
        self._refusal = why

    def refusal(self) -> str:
        """Return what was refused; empty for nothing."""
        return self._refusal

    def ask_to_stop(self) -> None:
        """Ask the workers to save and stop."""
        self._is_stopping = True

    def is_stopping(self) -> bool:
        """Say whether the workers are asked to stop."""
        return self._is_stopping

    def wait(self, is_waiting: bool) -> None:
        """Take note of whether workers are yet to be started."""
        self._is_waiting = is_waiting

    def is_waiting(self) -> bool:
        """Say whether workers are yet to be started: there is none that could save."""
        return self._is_waiting


class Deaths(UserCallback):
    """Tells the driver that workers died or failed, and what follows; Ray Train calls it in its controller.

    Args:
        board: carries it there.
        max_failures: how often the workers are started again.
    """

    def __init__(self, board: Any, max_failures: int) -> None:
        self._board = board
        self._max_failures = max_failures
        self._num_failures = 0

    def after_exception(self, run_context: Any, worker_exceptions: Mapping[int, Exception]) -> None:
        """Take note of what one look at the workers found; the cause alone, if others only failed after it."""
        # What dies with a node that was announced to be taken away is not counted by Ray Train.
        is_counted = not any(getattr(_death(error), "preempted", False) for error in worker_exceptions.values())
        self._num_failures += is_counted
        if any(isinstance(error, ValueError) for error in worker_exceptions.values()):
            return  # refused: the driver raises it, and nobody is started again
        ranks_of: dict[str, list[str]] = {}
        for rank, error in sorted(causes(worker_exceptions).items()):
            ranks_of.setdefault(reason(error), []).append(str(rank))
        notices = [f"worker {' and '.join(ranks)} {why}" for why, ranks in ranks_of.items()]
        left = self._max_failures - self._num_failures
        follows = (
            f"the workers are started again and go on from the latest checkpoint ({left} more such starts are left)"
            if left >= 0
            else "they were started again as often as launch.max_failures allows"
        )
        self._board.put.remote(Progress(done=0, total=0, notice=f"{'; '.join(notices)}: {follows}"))


class Waits(ControllerCallback):
    """Tells the driver what the workers wait for before they start; Ray Train calls it in its controller.

    Ray Train waits a minute for their resources and then begins again, without end and without counting it among the
    failures. The same is told after 1, 2, 4, 8 and so on of these waits.

    Args:
        board: carries it there.
        launch: says what the workers need.
    """

    def __init__(self, board: Any, launch: LaunchConfig) -> None:
        self._board = board
        self._launch = launch
        self._num_times: Counter[str] = Counter()

    def after_controller_state_update(self, previous_state: Any, current_state: Any) -> None:
        """Take note of a start that failed, and of one that did not."""
        self._board.wait.remote(isinstance(current_state, (SchedulingState, ReschedulingState)))
        if isinstance(current_state, RunningState):
            self._num_times.clear()
        if not isinstance(current_state, ReschedulingState):
            return
        error = current_state.training_failed_error
        failure = getattr(error, "controller_failure", error)
        if isinstance(failure, WorkerGroupStartupTimeoutError):
            kind = notice = missing(self._launch)
        else:
            cause: Any = failure.__cause__ or failure
            kind, notice = "death", f"a worker {reason(cause)} while it was started: it is tried again"
        self._num_times[kind] += 1
        if self._num_times[kind].bit_count() == 1:
            self._board.put.remote(Progress(done=0, total=0, notice=notice))


def run_on_ray(
    worker: Worker, config: Any, launch: LaunchConfig, name: str, watch: Callable[[Progress], None]
) -> Outcome:
    """Run the worker on Ray Train's workers and return the main one's outcome. Ray must be initialised.

    A KeyboardInterrupt asks the workers to save and stop, waits for them, and is raised again; a second one gives up.
    So does the first while there are no workers yet, or none any more.

    Raises:
        ValueError: if Ray does not have the CPUs or GPUs asked for.
        RuntimeError: if the workers failed more often than allowed, with the first cause.
    """
    _check_resources(launch)
    board = _board_here()
    trainer = TorchTrainer(
        _work,
        train_loop_config={"worker": worker, "config": config, "board": board, "launch": launch},
        torch_config=TorchConfig(backend="nccl" if launch.gpus_per_worker else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=launch.num_workers,
            use_gpu=launch.gpus_per_worker > 0,
            resources_per_worker=_resources(launch),
        ),
        run_config=RunConfig(
            name=name,
            failure_config=FailureConfig(max_failures=launch.max_failures),
            callbacks=[Deaths(board, launch.max_failures), Waits(board, launch)],  # type: ignore[list-item]
        ),
    )
    return _watched(trainer.fit, board, watch, "the workers finish their step and save")


def run_alone_on_ray(worker: Worker, config: Any, launch: LaunchConfig, watch: Callable[[Progress], None]) -> Outcome:
    """Run a worker that works alone as one task of Ray's; started in half the time that a group of workers takes.

    Ray starts it again when its process dies, not when it raises. Interrupts and errors are those of `run_on_ray`.
    """
    if launch.num_workers != 1:
        raise ValueError(f"this job works alone: launch.num_workers must be 1, got {launch.num_workers}")
    _check_resources(launch)
    board = _board_here()
    task = ray.remote(num_cpus=launch.cpus_per_worker, num_gpus=launch.gpus_per_worker, max_retries=launch.max_failures)
    begun = task(_work_alone).remote({"worker": worker, "config": config, "board": board, "launch": launch})
    return _watched(lambda: ray.get(begun), board, watch, "this is short and is finished first")


def _board_here() -> Any:
    """Start a board on the driver's node; Ray would take any, and a run would be lost with the node of its board."""
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    return ray.remote(num_cpus=0)(Board).options(scheduling_strategy=here).remote()


def _watched(finish: Callable[[], Any], board: Any, watch: Callable[[Progress], None], stopping: str) -> Outcome:
    """Wait for what was started while showing its news; return the outcome that it left on the board.

    After an interrupt it says what is awaited, and what went wrong meanwhile is raised in place of the interrupt.
    """
    failures: list[BaseException] = []
    # An interrupted `Thread.join` takes the thread for ended while it runs (CPython issue 90882): it is not asked.
    is_over = threading.Event()

    def wait() -> None:
        try:
            finish()
        except (Exception, SystemExit) as error:  # noqa: BLE001 - raised by the main thread; Ray exits when it is shut down
            failures.append(error)
        finally:
            is_over.set()

    # Not in the main thread: there Ray Train takes over SIGINT and aborts the workers, who then can't save.
    threading.Thread(target=wait, daemon=True).start()
    try:
        _watch_until(is_over, board, watch)
    except KeyboardInterrupt:
        watch(Progress(done=0, total=0, notice=f"stopping: {stopping} (again Ctrl-C gives up)"))
        try:
            ray.get(board.ask_to_stop.remote())
            _watch_until(is_over, board, watch, is_stopping=True)
        except KeyboardInterrupt:
            watch(Progress(done=0, total=0, notice="given up: what was saved last stands"))
            raise
        if not failures and not ray.get(board.outcome.remote()):
            raise
    if refusal := str(ray.get(board.refusal.remote())):
        raise ValueError(refusal)
    if failures:
        raise _readable(failures[0]) from failures[0]
    outcome: Outcome = ray.get(board.outcome.remote())
    return outcome


def _work(payload: Mapping[str, Any]) -> None:
    """Run the worker inside a process of Ray Train's."""
    context, device = get_context(), torch.device(get_device())
    rank, size = context.get_world_rank(), context.get_world_size()
    _run_in(World(rank=rank, size=size, device=device, hosts=hosts_of(size, device)), payload)


def _work_alone(payload: Mapping[str, Any]) -> None:
    """Run the worker inside a task, on the GPU that Ray shows it if it asked for one."""
    name = "cuda" if payload["launch"].gpus_per_worker else "cpu"
    _run_in(World(rank=0, size=1, device=torch.device(name)), payload)


def _run_in(world: World, payload: Mapping[str, Any]) -> None:
    launch: LaunchConfig = payload["launch"]
    board = payload["board"]
    if not launch.gpus_per_worker:
        torch.set_num_threads(max(1, int(launch.cpus_per_worker)))

    def report(progress: Progress) -> None:
        told = board.put.remote(progress)
        if progress.is_alarm:  # this process ends next
            ray.get(told)

    if ray.get(board.refusal.remote()):
        return
    try:
        told = report if world.is_main else alarms_of(report)
        outcome = payload["worker"](payload["config"], world, told, _StopPoll(board, world))
    except ValueError as error:
        ray.get(board.refuse.remote(str(error)))
        raise
    if world.is_main:
        ray.get(board.finish.remote(outcome))


class _StopPoll:
    """Asks the board at most twice a second whether to stop; only the main process asks."""

    def __init__(self, board: Any, world: World) -> None:
        self._board = board
        self._is_main = world.is_main
        self._asked = time.monotonic()

    def __call__(self) -> bool:
        if not self._is_main or time.monotonic() - self._asked < POLL_SECONDS:
            return False
        self._asked = time.monotonic()
        return bool(ray.get(self._board.is_stopping.remote()))


def _watch_until(
    is_over: threading.Event, board: Any, watch: Callable[[Progress], None], *, is_stopping: bool = False
) -> None:
    """Show the news until it is over; raise KeyboardInterrupt where it is to stop and waits for workers."""
    while True:
        was_over = is_over.wait(POLL_SECONDS)
        for progress in ray.get(board.take.remote()):
            watch(progress)
        if was_over:
            return
        if is_stopping and ray.get(board.is_waiting.remote()):
            raise KeyboardInterrupt


def _check_resources(launch: LaunchConfig) -> None:
    there: dict[str, float] = ray.cluster_resources()
    if not there.get("CPU"):  # a head that offers nothing: the workers' nodes are yet to be started for us
        return
    for name, wanted in (("CPU", launch.cpus_per_worker), ("GPU", launch.gpus_per_worker)):
        needed = wanted * launch.num_workers
        if needed > there.get(name, 0):
            raise ValueError(
                f"{launch.num_workers} workers with {wanted:g} {name} each need {needed:g} {name}, the Ray cluster has "
                f"{there.get(name, 0):g}: lower launch.num_workers, or add nodes"
            )


def missing(launch: LaunchConfig) -> str:
    """Return what the workers wait for, in words: what they need and what the cluster has."""
    needs = _resources(launch)
    each = " and ".join(f"{amount:g} {name}" for name, amount in needs.items())
    awaited = f"waiting for {launch.num_workers} workers with {each} each: the cluster"
    try:
        there: dict[str, float] = ray.cluster_resources()
        free: dict[str, float] = ray.available_resources()
    except Exception as error:  # noqa: BLE001 - whatever it is, a sentence that lacks is not worth a training
        return f"{awaited} does not tell what it has ({type(error).__name__})"
    return f"{awaited} has " + " and ".join(
        f"{there.get(name, 0):g} {name} ({free.get(name, 0):g} free)" for name in needs
    )


def _resources(launch: LaunchConfig) -> dict[str, float]:
    resources = {"CPU": launch.cpus_per_worker}
    return {**resources, "GPU": launch.gpus_per_worker} if launch.gpus_per_worker else resources


def causes(errors: Mapping[int, Exception]) -> dict[int, Exception]:
    """Return the workers' errors that the others followed from: what was refused, else deaths, else all.

    Where one worker dies, the others lose their connection to it in the next collective.
    """
    refused: dict[int, Exception] = {rank: error for rank, error in errors.items() if isinstance(error, ValueError)}
    died = {rank: error for rank, error in errors.items() if isinstance(_death(error), RayError)}
    return refused or died or dict(errors)


def reason(error: Exception) -> str:
    """Return how a worker came to its end, in words."""
    death = _death(error)
    if isinstance(death, OutOfMemoryError):
        return f"was killed by Ray, for its machine was running out of memory ({_first_lines(death)})"
    if isinstance(death, RayError):
        # Ray goes on with a list of causes that it does not know: the kernel's want of memory, a kill, a crash.
        found = re.search(
            r"Worker exit type: (\w+) Worker exit detail: (.*?)\.?( Some common causes.*)?$", str(death), re.M
        )
        said = f"{found[1]}, {found[2]}" if found else _first_lines(death)
        return f"died (killed, crashed, or out of the machine's memory; Ray says {said[:300]})"
    return f"failed ({type(error).__name__}: {_first_lines(error)})"


def _death(error: Exception) -> Exception:
    """Return Ray's own reason of a worker's death, which Ray Train wraps."""
    return getattr(error, "health_check_failure", error)


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _readable(failure: BaseException) -> Exception:
    """Return the worker's own ValueError where there is one: it is for the person, not for a traceback."""
    failures = getattr(failure, "worker_failures", {})
    cause = next(iter(causes(failures).values())) if failures else failure
    inner = getattr(cause, "_base_exc", getattr(cause, "cause", None)) or cause
    if isinstance(inner, ValueError):
        return ValueError(str(inner))
    how = reason(inner) if isinstance(inner, Exception) else repr(inner)
    return RuntimeError(f"the worker {how}")
