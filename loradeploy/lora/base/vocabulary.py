"""The vocabulary of a PyTorch model, and the model with another one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.fitting.vocabulary import Vocabulary, head_alone, resized_vocabulary
from loradeploy.errors import AdapterMismatchError, ModelError, first_line

if TYPE_CHECKING:
    import torch

    from loradeploy.adapter.adapter import Adapter


# transformers' names for how a model gives its embedding of tokens, and its output head.
TABLES: Final = ("get_input_embeddings", "get_output_embeddings")


def table_of(model: Any, getter: str) -> Any:
    """What one of `TABLES` gives; None where the model has no such module."""
    try:
        return getattr(model, getter, lambda: None)()
    except NotImplementedError:  # of a model of images
        return None


def vocabulary_of(model: Any) -> Vocabulary | None:
    """Where `model` has a row per token; None where it has no embedding of tokens."""
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
    """The weights of an embedding and its head that config.json ties, and that are stored apart.

    transformers 5 computes with both weights then, and PEFT puts trained rows into both.
    """
    embedding, head = (table_of(model, getter) for getter in TABLES)
    found = vocabulary_of(model)
    if found is None or found.head is None or not found.tied or head.weight is embedding.weight:
        return None
    own, other = f"{found.embedding}.weight", f"{found.head}.weight"
    return (own, other) if other in (getattr(model, "_tied_weights_keys", None) or ()) else None


def refuse_rows_of_tied(model: Any, adapter: Adapter) -> None:
    """Refuse trained rows of an embedding that is `tied_by_config_alone`, or of a tied head alone.

    Raises:
        AdapterMismatchError: the adapter has such rows.
    """
    embedding, head = (table_of(model, getter) for getter in TABLES)
    found = vocabulary_of(model)
    if found is not None and found.head is not None and head.weight is embedding.weight:
        weights = found.weights
        if weights[1] in adapter.rows and weights[0] not in adapter.rows:
            raise AdapterMismatchError(head_alone(*weights))
    apart = tied_by_config_alone(model)
    if apart is not None and apart[0] in adapter.rows:
        raise AdapterMismatchError(
            f"rows of {apart[0]} were trained (trainable_token_indices), which PEFT puts into"
            f" {apart[1]} too, because the base's config.json has tie_word_embeddings; but its"
            " checkpoint stores another weight there: give the base that the adapter was trained on"
        )


def resize_for(model: torch.nn.Module, adapter: Adapter) -> int | None:
    """Give `model` the vocabulary that `adapter` was trained with; its size, None where unchanged.

    As transformers' `resize_token_embeddings`, with added rows of zeros: the adapter has them.

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
    """Give `model` a vocabulary of `size` tokens, with zeros for those that it does not have.

    Raises:
        ModelError: it has no embedding of tokens, or transformers cannot resize it.
    """
    import torch

    before = vocabulary_of(model)
    if before is None:
        raise ModelError(f"{type(model).__name__} has no embedding of tokens")
    resized: Any = model
    try:
        resized.resize_token_embeddings(size, mean_resizing=False)
    except Exception as problem:  # whatever a model's own code raises
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
