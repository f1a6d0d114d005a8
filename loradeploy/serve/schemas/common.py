"""Common parts of requests and responses."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(ge=-100, le=100)]


class RequestBody(BaseModel):
    """A request body: unknown fields are refused, and null means the default."""

    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if isinstance(values, dict):
            return {name: value for name, value in values.items() if value is not None}
        return values


class ModelRequest(RequestBody):
    """A request to a model."""

    model: str = Field(description="The name of the bundle for the base, or of an adapter.")
    adapters: dict[str, Weight] | None = Field(
        default=None,
        description="An extension: a blend of adapters, as weights by name; the model must then"
        " be the base.",
    )
    user: str | None = Field(default=None, description="Has no effect.")


class Answer(BaseModel):
    """A response body."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Answer):
    """An error."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The response to a request that failed."""

    error: ErrorDetail


class ModelCard(Answer):
    """A model of the service."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "loradeploy"
    root: str
    parent: str | None = Field(description="The base, for an adapter.")
    digest: str | None = Field(
        description="The adapter's or the base's digest; null if the adapter was not read yet."
    )


class ModelList(Answer):
    """The models of the service."""

    object: str = "list"
    data: list[ModelCard]


class AdapterRequest(RequestBody):
    """A request to load an adapter, like vLLM's."""

    lora_name: str = Field(description="The name of the model in requests.")
    lora_path: str | None = Field(
        default=None,
        description="The name of its directory or .onnx_adapter file below the adapter root, by"
        " default lora_name.",
    )
    load_inplace: bool = Field(default=False, description="Replace an adapter of this name.")


class AdapterName(RequestBody):
    """A request to unload an adapter, like vLLM's."""

    lora_name: str


class Status(Answer):
    """The status of the service."""

    status: str
