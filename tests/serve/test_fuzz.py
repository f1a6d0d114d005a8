"""Random requests generated from the OpenAPI description never get status 500."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("schemathesis")

import schemathesis
from hypothesis import HealthCheck, given, settings

from tests.serve.conftest import Running, serving

EXAMPLES = 3
FEW = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=list(HealthCheck),
)


@pytest.fixture(scope="module")
def fuzzed(
    tiny_llama_bundle: Path,
    serve_adapters: dict[str, Path],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A server with all features enabled."""
    root = tmp_path_factory.mktemp("root")
    shutil.copytree(serve_adapters["headline"], root / "headline")
    with serving(tiny_llama_bundle, root=root, updates=True, max_tokens=4) as running:
        yield running


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", ["POSITIVE", "NEGATIVE"])
def test_no_request_is_answered_with_500(fuzzed: Running, mode: str) -> None:
    schema = schemathesis.openapi.from_url(f"{fuzzed.url}/openapi.json")
    statuses: dict[int, int] = {}

    for found in schema.get_all_operations():
        operation = found.ok()
        if mode == "NEGATIVE" and operation.method != "post":
            continue  # nothing can be invalid

        @FEW
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode[mode]))
        def check(case: Any) -> None:
            if isinstance(case.body, dict) and "model" in case.body:
                known = {"model": fuzzed.service.catalog.base, "adapters": None}
                case.body = {**case.body, **known}  # other names would only be not found
            status = case.call().status_code
            statuses[status] = statuses.get(status, 0) + 1
            assert status != 500, case.as_curl_command()

        check()
    if mode == "POSITIVE":
        assert statuses[200] >= EXAMPLES
    assert any(400 <= status < 500 for status in statuses)


# Requests that the generator does not produce.
ODD: list[tuple[bytes, int]] = [
    (b"", 400),
    (b"{", 400),
    (b"[]", 400),
    (b"null", 400),
    (b"[" * 100_000, 400),
    (b'{"model": "bundle-llama", "prompt": "\\ud800"}', 400),
    (b'{"model": "bundle-llama", "prompt": "x", "temperature": NaN}', 400),
    (b'{"model": "bundle-llama", "prompt": "x", "temperature": 1e999}', 400),
    (b'{"model": "bundle-llama", "prompt": "x", "seed": ' + b"9" * 5000 + b"}", 400),
    (b'{"model": "\\u0000", "prompt": "x"}', 404),
    (b'{"model": "bundle-llama", "prompt": [99999999]}', 400),
    (b'{"model": "bundle-llama", "prompt": [[]]}', 400),
    (b"\xff\xfe", 400),
]


@pytest.mark.parametrize(("content", "status"), ODD, ids=[str(body[:40]) for body, _ in ODD])
def test_malformed_requests_are_refused(fuzzed: Running, content: bytes, status: int) -> None:
    answer = fuzzed.http().post(
        "/v1/completions", content=content, headers={"Content-Type": "application/json"}
    )
    assert (answer.status_code, set(json.loads(answer.text))) == (status, {"error"})
