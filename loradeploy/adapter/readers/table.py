"""The table of readers, and the function that selects one by the content of a file."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.files.formats import (
    ADAPTER_HUB,
    DIFFUSERS,
    GGUF,
    JINA,
    KOHYA,
    LITGPT,
    MLX,
    MLX_VISION,
    NAMED,
    OLIVE,
    TORCHTUNE,
    Form,
    form_of,
)
from loradeploy.adapter.files.gguf import SUFFIX, read_gguf
from loradeploy.adapter.files.peft import WEIGHTS_NAME, refuse_pickles
from loradeploy.adapter.files.tensors import map_tensors
from loradeploy.adapter.readers import (
    adapterhub,
    diffusion,
    jina,
    litgpt,
    llama_cpp,
    mlx,
    named,
    olive,
    torchtune,
)
from loradeploy.adapter.readers.header import check_header
from loradeploy.adapter.readers.source import Base, Source
from loradeploy.errors import AdapterError, LoraDeployError, UsageError, listed_names
from loradeploy.files import read_json
from loradeploy.names import ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME

if TYPE_CHECKING:
    from numpy.typing import NDArray

Arrays = Mapping[str, "NDArray[Any]"]

READERS: Final[Mapping[Form, Callable[[Source], Adapter]]] = {
    ADAPTER_HUB: adapterhub.read,
    DIFFUSERS: diffusion.read,
    GGUF: llama_cpp.read,
    JINA: jina.read,
    KOHYA: diffusion.read,
    LITGPT: litgpt.read,
    MLX: mlx.read,
    MLX_VISION: mlx.read_vision,
    NAMED: named.read,
    OLIVE: olive.read,
    TORCHTUNE: torchtune.read,
}

# File names that the libraries use. If a directory has one .safetensors file, any name will do.
_FILES: Final = (
    WEIGHTS_NAME,
    "adapters.safetensors",
    "adapter.safetensors",
    "pytorch_lora_weights.safetensors",
    "model.safetensors",
)


def other_form(path: str | os.PathLike[str], arrays: Arrays | None = None) -> Form | None:
    """The form of the adapter at `path` if the table has a reader for it, else None.

    `arrays`: the tensors in `path`, if it is a file of another kind than those that are read here.
    """
    place = Path(path)
    if arrays is None and _is_gguf(place):
        return GGUF  # what it contains, and which of several, is checked when it is read
    try:
        source = _open(place, arrays)
    except LoraDeployError:
        return None
    form = None if source is None else _form(source)
    return form if form in READERS else None


def read_other(
    path: str | os.PathLike[str],
    *,
    name: str | None,
    base: Base | None,
    arrays: Arrays | None = None,
) -> Adapter:
    """The adapter of another library at `path`, a directory or a .safetensors or .gguf file.

    Args:
        path: the file or directory that the library wrote.
        arrays: the tensors in `path`, as for `other_form`.
        name: the name of the adapter to read, if the file has several.
        base: the base model, for the forms that need it.

    Raises:
        UsageError: the form needs the base or a name, or has no adapter with that name; or the base
            or a name is given and the form does not use it.
        AdapterError: the form is unknown, a tensor or a setting is not supported, or the settings
            are missing; the message names the cause.
        ModelError: the base cannot be read, or its architecture is not supported for the form.
    """
    source = _open(Path(path), arrays, name=name, base=base)
    form = None if source is None else _form(source)
    if source is None or form is None or form not in READERS:
        raise AdapterError(f"{path} is not an adapter of a library that can be converted")
    try:
        adapter = READERS[form](source)
        if READERS[form] is not diffusion.read:  # which uses the header itself
            check_header(source.header, adapter)
    except AdapterError as problem:
        raise AdapterError(f"{source.file}: {problem}") from None
    for option, given in (("name", name), ("model", base)):
        if given is not None and option not in source.asked:
            raise UsageError(f"{source.file} is converted without `{option}`: leave it out")
    return adapter


def _is_gguf(path: Path) -> bool:
    """Whether `path` is a GGUF file, or a directory that has no other tensors."""
    if not path.is_dir():
        return path.suffix == SUFFIX and path.is_file()
    return any(path.glob(f"*{SUFFIX}")) and not any(path.glob("*.safetensors"))


def _form(source: Source) -> Form | None:
    return GGUF if source.file.suffix == SUFFIX else form_of(source.config, source.shapes)


def _open(path: Path, arrays: Arrays | None, **given: Any) -> Source | None:
    """The adapter's tensors and settings; None if `path` has neither safetensors nor GGUF."""
    if arrays is not None:
        return _of_arrays(path, arrays, None, given)
    directory = path if path.is_dir() else path.parent
    file = _weights(path) if path.is_dir() else path
    if file is not None and file.suffix == SUFFIX and file.is_file():
        return _of_arrays(file, *read_gguf(file), given)
    if file is None or file.suffix != ".safetensors" or not file.is_file():
        return None
    tensors, header = map_tensors(file, error=AdapterError)
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    config = next(
        (
            read_json(directory / name, error=AdapterError)
            for name in (ADAPTER_CONFIG_NAME, MODEL_CONFIG_NAME)
            if (directory / name).is_file()
        ),
        None,
    )
    return Source(file, shapes, config, given.get("name"), given.get("base"), header)


def _of_arrays(
    file: Path, arrays: Arrays, config: Mapping[str, Any] | None, given: Mapping[str, Any]
) -> Source:
    shapes = {name: values.shape for name, values in arrays.items()}
    read = dict(arrays)
    return Source(file, shapes, config, given.get("name"), given.get("base"), _read=read)


def _weights(directory: Path) -> Path | None:
    for name in _FILES:
        if (directory / name).is_file():
            return directory / name
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob(f"*{SUFFIX}"))
    if len(files) > 1:
        raise UsageError(
            f"{directory} has {len(files)} files of tensors: give one of"
            f" {listed_names(file.name for file in files)}"
        )
    if not files:
        refuse_pickles(directory)
    return files[0] if files else None
