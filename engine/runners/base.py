"""What the runners that are not vLLM share: an OpenAI-format server on a Unix socket around one engine.

A runner module gives an :class:`Engine` and calls :func:`serve`. The base brings readiness, batching,
cancellation of work whose client has gone, sleeping, error envelopes, metrics and the drain at SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import contextvars
import functools
import logging
import math
import os
import signal
import socket
import stat
import sys
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

import uvicorn
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.routing import BaseRoute, Route

from engine.errors import ApiError, bad_request, nearest
from engine.runners.batching import Batcher, Work
from engine.runners.endpoints import endpoint, plain_routes
from engine.runners.environment import ensure_environment
from engine.runners.instruments import Instruments
from engine.runners.logs import set_up_logging
from engine.runners.sleeping import Sleeper, sleep_routes
from engine.runners.spec import RunnerSpec

__all__ = ["Engine", "Runner", "endpoint", "serve"]

T = TypeVar("T")
log = logging.getLogger("hearth.runner")


class Engine(Protocol):
    """One model behind one library."""

    def load(self) -> None:
        """Loads the model; called once, in a thread, while ``GET /health`` answers 503.

        Raises an exception whose message a person can act on; the process then exits with 1.
        """

    def routes(self, runner: Runner) -> list[Route]:
        """The engine's HTTP routes, each made with :func:`endpoint`; called once, before :meth:`load`."""

    def sleep(self) -> None:
        """Gives the weights' memory back; called in a thread, only when no request is in hand.

        Called only where ``spec.can_sleep``. If it raises, the runner counts as failed and is restarted.
        """

    def wake(self) -> None:
        """Takes the memory again after :meth:`sleep`: answers are then what they were. Called in a thread."""


class Runner:
    """One runner process: its specification, state, metrics and thread pool."""

    def __init__(self, spec: RunnerSpec) -> None:
        self.spec = spec
        self.state = "loading"
        self.metrics = Instruments()
        self.sleeper = Sleeper(spec.model, self.metrics)
        self.sleeper.stays_awake_while(lambda: self.busy)
        self.failed = False
        self._batchers: list[Batcher[Any, Any]] = []
        self._pool = ThreadPoolExecutor(max_workers=4, thread_name_prefix="offload")

    def batcher(
        self, run: Callable[[Hashable, list[Work[Any]]], list[Any]], **over: Any
    ) -> Batcher[Any, Any]:
        """A batcher with the specification's sizes and this runner's metrics; ``over`` adds or replaces."""
        sizes: dict[str, Any] = {
            "max_batch": self.spec.max_batch,
            "max_wait_s": self.spec.max_wait_ms / 1000,
            "max_queue": self.spec.max_queue,
            "name": self.spec.model,
            "observer": self.metrics,
        }
        made: Batcher[Any, Any] = Batcher(run, **(sizes | over))
        self._batchers.append(made)
        return made

    @property
    def busy(self) -> bool:
        """Whether a batcher has work, which may outlast its client: a model call cannot be interrupted."""
        return any(batcher.waiting or batcher.running for batcher in self._batchers)

    @property
    def status(self) -> str:
        """What ``GET /health`` says: "ok", "loading", "stopping", "failed", or a phase of sleep."""
        return self.state if self.state != "ok" or not self.sleeper.is_sleeping else self.sleeper.phase

    def loading(self) -> ApiError:
        """The answer to whoever comes before the model is loaded."""
        return ApiError(
            503,
            f"{self.spec.model} is loading. Try again in a few seconds.",
            code="model_loading",
            headers={"retry-after": "2"},
        )

    def check_model(self, name: object) -> None:
        """Raises ApiError: 400 without a name, 404 unless it is this runner's model or one of its aliases."""
        if name is None:
            raise bad_request("Missing required field 'model'.", param="model", code="missing_field")
        if not isinstance(name, str):
            raise bad_request("Invalid 'model': it must be a string.", param="model", code="invalid_value")
        known = [self.spec.model, *self.spec.aliases]
        if name not in known:
            close = nearest(name, known)
            raise ApiError(
                404,
                f"The model '{name}' is not served here. {'Did you mean' if close else 'This runner serves'} "
                f"'{(close or known)[0]}'{'?' if close else '.'}",
                param="model",
                code="model_not_found",
            )

    async def offload(self, fn: Callable[..., T], *args: Any) -> T:
        """Runs CPU work in a thread. If the awaiting task is cancelled, unstarted work is dropped."""
        call = functools.partial(contextvars.copy_context().run, fn, *args)
        return await asyncio.get_running_loop().run_in_executor(self._pool, call)

    async def close(self) -> None:
        """Closes the batchers; what still runs in them is told to stop and no longer waited for."""
        self.state = "stopping"
        await asyncio.gather(*(batcher.drain(0) for batcher in self._batchers))
        self._pool.shutdown(wait=False, cancel_futures=True)


