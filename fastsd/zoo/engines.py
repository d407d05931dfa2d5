"""Engines: what runs `convert_one` for many items at a time, within what the machines have."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

from fastsd.zoo.plan import PlanItem
from fastsd.zoo.work import Outcome, convert_one

_REPORT_SECONDS = 0.1
_STOP_SECONDS = 5.0
_OOM_SCORE = "500"  # workers go before whoever waits for them


@dataclass(frozen=True)
class Advance:
    """More bytes of an item are done."""

    name: str
    nbytes: int


Event = Advance | Outcome


class Engine(Protocol):
    def run(self, items: Iterable[PlanItem]) -> Iterator[Event]:
        """Converts all items, in any order: one outcome for each, and advances between them.

        An item whose outcome ``wants_trust``, where its options give it, is converted again as a
        trusted one, in a process of its own; only what comes of that is an outcome then. Closing
        the iterator stops what is running.
        """


def _is_to_be_trusted(item: PlanItem, outcome: Outcome) -> bool:
    return outcome.wants_trust and item.options.trust and not item.trusted


class PoolEngine:
    """Processes on this machine.

    Their number is at most ``jobs``. What they need together, by estimate, is at most ``memory``
    bytes, and what they fetch at most ``disk``; an item that is estimated to need more than all
    memory runs alone. A process that is killed fails the item that it was at, and is replaced.
    """

    def __init__(
        self, jobs: int | None = None, memory: int | None = None, disk: int | None = None
    ) -> None:
        self._jobs = jobs or len(os.sched_getaffinity(0))
        self._memory = find_memory() * 8 // 10 if memory is None else memory
        self._disk = disk
        self._workers: list[_Worker] = []
        self._pending: deque[PlanItem] = deque()

    def run(self, items: Iterable[PlanItem]) -> Iterator[Event]:
        # The largest first: no process is left with one when the others have nothing more.
        self._pending = deque(sorted(items, key=lambda item: -item.nbytes))
        try:
            while self._pending or self._busy():
                yield from self._assign()
                yield from self._collect()
        finally:
            for worker in self._workers:
                worker.stop()
            self._workers = []

    def _busy(self) -> list[_Worker]:
        return [worker for worker in self._workers if worker.item is not None]

    def _assign(self) -> Iterator[Outcome]:
        while len(self._busy()) < self._jobs and self._pending:
            item = self._choose()
            if item is None:
                return
            if self._disk is not None and item.disk > self._disk:
                reason = f"fetching it takes {item.disk} bytes, where {self._disk} are allowed"
                yield Outcome(item.name, "failed", reason)
                continue
            self._find_worker(item).start(item)

    def _choose(self) -> PlanItem | None:
        """Takes the first pending item there is room for; None if there is none now."""
        running = [worker.item for worker in self._busy() if worker.item is not None]
        memory = self._memory - sum(item.memory for item in running)
        disk = None if self._disk is None else self._disk - sum(item.disk for item in running)
        for i, item in enumerate(self._pending):
            if not running or (item.memory <= memory and (disk is None or item.disk <= disk)):
                del self._pending[i]
                return item
        return None

    def _find_worker(self, item: PlanItem) -> _Worker:
        idle = [worker for worker in self._workers if worker.item is None]
        if idle and not item.trusted:
            return idle[0]
        if idle:  # it would be one process more than there may be
            self._discard(idle[0])
        worker = _Worker()
        self._workers.append(worker)
        return worker

    def _discard(self, worker: _Worker) -> None:
        worker.stop()
        self._workers.remove(worker)

    def _collect(self) -> Iterator[Event]:
        by_connection: dict[Any, _Worker] = {worker.connection: worker for worker in self._busy()}
        for connection in wait(list(by_connection)) if by_connection else []:
            worker = by_connection[connection]
            item = worker.item
            assert item is not None
            event = worker.receive()
            if isinstance(event, int):
                yield Advance(item.name, event)
                continue
            if worker.is_dead or item.trusted:
                self._discard(worker)
            worker.item = None
            if _is_to_be_trusted(item, event):
                self._pending.append(replace(item, trusted=True))
            else:
                yield event


class _Worker:
    """A process that converts one item after the other, and ends when nobody is left to give it
    one."""

    def __init__(self) -> None:
        # Spawned: a process that forks while threads of torch run may never get going.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_work, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()  # so that its end is the end of the connection
        self.item: PlanItem | None = None
        self.is_dead = False

    def start(self, item: PlanItem) -> None:
        self.item = item
        with suppress(OSError):  # if it has died meanwhile, receive() will find out
            self.connection.send(item)

    def receive(self) -> int | Outcome:
        """How many more bytes are done, or the outcome."""
        assert self.item is not None
        try:
            event: int | Outcome = self.connection.recv()
        except (EOFError, OSError):
            self.is_dead = True
            self._process.join(_STOP_SECONDS)
            return Outcome(self.item.name, "failed", _explain_end(self._process.exitcode))
        return event

    def stop(self) -> None:
        self.connection.close()
        self._process.terminate()
        self._process.join(_STOP_SECONDS)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


def _explain_end(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return (
            "its process was killed: the system was out of memory? Then allow less with --memory "
            "or --jobs"
        )
    if code is not None and code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with code {code}"


def _work(connection: Connection) -> None:
    """What a worker runs."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who started it stops it
    os.dup2(2, 1)  # what files print while they are unpickled is no result
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write(_OOM_SCORE)
    while True:
        try:
            item = connection.recv()
        except (EOFError, OSError):
            return
        outcome = convert_one(item, _Throttle(connection.send))
        try:
            connection.send(outcome)
        except OSError:
            return


