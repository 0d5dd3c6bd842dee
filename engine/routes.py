"""The route table: what the scheduler publishes and the gateways read. Pure data.

Served by the scheduler on its control socket (``GET /routes?after=VERSION&wait=SECONDS`` is a watch) and
mirrored to ``<state_dir>/routes.json``, so that a gateway that starts while the scheduler is away still knows
its way.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from engine.runners.spec import Category

ReplicaState = Literal[
    "planned",
    "preparing",
    "starting",
    "warming",
    "ready",
    "asleep",
    "waking",
    "draining",
    "stopped",
    "failed",
    "backoff",
]


class Replica(BaseModel):
    """One warm place where requests may go."""

    model_config = ConfigDict(extra="ignore")
    id: str
    socket: str | None = Field(
        default=None, description="Unix socket path; exactly one of socket and url is set."
    )
    url: str | None = Field(default=None, description="http://host:port of a runner on another machine.")
    owner: str | None = Field(
        default=None, description="The tenant whose keys alone go there, by name or id; None = shared."
    )


class DedicatedRoute(BaseModel):
    """One tenant's own replicas of a model, which stand among the route's `replicas` once they are ready."""

    model_config = ConfigDict(extra="ignore")
    owner: str = Field(description="The tenant, by name or id.")
    spill_over: bool = Field(
        default=False, description="Whether its requests go to shared replicas when its own cannot take them."
    )
    state: ReplicaState = "planned"
    reason: str = Field(default="", description="Why none of them is ready, for a person.")
    eta_s: float | None = Field(
        default=None, description="Roughly how long until one is ready, seconds, as of the route's `at`."
    )


class ExpertBalance(BaseModel):
    """How evenly a mixture of experts is loaded: mean over largest load, 1 = evenly."""

    model_config = ConfigDict(extra="ignore")
    over: Literal["ranks", "experts"] = Field(
        description="What is compared: ranks, where several hold experts."
    )
    overall: float = Field(description="The layers' mean loads together over their largest together.")
    worst: float | None = Field(default=None, description="The least even layer's; None = not told.")
    worst_layer: int | None = None


class ModelRoute(BaseModel):
    """What a gateway needs to know of one served model."""

    model_config = ConfigDict(extra="ignore")
    id: str
    aliases: list[str] = []
    category: Category
    owned_by: str = "hearth"
    created: int = 0
    context_length: int | None = None
    capabilities: list[str] = []
    fim_template: str | None = None
    fim_stop: list[str] = []
    max_in_flight: int | None = Field(
        default=None,
        description="Most requests of one gateway worker at a replica at once; None = it bounds itself.",
    )
    max_batch: int | None = Field(
        default=None, description="Requests that one replica works on together; None = not known."
    )
    tier: Literal["resident", "standby"] = "resident"
    wake_wait_s: float | None = Field(
        default=None,
        description="Longest a request may wait for the model to wake, seconds; None = it is not to wait.",
    )
    most_waiting: int = Field(
        default=256, description="Most requests of one gateway worker that wait for it."
    )
    state: ReplicaState = "planned"
    reason: str = Field(default="", description="Why it is not ready, for a person.")
    eta_s: float | None = Field(
        default=None, description="Roughly how long until ready, seconds, as of `at`."
    )
    at: float = Field(default=0.0, description="Unix time of this row.")
    shared: bool = Field(default=True, description="False: only the tenants of `dedicated` are served.")
    dedicated: list[DedicatedRoute] = Field(
        default_factory=list, description="Tenants that own replicas of it; `state` is the shared ones'."
    )
    owner: str | None = Field(
        default=None,
        description="Whose replicas `state`, `reason` and `eta_s` tell of; None = the shared ones. Set in a "
        "gateway's view for a tenant, never in the table.",
    )
    replicas: list[Replica] = Field(default_factory=list, description="Ready replicas only.")
    expert_balance: ExpertBalance | None = Field(
        default=None, description="Of the least even replica, now and then; None = no experts, or not known."
    )


class RouteTable(BaseModel):
    """All served models, and a version that grows with every change."""

    model_config = ConfigDict(extra="ignore")
    version: int = 0
    models: list[ModelRoute] = []
