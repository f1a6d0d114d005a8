"""A base model in PyTorch with its own weights in it, and nothing else.

transformers' `from_pretrained` puts an adapter that lies beside the weights into the model unasked
(its modules are PEFT's then), initializes at random what the files lack, and drops what the model
has no place for. Here the first never happens, and the others are known to the caller or refused.

A model directory may name Python files of its own (auto_map). They are run inside `custom_code`
alone, and transformers, which would ask on standard input, is always told.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.base_files import base_tensors, check_no_peft_layers
from loradeploy.errors import ModelError, listed
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logger_of(__name__)

# transformers 5 looks for an adapter in this folder of the model's directory instead.
_NO_ADAPTER: Final = {"adapter_kwargs": {"subfolder": "no adapter, whatever lies beside"}}
_LISTED: Final = 3
_TRUSTED: Final = ContextVar("trust_remote_code", default=False)


@dataclass(frozen=True)
class Loaded:
    """A model as transformers loaded it, and the parameters that the files lack or have otherwise.

    `lacking`: these have random values.
    """

    model: Any
    lacking: frozenset[str]


@contextlib.contextmanager
def custom_code(trusted: bool) -> Iterator[None]:
    """While it lasts, this thread runs a model's own Python files if `trusted`, and none if not."""
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Whether a model's own Python files are run: inside `custom_code(True)` alone."""
    return _TRUSTED.get()


def from_pretrained(auto_class: Any, directory: Path, **options: Any) -> Any:
    """`auto_class.from_pretrained(directory)`, with the model's own code only where it is trusted.

    Raises:
        ModelError: the model needs code of its own, and it is not trusted.
    """
    with _explained(directory):
        return auto_class.from_pretrained(directory, trust_remote_code=is_trusted(), **options)


def from_config(auto_class: Any, config: Any, directory: Path) -> Any:
    """A model with new weights of the `config` that `directory` has, as `from_pretrained`."""
    with _explained(directory):
        return auto_class.from_config(config, trust_remote_code=is_trusted())


@contextlib.contextmanager
def _explained(directory: Path) -> Iterator[None]:
    try:
        yield
    except ValueError as problem:
        if "trust_remote_code" not in str(problem):
            raise
        raise ModelError(
            f"{directory} is a model with Python code of its own (auto_map in its config), which"
            " is not run: read it, and if you trust it give `trust_remote_code=True`"
        ) from None


def load_pretrained(auto_class: Any, directory: Path, **options: Any) -> Loaded:
    """`auto_class.from_pretrained(directory)` of the base's own weights alone.

    Raises:
        ModelError: the weights are missing, incomplete, of a model that PEFT wrapped, or have
            tensors for layers of the model that those have no place for.
    """
    check_no_peft_layers(directory, base_tensors(directory))
    model, info = from_pretrained(
        auto_class,
        directory,
        use_safetensors=True,
        output_loading_info=True,
        **_NO_ADAPTER,
        **options,
    )
    # The modules tell whether that still keeps transformers from it.
    check_no_peft_layers(directory, [name for name, _ in model.named_modules()])
    _check_unexpected(model, directory, info["unexpected_keys"])
    lacking = {str(key) for key in info["missing_keys"]}
    lacking |= {str(key if isinstance(key, str) else key[0]) for key in info["mismatched_keys"]}
    return Loaded(model, frozenset(lacking))


def _check_unexpected(model: Any, directory: Path, names: Iterable[str]) -> None:
    """Refuse tensors of layers that the model has, and tell of the others: heads of other tasks."""
    from loradeploy.lora.layers import kind_of

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
