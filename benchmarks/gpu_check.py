"""`python -m benchmarks.gpu_check` (`make gpu-check`): standby models on a real GPU, against the plan.

On one GPU, two vLLM models are placed as `hearth serve` would place them as standby models: prepared ones of
the profile for this GPU, else known ones with made-up weights of the same size. Measured are the times of
sleeping and waking at level 1 over several rounds of taking turns, the first answer after ready against
the steady state, and the memory planned against the memory used (NVML). Writes results/gpu-KIND.json.
Exit status 1 when the memory is off by more than 5 % or an answer changed by sleeping, 2 without a GPU.
`--rehearse` runs the same measurement with two small CPU runners, judges no memory and writes nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._gpu_models import SHAPES, Choice, choose, profile_of, write_model
from benchmarks._gpu_report import Record, answers_changed, missed, show
from benchmarks._gpu_stage import CheckError, RunnerStage, Subject, measure, spoken
from benchmarks._measure import machine, processes_of, pss_bytes, write_result
from engine.cli.doctor import engine_versions
from engine.config import ROOT, Config
from engine.runners.spec import RunnerSpec
from engine.scheduler.devices import Device, find_devices
from engine.scheduler.gpus import kind_of, suits
from engine.scheduler.nvml import DriverNvml
from engine.scheduler.plan import PlanError, RunnerPlan, make_plan
from engine.scheduler.warmup import Ask, warm_up_asks
from models.catalog import Catalog, CatalogError, choose_profile, load_catalog, load_profile, load_profiles
from models.prepare import prepare
from models.profile import Profile, ProfileModel

NO_GPU = 2
CONTEXT = 4096
BATCH = 16
#: Short: with a prefix of its own in the cache, the arithmetic of a later answer could be another.
_PROMPT = "Hi"
_REHEARSED = ("all-minilm-l6-v2", "whisper-tiny-en")


def one_gpu(devices: Sequence[Device]) -> Device | None:
    """The GPU that is checked: the first one that this process sees."""
    return next((device for device in devices if device.is_gpu), None)


def wanted_models(gpu: Device, host_bytes: int) -> list[str]:
    """The models of the profile that `hearth serve` takes with this GPU alone; none where there is none."""
    fitting = [profile for profile in load_profiles() if profile.needs.gpus == 1 and suits(profile, [gpu])]
    try:
        chosen = load_profile(choose_profile(fitting, [gpu.memory_bytes], host_bytes))
    except CatalogError:
        return []
    return [model.id for model in chosen.models]


def gpu_subjects(config: Config, catalog: Catalog, devices: Sequence[Device], folder: Path) -> list[Subject]:
    """Two models for the first GPU, planned as standby models; made-up weights are written into ``folder``.

    Raises:
        PlanError: they do not fit in turns.
    """
    gpu = one_gpu(devices)
    assert gpu is not None, "the caller has looked"
    host = next(device for device in devices if not device.is_gpu)
    choices = choose(catalog.entries, wanted_models(gpu, host.memory_bytes), config.weights_dir)
    plans = make_plan(config, profile_of(choices, CONTEXT, BATCH), catalog, [host, gpu])
    return [_gpu_subject(plan, _choice_of(plan, choices), folder) for plan in plans]


def _choice_of(plan: RunnerPlan, choices: Sequence[Choice]) -> Choice:
    return next(choice for choice in choices if choice.entry.id == plan.model)


def _gpu_subject(plan: RunnerPlan, choice: Choice, folder: Path) -> Subject:
    name = plan.model
    weights = choice.weights or write_model(folder / name, SHAPES[name])
    spec = plan.spec.model_copy(update={"model_dir": weights})
    kind = "prepared" if choice.weights else "dummy"
    return Subject(spec, chat_ask(spec), kind, plan.awake_bytes, plan.asleep_bytes)


def chat_ask(spec: RunnerSpec) -> Ask:
    """A streamed chat of a few tokens. Made-up weights say nonsense: it is judged only that they do."""
    body = {
        "model": spec.model,
        "messages": [{"role": "user", "content": _PROMPT}],
        "max_tokens": 16,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
    }
    return StreamAsk("/v1/chat/completions", "application/json", json.dumps(body).encode(), lambda _: "")


class StreamAsk(Ask):
    """An ask whose answer is a stream of events."""

    def fault(self, status: int, body: bytes) -> str:
        if status != 200:
            return f"status {status}"
        if not body.rstrip().endswith(b"data: [DONE]"):
            return "the stream has no end"
        return "" if spoken(body) else "no word in the whole stream"


def rehearsal_subjects(config: Config, catalog: Catalog, host: Device) -> list[Subject]:
    """Two of our own runners on the CPU, planned as standby models, with their real weights."""
    models = [ProfileModel(id=name, tier="standby") for name in _REHEARSED]
    plans = make_plan(config, Profile(name="rehearsal", models=models), catalog, [host])
    subjects = []
    for plan in plans:
        weights = prepare(plan.entry, config.weights_dir, offline=False, report=lambda _: None)
        spec = plan.spec.model_copy(update={"model_dir": weights})
        ask = warm_up_asks(spec)[0]
        subjects.append(Subject(spec, ask, "prepared", plan.awake_bytes, plan.asleep_bytes))
    return subjects


def document(gpu: Device, records: Sequence[Record], command: str, faults: Sequence[str]) -> dict[str, Any]:
    """The results file."""
    return {
        "command": command,
        "machine": machine(),
        "gpu": {"kind": kind_of(gpu).name, "product": gpu.product, "memory_bytes": gpu.memory_bytes},
        "versions": engine_versions(),
        "models": [record.document() for record in records],
        "missed": list(faults),
    }


def result_name(gpu: Device) -> str:
    """'gpu-h100' and the like, safe as a file's name."""
    return "gpu-" + re.sub(r"[^a-z0-9.]+", "-", kind_of(gpu).name.lower()).strip("-")


