"""The vocabulary of a PyTorch model, and models with a resized vocabulary."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.fitting.vocabulary import Vocabulary, resized_vocabulary, tied_head_refusal
from loradeploy.errors import AdapterMismatchError, ModelError, first_line

if TYPE_CHECKING:
    import torch

    from loradeploy.adapter.adapter import Adapter


# transformers' methods that return a model's token embedding and its output head.
TABLES: Final = ("get_input_embeddings", "get_output_embeddings")


def table_of(model: Any, getter: str) -> Any:
    """The module that `getter`, one of `TABLES`, returns; None if the model has none."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:  # image models
        return None


def vocabulary_of(model: Any) -> Vocabulary | None:
    """The modules of `model` with one row per token; None if it has no token embedding."""
    embedding, head = (table_of(model, getter) for getter in TABLES)
    names = {module: name for name, module in model.named_modules()}
    weight = getattr(embedding, "weight", None)
    if embedding is None or embedding not in names or weight is None or weight.ndim != 2:
        return None
    if head is None or head not in names or getattr(head, "weight", None) is None:
        return Vocabulary(len(weight), names[embedding])
    return Vocabulary(
        len(weight),
        names[embedding],
        names[head],
        tied=head.weight is weight
        or bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False)),
        biased=getattr(head, "bias", None) is not None,
    )


def tied_by_config_alone(model: Any) -> tuple[str, str] | None:
    """The weights of an embedding and a head that config.json ties but that are stored separately.

    transformers 5 then uses both weights, and PEFT writes trained rows into both.
    """
    embedding, head = (table_of(model, getter) for getter in TABLES)
    found = vocabulary_of(model)
    if found is None or found.head is None or not found.tied or head.weight is embedding.weight:
        return None
    own, other = f"{found.embedding}.weight", f"{found.head}.weight"
    return (own, other) if other in (getattr(model, "_tied_weights_keys", None) or ()) else None


def refuse_rows_of_tied(model: Any, adapter: Adapter) -> None:
    """Refuse trained rows of an embedding that is `tied_by_config_alone`, or only of a tied head.

    Raises:
        AdapterMismatchError: the adapter has such rows.
    """
    embedding, head = (table_of(model, getter) for getter in TABLES)
    found = vocabulary_of(model)
    if found is not None and found.head is not None and head.weight is embedding.weight:
        weights = found.weights
        if weights[1] in adapter.rows and weights[0] not in adapter.rows:
            raise AdapterMismatchError(tied_head_refusal(*weights))
    apart = tied_by_config_alone(model)
    if apart is not None and apart[0] in adapter.rows:
        raise AdapterMismatchError(
            f"rows of {apart[0]} were trained (trainable_token_indices), which PEFT puts into"
            f" {apart[1]} too, because the base's config.json has tie_word_embeddings; but its"
            " checkpoint stores another weight there: give the base that the adapter was trained on"
        )


def resize_for(model: torch.nn.Module, adapter: Adapter) -> int | None:
    """Resize `model` to the vocabulary of `adapter`; returns the size, None if it is unchanged.

    As transformers' `resize_token_embeddings`, but added rows are zeros: the adapter has their
    values.

    Raises:
        AdapterMismatchError: rows of added tokens are in neither the base nor the adapter.
        ModelError: transformers cannot resize the model.
    """
    before = vocabulary_of(model)
    size = None if before is None else resized_vocabulary(adapter, before)
    if size is not None:
        resize_to(model, size)
    return size


def resize_to(model: torch.nn.Module, size: int) -> None:
    """Resize `model` to a vocabulary of `size` tokens; added rows are zeros.

    Raises:
        ModelError: it has no token embedding, or transformers cannot resize it.
    """
    import torch

    before = vocabulary_of(model)
    if before is None:
        raise ModelError(f"{type(model).__name__} has no embedding of tokens")
    resized: Any = model
    try:
        resized.resize_token_embeddings(size, mean_resizing=False)
    except Exception as problem:  # the model's code can raise any exception
        raise ModelError(
            f"{type(model).__name__} cannot have the {size} tokens of the adapter's vocabulary:"
            f" {first_line(problem)}"
        ) from None
    parameters = dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for module in before.modules:
            for part in ("weight", "bias"):
                if (values := parameters.get(f"{module}.{part}")) is not None:
                    values[before.size :] = 0
    model.eval()
