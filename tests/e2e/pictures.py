"""Small pictures for the tests, drawn with Pillow."""

from __future__ import annotations

import base64
import io

from PIL import Image, ImageDraw


def png(picture: Image.Image) -> bytes:
    out = io.BytesIO()
    picture.save(out, "PNG")
    return out.getvalue()


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def red_square() -> bytes:
    picture = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(picture).rectangle([70, 70, 186, 186], fill="red")
    return png(picture)


def blue_circles(count: int) -> bytes:
    picture = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(picture)
    for x, y in [(70, 70), (186, 70), (70, 186), (186, 186)][:count]:
        pen.ellipse([x - 40, y - 40, x + 40, y + 40], fill="blue")
    return png(picture)
