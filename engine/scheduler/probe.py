"""Questions to runners and gateways over HTTP: are you well, and do you answer a real request."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Protocol

import aiohttp

from engine.scheduler.plan import RunnerPlan
from engine.scheduler.warmup import Ask, warm_up_asks

#: A health check that takes longer than this has failed, seconds.
HEALTH_TIMEOUT_S = 5.0
#: How much of a wrong answer is shown, bytes.
_BODY_SHOWN = 300


class ProbeError(Exception):
    """The answer was none or not the right one; the message says what came instead."""


class Prober(Protocol):
    """What the supervisor asks of processes; tests hand in a fake."""

    async def runner_health(self, socket: Path) -> None: ...

    async def gateway_health(self, url: str) -> None: ...

    async def warm_up(self, plan: RunnerPlan, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class HttpProber:
    """Asks by HTTP. Health checks keep their connection, since making one costs more than the question."""

    def __init__(self, health_timeout_s: float = HEALTH_TIMEOUT_S) -> None:
        self._health_timeout_s = health_timeout_s
        self._sessions: dict[str, aiohttp.ClientSession] = {}

    async def close(self) -> None:
        """Closes the connections that are kept."""
        for place in list(self._sessions):
            await self._forget(place)

    async def runner_health(self, socket: Path) -> None:
        """``GET /health`` on a runner's socket.

        Raises:
            ProbeError: no answer, or another than 200.
        """
        place = str(socket)
        if place not in self._sessions:
            self._keep(place, aiohttp.UnixConnector(place))
        await self._get_health(place, "http://runner/health")

    async def gateway_health(self, url: str) -> None:
        """``GET /health`` of a gateway; ``url`` without a path.

        Raises:
            ProbeError: no answer, or another than 200.
        """
        if url not in self._sessions:
            self._keep(url, aiohttp.TCPConnector())
        await self._get_health(url, f"{url}/health")

    def _keep(self, place: str, connector: aiohttp.BaseConnector) -> None:
        timeout = aiohttp.ClientTimeout(total=self._health_timeout_s)
        self._sessions[place] = aiohttp.ClientSession(connector=connector, timeout=timeout)

    async def _forget(self, place: str) -> None:
        session = self._sessions.pop(place, None)
        if session:
            await session.close()

    async def _get_health(self, place: str, url: str) -> None:
        fault = ""
        try:
            async with self._sessions[place].get(url) as answer:
                await answer.read()
                if answer.status != 200:
                    fault = f"status {answer.status}"
        except TimeoutError:
            fault = f"nothing within {self._health_timeout_s:g} s"
        except (aiohttp.ClientError, OSError) as error:
            fault = str(error) or type(error).__name__
        if fault:
            await self._forget(place)
            raise ProbeError(fault)

    async def warm_up(self, plan: RunnerPlan, timeout_s: float) -> None:
        """Sends the real requests of the plan's category, one after the other, and checks each answer.

        Raises:
            ProbeError: an answer did not come within ``timeout_s`` seconds in all, or was not right.
        """
        asks = await asyncio.to_thread(warm_up_asks, plan.spec)
        deadline = time.monotonic() + timeout_s
        for ask in asks:
            await self._ask(plan, ask, deadline, timeout_s)

    async def _ask(self, plan: RunnerPlan, ask: Ask, deadline: float, timeout_s: float) -> None:
        timeout = aiohttp.ClientTimeout(total=max(0.1, deadline - time.monotonic()))
        connector = aiohttp.UnixConnector(str(plan.spec.socket))
        headers = {"content-type": ask.content_type}
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.post(f"http://runner{ask.path}", data=ask.body, headers=headers) as answer,
            ):
                body = await answer.read()
                status = answer.status
        except TimeoutError:
            raise ProbeError(
                f"its first request ({ask.path}) had no answer within {timeout_s:g} s; "
                "raise `warm_timeout_s` in [scheduler] if it only needs longer"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ProbeError(
                f"its first request ({ask.path}) failed: {error or type(error).__name__}"
            ) from error
        fault = ask.fault(status, body)
        if fault:
            shown = body[:_BODY_SHOWN].decode(errors="replace")
            raise ProbeError(f"its first request ({ask.path}) was answered wrongly: {fault}: {shown}")
