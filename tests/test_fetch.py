"""Laws of fetching one URL: every outcome has a name, limits hold, and only what may pass is tried again."""

from __future__ import annotations

import errno
import gzip
import socket
from dataclasses import replace

import aiohttp
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.ingest.fetch import FETCH_REASONS, TRANSIENT_REASONS, FetchConfig, Fetcher
from pipeline.ingest.optouts import opt_out_of, robot_name
from pipeline.ingest.outcomes import reject_error
from pipeline.ingest.retries import backoff_seconds, retry_after_seconds
from pipeline.store.schema import Reject
from tests.image_server import LOCAL, PHOTO, image_server, self_signed_certificate

ONCE = replace(LOCAL, num_attempts=1)


@pytest.fixture
def server():
    with image_server() as running:
        yield running


def fetch(url: str, config: FetchConfig = LOCAL) -> bytes | Reject:
    with Fetcher(config) as fetcher:
        return fetcher.fetch(url)


@pytest.mark.parametrize(
    "path",
    [
        "/photo",
        "/photo?Content-Type=text/html",
        "/photo?Content-Encoding=utf-8",
        "/chunked",
        "/gzip",
        "/status/302?Location=/photo",
        "/status/307?Location=../photo",
        "/status/308?Location=//127.0.0.1:{port}/photo",
        "/redirect//redirect//photo",
    ],
)
def test_fetch_returns_the_bytes_however_they_are_sent(server, path):
    assert fetch(f" {server.url}{path.format(port=server.server_port)}\n") == PHOTO


@pytest.mark.parametrize(
    "path, expected",
    [
        ("/status/204", "http_204"),
        ("/status/302", "http_302"),
        ("/status/404", "http_404"),
        ("/status/410", "http_410"),
        ("/status/999", "http_other"),
        ("/cut", "cut_off"),
        ("/drip", "too_large"),
        ("/endless", "too_large"),
        ("/size/9001", "too_large"),
        ("/gzip/9001", "too_large"),
        ("/gzip/100000000", "too_large"),
        ("/gzip/half", "bad_encoding"),
        ("/photo?Content-Encoding=gzip", "bad_encoding"),
        ("/photo?Content-Encoding=br", "bad_encoding"),
        ("/huge-header", "bad_answer"),
        ("/many-headers", "bad_answer"),
        ("/raw/" + PHOTO[:50].hex(), "bad_answer"),
        ("/raw/" + b"HTTP/1.1 200 OK\r\nContent-Length: -5\r\n\r\n".hex(), "bad_answer"),
        ("/hang-up", "reset"),
        ("/reset", "reset"),
        ("/redirect/file:///etc/hostname", "not_http"),
        ("/redirect/data:image/png;base64,AAAA", "not_http"),
        ("/redirect/http://[::1", "bad_url"),
        ("/redirect//redirect//redirect/", "too_many_redirects"),
        ("/loop", "too_many_redirects"),
    ],
)
def test_fetch_failure_names_its_cause(server, path, expected):
    outcome = fetch(server.url + path, replace(ONCE, max_redirects=1))
    assert outcome.reason == expected
    assert expected in FETCH_REASONS


def test_fetch_stops_at_the_limit_of_bytes_and_not_below(server):
    assert len(fetch(f"{server.url}/size/9000")) == 9000
    assert len(fetch(f"{server.url}/gzip/9000")) == 9000


@pytest.mark.parametrize("num_redirects, is_fetched", [(3, True), (4, False)])
def test_fetch_follows_exactly_the_redirects_it_may(server, num_redirects, is_fetched):
    outcome = fetch(server.url + "/redirect/" * num_redirects + "/photo", replace(LOCAL, max_redirects=3))
    assert (outcome == PHOTO) is is_fetched


