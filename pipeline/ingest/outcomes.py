"""The named reasons why a URL gave no bytes: one word for a count, one line for a reader, and which may pass."""

from __future__ import annotations

import errno
import socket
import ssl
from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

import aiohttp

from pipeline.ingest.addresses import LookupTimedOut, RefusedAddress, RefusedPort
from pipeline.store.schema import Reject

MAX_DETAIL_CHARS = 200

_REASONS = {
    "no_image": "the row has neither bytes nor an address",
    "bad_url": "the address, or one it redirects to, is not a valid URL",
    "not_http": "the address, or one it redirects to, is neither http nor https",
    "refused_address": "the address leads to a host that is not public",
    "refused_port": "the address names a port that pictures are not served on",
    "opted_out": "the server asks by X-Robots-Tag that the picture not be used",
    "too_many_redirects": "one redirect led to the next for too long",
    "too_large": "the answer is longer than the limit",
    "dns_no_name": "no such host name, or it has no address",
    "dns_timeout": "the name could not be looked up in time",
    "connect_timeout": "no connection in time",
    "connect_refused": "nobody listens at the host's port",
    "unreachable": "no way to the host",
    "reset": "the connection broke before an answer",
    "tls": "no secure connection: certificate or protocol",
    "read_timeout": "the server fell silent",
    "timeout": "the download took too long in all",
    "cut_off": "the connection broke in the middle of the picture",
    "bad_answer": "the answer is not HTTP as the standard has it",
    "bad_encoding": "the answer is compressed in a way that was not asked for and can't be undone",
    "http_other": "the server answered with a status that has no name",
}

FETCH_REASONS: Mapping[str, str] = MappingProxyType(
    _REASONS | {f"http_{status.value}": f"the server answered {status.value} {status.phrase}" for status in HTTPStatus}
)
"""Every reason of a failed fetch and its meaning in one line."""

TRANSIENT_REASONS = frozenset(
    {
        *("dns_timeout", "connect_timeout", "connect_refused", "unreachable", "reset", "read_timeout", "timeout"),
        *("cut_off", "http_408", "http_425", "http_429", "http_500", "http_502", "http_503", "http_504"),
    }
)
"""Reasons that a later attempt may not meet again."""

NO_CONTACT_REASONS = frozenset({"dns_no_name", "dns_timeout", "connect_timeout", "connect_refused", "unreachable"})
"""Reasons that are the host's and not the picture's: it never answered."""

_NAME_ERRORS = frozenset({socket.EAI_NONAME, socket.EAI_NODATA, socket.EAI_FAIL, socket.EAI_ADDRFAMILY})
_UNREACHABLE_ERRORS = frozenset({errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.EACCES})
_OWN_ERRORS = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENOBUFS})
"""Errors of this machine, which say nothing about a URL."""


def reject(reason: str, detail: object = "") -> Reject:
    """Return a Reject whose detail is one short line."""
    assert reason in FETCH_REASONS, f"{reason} is not in FETCH_REASONS"
    return Reject(reason, " ".join(str(detail).split())[:MAX_DETAIL_CHARS])


def reject_status(status: int, url: str) -> Reject:
    """Return the Reject of an answer whose status is not 200."""
    reason = f"http_{status}"
    return reject(reason, url) if reason in FETCH_REASONS else reject("http_other", f"{status} {url}")


def reject_error(error: Exception) -> Reject:
    """Return the Reject of a download that ended with `error`.

    Raises:
        RuntimeError: if this machine is at fault, such as by too many open files: the URL may be sound.
    """
    cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
    if isinstance(cause, OSError) and not isinstance(cause, socket.gaierror) and cause.errno in _OWN_ERRORS:
        raise RuntimeError(f"fetching failed on this machine, fewer num_connections may help: {cause}") from error
    return reject(_reason(error), f"{type(error).__name__}: {error}")


def _reason(error: Exception) -> str:
    match error:
        case RefusedAddress():
            return "refused_address"
        case RefusedPort():
            return "refused_port"
        case LookupTimedOut():
            return "dns_timeout"
        case aiohttp.ClientConnectorDNSError():
            return "dns_no_name" if error.os_error.errno in _NAME_ERRORS else "dns_timeout"
        case aiohttp.ClientSSLError() | ssl.SSLError():
            return "tls"
        case aiohttp.ConnectionTimeoutError():
            return "connect_timeout"
        case aiohttp.SocketTimeoutError():
            return "read_timeout"
        case TimeoutError():
            return "timeout"
        case aiohttp.ClientConnectorError():
            return _connect_reason(error.os_error)
        case aiohttp.ClientPayloadError():
            return "cut_off"
        case aiohttp.ClientConnectionError() | OSError():
            return "reset"
        case aiohttp.InvalidURL():
            return "bad_url"
        case aiohttp.ClientError():
            return "bad_answer"
        case _:
            return "bad_url"  # a ValueError of a part of a URL that can't be encoded


def _connect_reason(error: OSError) -> str:
    if error.errno == errno.ECONNREFUSED:
        return "connect_refused"
    return "unreachable" if error.errno in _UNREACHABLE_ERRORS else "reset"
