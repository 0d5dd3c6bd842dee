"""Talks to a running scheduler over its control socket."""

from __future__ import annotations

import asyncio
import json
import time

import aiohttp

from engine.config import Config
from engine.scheduler.changes import Reloaded
from engine.scheduler.service import stop_leftovers
from engine.scheduler.status import Status

#: Reading the catalog and planning take a second or two; on a machine that is busy some more.
_LONGEST_RELOAD_S = 60.0


class NotRunningError(Exception):
    """No scheduler answers; the message says where it was looked for and what to do."""


def _session(config: Config, seconds: float) -> aiohttp.ClientSession:
    connector = aiohttp.UnixConnector(str(config.control_socket))
    return aiohttp.ClientSession(connector=connector, timeout=aiohttp.ClientTimeout(total=seconds))


async def status(config: Config) -> Status:
    """The scheduler's status.

    Raises:
        NotRunningError: none answers.
    """
    try:
        async with _session(config, 5.0) as session, session.get("http://hearth/status") as answer:
            return Status.model_validate_json(await answer.read())
    except (OSError, aiohttp.ClientError, TimeoutError) as error:
        raise NotRunningError(
            f"Hearth does not run here (state folder {config.state_dir}). Start it with `make serve`."
        ) from error


class RefusedError(Exception):
    """The scheduler did not do it; the message says why."""


async def reload(config: Config, *, dry_run: bool) -> Reloaded:
    """Has the scheduler read its configuration anew; what that changes (dry run: would change).

    Raises:
        NotRunningError: none answers.
        RefusedError: it cannot be used, or not live; nothing was changed.
    """
    try:
        async with (
            _session(config, _LONGEST_RELOAD_S) as session,
            session.post("http://hearth/reload", json={"dry_run": dry_run}) as answer,
        ):
            body = await answer.read()
            if answer.status == 200:
                return Reloaded.model_validate_json(body)
    except (OSError, aiohttp.ClientError, TimeoutError) as error:
        raise NotRunningError(
            f"Hearth does not run here (state folder {config.state_dir}). Start it with `make serve`."
        ) from error
    raise RefusedError(json.loads(body)["error"]["message"])


async def stop(config: Config, *, drain: bool) -> list[str]:
    """Stops the scheduler and all it started; what happened, in lines for a person."""
    try:
        running = await status(config)
    except NotRunningError:
        ended = await asyncio.to_thread(stop_leftovers, config)
        return ended or ["Hearth did not run here; nothing was left to stop."]
    longest = (config.scheduler.drain_s if drain else 0.0) + config.scheduler.stop_timeout_s + 15.0
    async with _session(config, longest) as session:
        body = {"drain": drain}
        async with session.post("http://hearth/stop", json=body) as answer:
            answer.raise_for_status()
    began = time.monotonic()
    while time.monotonic() - began < longest:
        try:
            await status(config)
        except NotRunningError:
            count = len({model.id for model in running.models})
            return [f"Stopped: {count} model{'s' if count != 1 else ''} in {time.monotonic() - began:.1f} s."]
        await asyncio.sleep(0.2)
    return [f"Still stopping after {longest:.0f} s; `hearth stop --now` ends it without waiting."]
