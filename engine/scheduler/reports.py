"""What gateway workers tell the scheduler: which models their requests wait for, and what is in use."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Callable

from pydantic import BaseModel, ConfigDict, Field

from engine.scheduler.messages import Event, UsageReported, WakeAsked, WakeLeft
from engine.scheduler.outlook import model_outlook
from engine.scheduler.units import ModelUsage, ReplicaUsage, World


class WakeCall(BaseModel):
    """The body of ``POST /wake``."""

    model_config = ConfigDict(extra="ignore")
    model: str
    worker: int = Field(default=0, description="Process number of the gateway worker.")


class WakeRefusedError(Exception):
    """The model will not become ready by being asked for; ``status`` is the answer's."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status


class _Replica(BaseModel):
    model_config = ConfigDict(extra="ignore")
    in_flight: int = Field(default=0, ge=0)
    idle_s: float = Field(default=0.0, description="Since a request last began or ended there, seconds.")


class _Model(BaseModel):
    model_config = ConfigDict(extra="ignore")
    waiting: int = Field(default=0, ge=0)
    first_byte_s: float | None = Field(
        default=None, description="Mean wait for the first byte lately, seconds."
    )


class UsageReport(BaseModel):
    """The body of ``POST /usage``."""

    model_config = ConfigDict(extra="ignore")
    worker: int
    version: int
    replicas: dict[str, _Replica] = {}
    models: dict[str, _Model] = {}

    def event(self) -> UsageReported:
        replicas = {
            id: ReplicaUsage(one.in_flight, max(0.0, one.idle_s)) for id, one in self.replicas.items()
        }
        models = {id: ModelUsage(one.waiting, one.first_byte_s) for id, one in self.models.items()}
        return UsageReported(self.worker, self.version, replicas, models)


class Waiters:
    """The held calls for models that sleep: each is a demand for as long as it lasts."""

    def __init__(
        self,
        world: World,
        *,
        now: Callable[[], float],
        send: Callable[[Event], None],
        changed: Callable[[], asyncio.Event],
    ) -> None:
        """``changed`` gives the event that the next change of the world sets."""
        self._world = world
        self._now = now
        self._send = send
        self._changed = changed
        self._numbers = itertools.count(1)

    async def until_ready(self, model: str) -> None:
        """Returns once the model has a ready replica. Cancelled, it is no longer asked for.

        Raises:
            WakeRefusedError: it is unknown (404), never asleep (409), or the scheduler is stopping (503).
        """
        if self._is_ready(model):
            return
        waiter = next(self._numbers)
        self._send(WakeAsked(model, waiter))
        try:
            while not self._is_ready(model):
                await self._changed().wait()
        finally:
            self._send(WakeLeft(model, waiter))

    def _is_ready(self, model: str) -> bool:
        # What a tenant owns is never asleep, and nobody but its owner is helped by it.
        runners = self._world.of_kind("runner")
        replicas = [unit for unit in runners if unit.model == model and unit.owner is None]
        if not replicas:
            raise WakeRefusedError(
                404, f"no model '{model}' is served here; `hearth status` lists those that are."
            )
        if self._world.stop:
            raise WakeRefusedError(503, "Hearth is stopping.")
        if any(unit.state == "ready" for unit in replicas):
            return True
        if not replicas[0].standby:
            seen = model_outlook(self._world, replicas, self._now())
            state = f"now {seen.state}: {seen.reason}" if seen.reason else f"now {seen.state}"
            raise WakeRefusedError(
                409, f"{model} is resident, so it is never asleep and need not be woken; it is {state}."
            )
        return False
