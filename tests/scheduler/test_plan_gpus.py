"""Placement on GPUs: what `hearth serve` would start on machines that are only described here."""

from __future__ import annotations

from pathlib import Path

import pytest

from engine.config import Config
from engine.planner.catalog import needs_of_all, wants_of
from engine.planner.hardware import KINDS
from engine.planner.launch import launch_lines
from engine.planner.plan import make_plan as plan_nodes
from engine.runners.vllm_arguments import server_arguments
from engine.scheduler.devices import CPU, Device, find_gpus
from engine.scheduler.gpus import kind_of, machine_of, suits
from engine.scheduler.nvml import GpuFacts, NvmlError
from engine.scheduler.plan import PlanError, RunnerPlan, host_room, make_plan, rooms
from models.catalog import choose_profile, load_catalog, load_profile, load_profiles
from models.profile import Needs, Profile

from .fake_nvml import FakeNvml
from .support import GIB, catalog, config, entry, profile

PRODUCTS = {
    "H200": "NVIDIA H200",
    "H100": "NVIDIA H100 80GB HBM3",
    "A100-80": "NVIDIA A100-SXM4-80GB",
    "L40S": "NVIDIA L40S",
    "RTX4090": "NVIDIA GeForce RTX 4090",
}


def machine(count: int, kind: str, host_gib: int = 2048) -> list[Device]:
    gpu = KINDS[kind]
    return [
        Device(CPU, host_gib * GIB),
        *(Device(f"cuda:{i}", gpu.memory_bytes, PRODUCTS[kind]) for i in range(count)),
    ]


def wanted(*names: str, gpus: int = 1, nodes: str = "", **fields: object) -> Profile:
    return profile(*names, **fields).model_copy(update={"needs": Needs(gpus=gpus, nodes=nodes)})


def of(plans: list[RunnerPlan], model: str) -> RunnerPlan:
    return next(plan for plan in plans if plan.model == model)


def assert_rooms_kept(settings: Config, plans: list[RunnerPlan], devices: list[Device]) -> None:
    """The formula of the tiers, from the runner plans alone."""
    room = rooms(settings, devices)
    for name, size in room.items():
        here = [plan for plan in plans if name in plan.devices]
        standby = [plan for plan in here if plan.standing.tier == "standby"]
        resident = sum(plan.awake_bytes for plan in here if plan.standing.tier == "resident")
        waking = max((plan.awake_bytes - plan.asleep_bytes for plan in standby), default=0)
        assert resident + sum(plan.asleep_bytes for plan in standby) + waking <= size
    assert sum(plan.host_bytes for plan in plans) <= host_room(settings, devices)


def test_r1_stands_on_all_eight_h200_with_whisper_on_one_of_them(tmp_path: Path) -> None:
    devices = machine(8, "H200")
    settings = config(tmp_path)
    plans = make_plan(settings, wanted("deepseek-r1", "whisper-large-v3"), load_catalog(), devices)
    r1, whisper = of(plans, "deepseek-r1"), of(plans, "whisper-large-v3")
    assert r1.device == r1.spec.device == "cuda:0,1,2,3,4,5,6,7"
    assert r1.devices == tuple(f"cuda:{i}" for i in range(8))
    assert r1.spec.options["args"]["data-parallel-size"] == 8
    assert r1.spec.options["args"]["enable-expert-parallel"] is True
    assert r1.spec.memory_bytes == 8 * r1.awake_bytes
    assert (
        len(whisper.devices) == 1 and whisper.spec.options == load_catalog().find("whisper-large-v3").options
    )
    assert_rooms_kept(settings, plans, devices)


ONE_MACHINE = [p for p in load_profiles() if p.needs.nodes and not p.plan_only]


@pytest.mark.parametrize("shipped", ONE_MACHINE, ids=lambda p: p.name)
def test_what_is_started_is_what_hearth_plan_prints(tmp_path: Path, shipped: Profile) -> None:
    count, kind = shipped.needs.nodes.split("x")[1:]
    devices = machine(int(count), kind.partition(":")[0])
    settings = config(tmp_path, scheduler={"drain_s": 30.0})
    plans = make_plan(settings, shipped, load_catalog(), devices)
    assert_rooms_kept(settings, plans, devices)
    known = load_catalog()
    host = machine_of(devices, host_room(settings, devices)).nodes
    found = plan_nodes(needs_of_all(known.entries.values()), wants_of(shipped), host)
    assert [plan.id for plan in plans] == [placement.id for placement in found.placements]
    for plan, placement in zip(plans, found.placements, strict=True):
        (line,) = launch_lines(placement, settings.runtime_dir)
        assert dict(line.environment)["CUDA_VISIBLE_DEVICES"] == plan.device.removeprefix("cuda:")
        if plan.spec.engine != "vllm":
            continue
        told = server_arguments(plan.spec.model_copy(update={"model_dir": Path(placement.needs.source)}), 0)
        printed = [f"--model={placement.needs.source}", *line.arguments[3:]]
        assert sorted(told) == sorted(printed)


