"""Requests and responses of the Open Inference Protocol, version 2."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from loradeploy.serve.schemas.common import Answer, RequestBody

Datatype = Literal[
    "BOOL",
    "UINT8",
    "UINT16",
    "UINT32",
    "UINT64",
    "INT8",
    "INT16",
    "INT32",
    "INT64",
    "FP16",
    "FP32",
    "FP64",
]


class InputParameters(RequestBody):
    """Parameters of an input."""

    binary_data_size: int | None = Field(
        default=None,
        ge=0,
        description="The input is this many bytes after the JSON, instead of `data`.",
    )


class OutputParameters(RequestBody):
    """Parameters of an output."""

    binary_data: bool | None = Field(default=None, description="Send it as bytes after the JSON.")


class InferParameters(RequestBody):
    """Parameters of a request."""

    binary_data_output: bool = Field(
        default=False, description="Send outputs as bytes after the JSON."
    )


class InputTensor(RequestBody):
    """An input of the graph."""

    name: str
    shape: list[int] = Field(max_length=8)
    datatype: Datatype
    data: list[Any] | None = Field(
        default=None, description="Values in row-major order, flat or nested."
    )
    parameters: InputParameters = InputParameters()


class RequestedOutput(RequestBody):
    """A requested output."""

    name: str
    parameters: OutputParameters = OutputParameters()


class InferRequest(RequestBody):
    """A request to run the graph."""

    id: str | None = Field(default=None, max_length=256, description="Returned in the response.")
    inputs: list[InputTensor] = Field(min_length=1, max_length=64)
    outputs: list[RequestedOutput] = Field(
        default=[], max_length=64, description="By default all outputs."
    )
    parameters: InferParameters = InferParameters()


class OutputTensor(Answer):
    """An output of the graph."""

    name: str
    shape: list[int]
    datatype: Datatype
    data: list[bool | int | float] = Field(description="Values in row-major order.")


class InferAnswer(Answer):
    """The outputs of the graph."""

    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[OutputTensor]


class TensorMetadata(Answer):
    """An input or output of the graph; -1 is a dimension of any size."""

    name: str
    datatype: str
    shape: list[int]


class ModelMetadata(Answer):
    """The inputs and outputs of a model."""

    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorMetadata]
    outputs: list[TensorMetadata]


class ServerMetadata(Answer):
    """The server's name, version and extensions."""

    name: str
    version: str
    extensions: list[str]


class Live(Answer):
    """Whether the server is alive."""

    live: bool


class Ready(Answer):
    """Whether the server accepts requests."""

    ready: bool


class ModelReady(Answer):
    """Whether a model accepts requests."""

    name: str
    ready: bool
