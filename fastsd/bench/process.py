"""Children: fresh processes that measure, of which none outlives its parent's interest."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from typing import IO, Any

# Children import what their parent would, wherever they are started. What libraries do, or fail at,
# when a process ends is not measured.
_CODE = """\
import os, sys
sys.path[:] = {path!r}
from fastsd.bench.child import main
main({task!r}, {descriptor})
os._exit(0)
"""
_END_SECONDS = 5.0
_STOPPED = "stopped after {:.3g} s without an end"


class ChildError(Exception):
    """A child has failed, died or taken too long; the text says which. ``is_import``: it could not
    import what it needs."""

    is_import = False


def run_child(task: dict[str, Any], timeout: float | None = None) -> Iterator[Any]:
    """Does a task (see `fastsd.bench.child`) in a new process and yields what it tells, at once.

    Raises ChildError. The child, and whatever it has started, is ended when this generator is:
    after ``timeout`` seconds, at an error, by Ctrl-C.
    """
    source, target = os.pipe()
    with os.fdopen(source, "rb", buffering=0) as pipe, tempfile.TemporaryFile() as output:
        try:
            program = _CODE.format(path=sys.path, task=task, descriptor=target)
            child = subprocess.Popen(
                [sys.executable, "-c", program],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=[target],
                start_new_session=True,  # a group to end, which Ctrl-C reaches through us alone
            )
        finally:
            os.close(target)
        try:
            for message in _read_lines(pipe, timeout):
                if "error" in message:
                    error = ChildError(message["error"])
                    error.is_import = message["is_import"]
                    raise error
                yield message["value"]
            # Threads of others may not end by themselves: all has been said by then.
            with suppress(subprocess.TimeoutExpired):
                if code := child.wait(_END_SECONDS):
                    raise ChildError(_describe_end(code, output))
        finally:
            with suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def _read_lines(pipe: IO[bytes], timeout: float | None) -> Iterator[dict[str, Any]]:
    end = None if timeout is None else time.monotonic() + timeout
    rest = b""
    while True:
        left = None if end is None else max(0.0, end - time.monotonic())
        if not select.select([pipe], [], [], left)[0]:
            raise ChildError(_STOPPED.format(timeout))
        more = pipe.read(1 << 16)
        if not more:
            return
        *lines, rest = (rest + more).split(b"\n")
        yield from map(json.loads, lines)


def _describe_end(code: int, output: IO[bytes]) -> str:
    if code < 0:
        return f"ended by {signal.Signals(-code).name}"
    output.seek(0)
    lines = output.read().decode(errors="replace").strip().splitlines()
    return f"ended with code {code}: {lines[-1] if lines else 'it said nothing'}"
