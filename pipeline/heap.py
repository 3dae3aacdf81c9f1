"""Large buffers of a worker's process stay in its heap, where the allocator is glibc's.

By default a block above 32 MiB is mapped anew each time, and the kernel then clears it page by page: of an encoder's
forward on a CPU that is two fifths of the time. Results do not change, only where they lie; what a process has held
at most, it keeps until it ends. Elsewhere (other libraries, other systems) nothing happens.
"""

from __future__ import annotations

import ctypes
import sys

# The parameters' numbers in malloc.h, the same on all of glibc's architectures.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX, _ARENA_MAX = -1, -2, -4, -8
_STEP_BYTES = 1 << 26


def keep_large_blocks() -> None:
    """Let this process reuse large blocks instead of giving them back; call it before threads are started."""
    if not sys.platform.startswith("linux"):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl has none
        return
    mallopt(_MMAP_MAX, 0)
    mallopt(_TRIM_THRESHOLD, 2**31 - 1)
    mallopt(_TOP_PAD, _STEP_BYTES)
    # Arenas of further threads hold blocks of at most 64 MiB, so threads share the first one.
    mallopt(_ARENA_MAX, 1)
