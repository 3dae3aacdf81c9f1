"""Schedules beyond the paper's, for tests of what goes with them."""

from __future__ import annotations

import torch

from ldm.diffusion.schedule import Scales, Schedule, ScheduleConfig, ScheduleKind

FLOW = ScheduleConfig(kind=ScheduleKind.FLOW)
EDM = ScheduleConfig(kind=ScheduleKind.EDM)
ZERO_SNR = ScheduleConfig(start=0.00085, end=0.012, has_zero_terminal_snr=True)
WITHOUT_SIGNAL = [FLOW, ZERO_SNR, ScheduleConfig(kind=ScheduleKind.FLOW, shift=3.0)]


def scales(config: ScheduleConfig, *times: float) -> Scales:
    """Return alpha and sigma at some times, float64."""
    return Schedule(config).scales(torch.tensor(times, dtype=torch.float64))
