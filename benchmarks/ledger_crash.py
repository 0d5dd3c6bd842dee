"""Does the ledger lose or double anything under kill -9?

A real scheduler runs real gateway workers over runners without models, on SQLite or a real PostgreSQL.
Clients ask without end, under plans whose limits run out, whole and streamed, some with Idempotency-Key and
again until they are answered. Each round kills a gateway worker, the scheduler, the database with all its
processes (SQLite, which has none: its write lock is held for a while), or all of Hearth. Every --era rounds
it is held against the ledger, request by request: every answer has one row with the charge that its head
told, no error has one, no limit is exceeded by one request, and `hearth usage verify` finds nothing wrong.

    python -m benchmarks.ledger_crash --rounds 1000 --database postgresql
    python -m benchmarks.ledger_crash --rounds 100 --database postgresql --machines 2 --workers 2
    python -m benchmarks.ledger_crash --budget 50000 --workers 8

With --budget all requests come with one key, until its hard budget is used up. `--writers 8` is for the
ledger alone, without gateways and requests.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
import time
from dataclasses import asdict
from typing import Any

from benchmarks._measure import RESULTS, machine, write_result
from benchmarks.crash.rounds import Wanted, run
from benchmarks.crash.writers import run as run_writers


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ledger_crash",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--database", choices=["sqlite", "postgresql"], default="sqlite")
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--workers", type=int, default=Wanted.workers, help="gateway workers of a machine")
    parser.add_argument("--machines", type=int, default=1, help="Hearths that share the PostgreSQL")
    parser.add_argument("--clients", type=int, default=Wanted.clients)
    parser.add_argument("--pace", type=float, default=Wanted.pace_s, help="mean pause of a client, seconds")
    parser.add_argument("--era", type=int, default=Wanted.era, help="rounds between two audits")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=0, help="one key with a budget of so many requests")
    parser.add_argument("--writers", type=int, default=0, help="processes that write the ledger, no gateways")
    parser.add_argument("--limit", type=int, default=50_000, help="budget of the writers' key")
    parser.add_argument("--name", default="", help="of the results file; else it is made of the arguments")
    parser.add_argument(
        "--seconds", type=float, default=0, help="end after so long, at an audit; 0 = no bound"
    )
    parser.add_argument("--add", action="store_true", help="add to the figures in the results file")
    return parser.parse_args()


def sums(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """Two runs as one: counts added up."""
    result = dict(other)
    for name, value in one.items():
        there = other.get(name)
        if name == "machine" or there is None:
            result[name] = value
        elif isinstance(value, dict):
            result[name] = sums(value, there)
        elif isinstance(value, bool):
            result[name] = value and there
        elif name == "settled_s":
            result[name] = max(value, there)
        elif isinstance(value, int | float | list) and name not in ("machines", "workers"):
            result[name] = value + there
    return result


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


def main() -> int:
    asked = _arguments()
    # So that what was started is ended.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    about = machine()
    if asked.writers:
        kind = "writers"
        found = run_writers(
            asked.database, rounds=asked.rounds, writers=asked.writers, limit=asked.limit, seed=asked.seed
        )
        document, good = {**asdict(found), "good": found.good}, found.good
    else:
        kind = "budget" if asked.budget else "gateways"
        wanted = Wanted(
            asked.database,
            asked.rounds,
            workers=asked.workers,
            machines=asked.machines,
            seed=asked.seed,
            era=asked.rounds if asked.budget else asked.era,
            clients=asked.clients,
            pace_s=asked.pace,
            budget=asked.budget,
            seconds=asked.seconds,
        )
        figures = asyncio.run(run(wanted, _say))
        document, good = figures.document(), figures.good
    print(json.dumps(document, indent=2))
    name = asked.name or f"ledger_crash-{kind}-{asked.database}"
    before = RESULTS / f"{name}.json"
    if asked.add and before.exists():
        document = sums(json.loads(before.read_text()), document)
    file = write_result(name, {"machine": about, **document})
    print(f"Written to {file}.")
    return 0 if good else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
