"""Names of replicas: the shared ones of a model, and those that a tenant owns."""

from __future__ import annotations

import hashlib
import re

_PLAIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,39}")
_OTHER = re.compile(r"[^A-Za-z0-9]+")


def family(model: str, owner: str | None) -> str:
    """What the replicas of a model that belong together are named by: 'model', or 'model@owner'.

    They are numbered behind it ('model@owner-0'); no two owners share a name, and each may be part of a
    file's name.
    """
    if not owner:
        return model
    if _PLAIN.fullmatch(owner):
        return f"{model}@{owner}"
    # '~' is in no plain name, so that what is written otherwise never becomes another's name.
    short = _OTHER.sub("-", owner).strip("-")[:32]
    return f"{model}@{short}~{hashlib.sha256(owner.encode()).hexdigest()[:8]}"
