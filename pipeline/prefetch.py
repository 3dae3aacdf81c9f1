"""Work done ahead of its consumer: a bounded number of pieces, in order, on one background thread."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")


def prefetched(
    produce: Callable[[Piece], Result], pieces: Iterator[Piece], depth: int, report_wait: Callable[[float], None]
) -> Generator[Result, None, None]:
    """Yield `produce(piece)` for each piece, in order, at most `depth` of them made ahead.

    An error of `produce` is raised here, at the piece it belongs to. Closing the iterator ends the thread.

    Args:
        produce: what to do with a piece; it runs on the one background thread.
        pieces: what to do it with; may be endless.
        depth: results made before they are asked for, at least 1.
        report_wait: takes the seconds that the consumer waited for each piece.
    """
    worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prefetch")
    pending: deque[Future[Result]] = deque(worker.submit(produce, piece) for piece in islice(pieces, depth))
    try:
        while pending:
            start_seconds = time.perf_counter()
            result = pending.popleft().result()
            report_wait(time.perf_counter() - start_seconds)
            pending.extend(worker.submit(produce, piece) for piece in islice(pieces, 1))
            yield result
    finally:
        worker.shutdown(wait=True, cancel_futures=True)
