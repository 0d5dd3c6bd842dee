"""`hearth models`: list the catalog, show one model whole, pull its weights."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_args

import typer
from pydantic import ByteSize, TypeAdapter, ValidationError
from rich.console import Console
from rich.table import Table
from rich.text import Text

from engine.cli.tables import size
from engine.config import Config, ConfigError, load
from engine.errors import nearest
from engine.runners.spec import Category
from models.catalog import Catalog, CatalogError, load_catalog
from models.entry import HubSource, ModelEntry
from models.facts import LEAST_CONTEXT, USABLE_SHARE

app = typer.Typer(help="The catalog: list, show and pull models.", pretty_exceptions_enable=False)

ConfigFile = Annotated[
    Path | None,
    typer.Option("--config", "-c", envvar="HEARTH_CONFIG", help="Configuration file; default: hearth.toml."),
]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Folder for keys, state, logs, weights.")]
AsJson = Annotated[bool, typer.Option("--json", help="Every field of each model, as JSON.")]

_HUB = "https://huggingface.co"
_LEGEND = (
    "needs = weights, {tokens} tokens of KV cache and a reserve for activations: the smallest replica. "
    "--fits compares it with {share:.0%} of one GPU. * = gated: the hub asks to accept the licence first; "
    "? = perhaps. `hearth models show NAME` tells all."
)


@app.callback(invoke_without_command=True)
def list_models(
    context: typer.Context,
    category: Annotated[
        list[str] | None, typer.Option(help=f"Only these: {', '.join(get_args(Category))}. Repeatable.")
    ] = None,
    fits: Annotated[
        str | None,
        typer.Option(
            help="Only models whose smallest replica one GPU of this size holds, for instance 80GiB."
        ),
    ] = None,
    capability: Annotated[
        list[str] | None, typer.Option(help="Only models that can do all of these, for instance tools, fim.")
    ] = None,
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """List the models of the catalog."""
    if context.invoked_subcommand is not None:
        return
    settings, entries = _configuration(config, state_dir), list(_catalog().entries.values())
    for name in category or []:
        _check("category", name, get_args(Category))
    for name in capability or []:
        _check("capability", name, {each for entry in entries for each in entry.capabilities})
    gpu = _bytes(fits) if fits is not None else None
    chosen = [
        entry
        for entry in entries
        if (not category or entry.category in category)
        and set(capability or ()) <= set(entry.capabilities)
        and (gpu is None or entry.fits(gpu))
    ]
    chosen.sort(
        key=lambda entry: (get_args(Category).index(entry.category), entry.least_bytes or 0, entry.id)
    )
    if as_json:
        print(json.dumps([_record(entry, settings.weights_dir) for entry in chosen], indent=2))
        return
    # A pipe has no width: nothing is cut there.
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(_table(chosen, settings.weights_dir))
    console.print(
        f"\n{len(chosen)} of {len(entries)} models. "
        + _LEGEND.format(tokens=LEAST_CONTEXT, share=USABLE_SHARE),
        style="dim",
        highlight=False,
        markup=False,
    )


@app.command()
def show(
    name: Annotated[str, typer.Argument(help="A model's id or alias.")],
    config: ConfigFile = None,
    state_dir: StateDir = None,
    as_json: AsJson = False,
) -> None:
    """Show one model whole: figures, sources, what is unverified."""
    settings, entry = _configuration(config, state_dir), _find(name)
    if as_json:
        print(json.dumps(_record(entry, settings.weights_dir), indent=2))
    else:
        Console().print(_sheet(entry, settings.weights_dir))


@app.command()
def pull(
    names: Annotated[list[str], typer.Argument(help="Ids or aliases.")],
    config: ConfigFile = None,
    state_dir: StateDir = None,
) -> None:
    """Download, check and convert models' weights; one that was cut short keeps its whole files."""
    settings, entries = _configuration(config, state_dir), [_find(name) for name in names]
    # Imported here: listing must not wait for the download libraries.
    from models.prepare_profile import prepare_entries

    if settings.weights.offline:
        _fail("weights.offline = true forbids downloads; set it to false in the configuration to pull.")
    missing = [entry for entry in entries if _folder(entry, settings.weights_dir) is None]
    closed = [entry for entry in missing if _lacks_access(entry, settings)]
    for entry in closed:
        Console(stderr=True).print(_how_to_get(entry), style="red", markup=False, soft_wrap=True)
    missing = [entry for entry in missing if entry not in closed]
    _check_disk(missing, settings.weights_dir)
    try:
        status = prepare_entries(missing, settings.weights_dir, False, settings.weights.hub_endpoint)
    except KeyboardInterrupt:
        _fail(
            "Stopped. Files that have arrived whole are kept: the same command goes on from there.",
            status=130,
        )
    for entry in entries:
        folder = _folder(entry, settings.weights_dir)
        if folder is not None:
            print(f"{entry.id}: {folder}")
    raise typer.Exit(1 if closed else status)