@pytest.mark.parametrize(
    "path, limit, expected",
    [
        ("/slow", {"read_timeout_seconds": 0.2}, "read_timeout"),
        ("/stall", {"read_timeout_seconds": 0.2}, "read_timeout"),
        ("/slow", {"timeout_seconds": 0.2}, "timeout"),
        ("/trickle", {"timeout_seconds": 0.3, "read_timeout_seconds": 5, "max_bytes": 1_000_000}, "timeout"),
        ("/trickle", {"deadline_seconds": 0.3, "read_timeout_seconds": 5, "max_bytes": 1_000_000}, "timeout"),
    ],
)
def test_fetch_of_a_slow_server_names_the_time_that_ran_out(server, path, limit, expected):
    assert fetch(server.url + path, replace(ONCE, **limit)).reason == expected


def test_fetch_from_nobody_is_refused_and_from_a_full_queue_times_out():
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/"
        assert fetch(url, ONCE).reason == "connect_refused"
        listener.listen(0)
        with socket.create_connection(listener.getsockname()):
            assert fetch(url, replace(ONCE, connect_timeout_seconds=0.2)).reason == "connect_timeout"


def test_fetch_over_tls_refuses_a_certificate_that_nobody_vouches_for(tmp_path):
    with image_server(certificate=self_signed_certificate(tmp_path / "server.pem")) as server:
        outcome = fetch(f"{server.url}/photo")
    assert (outcome.reason, server.seen) == ("tls", [])
    assert "certificate verify failed" in outcome.detail


@pytest.mark.parametrize(
    "url, expected",
    [
        ("ftp://example.com/a.jpg", "not_http"),
        ("file:///etc/hostname", "not_http"),
        ("data:image/gif;base64,R0lGODlhAQABAAAAACw=", "not_http"),
        ("javascript:alert(1)", "not_http"),
        ("http://", "bad_url"),
        ("http:a.jpg", "bad_url"),
        ("//example.com/a.jpg", "bad_url"),
        ("no url", "bad_url"),
        ("http://[::1", "bad_url"),
        ("http://[]@", "bad_url"),
        ("http://127.0.0.1:0/", "bad_url"),
        ("http://127.0.0.1:99999/", "bad_url"),
        ("http://ex ample.com/", "bad_url"),
        ("http://127.0.0.1\\@example.com/", "bad_url"),
        ("http://\ud800.com/", "bad_url"),
        ("http://a..b/", "bad_url"),
        ("http://" + "a" * 300 + "/", "bad_url"),
        ("http://example.com/" + "a" * 10_000, "bad_url"),
    ],
)
def test_fetch_of_what_is_no_web_address_says_so(url, expected):
    assert fetch(url, replace(LOCAL, num_attempts=1)).reason == expected


