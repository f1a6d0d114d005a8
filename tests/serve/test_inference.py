"""The Open Inference Protocol, version 2: input tensors, and outputs of the graph per adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from loradeploy.serve.keys import ApiKey
from tests.conftest import MakeAdapter
from tests.serve.conftest import Running, serving
from tests.tolerances import tolerance

IDS = np.array([[2, 7, 9, 3], [2, 5, 3, 0]], np.int64)
FEEDS = {"input_ids": IDS, "attention_mask": np.int64(IDS > 0), "token_type_ids": 0 * IDS}
KEY, NARROW = "all-0123456789abcdef", "narrow-0123456789abcdef"
KEYS = [ApiKey("all", KEY), ApiKey("narrow", NARROW, frozenset({"small"}))]
SIGNED = {"Authorization": f"Bearer {KEY}"}


@pytest.fixture(scope="module")
def running(
    tiny_bert: Path,
    tiny_bert_bundle: Path,
    make_adapter: MakeAdapter,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Running]:
    """A server of the tiny BERT as a classifier; the head of one adapter has a single output."""
    made = {"task": "sequence-classification", "scale": 0.3}
    head = {"modules_to_save": ["classifier"], "num_labels": 1}
    place = tmp_path_factory.mktemp("adapters")
    shutil.copytree(make_adapter(tiny_bert, r=4, seed=2, **made, **head), place / "score")
    (place / "score" / "config.json").write_text(
        json.dumps({"problem_type": "regression", "id2label": {0: "score"}})
    )
    adapters = {"small": make_adapter(tiny_bert, r=2, seed=2, **made), "score": place / "score"}
    limits: dict[str, Any] = {"max_inputs": 4, "batch_delay": 0.01}
    with serving(tiny_bert_bundle, adapters=adapters, keys=KEYS, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def http(running: Running) -> httpx.Client:
    return running.http(headers=SIGNED)


def tensor(name: str, array: np.ndarray, **changes: Any) -> dict[str, Any]:
    kind = {"i": "INT", "f": "FP", "b": "BOOL"}[array.dtype.kind]
    datatype = kind if kind == "BOOL" else f"{kind}{8 * array.dtype.itemsize}"
    values = {"name": name, "shape": list(array.shape), "datatype": datatype}
    return {**values, "data": array.tolist(), **changes}


def body(**changes: Any) -> dict[str, Any]:
    return {"inputs": [tensor(name, array) for name, array in FEEDS.items()], **changes}


def test_the_server_and_its_models_are_described(running: Running, http: httpx.Client) -> None:
    base = running.service.catalog.base
    assert http.get("/v2").json()["name"] == "loradeploy"
    assert "binary_tensor_data" in http.get("/v2").json()["extensions"]
    assert httpx.get(f"{running.url}/v2/health/live").json() == {"live": True}
    assert httpx.get(f"{running.url}/v2/health/ready").json() == {"ready": True}
    for name in (base, "small"):
        for path in (f"/v2/models/{name}", f"/v2/models/{name}/versions/1"):
            found = http.get(path).json()
            assert (found["name"], found["versions"]) == (name, ["1"])
            assert {one["name"]: one["datatype"] for one in found["inputs"]} == dict.fromkeys(
                FEEDS, "INT64"
            )
            assert found["inputs"][0]["shape"] == [-1, -1]
            assert found["outputs"][0] == {"name": "logits", "datatype": "FP32", "shape": [-1, 2]}
            assert http.get(f"{path}/ready").json() == {"name": name, "ready": True}


def test_outputs_equal_those_of_the_session_with_the_adapter(
    running: Running, http: httpx.Client
) -> None:
    session, base = running.service.session, running.service.catalog.base
    effects = []
    for name, adapter in ((base, None), ("small", "small"), ("score", "score")):
        (expected,) = session.run(["logits"], FEEDS, adapter)
        answer = http.post(f"/v2/models/{name}/infer", json=body(id="17")).json()
        assert (answer["model_name"], answer["model_version"], answer["id"]) == (name, "1", "17")
        (found,) = answer["outputs"]
        assert (found["name"], found["datatype"]) == ("logits", "FP32")
        labels = 1 if name == "score" else 2  # only the outputs of its own head
        assert found["shape"] == [2, labels]
        values = np.array(found["data"], np.float32).reshape(found["shape"])
        assert np.abs(values - expected[:, :labels]).max() <= tolerance("rows")
        effects.append(values)
    assert np.abs(effects[0] - effects[1]).max() > 0.01
    flat = body(
        inputs=[{**one, "data": np.ravel(one["data"]).tolist()} for one in body()["inputs"]]
    )
    again = http.post(f"/v2/models/{base}/versions/1/infer", json=flat).json()
    assert again["outputs"][0]["data"] == effects[0].ravel().tolist()


def test_tensors_can_be_sent_as_bytes_after_the_json(running: Running, http: httpx.Client) -> None:
    (expected,) = running.service.session.run(["logits"], FEEDS, "small")
    contents = [array.astype("<i8").tobytes() for array in FEEDS.values()]
    inputs = []
    for (name, array), content in zip(FEEDS.items(), contents, strict=True):
        one = tensor(name, array, parameters={"binary_data_size": len(content)})
        del one["data"]
        inputs.append(one)
    for asked in (
        {"parameters": {"binary_data_output": True}},
        {"outputs": [{"name": "logits", "parameters": {"binary_data": True}}]},
    ):
        text = json.dumps({"inputs": inputs, **asked}).encode()
        length = {"Inference-Header-Content-Length": str(len(text))}
        content = b"".join((text, *contents))
        answer = http.post("/v2/models/small/infer", content=content, headers=length)
        end = int(answer.headers["Inference-Header-Content-Length"])
        (found,) = json.loads(answer.content[:end])["outputs"]
        assert found["parameters"]["binary_data_size"] == len(answer.content) - end
        values = np.frombuffer(answer.content[end:], "<f4").reshape(found["shape"])
        assert np.abs(values - expected).max() <= tolerance("rows")
    for wrong in (str(len(text) + 10**6), "-1", "x"):
        refused = http.post(
            "/v2/models/small/infer",
            content=content,
            headers={"Inference-Header-Content-Length": wrong},
        )
        assert refused.status_code == 400, wrong
    for cut in (content[:-1], content + b"0"):
        refused = http.post("/v2/models/small/infer", content=cut, headers=length)
        assert refused.status_code == 400


def with_first(**changes: Any) -> dict[str, Any]:
    first, *others = body()["inputs"]
    return {"inputs": [{**first, **changes}, *others]}


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({}, "inputs: Field required"),
    ({"inputs": body()["inputs"][:1]}, "missing attention_mask"),
    ({"inputs": [*body()["inputs"], tensor("more", IDS)]}, "unknown more"),
    ({"inputs": [*body()["inputs"], tensor("input_ids", IDS)]}, "is given twice"),
    (with_first(data=[1, 2]), "2 numbers; the shape [2, 4] has 8"),
    (with_first(data=[[1] * 3, [1] * 5]), "it is not nested as the shape"),
    (with_first(data=[[1] * 4, 1, 1, 1, 1]), "it is not nested as the shape"),
    (with_first(data=[1.5] * 8), "a value that is not of type INT64"),
    (with_first(data=[True] * 8), "a value that is not of type INT64"),
    (with_first(data=["1"] * 8), "a value that is not of type INT64"),
    (with_first(data=[2**63] * 8), "does not fit into INT64"),
    (with_first(datatype="INT32", data=[2**31] * 8), "does not fit into INT32"),
    (with_first(datatype="INT8", data=[-129] * 8), "does not fit into INT8"),
    (with_first(datatype="UINT8", data=[-1] * 8), "does not fit into UINT8"),
    (with_first(data=[999_999] * 8), "the vocabulary ends at"),
    (with_first(data=None), "there is none"),
    (with_first(shape=[0, 4], data=[]), "sizes of 1 or more"),
    (with_first(shape=[1, 8], data=[1] * 8), "the first dimension is that of rows"),
    (with_first(shape=[], data=[1]), "the first dimension is that of rows"),
    (with_first(datatype="BYTES"), "datatype"),
    (with_first(datatype="FP32"), "the graph takes int64"),
    (with_first(parameters={"shared_memory_region": "x"}), "is not supported"),
    (with_first(data=None, parameters={"binary_data_size": 64}), "no bytes follow the JSON"),
    (body(outputs=[{"name": "states"}]), "there is no 'states', only logits"),
    (body(outputs=[{"name": "logits"}] * 2), "asked for twice"),
    (body(outputs=[{"name": "logits", "parameters": {"classification": 3}}]), "is not supported"),
    (body(parameters={"sequence_id": 5}), "is not supported"),
    (
        {"inputs": [tensor(name, np.tile(array, (3, 1))) for name, array in FEEDS.items()]},
        "6 rows; this service takes 4",
    ),
]


@pytest.mark.parametrize(("content", "message"), REFUSED, ids=[message for _, message in REFUSED])
def test_invalid_requests_are_refused_with_a_message(
    http: httpx.Client, content: dict[str, Any], message: str
) -> None:
    answer = http.post("/v2/models/small/infer", json=content)
    assert answer.status_code == 400
    assert message in answer.json()["error"]  # a string, as in the protocol


def test_a_mask_does_not_hide_tokens_beyond_the_positions(
    running: Running, http: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = running.service.session
    positions = session.limits.positions
    assert positions is not None

    def answer(length: int) -> tuple[int, str]:
        ids = np.full((1, length), 2)
        mask = np.int64(np.arange(length) < 3)[None]
        feeds = {"input_ids": ids, "attention_mask": mask, "token_type_ids": 0 * ids}
        inputs = [tensor(name, array) for name, array in feeds.items()]
        found = http.post("/v2/models/small/infer", json={"inputs": inputs})
        return found.status_code, found.text

    assert answer(positions)[0] == 200
    status, message = answer(positions + 1)
    assert (status, f"the most are {positions}" in message) == (400, True)
    endless = dataclasses.replace(session.limits, positions=None)
    monkeypatch.setattr(session, "limits", endless)
    monkeypatch.setattr("loradeploy.serve.routes.inference.MOST_TOKENS", 16)
    assert [answer(length)[0] for length in (16, 17)] == [200, 400]


def test_unknown_models_and_models_of_other_keys_are_not_found(
    running: Running, http: httpx.Client
) -> None:
    narrow = running.http(headers={"Authorization": f"Bearer {NARROW}"})
    base = running.service.catalog.base
    assert narrow.post("/v2/models/small/infer", json=body()).status_code == 200
    for client, name in ((http, "nobody"), (narrow, base), (narrow, "score")):
        for answer in (
            client.post(f"/v2/models/{name}/infer", json=body()),
            client.get(f"/v2/models/{name}"),
            client.get(f"/v2/models/{name}/ready"),
        ):
            assert answer.status_code == 404
            assert "does not exist" in answer.json()["error"]
    assert http.get("/v2/models/small/versions/2").status_code == 404
    unsigned = httpx.post(f"{running.url}/v2/models/small/infer", json=body())
    assert (unsigned.status_code, "API key" in unsigned.json()["error"]) == (401, True)


def test_a_page_of_another_origin_cannot_send_requests(http: httpx.Client) -> None:
    content = json.dumps(body()).encode()
    path = "/v2/models/small/infer"
    assert http.post(path, content=content).status_code == 200
    evil = {"Origin": "https://evil.example"}
    assert http.post(path, content=content, headers=evil).status_code == 415
    form = {"Content-Type": "text/plain"}
    assert http.post(path, content=content, headers=form).status_code == 415


def test_outputs_above_the_response_limit_are_refused(
    running: Running, monkeypatch: pytest.MonkeyPatch, http: httpx.Client
) -> None:
    monkeypatch.setattr("loradeploy.serve.answering.tensors._MOST", 20)
    answer = http.post("/v2/models/small/infer", json=body())  # 4 values
    assert (answer.status_code, "ask for fewer rows" in answer.text) == (400, True)
    raw = body(parameters={"binary_data_output": True})
    assert http.post("/v2/models/small/infer", json=raw).status_code == 200


def test_a_decoder_is_refused(llama: Running) -> None:
    http = llama.http()
    for answer in (http.get("/v2/models/sport"), http.post("/v2/models/sport/infer", json=body())):
        assert (answer.status_code, "/v1/completions" in answer.json()["error"]) == (404, True)
    assert http.get("/v2/health/ready").status_code == 200


def test_tritons_client_works(running: Running) -> None:
    client = pytest.importorskip("tritonclient.http", reason="tritonclient[http] is not installed")
    (expected,) = running.service.session.run(["logits"], FEEDS, "small")
    server = client.InferenceServerClient(running.url.removeprefix("http://"))
    assert server.is_server_live()
    assert server.is_server_ready()
    assert server.is_model_ready("small", headers=dict(SIGNED))
    assert (
        server.get_model_metadata("small", headers=dict(SIGNED))["outputs"][0]["name"] == "logits"
    )
    for as_bytes in (True, False):  # the client modifies the given headers
        inputs = []
        for name, array in FEEDS.items():
            inputs.append(client.InferInput(name, list(array.shape), "INT64"))
            inputs[-1].set_data_from_numpy(array, binary_data=as_bytes)
        asked = None if as_bytes else [client.InferRequestedOutput("logits", binary_data=False)]
        answer = server.infer("small", inputs, outputs=asked, headers=dict(SIGNED))
        found = answer.as_numpy("logits")
        assert np.abs(found - expected).max() <= tolerance("rows")
    with pytest.raises(Exception, match="does not exist"):
        server.infer("nobody", inputs, headers=dict(SIGNED))
    server.close()
