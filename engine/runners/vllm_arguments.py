"""From a runner's spec to the command line of vLLM's OpenAI server: pure functions."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from engine.errors import nearest
from engine.runners.spec import RunnerSpec

ROOT = Path(__file__).resolve().parent.parent.parent
#: GPU memory beside weights and KV cache: activations, CUDA graphs, libraries.
RESERVE_BYTES = 3 * 2**30
#: Never fewer bytes of KV cache than this, or no request of any use fits.
LEAST_KV_BYTES = 64 * 2**20
#: Steps of the engine between two looks at the balance of experts: some seconds, and each costs one sync.
_BALANCE_STEPS = 200
_OPTIONS = ("args", "chat_template", "kv_cache_bytes", "reserve_bytes")
_OURS = {
    "model": "the catalog's sources",
    "served-model-name": "the entry's id and aliases",
    "uds": "the scheduler",
    "host": "the scheduler; a runner listens on its Unix socket only",
    "port": "the scheduler; a runner listens on its Unix socket only",
    "allowed-media-domains": "Hearth; the gateway fetches pictures, a runner never",
    "allowed-local-media-path": "Hearth; a runner reads no files for a client",
    "api-key": "the gateway, which checks the keys",
    "chat-template": "options.chat_template",
    "kv-cache-memory-bytes": "options.kv_cache_bytes",
    "enable-sleep-mode": "the model's tier: standby models sleep",
    "shutdown-timeout": "scheduler.drain_s",
}


class OptionsError(Exception):
    """The options of a vLLM model cannot be used; the message names the option and the next step."""


def server_arguments(spec: RunnerSpec, weights_bytes: int, known: Iterable[str] | None = None) -> list[str]:
    """The arguments of vLLM's server for ``spec``, without the program's name.

    Args:
        spec: what to serve. Its ``options``: ``args`` (vLLM's own options, a table), ``chat_template`` (a
            file, relative to the repository), ``kv_cache_bytes``, ``reserve_bytes`` (GPU memory beside
            weights and KV cache; used when ``kv_cache_bytes`` is not given).
        weights_bytes: size of the weight files, to work out the KV cache from the memory budget.
        known: option names of the installed vLLM with their dashes; None = not checked.

    Raises:
        OptionsError: an option is unknown, belongs to another place, or the memory budget is too small.
    """
    for key in spec.options.keys() - set(_OPTIONS):
        raise OptionsError(
            f"{spec.model}: unknown option '{key}'; {_hint(key, _OPTIONS)} "
            "Options of vLLM itself go into the table options.args."
        )
    table = {key.replace("_", "-"): value for key, value in spec.options.get("args", {}).items()}
    for key in table:
        if key in _OURS:
            raise OptionsError(f"{spec.model}: options.args.{key} is set by {_OURS[key]}; leave it out.")
    defaults = _defaults(spec, weights_bytes)
    options = {**defaults, **table}
    if options.get("enable-eplb") is True:
        options["eplb-config"] = _eplb_config(spec.model, options.get("eplb-config", {}))
    if known is not None:
        _check(spec.model, options, set(known))
    return [
        f"--model={spec.model_dir}",
        "--served-model-name",
        spec.model,
        *spec.aliases,
        f"--uds={spec.socket}",
        *(part for key, value in options.items() for part in _flag(spec.model, key, value)),
    ]


def kv_cache_bytes(spec: RunnerSpec, weights_bytes: int) -> int:
    """Bytes of KV cache on each device.

    The option where it is given; else, on GPUs, each one's share of the memory budget less the weights and
    the reserve. The budget is of the whole replica and split evenly over its devices.

    Raises:
        OptionsError: nothing says how much, or too little is left.
    """
    given = spec.options.get("kv_cache_bytes")
    if given is not None:
        return int(given)
    devices = device_count(spec.device)
    reserve = int(spec.options.get("reserve_bytes", RESERVE_BYTES))
    left = (spec.memory_bytes - weights_bytes) // devices - reserve
    if left < LEAST_KV_BYTES:
        raise OptionsError(
            f"{spec.model}: {_gib(spec.memory_bytes)} on {devices} device(s) leave no room for the KV cache "
            f"beside {_gib(weights_bytes)} of weights and a reserve of {_gib(reserve)} on each device. "
            "Raise memory_bytes, or set options.kv_cache_bytes."
        )
    return left


def device_count(device: str) -> int:
    """How many devices a name like 'cuda:0,1' or 'cpu:0' stands for."""
    return len(device.partition(":")[2].split(","))


def _defaults(spec: RunnerSpec, weights_bytes: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "kv-cache-memory-bytes": kv_cache_bytes(spec, weights_bytes),
        "max-num-seqs": spec.max_batch,
        "shutdown-timeout": int(spec.drain_s),
        # A domain that cannot exist: pictures come as data URLs, and nobody makes a runner fetch anything.
        "allowed-media-domains": ["none.invalid"],
        "enable-prompt-tokens-details": True,
        # The gateway logs every request with its id.
        "disable-uvicorn-access-log": True,
    }
    if spec.device.startswith("cuda"):
        # With a fixed KV cache the share decides nothing, but vLLM still refuses to start where less than
        # this much is free, and other runners live on the same GPU.
        options["gpu-memory-utilization"] = 0.05
    if spec.can_sleep:
        if not spec.device.startswith("cuda"):
            raise OptionsError(
                f"{spec.model}: vLLM has no sleep mode on a CPU ({spec.device}). Make the model resident "
                '(tier = "resident"), or give it a GPU.'
            )
        options["enable-sleep-mode"] = True
    if spec.context_length is not None:
        options["max-model-len"] = spec.context_length
    if device_count(spec.device) > 1:
        options["tensor-parallel-size"] = device_count(spec.device)
    template = spec.options.get("chat_template")
    if template is not None:
        path = (ROOT / Path(template).expanduser()).resolve()
        if not path.is_file():
            raise OptionsError(f"{spec.model}: options.chat_template names {path}, which is no file.")
        options["chat-template"] = str(path)
    return options


def _eplb_config(model: str, given: Any) -> dict[str, Any]:
    """vLLM's balancer of experts logs how even they are, for `/metrics` (``expert_log``)."""
    if not isinstance(given, Mapping):
        raise OptionsError(
            f"{model}: options.args.eplb-config is a {type(given).__name__}; it must be a table."
        )
    return {"log_balancedness": True, "log_balancedness_interval": _BALANCE_STEPS, **given}