def _lacks_access(entry: ModelEntry, settings: Config) -> bool:
    """Whether its first download is gated and no token is here. A mirror has rules of its own."""
    repo = _hub_repo(entry)
    if entry.gated is not True or repo is None:
        return False
    if settings.weights.hub_endpoint or os.environ.get("HF_ENDPOINT"):
        return False
    from huggingface_hub import get_token

    return get_token() is None


def _how_to_get(entry: ModelEntry) -> str:
    page = f"{_HUB}/{_hub_repo(entry)}"
    return (
        f"{entry.id} is gated (licence {entry.licence or 'unknown'}) and there is no token here.\n"
        f"  1. Accept its licence, signed in, at {page}\n"
        f"  2. Make a token that may read at {_HUB}/settings/tokens\n"
        f"  3. HF_TOKEN=hf_… hearth models pull {entry.id}"
    )


def _hub_repo(entry: ModelEntry) -> str | None:
    return next((source.repo for source in entry.sources if isinstance(source, HubSource)), None)


def _check_disk(entries: Iterable[ModelEntry], weights_dir: Path) -> None:
    needed = sum(entry.weights_bytes or 0 for entry in entries)
    place = next(path for path in (weights_dir, *weights_dir.parents) if path.exists())
    free = shutil.disk_usage(place).free
    if needed > free:
        _fail(
            f"The weights take at least {size(needed)}; the disk of {place} has {size(free)} free. "
            "Free some, or set weights.dir to a folder on a larger disk."
        )


def _folder(entry: ModelEntry, weights_dir: Path) -> Path | None:
    """Where the model's prepared weights lie; None when they have to be fetched."""
    from models.prepare import PrepareError, prepare

    try:
        return prepare(entry, weights_dir, True, lambda progress: None)
    except PrepareError:
        return None


def _record(entry: ModelEntry, weights_dir: Path) -> dict[str, Any]:
    more = {"least_bytes": entry.least_bytes, "prepared": _folder(entry, weights_dir) is not None}
    return entry.model_dump(mode="json") | more


