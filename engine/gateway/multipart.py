"""multipart/form-data bodies: the small fields are found, the bytes stay as they came."""

from __future__ import annotations

from email.message import Message

from python_multipart import MultipartParser
from python_multipart.exceptions import FormParserError

from engine.errors import ApiError, bad_request
from engine.gateway.body import Head, missing_model

#: No field that routing reads is longer.
_MOST_FIELD_BYTES = 1024
_TRUE = {"true", "1", "on", "yes"}


def is_multipart(content_type: bytes | None) -> bool:
    return content_type is not None and content_type.lower().lstrip().startswith(b"multipart/form-data")


def multipart_head(body: bytes, content_type: bytes | None) -> Head:
    """`model` and `stream` of a form.

    The parser is handed the body as it stands and hands back places in it, so a file is never copied.

    Raises:
        ApiError: 415 for another content type, 400 for a malformed form or one without a model.
    """
    if not is_multipart(content_type) or content_type is None:
        said = content_type.decode("latin-1") if content_type else "nothing"
        raise ApiError(
            415,
            f"This endpoint takes a form with a file; the request's content type is {said}. "
            "Send multipart/form-data.",
            code="unsupported_media_type",
        )
    boundary = _boundary(content_type)
    fields = _Fields()
    try:
        parser = MultipartParser(
            boundary,
            {
                "on_part_begin": fields.begin,
                "on_header_field": fields.header_name,
                "on_header_value": fields.header_value,
                "on_header_end": fields.header_end,
                "on_headers_finished": fields.headers_finished,
                "on_part_data": fields.data,
                "on_end": fields.end,
            },
        )
        parser.write(body)
    except FormParserError as error:
        raise _malformed(str(error)) from None
    if not fields.ended:
        raise _malformed("the closing boundary is missing; the body may have been cut off")
    model = fields.values.get("model", b"").decode("utf-8", "replace").strip()
    if not model:
        raise missing_model()
    stream = fields.values.get("stream", b"").decode("utf-8", "replace").strip().lower()
    return Head(model, stream in _TRUE)


def _boundary(content_type: bytes) -> bytes:
    header = Message()
    header["content-type"] = content_type.decode("latin-1")
    boundary = header.get_param("boundary")
    if not isinstance(boundary, str) or not boundary:
        raise _malformed("the content type names no boundary")
    return boundary.encode("latin-1")


def _malformed(reason: str) -> ApiError:
    return bad_request(f"The form cannot be read: {reason}.", code="invalid_multipart")


class _Fields:
    """Collects the fields that routing reads from the parser's events."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.ended = False
        self._name = b""
        self._value = b""
        self._disposition = b""
        self._current: str | None = None

    def begin(self) -> None:
        self._disposition = b""
        self._current = None

    def header_name(self, data: bytes, start: int, end: int) -> None:
        self._name += data[start:end]

    def header_value(self, data: bytes, start: int, end: int) -> None:
        self._value += data[start:end]

    def header_end(self) -> None:
        if self._name.lower() == b"content-disposition":
            self._disposition = self._value
        self._name = self._value = b""

    def headers_finished(self) -> None:
        header = Message()
        header["content-disposition"] = self._disposition.decode("latin-1")
        name = header.get_param("name", header="content-disposition")
        is_file = header.get_param("filename", header="content-disposition") is not None
        if not is_file and name in ("model", "stream"):
            self._current = str(name)
            self.values[self._current] = b""

    def data(self, data: bytes, start: int, end: int) -> None:
        if self._current is None:
            return
        value = self.values[self._current] + data[start:end]
        if len(value) > _MOST_FIELD_BYTES:
            raise bad_request(
                f"The field '{self._current}' is longer than {_MOST_FIELD_BYTES} bytes.", param=self._current
            )
        self.values[self._current] = value

    def end(self) -> None:
        self.ended = True
