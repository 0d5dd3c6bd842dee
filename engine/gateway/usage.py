"""What one gateway worker tells the scheduler: which table it follows, what is in flight, who waits.

A report is an acknowledgement too: by the table's version the scheduler knows that no further request goes
to a replica that the table has left out, and by the count how many are there still. That holds because a
request takes its place (`Upstream.taken`) in the same turn of the event loop in which it chose its replica
from the table in force (`Forwarder.forward`), and a report is made in one turn as well.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

from engine.gateway.control import AWAY, ControlClient
from engine.gateway.fair.gate import Gate
from engine.gateway.firstbytes import FirstBytes
from engine.gateway.routing import Directory
from engine.gateway.waking import Waking

log = logging.getLogger("hearth.gateway")

#: Least time between two looks whether something has changed, and most between two reports, seconds.
LOOK_S, REPORT_S = 0.5, 5.0
#: The longest wait between two tries while the scheduler is away, seconds.
_MOST_BACKOFF_S = 2.0
_WITHIN_S = 2.0


class UsageReporter:
    """Posts `/usage`: at once after a new table or the last request of a replica that left it, else at most
    every 0.5 s when something changed, and every 5 s."""

    def __init__(
        self,
        directory: Directory,
        waking: Waking,
        gate: Gate,
        first_bytes: FirstBytes,
        control: ControlClient,
        *,
        worker: int,
    ) -> None:
        self._directory = directory
        self._waking = waking
        self._gate = gate
        self._first_bytes = first_bytes
        self._control = control
        self._worker = worker
        self._due = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        directory.listeners.append(self._due.set)

    async def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._task

    def report(self) -> dict[str, Any]:
        """The body of a report. Replicas out of the table are in it while they have requests in hand."""
        now = time.monotonic()
        replicas: dict[str, dict[str, Any]] = {}
        for upstream in self._directory.upstreams():
            idle_s = round(now - upstream.last, 3)
            same = replicas.get(upstream.id)
            # One id at two addresses: a replica that was started anew elsewhere while the old one ends.
            replicas[upstream.id] = {
                "in_flight": upstream.in_flight + (same["in_flight"] if same else 0),
                "idle_s": min(idle_s, same["idle_s"]) if same else idle_s,
            }
        return {
            "worker": self._worker,
            "version": self._directory.version,
            "replicas": replicas,
            "models": self._models(),
        }

    def _models(self) -> dict[str, dict[str, Any]]:
        models: dict[str, dict[str, Any]] = {}
        for served in self._directory:
            id, mean = served.route.id, self._first_bytes.mean(served.route.id)
            models[id] = {
                "waiting": self._waking.waiting(id) + self._gate.waiting(id),
                "first_byte_s": None if mean is None else round(mean, 4),
            }
        return models

    def _mark(self) -> object:
        """Differs when there is something new to tell."""
        upstreams = [(each.id, each.in_flight, each.last) for each in self._directory.upstreams()]
        return self._directory.version, upstreams, self._models()

    async def _run(self) -> None:
        told: object = None
        told_at = 0.0
        backoff_s = LOOK_S
        while True:
            if self._due.is_set():
                told = None
                backoff_s = LOOK_S
            self._due.clear()
            now, pause_s = time.monotonic(), LOOK_S
            # A worker without a table has nothing to tell.
            if self._directory.version >= 0 and (
                now - told_at >= REPORT_S or told is None or self._mark() != told
            ):
                mark = self._mark()
                if await self._post(self.report()):
                    told, told_at, backoff_s = mark, now, LOOK_S
                else:
                    told, pause_s = None, backoff_s
                    backoff_s = min(backoff_s * 2, _MOST_BACKOFF_S)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._due.wait(), pause_s)

    async def _post(self, report: dict[str, Any]) -> bool:
        """Whether the scheduler has it. While it is away the route watch says so; this keeps quiet."""
        try:
            status, _ = await self._control.post("/usage", report, within_s=_WITHIN_S)
        except AWAY:
            return False
        if status != 200:
            log.debug("the scheduler answered %d to a report", status)
        return status == 200