def test_fetch_says_who_asks_and_nothing_that_the_environment_or_the_url_knows(server, monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    config = replace(LOCAL, user_agent="picturebot/2", contact="https://example.org/bot")
    assert fetch(f"http://user:secret@127.0.0.1:{server.server_port}/photo?Set-Cookie=a=b", config) == PHOTO
    (headers,) = server.headers
    assert headers["User-Agent"] == "picturebot/2 (+https://example.org/bot)"
    assert headers["Accept-Encoding"] == "identity"
    assert headers["Authorization"] is None


# --- trying again -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504])
def test_fetch_tries_again_where_the_cause_may_pass(server, status):
    assert fetch(f"{server.url}/flaky/{status},{status}") == b"second"
    assert len(server.seen) == 3


@pytest.mark.parametrize("path", ["/status/404", "/status/403", "/status/501", "/size/9001", "/raw/00"])
def test_fetch_asks_once_where_the_cause_stays(server, path):
    assert fetch(server.url + path).reason not in TRANSIENT_REASONS
    assert len(server.seen) == 1


@pytest.mark.parametrize("path", ["/status/503", "/cut"])
def test_fetch_gives_up_after_its_attempts_under_the_last_cause(server, path):
    assert fetch(server.url + path, replace(LOCAL, num_attempts=4)).reason in TRANSIENT_REASONS
    assert len(server.seen) == 4


def test_fetch_waits_as_long_as_the_server_asks(server):
    """The server stays busy for its second, and two requests suffice: after its own back-off it would need more."""
    assert fetch(f"{server.url}/busy/0.9?Retry-After=1", replace(LOCAL, num_attempts=2)) == b"later"
    assert len(server.seen) == 2


@pytest.mark.parametrize("limit", [{"max_retry_after_seconds": 59}, {"deadline_seconds": 30}])
@pytest.mark.parametrize("status", [429, 503])
def test_fetch_gives_up_at_once_where_the_server_asks_for_too_long_a_wait(server, status, limit):
    config = replace(LOCAL, **({"max_retry_after_seconds": 60, "deadline_seconds": 100} | limit))
    assert fetch(f"{server.url}/status/{status}?Retry-After=60", config).reason == f"http_{status}"
    assert len(server.seen) == 1


def test_fetch_ends_at_the_row_deadline_however_many_attempts_are_left(server):
    config = replace(LOCAL, num_attempts=1_000_000, deadline_seconds=0.3, backoff_seconds=0.05)
    assert fetch(f"{server.url}/status/503", config).reason == "http_503"


@given(st.integers(), st.text(), st.integers(0, 900), st.floats(0, 10), st.floats(0, 60))
def test_backoff_is_a_function_of_its_arguments_and_never_above_the_ceiling(seed, url, attempt, base, ceiling):
    wait = backoff_seconds(seed, url, attempt, base, ceiling)
    assert wait == backoff_seconds(seed, url, attempt, base, ceiling)
    assert 0 <= wait <= min(ceiling, base * 2.0**attempt)


def test_backoff_has_full_jitter():
    """Uniform draws of n = 4000: the mean's standard error is 1 / sqrt(12 n) = 0.0046 of the longest wait."""
    for attempt, longest in ((0, 1), (1, 2), (2, 4), (3, 5), (9, 5)):
        waits = [backoff_seconds(1, f"http://example.com/{i}", attempt, 1, 5) / longest for i in range(4000)]
        assert sum(waits) / len(waits) == pytest.approx(0.5, abs=0.025)
        assert min(waits) < 0.01
        assert max(waits) > 0.99


@pytest.mark.parametrize(
    "headers, seconds",
    [
        ({}, 0),
        ({"Retry-After": "7"}, 7),
        ({"Retry-After": " 120 "}, 120),
        ({"Retry-After": "9" * 500}, float("inf")),
        ({"Retry-After": "-3"}, 0),
        ({"Retry-After": "1.5"}, 0),
        ({"Retry-After": "soon"}, 0),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT", "Date": "Fri, 31 Dec 1999 23:58:59 GMT"}, 60),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT", "Date": "Sat, 01 Jan 2000 00:00:00 GMT"}, 0),
        ({"Retry-After": "Fri, 31 Dec 1999 23:59:59 GMT"}, 0),
    ],
)
def test_retry_after_is_read_as_seconds_or_as_a_date(headers, seconds):
    assert retry_after_seconds(headers) == seconds


# --- opting out -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "headers, expected",
    [
        (["noai"], "noai"),
        (["NoImageAI"], "noimageai"),
        (["all"], None),
        (["nofollow, noindex"], "noindex"),
        (["none"], "noindex"),
        (["nofollow", " noimageindex "], "noimageindex"),
        (["picturebot: noai"], "noai"),
        (["PictureBot:noai"], "noai"),
        (["*: noai"], "noai"),
        (["otherbot: noai"], None),
        (["otherbot: nofollow, noai"], None),
        (["otherbot: noai, picturebot: nofollow"], None),
        (["otherbot: nofollow, picturebot: nofollow, noai"], "noai"),
        (["otherbot: nofollow", "noai"], "noai"),
        (["max-image-preview: large, noai"], "noai"),
        (["unavailable_after: 25 Jun 2030 15:00:00 GMT, noai"], "noai"),
        (["xnoai, noaix"], None),
        ([",,:,noai:"], None),
        ([], None),
    ],
)
def test_opt_out_is_heard_from_whoever_addresses_us(headers, expected):
    directives = frozenset(FetchConfig().opt_out_directives)
    assert opt_out_of(headers, robot_name("PictureBot/1.0 (x)"), directives) == expected


