"""Routes of the Open Inference Protocol, version 2 (KServe, Triton), for encoders."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version as installed_version
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from fastapi import APIRouter, Request
from fastapi.responses import Response

from loradeploy.adapter.tasks import CAUSAL_LM, CLASSIFICATIONS
from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.names import DECODER_INPUT_IDS, INPUT_IDS
from loradeploy.bundle.outputs import output_of
from loradeploy.errors import RunError, shown
from loradeploy.runtime.arguments import Adapters
from loradeploy.runtime.session import AdapterSession
from loradeploy.serve.answering.tensors import DATATYPES, answer_body, arrays_of, check_room
from loradeploy.serve.encoding import RowWork
from loradeploy.serve.keys import ApiKey
from loradeploy.serve.problems import RequestError, refused
from loradeploy.serve.routes.bodies import JsonRoute
from loradeploy.serve.routes.dependencies import KeyOf, ServiceOf
from loradeploy.serve.schemas.inference import (
    InferAnswer,
    InferRequest,
    Live,
    ModelMetadata,
    ModelReady,
    Ready,
    ServerMetadata,
    TensorMetadata,
)
from loradeploy.serve.service import Service
from loradeploy.serve.settings import MOST_TOKENS

if TYPE_CHECKING:
    from numpy.typing import NDArray

    _Row = Mapping[str, NDArray[Any]]  # inputs or outputs by name, without the axis of rows

router = APIRouter(route_class=JsonRoute, prefix="/v2", tags=["open inference protocol"])
_VERSION: Final = "1"
# Triton's name of the platform.
_PLATFORM: Final = "onnxruntime_onnx"
_MODEL: Final = "/models/{model}"
_VERSIONED: Final = "/models/{model}/versions/{version}"


@router.get("")
async def server() -> ServerMetadata:
    """Describe the server."""
    return ServerMetadata(
        name="loradeploy",
        version=installed_version("loradeploy"),
        extensions=["binary_tensor_data"],
    )


@router.get("/health/live")
async def live(service: ServiceOf) -> Live:
    """Check that the process responds and its engine runs; needs no key."""
    service.check_alive()
    return Live(live=True)


@router.get("/health/ready")
async def server_ready(service: ServiceOf) -> Ready:
    """Check that requests are accepted; needs no key."""
    service.check_ready()
    return Ready(ready=True)


@router.get(_MODEL)
@router.get(_VERSIONED)
async def metadata(
    model: str, service: ServiceOf, key: KeyOf, version: str = _VERSION
) -> ModelMetadata:
    """Describe the inputs and outputs of a model."""
    await _check_model(service, model, version, key)
    manifest = service.session.manifest
    return ModelMetadata(
        name=model,
        versions=[_VERSION],
        platform=_PLATFORM,
        inputs=[_described(spec) for spec in manifest.inputs],
        outputs=[_described(spec) for spec in manifest.outputs],
    )


@router.get(f"{_MODEL}/ready")
@router.get(f"{_VERSIONED}/ready")
async def model_ready(
    model: str, service: ServiceOf, key: KeyOf, version: str = _VERSION
) -> ModelReady:
    """Check that a model accepts requests."""
    await _check_model(service, model, version, key)
    service.check_ready()
    return ModelReady(name=model, ready=True)


@router.post(f"{_MODEL}/infer", response_model=InferAnswer)
@router.post(f"{_VERSIONED}/infer", response_model=InferAnswer)
async def infer(
    model: str,
    body: InferRequest,
    request: Request,
    service: ServiceOf,
    key: KeyOf,
    version: str = _VERSION,
) -> Response:
    """Run the graph with tensors; the model is the base, or an adapter."""
    _check_takes_tensors(service)
    _check_version(version)
    feeds = await asyncio.to_thread(arrays_of, body, request.state.tail)
    rows = _rows(service, feeds)
    _check_lengths(service, feeds)
    names = _outputs(service, body)
    _check_size(service, body, feeds, names)
    adapter = await service.catalog.resolve(model, None, key)

    def run(rows: Sequence[_Row], adapters: Adapters) -> Sequence[_Row]:
        return _run(service.session, names, rows, adapters)

    shapes = tuple((name, array.dtype.str, array.shape[1:]) for name, array in feeds.items())
    work = RowWork(("infer", frozenset(shapes), names), lambda: None, run)
    begin = time.perf_counter()
    _, found = await service.encoder.run(work, rows, adapter, key)
    service.metrics.encoded(len(rows), time.perf_counter() - begin)

    def answer() -> tuple[bytes, dict[str, str]]:
        outputs = {name: np.stack([row[name] for row in found]) for name in names}
        return answer_body(body, {"model_name": model, "model_version": _VERSION}, outputs)

    content, headers = await asyncio.to_thread(answer)
    return Response(content, headers=headers)


def _run(
    session: AdapterSession, names: Sequence[str], rows: Sequence[_Row], adapters: Adapters
) -> list[_Row]:
    """The outputs of each row; for a classifier, only those of the row's head."""
    feeds = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    main = output_of(session.manifest)
    with session.hold(adapters) as held:
        outputs = dict(zip(names, held.run(names, feeds), strict=True))
        heads = [held.head(row) for row in range(len(rows))]
    for name, values in outputs.items():
        if len(values) != len(rows):
            raise RunError(f"the output {name} has {len(values)} rows, of {len(rows)} inputs")
        if not np.isfinite(values).all():
            raise RunError(
                f"the output {name} has numbers that are not finite: run `loradeploy parity` on the"
                " bundle and the adapter"
            )
    found: list[_Row] = [
        {name: values[row] for name, values in outputs.items()} for row in range(len(rows))
    ]
    if main not in outputs or session.manifest.task not in CLASSIFICATIONS:
        return found
    return [
        row if head is None else {**row, main: row[main][..., : head.outputs]}
        for row, head in zip(found, heads, strict=True)
    ]


