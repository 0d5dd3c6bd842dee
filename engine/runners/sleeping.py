"""Sleeping and waking of a runner: who may change it, and what a request meets meanwhile.

The event loop owns the phase and the count of requests in hand, and nothing is awaited between a look at them
and a change. So a request that was let in keeps the runner awake to its last byte, and one that comes once
the runner has begun to fall asleep finds it asleep: there is no moment between the two.

The phases: ``awake → falling_asleep → asleep → waking → awake``. A sleep or wake that fails leads to
``failed``, which nothing leaves: what the engine still holds is unknown then, and a restart is the cure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Awaitable, Callable, Iterator
from typing import TYPE_CHECKING, Literal, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from engine.errors import ApiError, bad_request

if TYPE_CHECKING:
    from engine.runners.base import Engine, Runner

Phase = Literal["awake", "falling_asleep", "asleep", "waking", "failed"]
#: Gives the memory back or takes it again; raises when it cannot.
Change = Callable[[], Awaitable[object]]

log = logging.getLogger("hearth.runner")

_WORDS: dict[Phase, str] = {"falling_asleep": "falling asleep", "asleep": "asleep", "waking": "waking"}


class SleepObserver(Protocol):
    """Told of finished changes, on the event loop; for metrics."""

    def slept(self, seconds: float) -> None:
        """The runner has fallen asleep, which took ``seconds``."""

    def woke(self, seconds: float) -> None:
        """The runner has woken, which took ``seconds``."""


class Sleeper:
    """Whether a runner is awake, and the only way to change that. Used on one event loop only.

    Args:
        name: the model's, for messages.
        observer: for metrics.
    """

    def __init__(self, name: str, observer: SleepObserver | None = None) -> None:
        self.name = name
        self.phase: Phase = "awake"
        self._observer = observer
        self._in_hand = 0
        self._reasons: list[Callable[[], bool]] = []
        self._change: asyncio.Task[None] | None = None
        self._wake_s = 1.0  # of the last wake, for retry-after

    @property
    def is_sleeping(self) -> bool:
        """Whether a request would be refused; vLLM's word for it."""
        return self.phase != "awake"

    def stays_awake_while(self, busy: Callable[[], bool]) -> None:
        """Adds a reason to be busy beside requests, such as work that its client has left."""
        self._reasons.append(busy)

    @contextlib.contextmanager
    def visit(self) -> Iterator[ApiError | None]:
        """Around a request: keeps the runner awake inside, or gives the error to answer it with."""
        if self.phase != "awake":
            yield self.refusal()
            return
        self._in_hand += 1
        try:
            yield None
        finally:
            self._in_hand -= 1

    async def fall_asleep(self, change: Change) -> None:
        """Returns once the runner is asleep; joins a falling asleep under way, or lets ``change`` do it.

        Raises:
            ApiError: 409 ``model_busy`` when a request is in hand or it is waking, which changes nothing; 500
                when it failed.
        """
        if self.phase == "awake":
            if self._in_hand or any(busy() for busy in self._reasons):
                raise self._busy(f"has {self._in_hand} requests in hand" if self._in_hand else "is at work")
            self._begin("falling_asleep", change)
        elif self.phase == "waking":
            raise self._busy("is waking")
        await self._finished()

    async def wake_up(self, change: Change) -> None:
        """Returns once the runner is awake; joins a waking under way, or lets ``change`` do it.

        A falling asleep under way ends first.

        Raises:
            ApiError: 500 when it failed.
        """
        while self.phase == "falling_asleep":
            await self._finished()
        if self.phase == "asleep":
            self._begin("waking", change)
        await self._finished()

    def _begin(self, phase: Phase, change: Change) -> None:
        self.phase = phase
        # A task of its own: whoever asked for it may go away.
        self._change = asyncio.create_task(self._carry_out(phase, change))

    async def _carry_out(self, phase: Phase, change: Change) -> None:
        began = time.perf_counter()
        try:
            await change()
        except Exception:  # whatever a library raises, the log must tell it and the state must say so
            log.exception("%s failed at %s", self.name, _WORDS[phase])
            self.phase = "failed"
            return
        seconds = time.perf_counter() - began
        log.info("%s: %s took %.2f s", self.name, _WORDS[phase], seconds)
        if phase == "falling_asleep":
            self.phase = "asleep"
            if self._observer:
                self._observer.slept(seconds)
        else:
            self.phase, self._wake_s = "awake", seconds
            if self._observer:
                self._observer.woke(seconds)

    async def _finished(self) -> None:
        if self._change is not None:
            await asyncio.shield(self._change)
        if self.phase == "failed":
            raise ApiError(
                500, f"{self.name} failed at falling asleep or waking. Its log says why.", code="sleep_failed"
            )

    def _busy(self, why: str) -> ApiError:
        return ApiError(
            409, f"{self.name} {why}, so it stays awake. Try again when it is idle.", code="model_busy"
        )

    def refusal(self) -> ApiError:
        """The answer to a request while it is not awake: 503, with when to try again."""
        if self.phase == "failed":
            return ApiError(
                503,
                f"{self.name} failed at falling asleep or waking and has to be restarted. Its log says why.",
                code="model_failed",
                headers={"retry-after": "10"},
            )
        after = max(1, math.ceil(self._wake_s))
        return ApiError(
            503,
            f"{self.name} is {_WORDS[self.phase]}. Wake it, and try again in about {after} s.",
            code="model_asleep",
            headers={"retry-after": str(after)},
        )


def sleep_routes(runner: Runner, engine: Engine) -> list[BaseRoute]:
    """``POST /sleep``, ``POST /wake_up``, ``GET /is_sleeping``, in vLLM's words."""
    sleeper = runner.sleeper

    async def sleep(request: Request) -> Response:
        if request.query_params.get("level", "1") != "1":
            return answer(
                bad_request(
                    "Invalid 'level': this runner knows level 1 only. Leave it out.",
                    param="level",
                    code="invalid_value",
                )
            )
        return await change(sleeper.fall_asleep, engine.sleep)

    async def wake_up(_: Request) -> Response:
        return await change(sleeper.wake_up, engine.wake)

    async def is_sleeping(_: Request) -> Response:
        return JSONResponse({"is_sleeping": sleeper.is_sleeping})

    async def change(wanted: Callable[[Change], Awaitable[None]], does: Callable[[], None]) -> Response:
        if runner.state == "loading":
            return answer(runner.loading())
        try:
            await wanted(lambda: runner.offload(does))
        except ApiError as error:
            return answer(error)
        return JSONResponse({"is_sleeping": sleeper.is_sleeping})

    return [
        Route("/sleep", sleep, methods=["POST"]),
        Route("/wake_up", wake_up, methods=["POST"]),
        Route("/is_sleeping", is_sleeping),
    ]


def answer(error: ApiError) -> Response:
    """The error as a whole response."""
    return Response(error.body(), error.status, headers=error.headers, media_type="application/json")
