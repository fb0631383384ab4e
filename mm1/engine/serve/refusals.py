"""Turn errors into responses in OpenAI's form, by a table with the status of each error."""

import json
import logging
import secrets
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any

from mm1.engine.infer.asynchronous import Dead
from mm1.engine.infer.grammar import SchemaError
from mm1.engine.serve.body import TooLarge
from mm1.errors import Busy, Unreadable, UserError

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response


class Refusal(Exception):
    """Refuse a request with an HTTP status.

    message: one line for the client; code, param: OpenAI's error code and the wrong field; headers: those of the
    response, with "_" for "-".
    """

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None, **headers: str):
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}

    @property
    def body(self) -> dict[str, Any]:
        """Return the response's JSON object."""
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@cache
def _by_error() -> dict[type[Exception], Callable[[Any], Refusal]]:
    """Return a function for each expected error that makes its refusal; starlette is optional, so imported here."""
    from starlette.exceptions import HTTPException
    from starlette.requests import ClientDisconnect

    def wrong_schema(error: SchemaError) -> Refusal:
        message = f"response_format: the schema cannot be followed: {error}"
        return Refusal(400, message, "invalid_json_schema", "response_format")

    def wrong_input(error: UserError | Unreadable) -> Refusal:
        return Refusal(400, str(error), param=getattr(error, "param", None))

    return {
        Refusal: lambda error: error,
        TooLarge: lambda error: Refusal(413, str(error), connection="close"),
        SchemaError: wrong_schema,
        UserError: wrong_input,
        Unreadable: wrong_input,
        Busy: lambda error: Refusal(429, str(error), "rate_limit_exceeded", retry_after="1"),
        Dead: lambda error: _logged_refusal(503, "the engine has stopped", error, "engine_dead"),
        ClientDisconnect: lambda _: Refusal(499, "the client left"),
        HTTPException: lambda error: Refusal(error.status_code, error.detail, **(error.headers or {})),
    }


def refusal_of(error: Exception) -> Refusal:
    """Return the refusal of an expected error, and of any other error 500 without its message."""
    kind = next((kind for kind in type(error).__mro__ if kind in _by_error()), None)
    return _by_error()[kind](error) if kind else _logged_refusal(500, "internal error", error)


def exception_handlers() -> dict[Any, Any]:
    """Return Starlette's table of exception handlers."""
    return dict.fromkeys((Exception, *_by_error()), _respond)


async def _respond(_: "Request", error: Exception) -> "Response":
    refusal = refusal_of(error)
    return json_response(refusal.body, refusal.status, refusal.headers)


def _logged_refusal(status: int, summary: str, error: Exception, code: str | None = None) -> Refusal:
    """Return a refusal that does not quote the error, and log the error under the same number."""
    number = secrets.token_hex(6)
    logging.getLogger("mm1").error("request %s: %s", number, summary, exc_info=error)
    return Refusal(status, f"{summary}: see the server's log for request {number}", code)


def json_response(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> "Response":
    """Return a value as a response in JSON."""
    return response(json.dumps(content), status, "application/json", headers)


def response(content: str | bytes, status: int, media_type: str, headers: dict[str, str] | None = None) -> "Response":
    """Return Starlette's Response, imported here because it is optional."""
    from starlette.responses import Response

    return Response(content, status, headers, media_type)
