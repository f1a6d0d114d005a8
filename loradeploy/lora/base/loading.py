"""Load a base model in PyTorch with exactly its own weights.

transformers' `from_pretrained` injects an adapter that it finds beside the weights (with PEFT's
modules), initializes missing weights at random, and ignores unexpected ones. Here adapters are
never injected, missing weights are returned to the caller, and unexpected ones are refused or
reported.

A model directory may bring its own Python files (auto_map). They run only inside `custom_code`.
trust_remote_code is always passed, because transformers would otherwise ask on standard input.
"""

from __future__ import annotations

import contextlib
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.base_files import base_tensors, check_no_peft_layers
from loradeploy.errors import ModelError, listed
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

logger = logger_of(__name__)

# transformers 5 searches for an adapter in this folder of the model's directory instead.
_NO_ADAPTER: Final = {"adapter_kwargs": {"subfolder": "no adapter, whatever lies beside"}}
_LISTED: Final = 3
_TRUSTED: Final = ContextVar("trust_remote_code", default=False)


@dataclass(frozen=True)
class Loaded:
    """A model as transformers loaded it.

    `lacking`: the parameters that the files lack or have in another shape; their values are random.
    """

    model: Any
    lacking: frozenset[str]


@contextlib.contextmanager
def custom_code(trusted: bool) -> Iterator[None]:
    """Inside the context, this thread runs a model's own Python files if `trusted`, else none."""
    token = _TRUSTED.set(trusted)
    try:
        yield
    finally:
        _TRUSTED.reset(token)


def is_trusted() -> bool:
    """Whether a model's own Python files may run: only inside `custom_code(True)`."""
    return _TRUSTED.get()


def from_pretrained(auto_class: Any, directory: Path, **options: Any) -> Any:
    """`auto_class.from_pretrained(directory)`, with the model's own code only if it is trusted.

    Raises:
        ModelError: the model needs its own Python code, which is not trusted.
    """
    with _explained(directory):
        return auto_class.from_pretrained(directory, trust_remote_code=is_trusted(), **options)


def from_config(auto_class: Any, config: Any, directory: Path) -> Any:
    """A model of `config`, that of `directory`, with new weights; errors as `from_pretrained`."""
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
            f"{directory} needs its own Python code (auto_map in its config), which is not run:"
            " read it, and if you trust it, give `trust_remote_code=True`"
        ) from None


def load_pretrained(
    auto_class: Any, directory: Path, *, ignore_mismatched_sizes: bool = False, **options: Any
) -> Loaded:
    """`auto_class.from_pretrained(directory)` with the weights of the base only.

    `ignore_mismatched_sizes`: treat tensors with other shapes than the model's as `lacking`.

    Raises:
        ModelError: the weights are missing or incomplete, belong to a model that PEFT wrapped,
            include tensors that the model's layers do not have, or have other shapes, which are not
            ignored.
    """
    check_no_peft_layers(directory, base_tensors(directory))
    model, info = from_pretrained(
        auto_class,
        directory,
        use_safetensors=True,
        output_loading_info=True,
        ignore_mismatched_sizes=True,  # transformers does not name them in its error
        **_NO_ADAPTER,
        **options,
    )
    # In case a version of transformers injects an adapter anyway.
    check_no_peft_layers(directory, [name for name, _ in model.named_modules()])
    _warn_of_code(model, directory)
    _check_unexpected(model, directory, info["unexpected_keys"])
    mismatched = sorted(info["mismatched_keys"])
    if mismatched and not ignore_mismatched_sizes:
        (name, stored, built), *more = mismatched
        raise ModelError(
            f"{directory}: the checkpoint has {name} as {list(stored)}, and by its config.json it"
            f" is {list(built)}{f', and {len(more)} more' if more else ''}: weights and config are"
            " of different models"
        )
    lacking = {str(key) for key in info["missing_keys"]}
    lacking |= {str(name) for name, _, _ in mismatched}
    return Loaded(model, frozenset(lacking))


def _warn_of_code(model: Any, directory: Path) -> None:
    """Warn if transformers' class of the model type is used in place of the model's own class."""
    import transformers

    own = (model.config.architectures or [""])[0]
    named = getattr(model.config, "auto_map", None)
    if named and own and not is_trusted() and not hasattr(transformers, own):
        logger.warning(
            "%s names its own class %s in Python files (auto_map), which are not run: %s of"
            " transformers is used, which may compute something else",
            directory,
            own,
            type(model).__name__,
        )


def _check_unexpected(model: Any, directory: Path, names: Iterable[str]) -> None:
    """Refuse tensors that belong to layers of the model; log others, such as other heads."""
    from loradeploy.lora.layers.kinds import kind_of

    modules = dict(model.named_modules())
    body = model.base_model_prefix
    unused = sorted(str(name) for name in names)
    for name in unused:
        module, _, _ = name.rpartition(".")
        if any(kind_of(modules.get(path)) for path in (module, f"{body}.{module}")):
            raise ModelError(
                f"{directory}: the checkpoint has {name}, which {type(model).__name__} does not"
                " have by its config.json: weights and config are of different models"
            )
    parts = {name for name, _ in getattr(model, body, model).named_children()}
    inside = [n for n in unused if n.removeprefix(f"{body}.").partition(".")[0] in parts]
    unused_tensors = f"{directory} has tensors that {type(model).__name__} does not use"
    if inside:
        logger.warning("%s: %s", unused_tensors, listed(inside, _LISTED))
    elif unused:
        logger.info("%s: %s", unused_tensors, listed(unused, _LISTED))
