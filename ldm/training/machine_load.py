"""What each process and its machine are busy with: CPU, memory and GPU, by rank.

MLflow's own monitor reads the same sources (psutil, NVML). It sends them from a thread of its own under a count of its
own, gives up at the first answer that fails to come, and needs MLflow on every worker; here they go into the record
with the other metrics, at the same times of the clock.
"""

from __future__ import annotations

import psutil
import torch

from ldm.training.world import World

try:
    from pynvml import NVMLError
except ModuleNotFoundError:  # package nvidia-ml-py: without it torch can't ask how busy a GPU is, only what it holds
    NVMLError = ModuleNotFoundError


class MachineLoad:
    """Measures this process and its machine since the measurement before."""

    def __init__(self) -> None:
        self._process = psutil.Process()
        psutil.cpu_percent()  # the first calls measure nothing
        self._process.cpu_percent()

    def of_ranks(self, world: World) -> dict[str, float]:
        """Return every process's load as `system/rank_<number>/<name>`; all processes call it together."""
        loads = world.gather(self.measure(world.device))
        return {f"system/rank_{rank}/{name}": value for rank, load in enumerate(loads) for name, value in load.items()}

    def measure(self, device: torch.device) -> dict[str, float]:
        """Return the load of this process, its machine and its GPU; names of the machine's and the GPU's are MLflow's.

        A process that keeps two CPUs busy is at 200 percent, a machine whose CPUs are all busy at 100.
        """
        memory = psutil.virtual_memory()
        load = {
            "cpu_utilization_percentage": psutil.cpu_percent(),
            "system_memory_usage_percentage": memory.percent,
            "process_cpu_utilization_percentage": self._process.cpu_percent(),
            "process_memory_usage_megabytes": self._process.memory_info().rss / 1e6,
        }
        return {**load, **_gpu_load(device)} if device.type == "cuda" else load


def _gpu_load(device: torch.device) -> dict[str, float]:
    free, total = torch.cuda.mem_get_info(device)
    memory = {
        "gpu_memory_usage_megabytes": (total - free) / 1e6,
        "gpu_memory_usage_percentage": 100 * (total - free) / total,
    }
    try:
        return {**memory, "gpu_utilization_percentage": float(torch.cuda.utilization(device))}
    except (NVMLError, ModuleNotFoundError, RuntimeError):  # a driver may refuse it too, as of a part of a GPU (MIG)
        return memory