async def check(given: argparse.Namespace, console: Console) -> int:
    """The whole check; the exit status."""
    devices = find_devices()
    gpu = one_gpu(devices)
    if gpu is None and not given.rehearse:
        console.print(
            "No NVIDIA GPU is to be seen here (`nvidia-smi`), so there is nothing to check. "
            "`--rehearse` tries the measurement itself with two small CPU runners."
        )
        return NO_GPU
    catalog = load_catalog()
    with tempfile.TemporaryDirectory(prefix="hgc-") as short:
        folder = Path(short)
        config = own_config(folder, given.weights)
        config.runtime_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        try:
            if gpu is None or given.rehearse:
                subjects = rehearsal_subjects(config, catalog, devices[0])
            else:
                subjects = gpu_subjects(config, catalog, devices, folder)
            used = process_bytes if gpu is None or given.rehearse else nvml_bytes(gpu)
            stage = RunnerStage(folder, used, limit_s=given.limit, say=console.print)
            async with stage:
                records = await measure(stage, subjects, rounds=given.rounds, steady=given.steady)
        except (CheckError, PlanError) as error:
            console.print(str(error), style="red", markup=False)
            return 1
        finally:
            shutil.rmtree(config.runtime_dir, ignore_errors=True)
    show(records, console, judged=not given.rehearse)
    if gpu is None or given.rehearse:
        faults = [fault for record in records for fault in answers_changed(record)]
    else:
        faults = missed(records)
        command = shlex.join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]])
        console.print(
            f"Written to {write_result(result_name(gpu), document(gpu, records, command, faults))}."
        )
    for fault in faults:
        console.print(f"Missed: {fault}.", style="red", markup=False)
    return 1 if faults else 0


def own_config(folder: Path, weights: Path) -> Config:
    """A configuration of its own: no file, no other Hearth's sockets."""
    return Config.model_validate({"state_dir": folder / "state", "weights": {"dir": weights.resolve()}})


def process_bytes(leaders: Sequence[int]) -> int:
    """Proportional set size of the runners' processes."""
    return pss_bytes(process.pid for process in processes_of(leaders))


def nvml_bytes(gpu: Device) -> Callable[[Sequence[int]], int]:
    """What is taken of the GPU, whoever holds it: in a container the driver's process ids are not ours."""
    index, nvml = int(gpu.name.partition(":")[2]), DriverNvml()
    return lambda _: nvml.used_bytes(index)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_check", description=__doc__)
    parser.add_argument("--weights", type=Path, default=ROOT / "var" / "weights", help="prepared weights")
    parser.add_argument("--rounds", type=int, default=5, help="how often each model wakes")
    parser.add_argument("--steady", type=int, default=20, help="requests that make the steady state")
    parser.add_argument("--limit", type=float, default=900.0, help="longest start or answer, seconds")
    parser.add_argument(
        "--rehearse", action="store_true", help="on the CPU, with small runners; writes nothing"
    )
    given = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    return asyncio.run(check(given, Console()))


if __name__ == "__main__":
    sys.exit(main())