def _rows(service: Service, feeds: Mapping[str, NDArray[Any]]) -> list[_Row]:
    """The inputs of each row.

    Raises:
        RequestError: 400, the inputs have different numbers of rows, or more than the limit.
    """
    counts = {name: array.shape[0] if array.ndim else 0 for name, array in feeds.items()}
    count, *others = set(counts.values())
    if others or not count:
        raise refused("inputs", f"the first dimension is that of rows, and they have {counts}")
    most = service.limits.max_inputs
    if count > most:
        raise refused("inputs", f"{count} rows; this service takes {most}")
    return [{name: array[row] for name, array in feeds.items()} for row in range(count)]


def _check_lengths(service: Service, feeds: Mapping[str, NDArray[Any]]) -> None:
    """Raise RequestError, 400, if rows have more tokens, masked or not, than positions."""
    positions = service.session.limits.positions
    most = MOST_TOKENS if positions is None else positions
    for name in (INPUT_IDS, DECODER_INPUT_IDS):
        shape = feeds[name].shape if name in feeds else ()
        if len(shape) > 1 and shape[1] > most:
            raise refused("inputs", f"{name} has {shape[1]} tokens in a row, the most are {most}")


def _outputs(service: Service, body: InferRequest) -> tuple[str, ...]:
    known = [spec.name for spec in service.session.manifest.outputs]
    names = [output.name for output in body.outputs] or known
    for name in names:
        if name not in known:
            raise refused("outputs", f"there is no {shown(name)}, only {', '.join(known)}")
    if len(set(names)) < len(names):
        raise refused("outputs", "one is asked for twice")
    return tuple(names)


def _check_size(
    service: Service, body: InferRequest, feeds: Mapping[str, NDArray[Any]], names: Sequence[str]
) -> None:
    """Raise RequestError, 400, if the outputs are too large for a response."""
    manifest = service.session.manifest
    sizes: dict[int | str, int] = {}
    for spec in manifest.inputs:
        if spec.name in feeds:
            sizes.update(zip(spec.shape, feeds[spec.name].shape, strict=False))
    check_room(
        body,
        {
            spec.name: (
                math.prod(
                    size if isinstance(size, int) else sizes.get(size, 1) for size in spec.shape
                ),
                np.dtype(spec.dtype).itemsize,
            )
            for spec in manifest.outputs
            if spec.name in names
        },
    )


async def _check_model(service: Service, model: str, version: str, key: ApiKey) -> None:
    _check_takes_tensors(service)
    _check_version(version)
    if model not in [known.name for known in await service.catalog.models(key)]:
        raise RequestError(
            404,
            f"the model {shown(model)} does not exist, or this API key may not use it",
            param="model",
            code="model_not_found",
        )


def _check_takes_tensors(service: Service) -> None:
    manifest = service.session.manifest
    if manifest.task == CAUSAL_LM:
        raise RequestError(
            404, f"this bundle is for {manifest.task}: it takes no tensors, but /v1/completions"
        )
    for spec in (*manifest.inputs, *manifest.outputs):
        if spec.dtype not in DATATYPES:
            raise RequestError(
                404, f"{spec.name} is {spec.dtype}, which the protocol does not have"
            )


def _check_version(version: str) -> None:
    if version != _VERSION:
        raise RequestError(
            404, f"there is no version {shown(version)}, only {_VERSION}", code="model_not_found"
        )


def _described(spec: TensorSpec) -> TensorMetadata:
    shape = [size if isinstance(size, int) else -1 for size in spec.shape]
    return TensorMetadata(name=spec.name, datatype=DATATYPES[spec.dtype], shape=shape)
