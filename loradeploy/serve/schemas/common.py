"""What requests have in common."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, model_validator

Weight = Annotated[float, Field(ge=-100, le=100)]


class RequestBody(BaseModel):
    """A request: fields that it does not know are refused, null is a field's default."""

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

    model: str = Field(description="The base, by the bundle's name, or an adapter by its own.")
    adapters: dict[str, Weight] | None = Field(
        default=None,
        description="An extension: a blend of adapters, the weight of each by its name. The model"
        " is the base then.",
    )
    user: str | None = Field(default=None, description="Has no effect.")


class Answer(BaseModel):
    """An answer."""

    model_config = ConfigDict(protected_namespaces=())


class ErrorDetail(Answer):
    """What is wrong."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorAnswer(Answer):
    """The answer to a request that failed."""

    error: ErrorDetail


class ModelCard(Answer):
    """A model of the service."""

    id: str
    object: str = "model"
    created: int
    owned_by: str = "loradeploy"
    root: str
    parent: str | None = Field(description="The base of an adapter.")
    digest: str | None = Field(description="What it computes; null of one that was not read yet.")


class ModelList(Answer):
    """The models of the service."""

    object: str = "list"
    data: list[ModelCard]


class AdapterRequest(RequestBody):
    """An adapter that is to be loaded, in the shape of vLLM's."""

    lora_name: str = Field(description="The model that requests name.")
    lora_path: str | None = Field(
        default=None,
        description="The name of its directory or .onnx_adapter file below the adapter root, by"
        " default lora_name.",
    )
    load_inplace: bool = Field(default=False, description="Replace an adapter of this name.")


class AdapterName(RequestBody):
    """An adapter that is to be unloaded, in the shape of vLLM's."""

    lora_name: str


class Status(Answer):
    """Whether the service is well."""

    status: str
