"""PEFT in the reference's model: PEFT itself reads the adapter's own files.

Nothing that loradeploy has read or rewritten is used here, so that an error of loradeploy's reader
shows as a difference.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.files.keys import PREFIX
from loradeploy.adapter.files.peft import WEIGHTS_NAME, adapter_files, load_adapter
from loradeploy.adapter.files.tensors import read_arrays, read_tensors, write_arrays
from loradeploy.adapter.fitting.towers import TOWERS, is_body
from loradeploy.disk import scratch_directory
from loradeploy.errors import AdapterError, shortened
from loradeploy.files import copy_file
from loradeploy.names import ADAPTER_CONFIG_NAME

if TYPE_CHECKING:
    import torch

    from loradeploy.parity.context import AdapterUnderTest

# What PEFT's warning says if a file lacks factors of the adapter, and what all their names contain.
_MISSING: Final = "missing adapter keys"
_FACTOR: Final = "lora_"


@contextmanager
def with_peft(model: torch.nn.Module, tested: AdapterUnderTest) -> Iterator[str | None]:
    """Let PEFT load the adapter from its directory into `model`; removed when the block ends.

    The block gets the name of a tensor of the file that PEFT does not read, although the file has
    all tensors of the adapter: it has names that only loradeploy understands. None if there is no
    such tensor.
    """
    from loradeploy.lora.bare import bare_weights
    from loradeploy.lora.quiet import quiet

    with quiet():  # peft imports bitsandbytes, which prints warnings
        import peft

    root = _wrapped(model, tested)
    modules = dict(model.named_modules())
    parameters = dict(model.named_parameters(remove_duplicate=False))
    own: dict[str, torch.Tensor] = {}
    versions = {name: parameter._version for name, parameter in parameters.items()}
    targets = {*tested.adapter.factors, *(f"{name}.weight" for name in bare_weights(model))}
    digests = {name: _digest(parameters[name]) for name in targets & parameters.keys()}
    try:
        with quiet(), _directory_for_peft(tested) as path:
            own = _may_be_written(path / WEIGHTS_NAME, parameters)
            with warnings.catch_warnings(record=True) as raised:
                warnings.simplefilter("always")
                loaded = peft.PeftModel.from_pretrained(root, os.fspath(path), torch_device="cpu")
            loaded.eval()
            unread = None
            if any(_MISSING in str(warning.message) for warning in raised):
                names = peft.get_peft_model_state_dict(loaded, save_embedding_layers=False)
                unread = _unread(path / WEIGHTS_NAME, names)
        yield unread
    finally:
        _restore(model, modules, parameters)
        for trace in ("peft_config", "_hf_peft_config_loaded"):
            vars(root).pop(trace, None)
        for name, values in own.items():
            parameters[name].data.copy_(values)
            versions[name] = parameters[name]._version
        for name, digest in digests.items():
            # PEFT parametrizes them while they run, which sets each to its own values.
            if _digest(parameters[name]) == digest:
                versions[name] = parameters[name]._version
    changed = [name for name, version in versions.items() if parameters[name]._version != version]
    if changed:  # later comparisons need the original base
        raise AdapterError(
            f"the adapter {tested.name!r}: PEFT writes over the base's {shortened(changed[0])},"
            " so that what is compared next would be another base: give `backends` without peft"
        )


def _unread(weights: Path, known: Iterable[str]) -> str | None:
    """Return a factor in the file that is not among `known`, if it has as many factors as those."""
    factors = {name for name in known if _FACTOR in name}
    stored = [name for name in read_tensors(weights, error=AdapterError)[0] if _FACTOR in name]
    unknown = [name for name in stored if name not in factors]
    return unknown[0] if unknown and len(stored) >= len(factors) else None


def _wrapped(model: torch.nn.Module, tested: AdapterUnderTest) -> Any:
    """Return the module that PEFT wrapped in training: the model, or only the body of a tower."""
    kind = getattr(model, "tower_kind", None)
    if kind is None or not is_body(load_adapter(tested.path)):
        return model
    return model.get_submodule(TOWERS[kind.tower][0])


@contextmanager
def _directory_for_peft(tested: AdapterUnderTest) -> Iterator[Path]:
    """Yield a PEFT directory with the adapter's own files.

    If the bundle has more labels than the adapter, the tensors of the head are loradeploy's padded
    ones; all others are those of the file.
    """
    config, weights = adapter_files(tested.path)
    if not tested.widened and weights.name == WEIGHTS_NAME:
        yield weights.parent
        return
    with scratch_directory() as scratch:
        path = scratch / tested.name
        path.mkdir()
        copy_file(config, path / ADAPTER_CONFIG_NAME, error=AdapterError)
        if tested.widened:
            _write_widened(tested, weights, path / WEIGHTS_NAME)
        else:
            copy_file(weights, path / WEIGHTS_NAME, error=AdapterError)
        yield path


def _write_widened(tested: AdapterUnderTest, weights: Path, output: Path) -> None:
    arrays, metadata = read_arrays(weights, error=AdapterError)
    for name, values in tested.adapter.saved.items():
        key = f"{PREFIX}{name}"
        if key in arrays and arrays[key].shape != values.shape:
            arrays[key] = np.asarray(values)
    write_arrays(output, arrays, metadata)


def _may_be_written(
    weights: Path, parameters: Mapping[str, torch.nn.Parameter]
) -> dict[str, torch.Tensor]:
    """Return copies of the base's parameters that PEFT may overwrite with a tensor of the file.

    PEFT overwrites the base's parameters with trained biases and embeddings. Full names depend on
    what PEFT wraps and transformers renamed, so parameters are matched by last name part and shape.
    """
    tensors = read_tensors(weights, error=AdapterError)[0]
    shapes = {(name.rpartition(".")[2], tensor.shape) for name, tensor in tensors.items()}
    return {
        name: parameter.detach().clone()
        for name, parameter in parameters.items()
        if (name.rpartition(".")[2], tuple(parameter.shape)) in shapes
    }


def _digest(parameter: torch.nn.Parameter) -> bytes:
    values = parameter.detach().contiguous().numpy()
    return hashlib.blake2b(values.data.cast("B")).digest()


def _restore(
    model: torch.nn.Module,
    modules: Mapping[str, torch.nn.Module],
    parameters: Mapping[str, torch.nn.Parameter],
) -> None:
    """Put every module and parameter back into its place."""
    for name, module in modules.items():
        if name and model.get_submodule(name) is not module:
            parent, _, child = name.rpartition(".")
            setattr(modules[parent], child, module)
    for name, parameter in parameters.items():
        parent, _, child = name.rpartition(".")
        if getattr(modules[parent], child) is not parameter:
            setattr(modules[parent], child, parameter)
    for parameter in parameters.values():
        parameter.requires_grad_(False)
