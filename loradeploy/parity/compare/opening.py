"""Opens the models to compare: ONNX files, bundles, Python callables, PyTorch modules.

side = open_side("model.onnx")              an ONNX file, or a directory with one
side = open_side("bundle")                  a bundle: the base, or the merged model
side = open_side("package.module:function") a callable by name, importable from here
side = open_side(function)                  feeds → outputs, both numpy arrays by name
side = open_side(module)                    a torch.nn.Module, in its current state
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from loradeploy.adapter.files.digest import file_digest
from loradeploy.bundle.dtypes import NUMPY_NAMES
from loradeploy.bundle.manifest import TensorSpec, read_manifest
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import GRAPH_DATA_NAME, GRAPH_NAME, LOGITS, MANIFEST_NAME, PAST
from loradeploy.bundle.text.tokenizer_files import TOKENIZER_NAME
from loradeploy.errors import (
    BundleError,
    DataError,
    ModelError,
    UsageError,
    kind_and_line,
)
from loradeploy.export.read.files.repository import find_graph
from loradeploy.files import MAX_GRAPH_BYTES, check_file
from loradeploy.parity.compare.sides import Side, arrays_of, labels_of
from loradeploy.paths import expanded, resolved

if TYPE_CHECKING:
    import torch
    from numpy.typing import NDArray

    from loradeploy.parity.compare.sides import Feeds, Given
    from loradeploy.runtime.devices.providers import Provider

    Function = Callable[[dict[str, NDArray[Any]]], Any]
    Comparable = str | os.PathLike[str] | Function | torch.nn.Module


def open_side(
    given: Comparable,
    providers: Sequence[Provider] | None,
) -> Side:
    """Open a model to be compared; `providers` are onnxruntime's, the CPU's by default.

    Raises:
        UsageError: a path or name that does not exist, or an object that is not a model.
        ModelError: onnxruntime cannot open the file.
        BundleError: the bundle is broken.
    """
    if not isinstance(given, str | os.PathLike):
        return _open_object(given, _title(given))
    path = expanded(given)
    if not path.exists():
        text = os.fspath(given)
        module, colon, attribute = text.partition(":")
        if colon and _is_dotted(module) and _is_dotted(attribute):
            return _open_object(_imported(module, attribute), text)
        raise UsageError(
            f"{text} does not exist: give an ONNX file, a bundle, or module:function of a callable"
        )
    if (path / MANIFEST_NAME).is_file():
        return _open_bundle(path, os.fspath(given), providers)
    return _open_file(_graph(path), os.fspath(given), providers)


# -- ONNX ------------------------------------------------------------------------------------------


def _open_bundle(path: Path, title: str, providers: Sequence[Provider] | None) -> Side:
    from loradeploy.runtime.session import AdapterSession

    manifest = read_manifest(path)
    session = AdapterSession(path, providers, map_weights=True)
    inputs, outputs = manifest.inputs, manifest.outputs
    names = [spec.name for spec in outputs]

    def run(feeds: Feeds) -> Given:
        return dict(zip(names, session.run(names, _taken(inputs, feeds)), strict=True))

    data = path / GRAPH_DATA_NAME
    return Side(
        title,
        resolved(path).name,
        run,
        inputs,
        manifest.precision,
        file_digest(path / GRAPH_NAME),
        file_digest(data) if data.is_file() else None,
        provider=session.provider,
        **_beside(path, outputs),
    )


def _open_file(graph: Path, title: str, providers: Sequence[Provider] | None) -> Side:
    from loradeploy.runtime.devices.facts import facts_of
    from loradeploy.runtime.reading.graph import open_file

    try:
        session = open_file(graph, providers, None)
    except BundleError as problem:
        raise ModelError(str(problem)) from None
    inputs, outputs = _specs(session.get_inputs()), _specs(session.get_outputs())
    names = [spec.name for spec in outputs]

    def run(feeds: Feeds) -> Given:
        values = session.run(names, _taken(inputs, feeds))
        return arrays_of(dict(zip(names, values, strict=True)))

    return Side(
        title,
        graph.name,
        run,
        inputs,
        _precision(graph, (*inputs, *outputs)),
        file_digest(graph),
        provider=facts_of(session),
        **_beside(graph.parent, outputs),
    )


def _graph(path: Path) -> Path:
    if path.is_file():
        if path.suffix == ".onnx":
            return path
        raise UsageError(f"{path} is not an ONNX file: give one, a bundle, or module:function")
    if (graph := find_graph(path)) is not None:
        return graph
    raise UsageError(
        f"{path} has no ONNX file: of a PyTorch model give module:function of a callable"
    )


def _specs(nodes: Sequence[Any]) -> tuple[TensorSpec, ...]:
    """Return the specs of a session's nodes; an unnamed dimension is named after its tensor."""
    return tuple(
        TensorSpec(
            node.name,
            NUMPY_NAMES.get(node.type, node.type),
            tuple(
                f"{node.name} {axis}" if size is None else size
                for axis, size in enumerate(node.shape)
            ),
        )
        for node in nodes
    )


