"""The endpoints that are forwarded to runners, and which category of model each serves. Pure data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from engine.errors import bad_request
from engine.routes import ModelRoute
from engine.runners.spec import Category

BodyKind = Literal["json", "multipart", "either"]


@dataclass(frozen=True)
class Endpoint:
    """One forwarded path.

    `serves` names the categories; its value is a capability that the model must have too, or None.
    """

    path: str
    body: BodyKind
    serves: Mapping[Category, str | None]


ENDPOINTS: dict[str, Endpoint] = {
    endpoint.path: endpoint
    for endpoint in (
        Endpoint(
            "/v1/chat/completions",
            "json",
            {"chat": None, "code": "chat", "vision": None, "detection": None},
        ),
        Endpoint("/v1/completions", "json", {"chat": None, "code": None, "vision": "completions"}),
        Endpoint("/v1/embeddings", "json", {"embedding": None}),
        Endpoint("/v1/images/generations", "json", {"image": None}),
        Endpoint("/v1/audio/transcriptions", "multipart", {"audio": None}),
        Endpoint("/v1/audio/translations", "multipart", {"audio": None}),
        Endpoint("/v1/detections", "either", {"detection": None}),
        Endpoint("/v1/detection", "either", {"detection": None}),
    )
}

#: Where a model of each category is at home: the endpoint that an error points to.
HOME: dict[Category, str] = {
    "chat": "/v1/chat/completions",
    "code": "/v1/completions",
    "vision": "/v1/chat/completions",
    "image": "/v1/images/generations",
    "audio": "/v1/audio/transcriptions",
    "embedding": "/v1/embeddings",
    "detection": "/v1/detections",
}


def check_category(endpoint: Endpoint, route: ModelRoute) -> None:
    """Refuses a model whose category the endpoint does not serve.

    Raises:
        ApiError: 400 `wrong_category`, naming the endpoint that serves the model.
    """
    if route.category in endpoint.serves:
        needed = endpoint.serves[route.category]
        if needed is None or needed in route.capabilities:
            return
        reason = f"has no '{needed}' capability, which {endpoint.path} needs of a {route.category} model"
    else:
        served = ", ".join(endpoint.serves)
        reason = f"is a model of category '{route.category}'; {endpoint.path} serves {served}"
    raise bad_request(
        f"'{route.id}' {reason}. Send it to POST {HOME[route.category]}.",
        param="model",
        code="wrong_category",
    )
