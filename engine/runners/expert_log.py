"""Keeps what vLLM's own load balancer logs of its balancedness, for the runner's /metrics.

vLLM (0.32, ``distributed/eplb/eplb_state.py``) has no metric of it, only a line of its first worker, with
``log_balancedness`` on. A plugin (entry point group ``vllm.general_plugins``, loaded in every process of
vLLM) listens to that logger; the figure goes into the file that ``expert_load.read_reported`` reads.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from pathlib import Path

from engine.runners.expert_load import VARIABLE, reported_file

LOGGER = "vllm.distributed.eplb.eplb_state"
_LINE = re.compile(
    r"EPLB step: (?P<step>\d+) for model (?P<model>.*?): avg_tokens=(?P<mean>[\d.]+), "
    r"max_tokens=(?P<most>\d+), balancedness=(?P<balancedness>[\d.]+)"
)


def parse(line: str) -> dict[str, float | str] | None:
    """The figures of one of its lines; None for any other line, and where no token was routed."""
    found = _LINE.search(line)
    if found is None or not int(found["most"]):
        return None
    numbers = {name: float(found[name]) for name in ("step", "mean", "most", "balancedness")}
    return {"model": found["model"], **numbers}


class KeepBalancedness(logging.Handler):
    """Writes the last figure to a file; that of the first model that reports, as a draft model does, too."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._file = file
        self._model: str | float | None = None

    def emit(self, record: logging.LogRecord) -> None:
        figures = parse(record.getMessage())
        if figures is None:
            return
        self._model = self._model or figures["model"]
        if figures["model"] != self._model:
            return
        beside = self._file.with_name(f"{self._file.name}.{os.getpid()}")
        try:
            beside.write_text(json.dumps({**figures, "at": time.time()}))
            beside.replace(self._file)
        except OSError:
            # A figure less; the engine's work does not hang on it.
            self.handleError(record)


def install() -> None:
    """The plugin: does nothing in processes that no Hearth runner has started."""
    path = os.environ.get(VARIABLE)
    logger = logging.getLogger(LOGGER)
    if path and not any(isinstance(handler, KeepBalancedness) for handler in logger.handlers):
        logger.addHandler(KeepBalancedness(reported_file(Path(path))))
