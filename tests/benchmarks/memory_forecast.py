"""The forecast of a rank's memory against what two real ranks take, for the local engine and every ZeRO stage.

python -m tests.benchmarks.memory_forecast [--rows 8] [--quick] [--save]

Each engine trains a fresh UNet for a few steps in processes of its own; measured is the highest resident memory above
what the process had before the network, after a small training had the libraries take what they keep.
"""

from __future__ import annotations

import json
import platform
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ldm.config import Config
from ldm.unet.model import UNetConfig
from tests.measured_memory import Case, forecast_and_measured

RESULT = Path(__file__).parent / "results" / "memory_forecast.json"
GOAL = 0.1
LOCAL = "local"


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryForecastBenchmark(Config):
    """Forecast and measured memory of a rank."""

    engines: tuple[str, ...] = (LOCAL, "zero1", "zero2", "zero3")
    """The local engine and names of infra/deepspeed's files."""
    rows: int = 4
    """Rows of a rank's batch."""
    side: int = 32
    """Rows and columns of a latent."""
    base_channels: int = 128
    """Width of the UNet."""
    steps: int = 3
    """Steps of each training."""
    ranks: int = 2
    """Ranks that train together."""
    micro_rows: int = 0
    """Rows of a micro-batch; 0 for all."""
    quick: bool = False
    """A narrower UNet."""
    save: bool = False
    """Write the result beside the other results."""


def main() -> None:
    """Measure and print."""
    settings = tyro.cli(MemoryForecastBenchmark, description=__doc__)
    unet = UNetConfig(
        in_channels=4,
        out_channels=4,
        base_channels=64 if settings.quick else settings.base_channels,
        channel_mult=(1, 2, 3),
        num_res_blocks=2,
        attention_factors=(4,),
        num_heads=4,
        context_width=64,
    )
    case = Case(unet, settings.rows, settings.side, settings.micro_rows or settings.rows, settings.steps)
    print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {settings.ranks} ranks")
    print(f"{'engine':14}{'forecast MB':>12}{'measured MB':>14}{'ratio':>8}")
    results = {}
    for name in settings.engines:
        said, taken = forecast_and_measured(case, None if name == LOCAL else name, settings.ranks)
        results[name] = {"forecast_bytes": said, "measured_bytes": taken, "ratio": said / taken}
        print(f"{name:14}{said / 1e6:12,.1f}{taken / 1e6:14,.1f}{said / taken:8.3f}", flush=True)
    worst = max(abs(result["ratio"] - 1) for result in results.values())
    if settings.save:
        content = {"settings": settings.to_dict(), "torch": torch.__version__, "results": results}
        RESULT.write_text(json.dumps(content, indent=1) + "\n")
    print(f"memory_forecast worst {worst:.3f} goal {GOAL}")


if __name__ == "__main__":
    main()
