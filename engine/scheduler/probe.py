"""Questions to runners and gateways over HTTP: are you well, and do you answer a real request."""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Protocol

import aiohttp

from engine.routes import ExpertBalance
from engine.scheduler.expert_balance import parse_balance
from engine.scheduler.plan import RunnerPlan
from engine.scheduler.warmup import Ask, warm_up_asks

#: A health check that takes longer than this has failed, seconds.
HEALTH_TIMEOUT_S = 5.0
#: How much of a wrong answer is shown, bytes.
_BODY_SHOWN = 300


class ProbeError(Exception):
    """The answer was none or not the right one; the message says what came instead."""


class BusyError(ProbeError):
    """The runner has a request in hand, so it does not fall asleep; nothing has changed."""


class Prober(Protocol):
    """What the supervisor asks of processes; tests hand in a fake."""

    async def runner_health(self, socket: Path) -> None: ...

    async def gateway_health(self, url: str) -> None: ...

    async def warm_up(self, plan: RunnerPlan, timeout_s: float) -> None: ...

    async def sleep(self, socket: Path, timeout_s: float) -> None: ...

    async def wake(self, plan: RunnerPlan, timeout_s: float) -> None: ...

    async def is_sleeping(self, socket: Path, timeout_s: float) -> bool: ...

    async def expert_balance(self, socket: Path) -> ExpertBalance | None: ...

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

    async def expert_balance(self, socket: Path) -> ExpertBalance | None:
        """What a runner's /metrics tell of its experts; None where they tell nothing, or do not come."""
        timeout = aiohttp.ClientTimeout(total=self._health_timeout_s)
        try:
            async with (
                aiohttp.ClientSession(
                    connector=aiohttp.UnixConnector(str(socket)), timeout=timeout
                ) as session,
                session.get("http://runner/metrics") as answer,
            ):
                return parse_balance(await answer.text()) if answer.status == 200 else None
        except (TimeoutError, aiohttp.ClientError, OSError, UnicodeDecodeError):
            # A figure less; whether it is well is asked elsewhere.
            return None

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
            await self._ask(plan, ask, deadline, f"{timeout_s:g} s; raise `warm_timeout_s` in [scheduler]")

    async def sleep(self, socket: Path, timeout_s: float) -> None:
        """Puts a runner to sleep; its memory has been given back when this returns. Does so twice as well.

        Raises:
            BusyError: it has a request in hand and goes on as before.
            ProbeError: no answer within ``timeout_s`` seconds, or another than 200.
        """
        path = "/sleep?level=1&mode=wait"
        status, body = await self._call(socket, "POST", path, timeout_s, "falling asleep")
        if status == 409:
            raise BusyError("it has a request in hand")
        _expect_200("falling asleep", status, body)

    async def wake(self, plan: RunnerPlan, timeout_s: float) -> None:
        """Wakes a runner, which must then answer a real request; one that is awake has only the latter to do.

        Raises:
            ProbeError: not awake or not answering rightly within ``timeout_s`` seconds in all.
        """
        deadline = time.monotonic() + timeout_s
        status, body = await self._call(plan.spec.socket, "POST", "/wake_up", timeout_s, "waking up")
        _expect_200("waking up", status, body)
        first, *_ = await asyncio.to_thread(warm_up_asks, plan.spec)
        await self._ask(
            plan, first, deadline, f"{timeout_s:g} s with waking up; raise `wake_timeout_s` in [tiers]"
        )

    async def is_sleeping(self, socket: Path, timeout_s: float) -> bool:
        """Whether a runner says that it sleeps.

        Raises:
            ProbeError: no such answer within ``timeout_s`` seconds.
        """
        status, body = await self._call(
            socket, "GET", "/is_sleeping", timeout_s, "the question whether it sleeps"
        )
        _expect_200("the question whether it sleeps", status, body)
        try:
            return bool(json.loads(body)["is_sleeping"])
        except (ValueError, KeyError, TypeError) as error:
            raise ProbeError(f"it does not say whether it sleeps: {_shown(body)}") from error

    async def _call(
        self, socket: Path, method: str, path: str, timeout_s: float, what: str
    ) -> tuple[int, bytes]:
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        connector = aiohttp.UnixConnector(str(socket))
        try:
            async with (
                aiohttp.ClientSession(connector=connector, timeout=timeout) as session,
                session.request(method, f"http://runner{path}") as answer,
            ):
                return answer.status, await answer.read()
        except TimeoutError:
            raise ProbeError(
                f"{what} took longer than {timeout_s:g} s; "
                "raise `wake_timeout_s` in [tiers] if it only needs longer"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ProbeError(f"{what} failed: {error or type(error).__name__}") from error

    async def _ask(self, plan: RunnerPlan, ask: Ask, deadline: float, limit: str) -> None:
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
                f"its first request ({ask.path}) had no answer within {limit} if it only needs longer"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ProbeError(
                f"its first request ({ask.path}) failed: {error or type(error).__name__}"
            ) from error
        fault = ask.fault(status, body)
        if fault:
            raise ProbeError(f"its first request ({ask.path}) was answered wrongly: {fault}: {_shown(body)}")


def _expect_200(what: str, status: int, body: bytes) -> None:
    if status != 200:
        raise ProbeError(f"{what} failed: status {status}: {_shown(body)}")


def _shown(body: bytes) -> str:
    return body[:_BODY_SHOWN].decode(errors="replace")
