"""Laws of fetching: private addresses are never reached, every failure has a name, rows keep their order."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest

from pipeline.ingest.fetch import FetchConfig, Fetcher
from pipeline.store.schema import Reject, SourceRow
from tests.image_server import LOCAL, PHOTO, image_server


@pytest.fixture
def server():
    with image_server() as running:
        yield running


def fetch(url: str, config: FetchConfig = LOCAL) -> bytes | Reject:
    with Fetcher(config) as fetcher:
        return fetcher.fetch(url)


def test_fetch_returns_the_bytes_also_through_redirects(server):
    assert fetch(f"{server.url}/photo") == PHOTO
    assert fetch(f"{server.url}/redirect/{server.url}/redirect/{server.url}/photo") == PHOTO


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/status/404", "http_404"),
        ("/status/410", "http_410"),
        ("/cut", "cut_off"),
        ("/drip", "too_large"),
        ("/redirect/file:///etc/hostname", "not_http"),
        ("/redirect//redirect//redirect/", "too_many_redirects"),
    ],
)
def test_fetch_failure_names_its_cause(server, path, expected):
    config = replace(LOCAL, max_redirects=1)
    assert fetch(server.url + path, config).reason == expected


def test_fetch_of_a_silent_server_times_out(server):
    assert fetch(f"{server.url}/slow", replace(LOCAL, timeout_seconds=0.2, num_attempts=1)).reason == "timeout"


def test_fetch_refuses_what_is_announced_as_too_large(server):
    assert fetch(f"{server.url}/photo", replace(LOCAL, max_bytes=100)).reason == "too_large"


def test_fetch_tries_again_only_where_the_cause_may_pass(server):
    assert fetch(f"{server.url}/flaky") == b"second"
    fetch(f"{server.url}/status/404")
    assert server.seen == ["/flaky", "/flaky", "/status/404"]


@pytest.mark.parametrize(
    "host",
    [
        "127.0.0.1",
        "localhost",
        "[::1]",
        "[::ffff:127.0.0.1]",
        "10.0.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "0.0.0.0",
        "100.64.0.1",
        "[fd00::1]",
        "[fe80::1]",
        "[64:ff9b::7f00:1]",
        "[2002:7f00:1::]",
        "224.0.0.1",
    ],
)
def test_fetch_never_connects_to_an_address_that_is_not_public(server, host):
    outcome = fetch(f"http://{host}:{server.server_port}/photo", FetchConfig(timeout_seconds=5))
    assert outcome.reason == "refused_address"
    assert server.seen == []


@pytest.mark.parametrize("host", ["2130706433", "0x7f000001", "0177.0.0.1", "127.1"])
def test_fetch_never_connects_to_a_disguised_private_address(server, host):
    outcome = fetch(f"http://{host}:{server.server_port}/photo", FetchConfig(timeout_seconds=5, num_attempts=1))
    assert outcome.reason in {"refused_address", "bad_url", "dns"}
    assert server.seen == []


def test_fetch_checks_the_address_of_every_redirect(server):
    target = f"http://127.0.0.2:{server.server_port}/photo"
    assert fetch(f"{server.url}/redirect/{target}").reason == "refused_address"
    assert len(server.seen) == 1


@pytest.mark.parametrize("url", ["ftp://example.com/a.jpg", "http://", "no url", "http://[::1"])
def test_fetch_of_what_is_no_web_address_says_so(url):
    assert fetch(url).reason in {"not_http", "bad_url"}


def test_fetch_keeps_the_order_of_rows_whatever_finishes_first(server):
    rows = [SourceRow(key=str(i), captions=(), url=f"{server.url}/{'slow' if i == 0 else 'photo'}") for i in range(20)]
    rows[3] = SourceRow(key="3", captions=(), payload=b"here")
    rows[4] = SourceRow(key="4", captions=())
    with Fetcher(replace(LOCAL, num_connections=4)) as fetcher:
        outcomes = []
        threading.Timer(0.3, server.gate.set).start()
        for row, outcome in fetcher.payloads(rows):
            outcomes.append((row.key, outcome))
    assert [key for key, _ in outcomes] == [str(i) for i in range(20)]
    assert (outcomes[0][1], outcomes[3][1], outcomes[4][1], outcomes[5][1]) == (
        b"late",
        b"here",
        Reject("no_image"),
        PHOTO,
    )


def test_fetch_of_allowed_networks_must_be_networks():
    with pytest.raises(ValueError, match="does not appear to be an IPv4 or IPv6 network"):
        FetchConfig(allowed_networks=("everywhere",))