def test_a_profile_is_chosen_by_the_gpus_that_are_there() -> None:
    def chosen(devices: list[Device]) -> str:
        fitting = [one for one in load_profiles() if suits(one, devices)]
        gpus = [device.memory_bytes for device in devices if device.is_gpu]
        return choose_profile(fitting, gpus, devices[0].memory_bytes)

    assert chosen(machine(1, "H200")) == "gpu-h200"
    assert chosen(machine(8, "H200")) == "flagship"
    assert chosen(machine(8, "H100")) == "h100-8"
    assert chosen(machine(4, "L40S")) == "l40s-4"
    # Sparse attention needs Hopper: eight A100 are no eight H100, though their memory would do.
    assert chosen(machine(8, "A100-80")) == "gpu-80g"
    assert chosen(machine(1, "H100")) == "gpu-80g"
    assert chosen(machine(2, "RTX4090", host_gib=64)) == "gpu-24g"


@pytest.mark.parametrize(("name", "kinds"), [("gpu-24g", ("RTX4090",)), ("gpu-80g", ("H100", "A100-80"))])
def test_profiles_for_any_gpu_of_a_size_fit_the_smallest_and_the_known(
    tmp_path: Path, name: str, kinds: tuple[str, ...]
) -> None:
    shipped, settings = load_profile(name), config(tmp_path)
    least = [Device(CPU, shipped.needs.memory_bytes), Device("cuda:0", shipped.needs.gpu_memory_bytes)]
    for devices in (least, *(machine(1, kind, 64) for kind in kinds)):
        plans = make_plan(settings, shipped, load_catalog(), devices)
        assert len(plans) == len(shipped.models)
        assert_rooms_kept(settings, plans, devices)
        standby = {plan.model for plan in plans if plan.spec.can_sleep}
        assert standby == {model.id for model in shipped.models if model.tier == "standby"}


def test_standby_on_a_gpu_keeps_its_context_and_its_weights_in_the_host(tmp_path: Path) -> None:
    settings = config(tmp_path, models={"gpt-oss-120b": {"tier": "standby", "priority": 4}})
    shipped = wanted("qwen3-8b", "gpt-oss-120b", "qwen3-32b")
    chat, oss, _ = make_plan(settings, shipped, load_catalog(), machine(2, "H200"))
    assert oss.standing.tier == "standby" and oss.standing.priority == 4 and oss.spec.can_sleep
    assert GIB < oss.asleep_bytes < 3 * GIB < 60 * GIB < oss.awake_bytes
    assert 60 * GIB < oss.host_bytes < 62 * GIB
    assert (chat.asleep_bytes, chat.host_bytes, chat.spec.can_sleep) == (0, 0, False)


def test_the_configured_host_memory_bounds_what_may_sleep(tmp_path: Path) -> None:
    settings = config(tmp_path, tiers={"host_memory_bytes": 8 * GIB})
    with pytest.raises(PlanError, match=r"qwen3-8b-0 has no place \(host memory\).*8\.0 GiB of each node"):
        make_plan(settings, wanted("qwen3-8b", tier="standby"), load_catalog(), machine(1, "H200"))
    assert host_room(config(tmp_path), machine(1, "H200", 1000)) == 900 * GIB


