"""From a spec to vLLM's command line."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from engine.runners.spec import RunnerSpec
from engine.runners.vllm_arguments import OptionsError, kv_cache_bytes, server_arguments
from models.catalog import load_catalog

GIB = 2**30


def make_spec(**fields: Any) -> RunnerSpec:
    base: dict[str, Any] = {
        "model": "m",
        "aliases": ["alias"],
        "category": "chat",
        "engine": "vllm",
        "model_dir": "/weights/m",
        "socket": "/run/m.sock",
        "options": {"kv_cache_bytes": 1000},
    }
    return RunnerSpec(**{**base, **fields})


def arguments(spec: RunnerSpec, known: list[str] | None = None) -> list[str]:
    return server_arguments(spec, 0, known)


def test_names_socket_and_sizes_come_from_the_spec() -> None:
    got = arguments(make_spec(context_length=4096, max_batch=7, drain_s=12.5))
    assert got[:5] == ["--model=/weights/m", "--served-model-name", "m", "alias", "--uds=/run/m.sock"]
    for argument in (
        "--max-model-len=4096",
        "--max-num-seqs=7",
        "--shutdown-timeout=12",
        "--kv-cache-memory-bytes=1000",
    ):
        assert argument in got
    # Nobody makes a runner fetch anything.
    assert got[got.index("--allowed-media-domains") + 1] == "none.invalid"
    assert not any(a.startswith(("--host", "--port", "--tensor-parallel-size")) for a in got)


def test_each_kind_of_value_becomes_a_flag() -> None:
    table = {
        "enforce_eager": True,
        "enable-prefix-caching": False,
        "limit-mm-per-prompt": {"image": 4},
        "dtype": "float32",
        "seed": 1,
        "allowed-local": ["a", "b"],
    }
    got = arguments(make_spec(options={"kv_cache_bytes": 1, "args": table}))
    expected = ["--enforce-eager", "--no-enable-prefix-caching", '--limit-mm-per-prompt={"image": 4}']
    expected += ["--dtype=float32", "--seed=1", "--allowed-local", "a", "b"]
    assert got[-len(expected) :] == expected


def test_a_models_own_option_wins_over_the_default() -> None:
    got = arguments(make_spec(options={"kv_cache_bytes": 1, "args": {"max-num-seqs": 99}}))
    assert [a for a in got if a.startswith("--max-num-seqs")] == ["--max-num-seqs=99"]


@pytest.mark.parametrize(
    "key", ["uds", "host", "port", "model", "served_model_name", "api-key", "chat-template"]
)
def test_what_others_decide_is_refused(key: str) -> None:
    with pytest.raises(OptionsError, match=rf"m: options.args.{key.replace('_', '-')} is set by "):
        arguments(make_spec(options={"kv_cache_bytes": 1, "args": {key: "x"}}))


def test_an_unknown_option_gets_the_nearest_name() -> None:
    known = [
        f"--{n}"
        for n in ("kv-cache-memory-bytes", "max-num-seqs", "shutdown-timeout", "allowed-media-domains")
    ]
    known += ["--enable-prompt-tokens-details", "--disable-uvicorn-access-log", "--enforce-eager", "--trust"]
    with pytest.raises(
        OptionsError, match=r"enforce-eagre is unknown to the installed vLLM; did you mean 'enfor"
    ):
        arguments(make_spec(options={"kv_cache_bytes": 1, "args": {"enforce-eagre": True}}), known)
    with pytest.raises(
        OptionsError, match=r"options.args.trust cannot be switched off in the installed vLLM"
    ):
        arguments(make_spec(options={"kv_cache_bytes": 1, "args": {"trust": False}}), known)
    with pytest.raises(OptionsError, match=r"unknown option 'dtype'; .* go into the table options.args"):
        arguments(make_spec(options={"kv_cache_bytes": 1, "dtype": "float32"}))


def test_a_template_is_a_file_of_the_repository_or_an_absolute_one(tmp_path: Path) -> None:
    got = arguments(
        make_spec(options={"kv_cache_bytes": 1, "chat_template": "models/catalog/templates/smollm2.jinja"})
    )
    path = next(a for a in got if a.startswith("--chat-template=")).removeprefix("--chat-template=")
    assert Path(path).is_absolute() and Path(path).is_file()
    with pytest.raises(OptionsError, match=r"names .*none.jinja, which is no file"):
        arguments(make_spec(options={"kv_cache_bytes": 1, "chat_template": str(tmp_path / "none.jinja")}))


def test_the_kv_cache_is_what_the_budget_leaves() -> None:
    spec = make_spec(device="cuda:0", memory_bytes=20 * GIB, options={})
    assert kv_cache_bytes(spec, 15 * GIB) == 2 * GIB
    less = make_spec(device="cuda:0", memory_bytes=20 * GIB, options={"reserve_bytes": GIB})
    assert kv_cache_bytes(less, 15 * GIB) == 4 * GIB
    assert "--gpu-memory-utilization=0.05" in server_arguments(spec, 15 * GIB)
    two = make_spec(device="cuda:0,1", memory_bytes=40 * GIB, options={})
    assert kv_cache_bytes(two, 20 * GIB) == 7 * GIB
    assert "--tensor-parallel-size=2" in server_arguments(two, 20 * GIB)
    reason = r"m: 20.0 GiB on 1 device\(s\) leave no room .* 18.0 GiB of weights and a reserve of 3.0 GiB"
    with pytest.raises(OptionsError, match=reason):
        kv_cache_bytes(spec, 18 * GIB)


def test_a_balancer_of_experts_is_asked_to_log_unless_told_otherwise() -> None:
    def config_of(**args: Any) -> list[str]:
        got = arguments(make_spec(options={"kv_cache_bytes": 1, "args": args}))
        return [flag.partition("=")[2] for flag in got if flag.startswith("--eplb-config=")]

    assert config_of() == []
    assert config_of(**{"enable-eplb": False}) == []
    (text,) = config_of(**{"enable-eplb": True, "eplb-config": {"num_redundant_experts": 32}})
    assert json.loads(text) == {
        "log_balancedness": True,
        "log_balancedness_interval": 200,
        "num_redundant_experts": 32,
    }
    (text,) = config_of(**{"enable-eplb": True, "eplb-config": {"log_balancedness": False}})
    assert json.loads(text)["log_balancedness"] is False
    with pytest.raises(OptionsError, match="eplb-config is a str"):
        config_of(**{"enable-eplb": True, "eplb-config": "{}"})


def test_a_model_that_sleeps_has_vllms_sleep_mode_and_that_needs_a_gpu() -> None:
    assert "--enable-sleep-mode" in arguments(make_spec(device="cuda:0", can_sleep=True))
    assert "--enable-sleep-mode" not in arguments(make_spec(device="cuda:0"))
    with pytest.raises(
        OptionsError, match=r'm: vLLM has no sleep mode on a CPU \(cpu:0\).*tier = "resident"'
    ):
        arguments(make_spec(can_sleep=True))
    table = {"kv_cache_bytes": 1, "args": {"enable_sleep_mode": True}}
    with pytest.raises(OptionsError, match=r"enable-sleep-mode is set by the model's tier"):
        arguments(make_spec(device="cuda:0", options=table))


def test_every_vllm_model_of_the_catalog_has_options_that_make_a_command_line() -> None:
    for entry in load_catalog().entries.values():
        if entry.engine == "vllm":
            spec = make_spec(
                device="cuda:0",
                memory_bytes=entry.memory_bytes,
                options={**entry.options, "kv_cache_bytes": 1},
                context_length=entry.context_length,
            )
            got = arguments(spec)
            assert not [a for a in got if re.search(r"--[a-z-]*_", a.partition("=")[0])], entry.id
