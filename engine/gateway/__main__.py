"""`python -m engine.gateway --settings FILE [--fd N]`: one gateway process.

SIGTERM (or SIGINT): no new connections, requests in flight end (at most gateway.drain_s seconds), exit 0.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from pathlib import Path

from pydantic import ValidationError

from engine.config import Config, ConfigError
from engine.gateway.settings import read_settings


def main() -> int:
    """Runs a gateway until it is told to stop; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m engine.gateway", description="One gateway process of Hearth."
    )
    parser.add_argument("--settings", type=Path, required=True, help="JSON file: {config: {…}}.")
    parser.add_argument(
        "--fd", type=int, help="Inherited listening socket; else config.host and port are bound."
    )
    arguments = parser.parse_args()
    try:
        config = read_settings(arguments.settings)
    except (OSError, ValidationError, ConfigError) as error:
        print(f"gateway: {arguments.settings} cannot be used: {error}", file=sys.stderr)
        return 1
    _share_metrics(config)

    # prometheus_client decides at its import where values are kept, so what imports it comes after.
    from engine.gateway.app import Gateway
    from engine.gateway.server import listen, make_server, set_up_logging

    set_up_logging(config.log_level)
    try:
        listener = listen(config, arguments.fd)
    except OSError as error:
        place = f"fd {arguments.fd}" if arguments.fd is not None else f"{config.host}:{config.port}"
        print(f"gateway: cannot listen on {place}: {error.strerror}. Is it taken?", file=sys.stderr)
        return 1
    # uvicorn raises the signal again once it has drained; this is what it then finds.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: None)
    server = make_server(config, Gateway(config))
    server.run(sockets=[listener])
    return 0 if server.started else 1


def _share_metrics(config: Config) -> None:
    """With several workers: one folder for their metrics, so that any of them can tell the sum."""
    if config.gateway.workers == 1:
        return
    folder = config.runtime_dir / "gateway-metrics"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(folder)

    from engine.gateway.metrics import forget_the_dead

    forget_the_dead(folder)


if __name__ == "__main__":
    sys.exit(main())
