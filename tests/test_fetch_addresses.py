"""Laws of the address guard: a connection goes to a public address that was checked, whatever names and servers say."""

from __future__ import annotations

import asyncio
import ipaddress
import random
import socket
from dataclasses import replace

import pytest
from aiohttp.abc import AbstractResolver
from hypothesis import given
from hypothesis import strategies as st

from pipeline.ingest.addresses import (
    SERVICE_PORTS,
    AddressGuard,
    RefusedAddress,
    RefusedPort,
    is_disguised,
    is_public,
    reached_address,
)
from pipeline.ingest.fetch import FetchConfig, Fetcher
from pipeline.store.schema import Reject, SourceRow
from tests.image_server import LOCAL, PHOTO, image_server

ONCE = FetchConfig(num_attempts=1, timeout_seconds=5)
PRIVATE_ADDRESSES = (
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.100.100.200", "127.0.0.1", "127.255.255.254"),
    *("169.254.0.1", "169.254.169.254", "168.63.129.16", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.192"),
    *("192.0.2.1", "192.88.99.1", "192.168.1.1", "198.18.0.1", "198.51.100.1", "203.0.113.1", "224.0.0.1"),
    *("239.255.255.250", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::127.0.0.1", "::8.8.8.8", "::ffff:127.0.0.1", "::ffff:10.0.0.1", "::ffff:169.254.169.254"),
    *("::ffff:0:127.0.0.1", "64:ff9b::7f00:1", "64:ff9b::a9fe:a9fe", "64:ff9b:1::808:808", "100::1", "2001::1"),
    *("2001:0:7f00:1::", "2001:2::1", "2001:db8::1", "2002:7f00:1::", "2002:808:808::", "3fff::1", "4000::1"),
    *("5f00::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fe80::1%eth0", "fec0::1"),
    *("ff02::1", "ff0e::1"),
)
PUBLIC_ADDRESSES = (
    *("1.1.1.1", "8.8.8.8", "100.63.255.255", "100.128.0.0", "172.15.0.1", "172.32.0.1", "192.0.1.0", "223.255.255.1"),
    *("2606:4700:4700::1111", "2001:4860:4860::8888", "2a00:1450::1", "::ffff:8.8.8.8", "64:ff9b::808:808"),
)
DISGUISED_HOSTS = (
    *("2130706433", "0x7f000001", "0X7F000001", "017700000001", "127.1", "127.0.1", "0177.0.0.1", "0x7f.0.0.1"),
    *("127.0.0.0x1", "127.0.0.01", "127.0.0.1.", "127.0.0.256", "1.2.3.4.5", "10.0.0.0x", "example.1"),
)


class Names(AbstractResolver):
    """Name servers that give the n-th answer of a script to the n-th question, the last one for ever."""

    def __init__(self, *answers: tuple[str, ...] | OSError | None) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []

    async def resolve(self, host, port=0, family=socket.AF_UNSPEC):
        self.asked.append(host)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, OSError):
            raise answer
        families = [socket.AF_INET6 if ":" in address else socket.AF_INET for address in answer]
        return [
            {"hostname": host, "host": address, "port": port, "family": family, "proto": 0, "flags": 0}
            for address, family in zip(answer, families, strict=True)
        ]

    async def close(self):
        pass


@pytest.fixture
def server():
    """Listens at every address of this machine, so that a connection to a wrong one would be seen."""
    with image_server("0.0.0.0") as running:
        yield running


def fetch(url: str, config: FetchConfig = ONCE, names: Names | None = None) -> bytes | Reject:
    with Fetcher(config, names) as fetcher:
        return fetcher.fetch(url)


def connect_info(address: str, port: int = 80) -> tuple:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return family, socket.SOCK_STREAM, socket.IPPROTO_TCP, "", (address, port)


# --- what is public ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", PRIVATE_ADDRESSES)
def test_guard_makes_no_socket_for_an_address_that_is_not_public(address):
    with pytest.raises(RefusedAddress, match="is not a public address"):
        AddressGuard().open_socket(connect_info(address))


@pytest.mark.parametrize("address", PUBLIC_ADDRESSES)
def test_guard_makes_a_socket_for_a_public_address(address):
    AddressGuard().open_socket(connect_info(address)).close()


@given(st.integers(0, 2**32 - 1).map(ipaddress.IPv4Address))
def test_guard_sees_the_same_host_behind_every_way_of_writing_it_in_ipv6(address):
    assert is_public(address) <= address.is_global
    for prefix in ("::ffff:0:0", "64:ff9b::"):
        written = ipaddress.IPv6Address(int(ipaddress.IPv6Address(prefix)) | int(address))
        assert AddressGuard().allows(str(written)) == is_public(address)
    for number in (int(address), int(ipaddress.IPv6Address("2002::")) | int(address) << 80):
        assert not AddressGuard().allows(str(ipaddress.IPv6Address(number)))


@given(st.integers(0, 2**128 - 1).map(ipaddress.IPv6Address))
def test_guard_calls_nothing_public_that_the_standard_library_calls_private(address):
    reached = reached_address(address)
    assert not is_public(address) or (reached.is_global and not reached.is_private and not reached.is_multicast)


def test_guard_allows_exactly_the_networks_it_is_told():
    guard = AddressGuard(("10.1.0.0/16", "fd00:1::/32"))
    assert all(guard.allows(address) for address in ("10.1.2.3", "::ffff:10.1.2.3", "fd00:1::5"))
    assert not any(guard.allows(address) for address in ("10.2.0.1", "fd00:2::5", "127.0.0.1"))


def test_guard_allows_web_ports_and_what_no_service_is_known_for():
    guard = AddressGuard(allowed_ports=(81, 6379))
    refused = {port for port in range(1, 65536) if not guard.allows_port(port)}
    assert refused == (set(range(1, 1024)) | SERVICE_PORTS) - {80, 81, 443, 6379}
    with pytest.raises(RefusedPort, match="port 22 is not one that pictures are served on"):
        guard.open_socket(connect_info("8.8.8.8", 22))


@pytest.mark.parametrize("host", DISGUISED_HOSTS)
def test_disguise_of_an_address_is_seen(host):
    assert is_disguised(host)


@pytest.mark.parametrize("host", ["127.0.0.1", "8.8.8.8", "example.com", "1.example", "1e100.net", "x1", "0xyz", "::1"])
def test_disguise_is_not_seen_where_there_is_none(host):
    assert not is_disguised(host)


# --- what is connected ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        *("127.0.0.1", "localhost", "LOCALHOST", "[::1]", "[::ffff:127.0.0.1]", "[::ffff:7f00:1]"),
        *("[::127.0.0.1]", "[64:ff9b::7f00:1]", "[2002:7f00:1::]", "10.0.0.1", "169.254.169.254", "[fd00:ec2::254]"),
        *("0.0.0.0", "[::]", "100.64.0.1", "224.0.0.1", "[fe80::1%25lo]", *DISGUISED_HOSTS),
        *("１２７.０.０.１", "①②⑦.⓪.⓪.①", "127。0。0。1", "example.com@127.0.0.1", "8.8.8.8:80@127.0.0.1"),
    ],
)
def test_fetch_never_connects_to_an_address_that_is_not_public(server, host):
    assert fetch(f"http://{host}:{server.server_port}/photo").reason == "refused_address"
    assert server.num_connections == 0