def _table(entries: Iterable[ModelEntry], weights_dir: Path) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    table.add_column("model", no_wrap=True)
    table.add_column("category", no_wrap=True)
    for name in ("size", "context", "needs"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("here", no_wrap=True)
    # The only one that may get narrower.
    table.add_column("licence", overflow="ellipsis")
    for entry in entries:
        mark = {True: "*", "unknown": "?", False: ""}[entry.gated]
        table.add_row(
            entry.id,
            entry.category,
            _count(entry.parameters),
            _tokens(entry.context_length),
            size(entry.least_bytes) or "?",
            "yes" if _folder(entry, weights_dir) else "",
            mark + (entry.licence or "not known"),
        )
    return table


def _sheet(entry: ModelEntry, weights_dir: Path) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(entry, weights_dir):
        if text:
            # Text, not str: brackets of a template are no markup.
            table.add_row(name, Text(text))
    return table


def _lines(entry: ModelEntry, weights_dir: Path) -> Iterable[tuple[str, str]]:
    folder, kv, experts = _folder(entry, weights_dir), entry.kv, entry.experts
    gate = {True: ", gated", "unknown": ", perhaps gated", False: ""}[entry.gated]
    yield "model", f"{entry.id} ({entry.title})" if entry.title else entry.id
    yield "aliases", ", ".join(entry.aliases)
    yield "category", f"{entry.category}, served by {entry.engine}"
    yield "licence", (entry.licence or "unknown") + gate
    yield "capabilities", ", ".join(entry.capabilities)
    yield "architecture", entry.architecture
    yield "parameters", _parameters(entry)
    yield "experts", f"{experts.count} a layer, {experts.per_token} for each token" if experts else ""
    yield "context", f"{entry.context_length} tokens" if entry.context_length else ""
    yield "format", entry.dtype
    yield "weights", size(entry.weights_bytes) or "unknown"
    yield "KV cache", f"{kv.bytes_per_token} bytes a token at 16 bits" if kv else ""
    yield (
        "",
        "of " + json.dumps(kv.model_dump(exclude_defaults=True, exclude={"bytes_per_token"})) if kv else "",
    )
    yield "needs", f"{size(entry.least_bytes)} at least, {size(entry.memory_bytes)} for its whole context"
    yield "parsers", ", ".join(filter(None, (entry.tool_parser, entry.reasoning_parser)))
    yield "fill in", entry.fim.template if entry.fim else ""
    yield "options", json.dumps(entry.options) if entry.options else ""
    yield "notes", entry.notes
    for source in entry.sources:
        yield "source", json.dumps(source.model_dump(exclude_defaults=True), ensure_ascii=False)
    yield "here", str(folder) if folder else f"no; `hearth models pull {entry.id}` fetches it"
    yield "figures", entry.facts
    yield "unverified", ", ".join(entry.unverified)


def _parameters(entry: ModelEntry) -> str:
    active = f" ({_count(entry.active_parameters)} active)" if entry.active_parameters else ""
    return _count(entry.parameters) + active if entry.parameters else ""


def _count(number: int | None) -> str:
    if not number:
        return ""
    for unit, scale in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if number >= scale:
            return f"{number / scale:.0f}{unit}" if number >= 100 * scale else f"{number / scale:.3g}{unit}"
    return str(number)


def _tokens(number: int | None) -> str:
    if not number:
        return ""
    if number >= 2**20:
        return f"{number / 2**20:.3g}M"
    return f"{number / 1024:.0f}K" if number >= 1024 else str(number)


def _bytes(text: str) -> int:
    try:
        return int(TypeAdapter(ByteSize).validate_python(text))
    except ValidationError:
        _fail(f"'{text}' is no size. Write a number with a unit, for instance 80GiB or 24GB.")


def _check(kind: str, name: str, known: Iterable[str]) -> None:
    names = sorted(known)
    if name not in names:
        close = nearest(name, names)
        hint = f"Did you mean {' or '.join(close)}?" if close else f"There are: {', '.join(names)}."
        _fail(f"There is no {kind} '{name}'. {hint}")


def _find(name: str) -> ModelEntry:
    try:
        return _catalog().find(name)
    except CatalogError as error:
        _fail(str(error))


def _catalog() -> Catalog:
    try:
        return load_catalog()
    except CatalogError as error:
        _fail(str(error))


def _configuration(file: Path | None, state_dir: Path | None) -> Config:
    try:
        return load(file, state_dir=state_dir)
    except ConfigError as error:
        _fail(str(error))


def _fail(message: str, status: int = 1) -> NoReturn:
    Console(stderr=True).print(message, style="red", highlight=False, markup=False, soft_wrap=True)
    raise typer.Exit(status)
