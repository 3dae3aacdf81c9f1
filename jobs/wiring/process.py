"""A job as a child process that shares its parent's fate."""

from __future__ import annotations

import ctypes
import signal
import subprocess
import sys

PR_SET_PDEATHSIG = 1


def run_job(words: list[str], folder: str) -> int:
    """Run `python -m ...` and return its exit code.

    Ctrl-C reaches the child from the terminal, and it saves and stops by itself; SIGTERM is passed on; when this
    process is killed, so is the child (on Linux).
    """
    child = subprocess.Popen([sys.executable, "-m", *words], cwd=folder, preexec_fn=_die_with_parent)
    before = signal.signal(signal.SIGINT, lambda *_: None)
    signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    code = child.wait()
    signal.signal(signal.SIGINT, before)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    return code


def _die_with_parent() -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