def _taken(inputs: Sequence[TensorSpec], feeds: Feeds) -> dict[str, NDArray[Any]]:
    """Return the feeds that a graph takes, cast to its dtypes within integers or floats."""
    taken = {}
    for spec in inputs:
        value = np.asarray(feeds[spec.name])
        try:
            dtype = np.dtype(spec.dtype)
        except TypeError:
            dtype = value.dtype  # numpy does not have this dtype; onnxruntime raises the error
        taken[spec.name] = value.astype(dtype) if dtype.kind == value.dtype.kind else value
    return taken


def _precision(graph: Path, specs: Sequence[TensorSpec]) -> str | None:
    """Return the precision of the weights; without onnx_ir, that of the inputs and outputs."""
    if importlib.util.find_spec("onnx_ir") is None:
        return "fp16" if any(spec.dtype == "float16" for spec in specs) else None
    import onnx_ir as ir

    from loradeploy.export.match.products import precision_of

    check_file(graph, error=UsageError, limit=MAX_GRAPH_BYTES)
    return precision_of(ir.load(graph))


def _beside(path: Path, outputs: Sequence[TensorSpec]) -> dict[str, Any]:
    """Return the vocabulary size, labels and tokenizer from the files beside a graph."""
    config = model_config(path, error=DataError)
    vocabulary = config.get("vocab_size")
    if not isinstance(vocabulary, int):
        last = [s.shape[-1] for s in outputs if s.name == LOGITS and len(s.shape) == 3]
        vocabulary = last[0] if last and isinstance(last[0], int) else None
    tokenizer = path / TOKENIZER_NAME
    return {
        "vocabulary": vocabulary,
        "labels": labels_of(config.get("id2label")),
        "tokenizer": tokenizer if tokenizer.is_file() else None,
    }


# -- Python ----------------------------------------------------------------------------------------


def _is_dotted(text: str) -> bool:
    return bool(text) and all(part.isidentifier() for part in text.split("."))


def _imported(module: str, attribute: str) -> Any:
    """Import `module:attribute` with the working directory on the path, as `python -m` does."""
    with _working_directory():
        try:
            found: Any = importlib.import_module(module)
        except (Exception, SystemExit) as problem:  # anything that the user's module raises
            raise UsageError(
                f"{module}:{attribute} cannot be imported: {kind_and_line(problem)}"
            ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise UsageError(f"{module} has no {attribute}: give module:function of a callable")
        found = getattr(found, part)
    return found


@contextmanager
def _working_directory() -> Iterator[None]:
    here = os.getcwd()
    if here in sys.path or "" in sys.path:
        yield
        return
    sys.path.insert(0, here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _open_object(given: Any, title: str) -> Side:
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(given, torch.nn.Module):
        return _open_module(given, title)
    if not callable(given) or inspect.isclass(given):
        raise UsageError(
            f"{title} is not a model to compare: give an ONNX file, a bundle, a torch.nn.Module, or"
            " a function of feeds that returns outputs"
        )

    def run(feeds: Feeds) -> Given:
        # Copies, so that a function that changes its inputs does not affect the other side.
        return arrays_of(given({name: np.array(value) for name, value in feeds.items()}))

    return Side(title, short_title(title), run)


def _open_module(module: torch.nn.Module, title: str) -> Side:
    """Open a module in its current state, on the device and in the float dtype of its weights.

    Feeds are passed to `forward` by name if it has any of the names, otherwise in order.
    """
    import torch

    takes = inspect.signature(module.forward).parameters
    tensors = [*module.parameters(), *module.buffers()]
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    device = tensors[0].device if tensors else torch.device("cpu")
    width = floats[0].dtype if floats else torch.float32

    def tensor(value: NDArray[Any]) -> torch.Tensor:
        made = torch.from_numpy(np.array(value)).to(device)
        return made.to(width) if made.is_floating_point() else made

    def run(feeds: Feeds) -> Given:
        given: dict[str, Any] = {name: tensor(value) for name, value in feeds.items()}
        if "past_key_values" in takes:
            given |= _cache(given)
        named = {name: value for name, value in given.items() if name in takes}
        with torch.inference_mode():
            return arrays_of(module(**named) if named else module(*given.values()))

    config = getattr(module, "config", None)
    vocabulary = getattr(config, "vocab_size", None)
    halves = {torch.float16: "fp16", torch.bfloat16: "bf16"}
    return Side(
        title,
        short_title(title),
        run,
        precision=halves.get(width, "fp32"),
        vocabulary=vocabulary if isinstance(vocabulary, int) else None,
        labels=labels_of(getattr(config, "id2label", None)),
        hint=" (it is in training mode: call .eval() on it)" if module.training else "",
    )


def _cache(given: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Return arguments with transformers' cache made of `past_key_values.{i}.key` and `.value`."""
    layers = sum(name.startswith(PAST) and name.endswith(".key") for name in given)
    if not layers:
        return {}
    from transformers.cache_utils import DynamicCache

    pairs = [(given[f"{PAST}{i}.key"], given[f"{PAST}{i}.value"]) for i in range(layers)]
    return {"past_key_values": DynamicCache(pairs), "use_cache": True}


def _title(given: Any) -> str:
    named = given if hasattr(given, "__qualname__") else type(given)
    return f"{named.__module__}.{named.__qualname__}"


def short_title(title: str) -> str:
    """Return the file name of a path, or the function's name of "module:function"."""
    if os.path.exists(title) or os.sep in title:
        return Path(title).name
    return title.rpartition(":")[2].rpartition(".")[2]
