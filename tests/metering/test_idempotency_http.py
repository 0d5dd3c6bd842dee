"""The Idempotency-Key as clients send it."""

from __future__ import annotations

import pytest

from engine.errors import ApiError
from engine.metering.idempotency import InProgress, Mismatch
from engine.metering.idempotency_http import check_idempotency_key, hash_request, refusal

FORM = b'--%b\r\ncontent-disposition: form-data; name="file"\r\n\r\n%b\r\n--%b--\r\n'


@pytest.mark.parametrize("value", [b"a", b"~" * 255, b"8e03978e-40d5-43e8-bc93-6894a57f9324", b"two words"])
def test_a_sane_key_is_taken_as_it_is(value: bytes) -> None:
    assert check_idempotency_key(value) == value.decode()


@pytest.mark.parametrize("value", [b"", b"a" * 256, b"caf\xc3\xa9", b"a\tb", b"a\x00", b"a\x7f", b"a\n"])
def test_any_other_is_refused(value: bytes) -> None:
    with pytest.raises(ApiError) as caught:
        check_idempotency_key(value)
    assert (caught.value.status, caught.value.code) == (400, "invalid_idempotency_key")


async def test_path_and_body_make_a_request() -> None:
    digests = {
        await hash_request(path, b"application/json", body)
        for path in ("/v1/embeddings", "/v1/completions")
        for body in (b"", b"{}", b"{ }", bytes(300_000))
    }
    assert len(digests) == 8
    assert all(len(digest) == 64 for digest in digests)


@pytest.mark.parametrize("quoted", [False, True])
async def test_a_form_is_the_same_with_another_boundary(quoted: bool) -> None:
    async def digest(boundary: bytes, content: bytes) -> str:
        name = b'"%b"' % boundary if quoted else boundary
        content_type = b"multipart/form-data; boundary=" + name
        return await hash_request(
            "/v1/audio/transcriptions", content_type, FORM % (boundary, content, boundary)
        )

    assert await digest(b"abc", b"sound") == await digest(b"xyz", b"sound")
    assert await digest(b"abc", b"sound") != await digest(b"abc", b"noise")


@pytest.mark.parametrize(
    ("outcome", "status", "code"),
    [(InProgress(2.0), 409, "idempotency_key_in_use"), (Mismatch(), 422, "idempotency_key_reused")],
)
def test_refusals_say_what_to_do(outcome: InProgress | Mismatch, status: int, code: str) -> None:
    error = refusal(outcome)
    assert (error.status, error.code) == (status, code)
    assert ("retry-after" in error.headers) == (status == 409)