def make_app(engine: Engine, runner: Runner, on_failure: Callable[[], None] = lambda: None) -> Starlette:
    """The ASGI app of a runner; its lifespan loads the engine in a thread and closes the runner at the end.

    Args:
        on_failure: called on the event loop when ``engine.load`` has raised.
    """

    async def load() -> None:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            await runner.offload(engine.load)
        except Exception as error:  # whatever a library raises, the person at the terminal must read it
            log.debug("load failed", exc_info=True)
            reason = " ".join(str(error).split()) or type(error).__name__
            print(f"{runner.spec.model} cannot be loaded: {reason}", file=sys.stderr, flush=True)
            runner.failed, runner.state = True, "failed"
            on_failure()
            return
        runner.state = "ok"
        log.info("%s loaded in %.1f s", runner.spec.model, loop.time() - started)

    @contextlib.asynccontextmanager
    async def lifespan(_: Starlette) -> Any:
        loading = asyncio.create_task(load())
        yield
        loading.cancel()
        await asyncio.wait([loading])
        await runner.close()

    sleeping = sleep_routes(runner, engine) if runner.spec.can_sleep else []
    routes: list[BaseRoute] = [*engine.routes(runner), *sleeping, *plain_routes(runner)]
    app = Starlette(routes=routes, lifespan=lifespan)
    app.state.runner = runner
    return app


def serve(make_engine: Callable[[RunnerSpec], Engine]) -> None:
    """A runner's main: reads ``--spec FILE``, serves until SIGTERM, drains and exits the process.

    Exit codes: 0 after SIGTERM, 1 when the engine could not be loaded, 2 for a wrong specification. The
    engine's heavy imports belong into ``load``: thread counts are set in the environment before it is called.
    """
    spec = _read_spec()
    ensure_environment(spec)
    set_up_logging()

    def leave(*_: Any) -> None:
        raise SystemExit(0)

    # Before and after uvicorn's own handlers: it drains, then raises the signal again for whoever was there
    # before.
    signal.signal(signal.SIGTERM, leave)
    signal.signal(signal.SIGINT, leave)
    code = 1
    with _bound_socket(spec.socket) as bound:
        try:
            code = asyncio.run(_serve(make_engine(spec), Runner(spec), bound))
        except SystemExit as asked:
            code = int(asked.code or 0)
        except Exception as error:
            log.exception("the runner failed")
            print(f"{spec.model} cannot be served: {error}", file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    # A model call cannot be interrupted, and the interpreter would wait for its thread: past the drain, just
    # leave.
    os._exit(code)


async def _serve(engine: Engine, runner: Runner, bound: socket.socket) -> int:
    app = make_app(engine, runner, on_failure=lambda: setattr(server, "should_exit", True))
    config = uvicorn.Config(
        app,
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=3600,  # the gateway's pool decides when a connection ends, not a race with it
        timeout_graceful_shutdown=math.ceil(runner.spec.drain_s),
    )
    server = uvicorn.Server(config)
    await server.serve(sockets=[bound])
    return 1 if runner.failed else 0


def _read_spec() -> RunnerSpec:
    parser = argparse.ArgumentParser()
    parser.add_argument("--spec", type=Path, required=True, help="RunnerSpec as a JSON file")
    file: Path = parser.parse_args().spec
    try:
        return RunnerSpec.model_validate_json(file.read_text())
    except (OSError, ValidationError, UnicodeDecodeError) as error:
        parser.error(f"{file} is no runner specification: {error}")


@contextlib.contextmanager
def _bound_socket(path: Path) -> Any:
    """A Unix socket at ``path`` with mode 0600; a stale one is replaced, and ours is removed at the end."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as bound:
        if path.exists() and not stat.S_ISSOCK(path.stat().st_mode):
            raise SystemExit(f"{path} is there already and no socket. Remove it or name another socket.")
        path.unlink(missing_ok=True)
        before = os.umask(0o177)
        try:
            bound.bind(str(path))
        finally:
            os.umask(before)
        own = path.stat().st_ino
        try:
            yield bound
        finally:
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_ino == own:  # a successor may have put its own there
                    path.unlink()
