"""A base model in PyTorch with its own weights in it, and nothing else.

transformers' `from_pretrained` puts an adapter that lies beside the weights into the model unasked
(its modules are PEFT's then), initialises at random what the files lack, and drops what the model
has no place for. Here the first never happens, and the others are known to the caller or refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.base_files import base_tensors, check_plain
from loradeploy.errors import ModelError, listed
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from collections.abc import Iterable

logger = logger_of(__name__)

# transformers 5 looks for an adapter in this folder of the model's directory instead.
_NO_ADAPTER: Final = {"adapter_kwargs": {"subfolder": "no adapter, whatever lies beside"}}
_LISTED: Final = 3


@dataclass(frozen=True)
class Loaded:
    """A model as transformers loaded it, and the parameters that the files lack or have otherwise.

    `lacking`: these have random values.
    """

    model: Any
    lacking: frozenset[str]


def load_pretrained(auto_class: Any, directory: Path, **options: Any) -> Loaded:
    """`auto_class.from_pretrained(directory)` of the base's own weights alone.

    Raises:
        ModelError: the weights are missing, incomplete, of a model that PEFT wrapped, or have
            tensors for layers of the model that those have no place for.
    """
    check_plain(directory, base_tensors(directory))
    model, info = auto_class.from_pretrained(
        directory, use_safetensors=True, output_loading_info=True, **_NO_ADAPTER, **options
    )
    # The modules tell whether that still keeps transformers from it.
    check_plain(directory, [name for name, _ in model.named_modules()])
    _check_unexpected(model, directory, info["unexpected_keys"])
    lacking = {str(key) for key in info["missing_keys"]}
    lacking |= {str(key if isinstance(key, str) else key[0]) for key in info["mismatched_keys"]}
    return Loaded(model, frozenset(lacking))


def _check_unexpected(model: Any, directory: Path, names: Iterable[str]) -> None:
    """Refuse tensors of layers that the model has, and tell of the others: heads of other tasks."""
    from loradeploy.lora.kinds import kind_of

    modules = dict(model.named_modules())
    body = model.base_model_prefix
    unused = sorted(str(name) for name in names)
    for name in unused:
        module, _, _ = name.rpartition(".")
        if any(kind_of(modules.get(path)) for path in (module, f"{body}.{module}")):
            raise ModelError(
                f"{directory}: the checkpoint has {name}, which {type(model).__name__} by its"
                " config.json has no place for: weights and config are not of one model"
            )
    parts = {name for name, _ in getattr(model, body, model).named_children()}
    inside = [n for n in unused if n.removeprefix(f"{body}.").partition(".")[0] in parts]
    told = f"{directory} has tensors that {type(model).__name__} does not use"
    if inside:
        logger.warning("%s: %s", told, listed(inside, _LISTED))
    elif unused:
        logger.info("%s: %s", told, listed(unused, _LISTED))
