"""Damage to sound bytes, and ten minutes of it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

FUZZ_SECONDS = 600
place = st.floats(0, 1, exclude_max=True)
change = st.one_of(
    st.tuples(st.just("set"), place, st.integers(0, 255)),
    st.tuples(st.just("near the start"), place, st.integers(0, 255)),
    st.tuples(st.just("cut"), place, st.just(0)),
    st.tuples(st.just("drop"), place, st.integers(1, 40)),
    st.tuples(st.just("repeat"), place, st.integers(1, 60)),
    st.tuples(st.just("long"), place, st.sampled_from([0x00, 0x7F, 0x80, 0xFF])),
)
damage = st.lists(change, min_size=1, max_size=8)


def damaged(content: bytes, changes: list[tuple[str, float, int]]) -> bytes:
    for kind, where, value in changes:
        at = int(where * len(content))
        match kind:
            case "set":
                content = content[:at] + bytes([value]) + content[at + 1 :]
            case "near the start":
                at = int(where * min(64, len(content)))
                content = content[:at] + bytes([value]) + content[at + 1 :]
            case "cut":
                content = content[:at]
            case "drop":
                content = content[:at] + content[at + value :]
            case "repeat":
                content = content[:at] + content[at : at + value] * 2 + content[at + value :]
            case "long":
                content = content[:at] + bytes([value] * 4) + content[at + 4 :]
    return content


def fuzz(check: Callable[..., Any], *strategies: st.SearchStrategy[Any], seconds: float = FUZZ_SECONDS) -> int:
    """Call the check with ever new examples until the time is over; return how many there were."""
    ends, num_examples = time.monotonic() + seconds, 0

    @settings(
        max_examples=2000,
        deadline=None,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(st.tuples(*strategies))
    def examples(example: tuple[Any, ...]) -> None:
        nonlocal num_examples
        if time.monotonic() < ends:
            check(*example)
            num_examples += 1

    while time.monotonic() < ends:
        examples()
    print(f"{num_examples:,} examples in {seconds:.0f} s")
    return num_examples