def test_fetch_never_connects_to_the_local_name_with_a_dot(server):
    """Some systems know that name and some do not."""
    assert fetch(f"http://localhost.:{server.server_port}/photo").reason in {"refused_address", "dns_no_name"}
    assert server.num_connections == 0


@pytest.mark.parametrize("host", ["%31%32%37.0.0.1", "127.0.0.1\\@example.com", "127.0.0.1%00.example.com"])
def test_fetch_never_connects_to_a_host_that_is_written_to_confuse(server, host):
    assert fetch(f"http://{host}:{server.server_port}/photo").reason == "bad_url"
    assert server.num_connections == 0


@pytest.mark.parametrize(
    "target", ["127.0.0.2", "[::ffff:127.0.0.2]", "[::1]", "10.0.0.1", "169.254.169.254", "2130706433"]
)
@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_fetch_checks_the_address_of_every_redirect(server, status, target):
    location = f"http://{target}:{server.server_port}/photo"
    url = f"http://127.0.0.1:{server.server_port}/status/{status}?Location={location}"
    assert fetch(url, LOCAL).reason == "refused_address"
    assert len(server.seen) == 1


@pytest.mark.parametrize("port", [22, 25, 6379, 11211])
def test_fetch_refuses_the_ports_of_other_services_also_after_a_redirect(server, port):
    assert fetch(f"http://127.0.0.1:{port}/", LOCAL).reason == "refused_port"
    assert (
        fetch(f"http://127.0.0.1:{server.server_port}/redirect/http://127.0.0.1:{port}/", LOCAL).reason
        == "refused_port"
    )


