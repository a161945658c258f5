"""Requests that the server's own document describes, and requests that it rules out, made by
schemathesis: each is answered as the document says, and so is the next good one."""

import pytest
from hypothesis import HealthCheck, given, settings
from servers import PATIENCE, idle, post, served

import qlab

schemathesis = pytest.importorskip("schemathesis", reason="makes requests from the document")
OK = {"prompt": "word1", "max_tokens": 2, "temperature": 0}
ROUTES = {
    "POST": ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"],
    "GET": ["/v1/models", "/health", "/ready", "/metrics"],
}


@pytest.fixture(scope="module")
def server(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("documented") / "out"
    few = saved("llama", max_position_embeddings=32)
    qlab.quantize(few, qlab.rtn("int8-channel"), None, out)
    with served(out) as server:
        server.worker.pipe.tokenizer.chat_template = (
            "word1{% for m in messages %} word2{% endfor %}"
        )
        yield server


@pytest.fixture(scope="module")
def document(server):
    return schemathesis.openapi.from_url(f"{server.url}/openapi.json")


def checks():
    from schemathesis.checks import not_a_server_error
    from schemathesis.specs.openapi import checks

    return [
        not_a_server_error,
        checks.status_code_conformance,
        checks.content_type_conformance,
        checks.response_schema_conformance,
        checks.negative_data_rejection,
    ]


def test_every_route_is_in_the_document(document):
    routes = {(o.ok().method.upper(), o.ok().path) for o in document.get_all_operations()}
    assert routes == {(method, path) for method, paths in ROUTES.items() for path in paths}


@pytest.mark.parametrize("mode", schemathesis.GenerationMode)
@pytest.mark.parametrize("path", ROUTES["POST"])
def test_what_is_posted_is_answered_as_the_document_says(server, document, path, mode):
    codes: list[int] = []
    bounds = settings(
        max_examples=15,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[*HealthCheck],
    )

    @bounds
    @given(case=document[path]["POST"].as_strategy(generation_mode=mode))
    def answered(case):
        codes.append(case.call_and_validate(checks=checks(), timeout=PATIENCE).status_code)

    answered()
    assert mode is not schemathesis.GenerationMode.POSITIVE or 200 in codes
    assert idle(server)
    assert post(f"{server.url}/v1/completions", json=OK).status_code == 200


@pytest.mark.parametrize("path", ROUTES["GET"])
def test_what_is_got_is_what_the_document_says(document, path):
    document[path]["GET"].Case().call_and_validate(checks=checks())
