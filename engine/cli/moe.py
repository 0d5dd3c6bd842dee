"""`hearth moe balance`: how evenly experts are loaded, and where EPLB would put them."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import typer
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from engine.balance import balancedness, on_ranks, overall
from engine.cli import control
from engine.config import Config, ConfigError, load
from engine.errors import nearest
from engine.runners import expert_load
from engine.scheduler.eplb import ExpertPlacement, LoadsError, Policy, rebalance, standing
from engine.scheduler.plan import socket_path

app = typer.Typer(help="Mixtures of experts.", no_args_is_help=True)


@app.callback()
def moe() -> None:
    """Mixtures of experts: how evenly their experts are loaded."""


@app.command()
def balance(
    file: Annotated[
        Path | None,
        typer.Argument(
            help="JSON: [layers][experts] of tokens, or an object with 'loads' and, if it is there already, "
            "'placement' ([layers][slots] of experts)."
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="A model that this Hearth serves, as measured.")] = "",
    gpus: Annotated[int, typer.Option(min=1, help="Expert-parallel ranks to place for.")] = 8,
    nodes: Annotated[int, typer.Option(min=1, help="Machines that they stand in.")] = 1,
    groups: Annotated[int, typer.Option(min=1, help="Expert groups of the model's router (n_group).")] = 1,
    redundant: Annotated[int, typer.Option(min=0, help="Slots beyond one an expert.")] = 0,
    policy: Annotated[Policy, typer.Option(help="auto: hierarchical where groups fit nodes.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="With the whole placement.")] = False,
    config: Annotated[Path | None, typer.Option("--config", "-c", envvar="HEARTH_CONFIG")] = None,
    state_dir: Annotated[Path | None, typer.Option("--state-dir")] = None,
) -> None:
    """Print the expected balance (mean over largest load) now, in linear order, and rebalanced by EPLB."""
    if (file is None) == (not model):
        _fail("Name either a JSON file with loads, or a served model: --model ID.")
    try:
        if file is not None:
            loads, placement = _read(file)
        else:
            loads, placement = _measured(load(config, state_dir=state_dir), model), None
        now = None if placement is None else standing(loads, placement, gpus=gpus)
        best = rebalance(loads, gpus=gpus, nodes=nodes, groups=groups, redundant=redundant, policy=policy)
    except (LoadsError, ConfigError, control.NotRunningError) as error:
        _fail(str(error))
    rows = _figures(best, now)
    if as_json:
        print(json.dumps(_document(best, rows, nodes=nodes, groups=groups, redundant=redundant)))
    else:
        _show(best, rows, nodes=nodes, redundant=redundant)


def _read(file: Path) -> tuple[Any, Any]:
    try:
        found = json.loads(file.read_bytes())
    except OSError as error:
        raise LoadsError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise LoadsError(f"{file} is no JSON: {error}") from None
    if not isinstance(found, dict):
        return found, None
    if "loads" not in found:
        raise LoadsError(f"{file} is an object without 'loads' ([layers][experts] of tokens)")
    return found["loads"], found.get("placement")


def _measured(config: Config, model: str) -> NDArray[np.int64]:
    status = asyncio.run(control.status(config))
    # Of an owned replica only where there is no shared one.
    served = {one.id: one for one in sorted(status.models, key=lambda one: one.owner is None)}
    if model not in served:
        close = nearest(model, served)
        raise LoadsError(
            f"'{model}' is not served here. "
            + (
                f"Did you mean {' or '.join(close)}?"
                if close
                else f"Served: {', '.join(served) or 'nothing'}."
            )
        )
    found = []
    for replica in served[model].replicas:
        path = expert_load.path_of(socket_path(config.runtime_dir, replica.id))
        if (counts := expert_load.read_counts(path)) is not None:
            found.append(counts)
    if not found:
        raise LoadsError(
            f"'{model}' has counted no tokens per expert. Only mixtures of experts do, on a CPU, once they "
            "had requests; on GPUs vLLM tells no more than the balance in `hearth status`. Bring loads as a "
            "JSON file."
        )
    return np.asarray(np.sum(found, axis=0), dtype=np.int64)


def _figures(best: ExpertPlacement, now: ExpertPlacement | None) -> dict[str, dict[str, Any]]:
    """Of each placement, by name; "linear" is without copies, as it is served without EPLB."""
    shares = {"linear": on_ranks(best.loads, best.gpus), "rebalanced": best.gpu_loads}
    if now is not None:
        shares = {"now": now.gpu_loads, **shares}
    return {name: _figure(loads) for name, loads in shares.items()}


def _figure(loads: NDArray[Any]) -> dict[str, Any]:
    layers = balancedness(loads)
    total = overall(loads)
    return {
        "overall": None if total is None else round(total, 4),
        "mean": round(float(layers.mean()), 4),
        "worst": round(float(layers.min()), 4),
        "worst_layer": int(layers.argmin()),
        "layers": [round(float(value), 4) for value in layers],
    }


def _document(best: ExpertPlacement, rows: dict[str, Any], **shape: int) -> dict[str, Any]:
    layers, experts = best.loads.shape
    return {
        "layers": layers,
        "experts": experts,
        "gpus": best.gpus,
        **shape,
        "policy": best.policy,
        "balance": rows,
        "loads": best.loads.tolist(),
        "placement": best.physical_to_logical.tolist(),
        "copies": best.copies.tolist(),
    }


def _show(best: ExpertPlacement, rows: dict[str, Any], *, nodes: int, redundant: int) -> None:
    layers, experts = best.loads.shape
    print(
        f"{layers} layers of {experts} experts on {best.gpus} GPUs in {nodes} node{'s' if nodes > 1 else ''},"
        f" {redundant} redundant, {best.policy}"
    )
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("balance", "all layers", "mean layer", "worst layer"):
        table.add_column(name, justify="left" if name == "balance" else "right")
    for name, row in rows.items():
        whole = "no load" if row["overall"] is None else f"{row['overall']:.3f}"
        worst = f"{row['worst']:.3f} (layer {row['worst_layer']})"
        table.add_row(name, whole, f"{row['mean']:.3f}", worst)
    Console(highlight=False).print(table)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(1)
