"""What a text model may be sent."""

from __future__ import annotations

from engine.errors import bad_request
from engine.gateway.images_body import Body, may_hold_pictures
from engine.routes import ModelRoute


def refuse_pictures(body: bytes, route: ModelRoute) -> None:
    """Refuses a chat with a picture for a model that reads text only: its engine would fetch it by itself.

    Raises:
        ApiError: 400 `unsupported_content`, its param the picture's place.
    """
    if not may_hold_pictures(body, "chat"):
        return
    places = Body(body, "chat").places
    if places:
        raise bad_request(
            f"'{route.id}' reads text only; the messages have an image. Use a model of category 'vision' "
            "(GET /v1/models lists them).",
            param=places[0].param,
            code="unsupported_content",
        )