def _flag(model: str, key: str, value: Any) -> list[str]:
    if value is True:
        return [f"--{key}"]
    if value is False:
        return [f"--no-{key}"]
    if isinstance(value, Mapping):
        return [f"--{key}={json.dumps(value)}"]
    if isinstance(value, list):
        return [f"--{key}", *(str(item) for item in value)]
    if isinstance(value, int | float | str):
        return [f"--{key}={value}"]
    raise OptionsError(f"{model}: options.args.{key} is a {type(value).__name__}; vLLM takes none.")


def _check(model: str, options: Mapping[str, Any], known: set[str]) -> None:
    for key, value in options.items():
        flag = f"--no-{key}" if value is False else f"--{key}"
        if flag not in known:
            names = [name.removeprefix("--") for name in known]
            what = "cannot be switched off in" if value is False and f"--{key}" in known else "is unknown to"
            raise OptionsError(
                f"{model}: options.args.{key} {what} the installed vLLM; {_hint(key, names)} "
                "`python -m vllm.entrypoints.openai.api_server --help=all` lists all."
            )


def _hint(key: str, known: Iterable[str]) -> str:
    names = sorted(known)
    close = nearest(key, names, most=1)
    return f"did you mean '{close[0]}'?" if close else f"known here: {', '.join(names[:8])}."


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"
