"""Laws of fetching many rows: order kept, a slow row holds up no other, memory is bounded, nothing deadlocks."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import pytest

from pipeline.ingest.fetch import Fetcher
from pipeline.store.schema import Reject, SourceRow
from tests.image_server import LOCAL, PHOTO, image_server, wait_until


@pytest.fixture
def server():
    with image_server() as running:
        yield running


def rows_of(urls: list[str]) -> list[SourceRow]:
    return [SourceRow(key=str(i), captions=(), url=url) for i, url in enumerate(urls)]


def outcomes_of(urls: list[str], config=LOCAL) -> list[bytes | Reject]:
    with Fetcher(config) as fetcher:
        taken = list(fetcher.payloads(rows_of(urls)))
    assert [row.key for row, _ in taken] == [str(i) for i in range(len(urls))]
    return [outcome for _, outcome in taken]


def test_fetch_keeps_the_order_of_rows_while_all_others_overtake_a_slow_one(server):
    """The slow row ends only when the server has seen every other."""
    rows = rows_of([f"{server.url}/slow", *[f"{server.url}/photo"] * 39])
    rows[3] = SourceRow(key="3", captions=(), payload=b"here")
    rows[4] = SourceRow(key="4", captions=())
    rows[5] = SourceRow(key="5", captions=(), url="")
    server.open_gate_when(lambda: len(server.seen) == 37)
    with Fetcher(replace(LOCAL, num_connections=2)) as fetcher:
        taken = list(fetcher.payloads(rows))
    assert [row for row, _ in taken] == rows
    expected = [b"late", PHOTO, PHOTO, b"here", Reject("no_image"), Reject("no_image"), *[PHOTO] * 34]
    assert [outcome for _, outcome in taken] == expected


def test_fetch_uses_its_connection_for_others_while_a_row_backs_off(server):
    """One connection, and the first row is answered after the other twenty: they must all fit between its attempts."""
    urls = [f"{server.url}/after/20?Retry-After=1", *[f"{server.url}/photo?i={i}" for i in range(20)]]
    config = replace(LOCAL, num_connections=1, num_attempts=8)
    assert outcomes_of(urls, config) == [b"last", *[PHOTO] * 20]


def test_fetch_asks_a_host_no_more_at_once_than_it_may_while_others_are_asked(server):
    """Twelve rows hang at one host; a row of another is answered meanwhile, and lets them go."""
    urls = [*[f"{server.url}/slow?i={i}" for i in range(12)], f"http://localhost:{server.server_port}/photo"]
    server.open_gate_when(lambda: "/photo" in server.seen and server.num_active == 3)
    assert outcomes_of(urls, replace(LOCAL, num_connections_per_host=3)) == [*[b"late"] * 12, PHOTO]
    assert server.peak <= 4


def test_fetch_has_no_more_downloads_at_once_than_it_may(server):
    assert outcomes_of([f"{server.url}/photo"] * 60, replace(LOCAL, num_connections=3)) == [PHOTO] * 60
    assert server.peak <= 3


def test_fetch_uses_a_connection_again_for_rows_of_its_host(server):
    config = replace(LOCAL, num_connections_per_host=2)
    assert outcomes_of([f"{server.url}/photo"] * 100, config) == [PHOTO] * 100
    assert server.num_connections <= 10


def test_fetch_takes_no_byte_of_one_answer_for_another(server):
    """A server that sends more than it announced spoils its own connection at most."""
    urls = [f"{server.url}/{kind}" for kind in ("long", "photo") * 20]
    outcomes = outcomes_of(urls, replace(LOCAL, num_connections_per_host=1))
    assert outcomes[1::2] == [PHOTO] * 20
    assert {outcome if isinstance(outcome, bytes) else outcome.reason for outcome in outcomes[::2]} <= {
        PHOTO,
        "bad_answer",
    }


def test_fetch_runs_ahead_of_its_caller_and_never_beyond_its_memory(server):
    """Pictures of 200 kB and a megabyte of memory: five fit, and the row to be taken next may be a sixth."""
    urls = [f"{server.url}/size/200000?i={i}" for i in range(60)]
    ahead = []
    with Fetcher(replace(LOCAL, max_bytes=300_000, max_buffer_bytes=1_000_000)) as fetcher:
        for num_taken, (_, outcome) in enumerate(fetcher.payloads(rows_of(urls)), start=1):
            assert len(outcome) == 200_000
            goal = min(60, num_taken + 3)
            wait_until(lambda goal=goal: len(server.seen) >= goal)
            ahead.append(len(server.seen) - num_taken)
    assert min(ahead[:-3]) >= 3
    assert max(ahead) <= 6


def test_fetch_reads_no_more_rows_ahead_than_it_may(server):
    num_read = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal num_read
        for row in rows_of([f"{server.url}/photo"] * 100):
            num_read += 1
            yield row

    with Fetcher(replace(LOCAL, num_rows_ahead=7)) as fetcher:
        ahead = [num_read - num_taken for num_taken, _ in enumerate(fetcher.payloads(rows()), start=1)]
    assert max(ahead) == 7


def test_fetch_reads_rows_that_bring_their_bytes_one_at_a_time():
    num_read = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal num_read
        for i in range(50):
            num_read += 1
            yield SourceRow(key=str(i), captions=(), payload=bytes(1000))

    with Fetcher(LOCAL) as fetcher:
        assert [num_read for _ in fetcher.payloads(rows())] == list(range(1, 51))


def test_fetch_holds_back_rows_with_bytes_behind_a_slow_download(server):
    """Bytes that came with rows count as well: three rows of 400 kB are more than a megabyte."""
    slow = SourceRow(key="slow", captions=(), url=f"{server.url}/slow")
    num_read = 0

    def rows() -> Iterator[SourceRow]:
        nonlocal num_read
        yield slow
        for i in range(50):
            num_read += 1
            if num_read == 3:
                server.gate.set()
            yield SourceRow(key=str(i), captions=(), payload=bytes(400_000))

    with Fetcher(replace(LOCAL, max_buffer_bytes=1_000_000)) as fetcher:
        passing = fetcher.payloads(rows())
        assert next(passing) == (slow, b"late")
        assert num_read == 3
        assert len(list(passing)) == 50


@pytest.mark.parametrize("seed", range(12))
def test_fetch_of_any_mixture_under_any_limits_ends_with_every_row_in_its_place(server, seed):
    """Back-off, redirects between hosts, bodies beyond all memory, gates for one or two: nothing deadlocks."""
    draw = random.Random(seed)
    hosts = [server.url, f"http://localhost:{server.server_port}"]
    cases = {
        "/photo": PHOTO,
        "/size/8999": bytes(8999),
        "/chunked": PHOTO,
        "/flaky/503,500": b"second",
        "/flaky/429?Retry-After=0": b"second",
        f"/redirect/{hosts[0]}/photo": PHOTO,
        f"/redirect/{hosts[1]}/redirect/{hosts[0]}/chunked": PHOTO,
        "/status/404": "http_404",
        "/status/503": "http_503",
        "/cut": "cut_off",
        "/drip": "too_large",
        "/gzip": PHOTO,
        "/reset": "reset",
    }
    paths = [draw.choice(list(cases)) for _ in range(40)]
    urls = [f"{draw.choice(hosts)}{path}{'&' if '?' in path else '?'}i={i}" for i, path in enumerate(paths)]
    config = replace(
        LOCAL,
        num_connections=draw.randint(1, 3),
        num_connections_per_host=draw.randint(1, 2),
        num_rows_ahead=draw.choice([1, 3, 10, 100]),
        max_buffer_bytes=draw.choice([1, 300_000, 600_000]),
        deadline_seconds=60,
        num_attempts=3,
        seed=seed,
    )
    outcomes = outcomes_of(urls, config)
    assert [x if isinstance(x, bytes) else x.reason for x in outcomes] == [cases[path] for path in paths]


def test_fetch_stops_what_a_caller_leaves_and_goes_on_with_the_next(server):
    with Fetcher(LOCAL) as fetcher:
        passing = fetcher.payloads(rows_of([f"{server.url}/photo", *[f"{server.url}/slow?i={i}" for i in range(20)]]))
        assert next(passing)[1] == PHOTO
        passing.close()
        server.gate.set()
        assert [outcome for _, outcome in fetcher.payloads(rows_of([f"{server.url}/photo"] * 5))] == [PHOTO] * 5


def test_fetch_passes_on_what_breaks_the_source(server):
    def rows() -> Iterator[SourceRow]:
        yield from rows_of([f"{server.url}/photo"] * 3)
        raise OSError("the listing is gone")

    with Fetcher(LOCAL) as fetcher, pytest.raises(OSError, match="the listing is gone"):
        list(fetcher.payloads(rows()))