@pytest.mark.parametrize(
    "path",
    [
        "/photo?X-Robots-Tag=noai",
        "/photo?X-Robots-Tag=all&X-Robots-Tag=otherbot: nofollow&X-Robots-Tag=nofollow, noimageai",
        "/photo?X-Robots-Tag=latent-diffusion-pipeline: noindex",
        "/status/302?Location=/photo&X-Robots-Tag=noai",
        "/redirect//photo?X-Robots-Tag=noai",
    ],
)
def test_fetch_leaves_out_what_is_opted_out_anywhere_on_the_way(server, path):
    path = path.replace(" ", "%20")
    assert fetch(server.url + path).reason == "opted_out"
    assert fetch(server.url + path, replace(LOCAL, opt_out_directives=())) == PHOTO


def test_fetch_names_a_failure_before_an_opt_out(server):
    assert fetch(f"{server.url}/status/404?X-Robots-Tag=noindex").reason == "http_404"


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_fetch_blames_no_url_for_what_this_machine_lacks(number):
    with pytest.raises(RuntimeError, match="fetching failed on this machine, fewer num_connections may help"):
        reject_error(OSError(number, "not enough"))
    with pytest.raises(RuntimeError, match="fetching failed on this machine"):
        reject_error(aiohttp.ClientConnectorError(None, OSError(number, "not enough")))


# --- anything at all --------------------------------------------------------------------------------------------------

STATUS_LINES = st.sampled_from(
    [b"HTTP/1.1 200 OK\r\n", b"HTTP/1.0 200\r\n", b"HTTP/1.1 302 Found\r\n", b"HTTP/9 x", b""]
)
HEADERS = st.sampled_from(
    [
        *(b"Content-Length: 5\r\n", b"Content-Length: 5, 5\r\n", b"Content-Length: 99999999999999999999\r\n"),
        *(b"Transfer-Encoding: chunked\r\n", b"Transfer-Encoding: gzip\r\n", b"Content-Encoding: gzip\r\n"),
        *(b"Location: \xff\xfe/photo\r\n", b"Location: http://%31/\r\n", b"Location: \r\n", b"Connection: close\r\n"),
        *(b"X-Robots-Tag: \xff: noai\r\n", b"Retry-After: \xb2\r\n", b": empty\r\n", b" folded\r\n", b"a\0b: c\r\n"),
    ]
)
BODIES = st.one_of(
    st.binary(max_size=60), st.sampled_from([b"5\r\nhello\r\n0\r\n\r\n", b"hello", gzip.compress(b"hello")])
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(STATUS_LINES, st.lists(HEADERS, max_size=4), st.sampled_from([b"\r\n", b"\n", b""]), BODIES)
def test_fetch_of_any_answer_ends_in_bytes_or_a_known_reason(server, status_line, headers, gap, body):
    answer = status_line + b"".join(headers) + gap + body
    config = replace(ONCE, read_timeout_seconds=1, max_redirects=1)
    outcome = fetch(f"{server.url}/raw/{answer.hex()}", config)
    assert isinstance(outcome, bytes) or outcome.reason in FETCH_REASONS


@settings(max_examples=150, deadline=None)
@given(st.one_of(st.text(max_size=60), st.text(max_size=60).map("http://[::1]".__add__)))
def test_fetch_of_any_text_ends_in_a_known_reason(text):
    """No text of so few characters is by chance a public address that would be asked."""
    assert fetch(text, FetchConfig(num_attempts=1)).reason in FETCH_REASONS


def test_transient_reasons_are_reasons():
    assert FETCH_REASONS.keys() > TRANSIENT_REASONS
    assert all(meaning and "\n" not in meaning for meaning in FETCH_REASONS.values())


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"allowed_networks": ("everywhere",)}, "does not appear to be an IPv4 or IPv6 network"),
        ({"timeout_seconds": 0}, "timeout_seconds must be above 0, got 0"),
        ({"max_redirects": -1}, "max_redirects must be at least 0, got -1"),
        ({"user_agent": ""}, "user_agent must begin with a name"),
        ({"user_agent": "bot\r\nHost: x"}, "user_agent must be printable ASCII"),
        ({"contact": "https://exämple.org"}, "contact must be printable ASCII"),
    ],
)
def test_fetch_config_refuses_what_can_not_work(fields, message):
    with pytest.raises(ValueError, match=message):
        FetchConfig(**fields)
