"""What stands in front of the routes: keys, and the size of a body."""

import hmac
from collections.abc import Callable, Sequence
from typing import Any

from starlette.responses import JSONResponse

from qlab.serving.replies import error_body

OPEN = ("/", "/health", "/ready", "/docs", "/openapi.json", "/metrics")  # need no key
DOCUMENTATION = "/docs/"  # nor does what the page at /docs loads
BODY = 2**25  # bytes


class Limits:
    """An ASGI application behind a door that asks for a key and measures the body.

    Args:
        app: the application.
        keys: any of them opens; without one, all is open.
    """

    def __init__(self, app: Any, keys: Sequence[str]):
        self.app, self.keys = app, [key.encode() for key in keys]

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Any) -> None:
        """Answer 401 or 413, or pass the request on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        is_open = scope["path"] in OPEN or scope["path"].startswith(DOCUMENTATION)
        if self.keys and not is_open and not self._opens(headers):
            said = error_body(
                "the key is missing or wrong", "invalid_request_error", "invalid_api_key"
            )
            await JSONResponse(said, 401)(scope, receive, send)
            return
        body = await _body(headers, receive)
        if body is None:
            said = error_body(f"the body has more than {BODY} bytes", "invalid_request_error")
            await JSONResponse(said, 413)(scope, receive, send)
            return
        await self.app(scope, _replayed(body, receive), send)

    def _opens(self, headers: dict[bytes, bytes]) -> bool:
        given = headers.get(b"authorization", b"").removeprefix(b"Bearer ").strip()
        return any([hmac.compare_digest(given, key) for key in self.keys])


async def _body(headers: dict[bytes, bytes], receive: Callable[[], Any]) -> bytes | None:
    """The whole body; None where it is too long."""
    said = headers.get(b"content-length", b"0")
    if said.isdigit() and int(said) > BODY:
        return None
    parts, size, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            break
        parts.append(message.get("body", b""))
        size, more = size + len(parts[-1]), message.get("more_body", False)
        if size > BODY:
            return None
    return b"".join(parts)


def _replayed(body: bytes, receive: Callable[[], Any]) -> Callable[[], Any]:
    """The body as one message; what comes behind it is the client's."""
    messages = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Any:
        return messages.pop() if messages else await receive()

    return again