@pytest.mark.parametrize("address", ["127.0.0.1", "169.254.169.254", "10.0.0.1", "fd00:ec2::254", "::ffff:127.0.0.1"])
def test_fetch_refuses_a_name_that_leads_to_a_private_address(server, address):
    names = Names((address,))
    outcome = fetch(f"http://metadata.example:{server.server_port}/photo", names=names)
    assert outcome == Reject("refused_address", outcome.detail)
    assert address in outcome.detail
    assert (names.asked, server.num_connections) == (["metadata.example"], 0)


@pytest.mark.parametrize("addresses", [("127.0.0.2", "127.0.0.1"), ("127.0.0.1", "127.0.0.2"), ("::1", "127.0.0.1")])
def test_fetch_connects_only_to_the_allowed_one_of_the_addresses_of_a_name(server, addresses):
    """127.0.0.1 stands for a public address here: it is the one allowed."""
    assert fetch(f"http://two.example:{server.server_port}/photo", LOCAL, Names(addresses)) == PHOTO
    assert server.reached == ["127.0.0.1"]


def test_fetch_gains_nothing_by_a_name_that_changes_its_address(server):
    """Rebinding: the first answer is allowed, the next is not; connections go where the check was made."""
    urls = [f"http://rebind.example:{server.server_port}/{kind}" for kind in ("status/503", "photo", "size/5")]
    with Fetcher(replace(LOCAL, dns_cache_seconds=3600), Names(("127.0.0.1",), ("127.0.0.2",))) as fetcher:
        outcomes = [fetcher.fetch(url) for url in urls]
    assert (outcomes[0].reason, outcomes[1:]) == ("http_503", [PHOTO, bytes(5)])
    assert set(server.reached) == {"127.0.0.1"}
    names = Names(("127.0.0.1",), ("127.0.0.2",))
    assert fetch(urls[1], LOCAL, names) == PHOTO
    assert fetch(urls[1], LOCAL, names).reason == "refused_address"
    assert set(server.reached) == {"127.0.0.1"}


def test_fetch_reaches_only_allowed_addresses_whatever_names_answer(server):
    """Sixty names, each with one to three addresses at random, of which only 127.0.0.1 is allowed."""
    draw = random.Random(5)
    answers = [
        tuple(draw.sample(["127.0.0.1", "127.0.0.2", "127.0.0.3", "::1"], draw.randint(1, 3))) for _ in range(60)
    ]
    rows = [
        SourceRow(key=str(i), captions=(), url=f"http://name{i}.example:{server.server_port}/photo")
        for i in range(len(answers))
    ]
    with Fetcher(replace(LOCAL, num_connections=1), Names(*answers)) as fetcher:
        outcomes = [outcome for _, outcome in fetcher.payloads(rows)]
    assert [outcome == PHOTO for outcome in outcomes] == ["127.0.0.1" in answer for answer in answers]
    assert {outcome.reason for outcome in outcomes if isinstance(outcome, Reject)} == {"refused_address"}
    assert set(server.reached) == {"127.0.0.1"}


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "answer, expected, num_asked",
    [
        (socket.gaierror(socket.EAI_NONAME, "Name or service not known"), "dns_no_name", 1),
        (socket.gaierror(socket.EAI_NODATA, "No address associated with hostname"), "dns_no_name", 1),
        ((), "dns_no_name", 1),
        (socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution"), "dns_timeout", 3),
        (None, "dns_timeout", 3),
    ],
)
def test_fetch_tells_a_name_that_is_not_there_from_one_that_was_not_found_in_time(answer, expected, num_asked):
    names = Names(answer)
    config = FetchConfig(num_attempts=3, connect_timeout_seconds=0.05, backoff_seconds=0.01)
    assert fetch("http://nowhere.example/photo", config, names).reason == expected
    assert len(names.asked) == num_asked


def test_fetch_looks_a_name_up_once_for_many_rows(server):
    names = Names(("127.0.0.1",))
    rows = [SourceRow(key=str(i), captions=(), url=f"http://one.example:{server.server_port}/photo") for i in range(50)]
    with Fetcher(LOCAL, names) as fetcher:
        assert {outcome for _, outcome in fetcher.payloads(rows)} == {PHOTO}
    assert names.asked == ["one.example"]


def test_fetch_gives_a_dead_host_up_after_so_many_failures_and_says_why():
    names = Names(socket.gaierror(socket.EAI_NONAME, "Name or service not known"))
    rows = [SourceRow(key=str(i), captions=(), url=f"http://dead.example/{i}") for i in range(40)]
    with Fetcher(FetchConfig(max_host_failures=6, num_connections_per_host=1), names) as fetcher:
        outcomes = [outcome for _, outcome in fetcher.payloads(rows)]
    assert {outcome.reason for outcome in outcomes} == {"dns_no_name"}
    assert len(names.asked) == 6
