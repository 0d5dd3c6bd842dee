"""`hearth plan`: where each model would stand, with how much memory and why, before anything is loaded."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Annotated, Literal, NoReturn

import typer
from rich.console import Console

from engine.cli import hostplan
from engine.config import Config, ConfigError, load
from engine.planner.catalog import needs_of_all, nodes_of
from engine.planner.chart import chart
from engine.planner.document import document
from engine.planner.fleet import Homes
from engine.planner.hardware import Node, NodesError, parse_nodes
from engine.planner.layout import Policy, Want
from engine.planner.plan import make_plan
from engine.scheduler.dedicated import gpu_owners
from engine.scheduler.devices import CPU, find_devices
from engine.scheduler.gpus import asked
from engine.scheduler.plan import PlanError, all_wishes, rooms
from engine.scheduler.plan import make_plan as place
from models.catalog import Catalog, CatalogError, load_catalog, load_profile
from models.profile import Profile


def plan(
    nodes: Annotated[
        str,
        typer.Option(
            help="The GPUs: NODESxGPUSxKIND, joined by commas, e.g. 1x8xH200; :GiB behind it, host memory."
        ),
    ] = "",
    models: Annotated[str, typer.Option(help="The models, joined by commas; name:2 for two replicas.")] = "",
    standby: Annotated[
        str, typer.Option(help="Which of the models sleep until a request comes, joined by commas.")
    ] = "",
    profile: Annotated[str, typer.Option(help="A profile of models/profiles/, with its nodes.")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="The whole plan as JSON.")] = False,
    context: Annotated[int | None, typer.Option(min=1, help="Context to plan for, tokens.")] = None,
    concurrency: Annotated[
        int | None, typer.Option(min=1, help="Requests of the whole context held at once.")
    ] = None,
    kv_dtype: Annotated[
        Literal["auto", "bf16", "fp8"] | None, typer.Option(help="The KV cache's number format.")
    ] = None,
    eplb: Annotated[
        bool | None, typer.Option("--eplb/--no-eplb", help="Expert load balancing; default: where it helps.")
    ] = None,
    objective: Annotated[
        Literal["throughput", "latency"], typer.Option(help="What large models are laid out for.")
    ] = "throughput",
    rdma: Annotated[
        bool | None, typer.Option("--rdma/--no-rdma", help="Between nodes; default: where GPUs have NVLink.")
    ] = None,
    utilisation: Annotated[
        float, typer.Option(min=0.1, max=1.0, help="Share of a GPU's memory that models may take.")
    ] = 0.92,
) -> None:
    """Show where models would stand, with memory and launch lines. Exit status 1 if one has no place."""
    try:
        catalog, config = load_catalog(), load()
        sleepers = {catalog.find(name.strip()).id for name in standby.split(",") if name.strip()}
        needs = needs_of_all(catalog.entries.values())
        wants, places = _wanted(catalog, models, nodes, rdma)
        homes: Homes = {}
        if profile:
            chosen = load_profile(profile)
            if not chosen.needs.gpus and not (models or nodes or standby):
                _show_host(config, chosen, catalog, as_json)
                return
            # As `hearth serve` would start it: with what the configuration changes in [models], and what
            # tenants own.
            changed, listed = asked(all_wishes(config, chosen, catalog))
            needs |= changed
            wants = [*listed, *wants]
            places = places or nodes_of(chosen)
            homes = _homes(config, places)
    except (CatalogError, NodesError, ConfigError, PlanError) as error:
        _fail(str(error))
    _check(wants, places, sleepers)
    wants = [
        replace(want, tier="standby") if want.model in sleepers and not want.owner else want for want in wants
    ]
    wants = [_changed(want, context, concurrency, kv_dtype, eplb) for want in wants]
    policy = Policy(utilisation=utilisation, objective=objective)
    found = make_plan(needs, wants, places, policy, homes)
    if as_json:
        print(json.dumps(document(found, utilisation, config.runtime_dir), indent=2))
    else:
        Console(highlight=False).print(chart(found, utilisation, config.runtime_dir), soft_wrap=True)
    raise typer.Exit(1 if found.refusals else 0)


def _show_host(config: Config, profile: Profile, catalog: Catalog, as_json: bool) -> None:
    devices = find_devices()
    plans, room = place(config, profile, catalog, devices), rooms(config, devices)[CPU]
    if as_json:
        print(json.dumps(hostplan.document(plans, room), indent=2))
    else:
        Console(highlight=False).print(hostplan.shown(plans, room), soft_wrap=True)


def _homes(config: Config, places: list[Node]) -> Homes:
    """Who owns which GPU; they are numbered through all nodes."""
    every = [(node, gpu) for node, each in enumerate(places) for gpu in range(each.gpus)]
    return {every[number]: owner for number, owner in gpu_owners(config, range(len(every))).items()}


def _wanted(catalog: Catalog, models: str, nodes: str, rdma: bool | None) -> tuple[list[Want], list[Node]]:
    wants: list[Want] = []
    places = parse_nodes(nodes, rdma=rdma) if nodes else []
    for part in (part.strip() for part in models.split(",") if part.strip()):
        name, _, count = part.partition(":")
        if count and not (count.isdigit() and int(count) > 0):
            _fail(f"'{part}': after the colon stands the number of replicas, at least 1.")
        wants.append(Want(catalog.find(name).id, replicas=int(count or 1)))
    return wants, places


def _check(wants: list[Want], places: list[Node], sleepers: set[str]) -> None:
    absent = sorted(sleepers - {want.model for want in wants})
    if absent:
        _fail(f"--standby names {', '.join(absent)}, which is not among the models. Add it to --models.")
    if not wants:
        _fail("Nothing to plan: name models (--models deepseek-r1,whisper-large-v3) or a --profile.")
    if not places:
        _fail("Nowhere to plan: name the GPUs (--nodes 1x8xH200), or a --profile that names its own.")


def _changed(
    want: Want,
    context: int | None,
    concurrency: int | None,
    kv_dtype: Literal["auto", "bf16", "fp8"] | None,
    eplb: bool | None,
) -> Want:
    return replace(
        want,
        context=want.context if context is None else context,
        concurrency=want.concurrency if concurrency is None else concurrency,
        kv_dtype=want.kv_dtype if kv_dtype is None else kv_dtype,
        eplb=want.eplb if eplb is None else eplb,
    )


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)