def test_what_does_not_fit_is_told_with_step_reason_and_change(tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(config(tmp_path), wanted("deepseek-r1"), load_catalog(), machine(8, "H100"))
    text = str(caught.value)
    assert text.startswith("deepseek-r1-0 has no place (memory): TP8 needs")
    assert "8xH200 instead" in text and "[models.deepseek-r1] enabled = false" in text


def test_the_configuration_is_laid_over_the_profile(tmp_path: Path) -> None:
    own = {
        "qwen3-8b": {"context_length": 4096, "max_batch": 3, "options": {"args": {"seed": 7}}},
        "qwen2.5-coder-7b": {"options": {"kv_cache_bytes": 3 * GIB}, "path": str(tmp_path)},
        "bge-m3": {"memory_bytes": 5 * GIB},
    }
    shipped = wanted("qwen3-8b", "qwen2.5-coder-7b", "bge-m3", context_length=8192)
    plans = make_plan(config(tmp_path, models=own), shipped, load_catalog(), machine(1, "H200"))
    chat, coder, embedding = plans
    assert (chat.spec.context_length, chat.spec.max_batch) == (4096, 3)
    assert chat.spec.options["args"]["seed"] == 7 and "tool-call-parser" in chat.spec.options["args"]
    assert coder.spec.options["kv_cache_bytes"] == 3 * GIB
    assert coder.preparation == "prepare-qwen2.5-coder-7b-local"
    assert embedding.awake_bytes == embedding.spec.memory_bytes == 5 * GIB
    assert embedding.spec.context_length == 8192


def test_a_fixed_budget_decides_and_the_runner_divides_it(tmp_path: Path) -> None:
    known = catalog(entry("own", memory_bytes=40 * GIB, options={"args": {"tensor-parallel-size": 2}}))
    shipped = wanted("own")
    own = {"own": {"memory_bytes": 60 * GIB, "options": {"args": {"tensor_parallel_size": 2}}}}
    (plan,) = make_plan(config(tmp_path, models=own), shipped, known, machine(2, "H100"))
    assert plan.device == "cuda:0,1" and plan.awake_bytes == 30 * GIB
    assert plan.spec.memory_bytes == 60 * GIB and "kv_cache_bytes" not in plan.spec.options
    # An entry without figures is placed by the sum that its author gave.
    (alone,) = make_plan(
        config(tmp_path), shipped, catalog(entry("own", memory_bytes=40 * GIB)), machine(1, "H100")
    )
    assert alone.awake_bytes == 40 * GIB


def test_room_is_kept_for_replicas_that_load_may_ask_for(tmp_path: Path) -> None:
    shipped = wanted("qwen3-8b", "bge-m3")
    own = {"qwen3-8b": {"min_replicas": 1, "max_replicas": 2}}
    devices = machine(1, "H100")
    settings = config(tmp_path, models=own)
    chat, embedding = make_plan(settings, shipped, load_catalog(), devices)
    assert (chat.standing.min_replicas, chat.standing.max_replicas) == (1, 2)
    free = rooms(settings, devices)["cuda:0"] - chat.awake_bytes - embedding.awake_bytes
    assert free >= chat.awake_bytes
    (fixed, _) = make_plan(config(tmp_path), shipped, load_catalog(), devices)
    assert fixed.awake_bytes > chat.awake_bytes


def test_several_machines_cannot_be_started_from_one(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"'flagship-2' is laid out for 2x8xH200: several machines"):
        make_plan(config(tmp_path), load_profile("flagship-2"), load_catalog(), machine(8, "H200"))


def test_gpus_keep_their_own_numbers(tmp_path: Path) -> None:
    devices = [Device(CPU, 512 * GIB), *machine(4, "H100")[3:]]
    (plan,) = make_plan(
        config(tmp_path),
        wanted("llama-3.3-70b-instruct"),
        load_catalog(),
        [devices[0], *machine(6, "H100")[3:]],
    )
    assert plan.device == "cuda:2,3,4,5"


def test_different_gpus_are_nodes_of_their_own_and_share_the_host() -> None:
    devices = [
        Device(CPU, 100 * GIB),
        *machine(2, "H100")[1:],
        Device("cuda:2", 24 * GIB, "NVIDIA GeForce RTX 3090", (8, 6)),
    ]
    found = machine_of(devices, 90 * GIB)
    assert [(node.kind.name, node.gpus) for node in found.nodes] == [("H100", 2), ("GeForce-RTX-3090", 1)]
    assert found.names["n1"] == ("cuda:2",)
    assert sum(node.host_bytes for node in found.nodes) <= 90 * GIB


@pytest.mark.parametrize(
    ("product", "kind"),
    [
        ("NVIDIA H200", "H200"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA H100 PCIe", "H100"),
        ("NVIDIA H20", "H20"),
        ("NVIDIA B200", "B200"),
        ("NVIDIA A100-SXM4-80GB", "A100-80"),
        ("NVIDIA A100 80GB PCIe", "A100-80"),
        ("NVIDIA A100-SXM4-40GB", "A100-40"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("NVIDIA A10G", "A10"),
        ("NVIDIA GeForce RTX 4090", "RTX4090"),
        ("NVIDIA L40", "L40"),
        ("NVIDIA GeForce RTX 5090", "GeForce-RTX-5090"),
        ("", "GPU"),
    ],
)
def test_kinds_by_product_name(product: str, kind: str) -> None:
    found = kind_of(Device("cuda:0", 30 * GIB, product, (12, 0)))
    assert (found.name, found.memory_bytes) == (kind, 30 * GIB)
    assert found.capability == (KINDS[kind].capability if kind in KINDS else (12, 0))


def facts(index: int) -> GpuFacts:
    return GpuFacts(index, f"GPU-{index}abc", "NVIDIA H100 80GB HBM3", 80 * GIB, (9, 0), nvlink=True)


def test_only_gpus_that_cuda_may_see_are_devices() -> None:
    nvml = FakeNvml([facts(index) for index in range(4)])
    assert [device.name for device in find_gpus(nvml, "3,1")] == ["cuda:1", "cuda:3"]
    assert [device.name for device in find_gpus(nvml, "GPU-2,0")] == ["cuda:0", "cuda:2"]
    assert find_gpus(nvml, "") == [] == find_gpus(nvml, "-1")
    (first, *_) = find_gpus(nvml, "0,9,1")
    assert first == Device("cuda:0", 80 * GIB, "NVIDIA H100 80GB HBM3", (9, 0), nvlink=True)
    nvml.error = NvmlError("gone")
    assert find_gpus(nvml, "0") == []
