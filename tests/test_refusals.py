"""Each error becomes the response that OpenAI's clients expect, and nothing internal is shown."""

import logging

import pytest

pytest.importorskip("starlette", reason="serving is an extra")
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from mm1.engine.infer.asynchronous import Dead
from mm1.engine.infer.grammar import SchemaError
from mm1.engine.serve.body import TooLarge
from mm1.engine.serve.fields import WrongField
from mm1.engine.serve.refusals import Refusal, exception_handlers, refusal_of
from mm1.errors import Busy, Unreadable, UserError


class Derived(Busy):
    """Is an error of a class that the table does not name, but whose base it does."""


EXPECTED = [
    (Refusal(418, "no"), 418, "invalid_request_error", None, None, "no", {}),
    (TooLarge("long"), 413, "invalid_request_error", None, None, "long", {"connection": "close"}),
    (SchemaError("deep"), 400, "invalid_request_error", "invalid_json_schema", "response_format",
     "response_format: the schema cannot be followed: deep", {}),
    (WrongField("top_k", "is x"), 400, "invalid_request_error", None, "top_k", "top_k is x", {}),
    (UserError("bad"), 400, "invalid_request_error", None, None, "bad", {}),
    (Unreadable("cut"), 400, "invalid_request_error", None, None, "cut", {}),
    (Busy("full"), 429, "rate_limit_error", "rate_limit_exceeded", None, "full", {"retry-after": "1"}),
    (Derived("full"), 429, "rate_limit_error", "rate_limit_exceeded", None, "full", {"retry-after": "1"}),
    (ClientDisconnect(), 499, "invalid_request_error", None, None, "the client left", {}),
    (HTTPException(405, "no POST", {"allow": "GET"}), 405, "invalid_request_error", None, None, "no POST",
     {"allow": "GET"}),
]  # fmt: skip


@pytest.mark.parametrize(
    ("error", "status", "kind", "code", "param", "message", "headers"), EXPECTED, ids=lambda x: type(x).__name__
)
def test_an_expected_error_has_its_response(error, status, kind, code, param, message, headers):
    refusal = refusal_of(error)
    assert (refusal.status, refusal.headers) == (status, headers)
    assert refusal.body == {"error": {"message": message, "type": kind, "param": param, "code": code}}
    assert any(issubclass(type(error), handled) for handled in exception_handlers() if handled is not Exception)


@pytest.mark.parametrize(("error", "status"), [(Dead("CUDA error"), 503), (KeyError("secret"), 500)])
def test_an_error_of_the_server_is_told_by_the_log_alone(error, status, caplog):
    with caplog.at_level(logging.ERROR):
        refusal = refusal_of(error)
    assert (refusal.status, refusal.body["error"]["type"]) == (status, "server_error")
    assert "secret" not in str(refusal)
    assert "CUDA" not in str(refusal)
    [record] = caplog.records
    assert record.exc_info[1] is error
    assert str(refusal).split()[-1] in record.getMessage()
