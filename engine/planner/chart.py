"""A plan for a terminal: a bar for each GPU, then each model, then what has no place."""

from __future__ import annotations

import string
from collections.abc import Iterator
from pathlib import Path

from rich.console import Group, RenderableType
from rich.text import Text

from engine.planner.launch import launch_lines
from engine.planner.memory import GIB, capacity
from engine.planner.outcome import Placement, Plan

_WIDTH = 44
_KEPT, _WAKING = "▒", "░"
_LETTERS = string.ascii_uppercase + string.ascii_lowercase + string.digits
_COLOURS = ("cyan", "magenta", "green", "yellow", "blue", "red", "bright_cyan", "bright_magenta")


def chart(plan: Plan, utilisation: float, runtime_dir: Path) -> RenderableType:
    """The whole plan."""
    letters = {p.id: _LETTERS[i % len(_LETTERS)] for i, p in enumerate(plan.placements)}
    parts: list[RenderableType] = [_bars(plan, utilisation, letters)]
    if any(placement.sleep for placement in plan.placements):
        parts.append(_asleep(plan, letters))
    for placement in plan.placements:
        parts.append(_model(placement, letters[placement.id], runtime_dir))
    if plan.refusals:
        parts.append(Text("\nDoes not fit", style="bold red"))
        parts += [
            Text(f"  {r.id}: {r.reason}.") + Text(f"\n    → {r.change}" if r.change else "", style="yellow")
            for r in plan.refusals
        ]
    return Group(*parts)


def _bars(plan: Plan, utilisation: float, letters: dict[str, str]) -> Text:
    standing: dict[tuple[str, int], list[Placement]] = {}
    for placement in plan.placements:
        for node, gpus in placement.places:
            for gpu in gpus:
                standing.setdefault((node.name, gpu), []).append(placement)
    text = Text()
    empty = 0
    for number, (node, free) in enumerate(zip(plan.nodes, plan.free, strict=True)):
        if not any((node.name, gpu) in standing or (number, gpu) in plan.homes for gpu in range(node.gpus)):
            empty += 1
            continue
        room = capacity(node.kind, utilisation)
        for gpu in range(node.gpus):
            here = standing.get((node.name, gpu), [])
            text.append(f"{f'{node.name} gpu{gpu}':<9} {node.kind.name} ")
            text.append(_bar(here, node.kind.memory_bytes, room, letters))
            text.append(f" {(room - free[gpu]) / GIB:6.1f} of {room / GIB:.1f} GiB")
            if owner := plan.homes.get((number, gpu)):
                text.append(f", {owner}'s alone")
            turns = " ".join(letters[each.id] for each in here if each.sleep)
            text.append(f", in turn: {turns}\n" if turns else "\n")
    if empty:
        text.append(
            f"{empty} more node{'s' if empty > 1 else ''} with nothing on {'them' if empty > 1 else 'it'}\n"
        )
    text.rstrip()
    return text


def _bar(here: list[Placement], memory: int, room: int, letters: dict[str, str]) -> Text:
    """Letters for residents; of standby replicas what all keep asleep, lightly hatched what one takes awake.

    Dots are free room, a blank is what nobody may take.
    """
    bar = Text("[")
    done = taken = 0
    for placement in here:
        if placement.sleep:
            continue
        taken += placement.footprint.total
        # Whatever stands there shows, however small it is.
        cells = max(1, round(taken / memory * _WIDTH) - done)
        letter = letters[placement.id]
        bar.append(letter * cells, style=_COLOURS[_LETTERS.index(letter) % len(_COLOURS)])
        done += cells
    asleep = [(p.sleep.kept, p.footprint.total - p.sleep.kept) for p in here if p.sleep]
    shares = (_KEPT, sum(kept for kept, _ in asleep)), (_WAKING, max((more for _, more in asleep), default=0))
    for hatch, size in shares if asleep else ():
        taken += size
        cells = max(1, round(taken / memory * _WIDTH) - done)
        bar.append(hatch * cells)
        done += cells
    usable = round(room / memory * _WIDTH)
    bar.append("." * max(0, usable - done), style="dim")
    bar.append(" " * (_WIDTH - max(usable, done)) + "]")
    return bar


def _asleep(plan: Plan, letters: dict[str, str]) -> Text:
    """Standby replicas: what each takes of its GPUs awake and asleep, and of the host."""
    text = Text(f"\nasleep: {_KEPT} kept by all, {_WAKING} taken by the one that is awake", style="bold")
    standby = [(p, p.sleep) for p in plan.placements if p.sleep]
    width = max(len(p.id) for p, _ in standby)
    for placement, sleep in standby:
        where = ", ".join(f"{node.name}:{_span(gpus)}" for node, gpus in placement.places)
        line = (
            f"\n{letters[placement.id]} {placement.id:<{width}}  {where:<12} "
            f"awake {placement.footprint.total / GIB:6.1f} GiB, asleep {sleep.kept / GIB:4.1f}"
            f"{' of each' if placement.gpus > 1 else ''}, host {sleep.host * placement.gpus / GIB:.1f}"
        )
        text.append(line, style="not bold")
    for node, free in zip(plan.nodes, plan.host_free, strict=True):
        if free < node.host_bytes:
            taken = (node.host_bytes - free) / GIB
            text.append(
                f"\nhost of {node.name}: {taken:.1f} of {node.host_bytes / GIB:.1f} GiB", style="not bold"
            )
    return text


def _model(placement: Placement, letter: str, runtime_dir: Path) -> Text:
    foot = placement.footprint
    where = ", ".join(f"{node.name}:{_span(gpus)}" for node, gpus in placement.places)
    text = Text()
    text.append(f"\n{letter} ", style=_COLOURS[_LETTERS.index(letter) % len(_COLOURS)])
    text.append(placement.id, style="bold")
    each = " of each" if placement.layout.gpus > 1 else ""
    text.append(f"  {placement.layout.name()} on {where}, {foot.total / GIB:.1f} GiB{each}")
    if placement.sleep:
        text.append(f" awake, {placement.sleep.kept / GIB:.1f} asleep")
    if foot.token_bytes:
        text.append(f"; {foot.kv_tokens} tokens of KV cache, context {placement.context}")
    text.append("\n    " + "; ".join(placement.why))
    for term in foot.terms:
        text.append(f"\n    {term.bytes / GIB:8.2f} GiB  {term.name}: {term.how}", style="dim")
    for line in _lines(placement, runtime_dir):
        text.append(f"\n    {line}")
    return text


def _lines(placement: Placement, runtime_dir: Path) -> Iterator[str]:
    lines = launch_lines(placement, runtime_dir)
    for line in lines:
        yield f"{f'on {line.node}: ' if len(lines) > 1 else ''}{line.text}"


def _span(gpus: tuple[int, ...]) -> str:
    if len(gpus) > 1 and gpus == tuple(range(gpus[0], gpus[-1] + 1)):
        return f"gpu{gpus[0]}-{gpus[-1]}"
    return ",".join(f"gpu{gpu}" for gpu in gpus)