class _Throttle:
    """Adds up numbers of bytes, and passes them on now and then."""

    def __init__(self, send: Callable[[int], None]) -> None:
        self._send = send
        self._nbytes = 0
        self._last = time.monotonic()

    def __call__(self, nbytes: int) -> None:
        self._nbytes += nbytes
        now = time.monotonic()
        if now - self._last >= _REPORT_SECONDS:
            self._last = now
            self._send(self._nbytes)
            self._nbytes = 0


def find_memory() -> int:
    """How many bytes this process and its children could still get, in its control group, too."""
    with open("/proc/meminfo") as file:
        fields = dict(line.split(":", 1) for line in file)
    available = int(fields["MemAvailable"].split()[0]) << 10
    with suppress(OSError, ValueError):  # no such limit is the rule
        limit, used = (
            int(open(f"/sys/fs/cgroup/memory.{name}").read())  # noqa: SIM115
            for name in ("max", "current")
        )
        available = min(available, max(limit - used, 0))
    return available


class RayEngine:
    """Tasks of Ray, on the cluster at ``address``, or on a local one that ends with the run.

    Every machine of the cluster needs fastsd, and both directories under the same paths. Ray counts
    the estimates of memory against that of its machines; what is fetched is not limited. There are
    no advances: an item is done as a whole.
    """

    def __init__(self, address: str | None = None, jobs: int | None = None) -> None:
        self._address = address
        self._jobs = jobs

    def run(self, items: Iterable[PlanItem]) -> Iterator[Event]:
        try:
            import ray
        except ImportError:
            raise ImportError('the engine needs Ray: pip install "fastsd[ray]"') from None
        is_ours = not ray.is_initialized()
        if is_ours:
            local: dict[str, Any] = (
                {} if self._address else {"num_cpus": self._jobs, "include_dashboard": False}
            )
            ray.init(address=self._address, log_to_driver=False, **local)
        try:
            yield from _RayRun(ray).run(items)
        finally:
            if is_ours:
                ray.shutdown()


class _RayRun:
    def __init__(self, ray: Any) -> None:
        self._ray = ray
        # An item that dies takes its process with it; asked for more than any machine has, a task
        # would wait for ever.
        self._task = ray.remote(max_retries=0)(convert_one)
        self._trusted_task = ray.remote(max_retries=0, max_calls=1)(convert_one)
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self._memory = max(int(resources.get("memory", 0)) for resources in nodes)
        self._running: dict[Any, PlanItem] = {}

    def run(self, items: Iterable[PlanItem]) -> Iterator[Event]:
        for item in sorted(items, key=lambda item: -item.nbytes):
            self._start(item)
        try:
            while self._running:
                (ready,), _ = self._ray.wait(list(self._running), num_returns=1)
                item = self._running.pop(ready)
                outcome = self._get(ready, item)
                if _is_to_be_trusted(item, outcome):
                    self._start(replace(item, trusted=True))
                else:
                    yield outcome
        finally:
            for task in self._running:
                self._ray.cancel(task, force=True)

    def _start(self, item: PlanItem) -> None:
        task = self._trusted_task if item.trusted else self._task
        memory = min(item.memory, self._memory)
        self._running[task.options(memory=memory).remote(item)] = item

    def _get(self, ready: Any, item: PlanItem) -> Outcome:
        try:
            outcome: Outcome = self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            lines = str(error).splitlines() or [""]
            return Outcome(item.name, "failed", f"{type(error).__name__}: {lines[0]}")
        return outcome
