"""Run a bundle's source on a sample: a checkpoint in PyTorch, a graph in onnxruntime.

A checkpoint is also run with an update, by the equation y = x Wᵀ + (x A) B at the outputs of
PyTorch's modules, independently of the graph.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.dtypes import NUMPY_NAMES
from loradeploy.bundle.manifest import TensorSpec
from loradeploy.bundle.names import ATTENTION_MASK, INPUT_IDS, PAST
from loradeploy.bundle.sample import Sample
from loradeploy.errors import ExportError, first_line
from loradeploy.export.graph.running import NotRunError, Outputs, open_graph, run_graph
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnxruntime
    import torch
    from numpy.typing import NDArray

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.sample import Feeds

logger = logger_of(__name__)

_RANK: Final = 2
# Dtypes of inputs that can be generated.
_DTYPES: Final = ("float32", "float16", "int64", "int32", "bool")


@dataclass(frozen=True, eq=False)
class Update:
    """A low-rank update of modules' outputs by name: A [in, rank] and s · B [rank, out].

    `of`: the name of the adapter, None for random factors. `outputs`: the source's with the update.
    """

    of: str | None
    factors: Mapping[str, tuple[NDArray[np.float32], NDArray[np.float32]]]
    outputs: Outputs


@dataclass(frozen=True, eq=False)
class Original:
    """The source's `outputs` by name for `feeds`, and those with an `update` if it was run.

    `embedded`: the same with embeddings in place of some tokens.
    """

    feeds: Feeds
    outputs: Outputs
    update: Update | None = None
    embedded: Original | None = None


# -- a checkpoint ----------------------------------------------------------------------------------


def run_module(
    model: Any,
    wrapper: torch.nn.Module,
    names: Sequence[str],
    feeds: Feeds,
    adapters: Mapping[str, Adapter],
    embedded: tuple[torch.nn.Module, Feeds] | None,
) -> Original | None:
    """Run the model in PyTorch; None if it fails on the sample.

    `wrapper` takes the inputs as they were traced and gives the outputs `names`. The update is that
    of the first of `adapters` with factors of linear layers only, else a random one. `embedded`: a
    wrapper that takes embeddings too, and its sample.

    Raises:
        ExportError: the model does not take embeddings, which the bundle has to; or its outputs are
            NaN.
    """
    try:
        outputs = _run(wrapper, names, feeds)
    except Exception as problem:  # any error of the model's code for rows of a few tokens
        logger.warning("not compared with PyTorch, it fails on a sample: %s", first_line(problem))
        return None
    if damaged := [name for name, values in outputs.items() if _has_nan(values)]:
        raise ExportError(
            f"{type(model).__name__} gives NaN as {damaged[0]} in PyTorch for tokens of a trial:"
            " weights of its checkpoint are damaged"
        )
    original = Original(feeds, outputs)
    if embedded is not None:
        fed, its = embedded
        try:
            original = replace(original, embedded=Original(its, _run(fed, names, its)))
        except Exception as problem:  # a model that needs its tokens too
            raise ExportError(
                f"{type(model).__name__} does not take embeddings in place of tokens:"
                f" {first_line(problem)}"
            ) from None
    try:
        given = _given(adapters)
        of, factors = given if given is not None else (None, _made(model))
        with _updated(model, factors) as all_found:
            updated = _run(wrapper, names, feeds)
    except Exception as problem:  # a layer that is called in an unusual way
        logger.warning("an update was not compared with PyTorch: %s", first_line(problem))
        return original
    return replace(original, update=Update(of, factors, updated)) if all_found else original


def _has_nan(values: NDArray[Any]) -> bool:
    return values.dtype.kind == "f" and bool(np.isnan(values).any())


def _run(wrapper: torch.nn.Module, names: Sequence[str], feeds: Feeds) -> Outputs:
    import torch

    tensors = {name: torch.from_numpy(values) for name, values in feeds.items()}
    plain = [tensor for name, tensor in tensors.items() if not name.startswith(PAST)]
    past = [tensor for name, tensor in tensors.items() if name.startswith(PAST)]
    arguments: list[Any] = [plain]
    if past:
        arguments.append(list(zip(past[::2], past[1::2], strict=True)))
    with torch.no_grad():
        results = wrapper(*arguments)
    return {name: np.array(value) for name, value in zip(names, results, strict=True)}


def _given(
    adapters: Mapping[str, Adapter],
) -> tuple[str, dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]] | None:
    for name, adapter in adapters.items():
        pairs = adapter.factors
        plain = all(p.kind == "linear" and p.magnitude is p.bias is None for p in pairs.values())
        brought = adapter.saved or adapter.carried or adapter.rows
        if pairs and plain and not brought and not adapter.changes_base:
            return name, {
                module: (
                    pair.A.astype(np.float32).T,
                    pair.B.astype(np.float32).T * np.float32(adapter.scaling(module)),
                )
                for module, pair in pairs.items()
            }
    return None


def _made(model: Any) -> dict[str, tuple[NDArray[np.float32], NDArray[np.float32]]]:
    """Random factors for one linear layer in the middle of the model."""
    import torch
    from transformers.pytorch_utils import Conv1D

    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear | Conv1D)
    ]
    if not found:
        return {}
    name, module = found[len(found) // 2]
    out, into = module.weight.shape
    if isinstance(module, Conv1D):
        out, into = into, out
    return {name: random_factors(int(into), int(out), scale=0.5)}


def random_factors(
    into: int, out: int, *, scale: float, experts: int = 1
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Random A [in, rank] and B [rank, out]; for x of size 1 the update has the size `scale`.

    The rank includes all `experts`.
    """
    rank = _RANK * experts
    random = np.random.default_rng([into, out])
    A = random.standard_normal((into, rank)) / np.sqrt(into)
    B = random.standard_normal((rank, out)) * (scale / np.sqrt(_RANK))
    return A.astype(np.float32), B.astype(np.float32)


@contextmanager
def _updated(
    model: Any, factors: Mapping[str, tuple[NDArray[Any], NDArray[Any]]]
) -> Iterator[bool]:
    """Apply the updates to `model` until the context ends; yield whether it has all modules."""
    import torch

    modules = dict(model.named_modules())
    handles = []
    try:
        for name, (A, B) in factors.items():
            if name in modules:
                a, b = torch.from_numpy(A), torch.from_numpy(B)

                def add(_: Any, inputs: Any, y: Any, a: Any = a, b: Any = b) -> Any:
                    return y + ((inputs[0].to(a.dtype) @ a) @ b).to(y.dtype)

                handles.append(modules[name].register_forward_hook(add))
        yield bool(factors) and len(handles) == len(factors)
    finally:
        for handle in handles:
            handle.remove()


# -- a graph ---------------------------------------------------------------------------------------


def run_source_graph(
    file: Path,
    feeds: Feeds,
    names: Sequence[str],
    renamed: Mapping[str, str],
    *,
    packed: bool = False,
) -> Original:
    """Run the graph in `file`, for those of the outputs `names` that it has.

    `renamed`: the names in the file of inputs and outputs that were renamed. `packed`: as in
    `trial_options`.

    Raises:
        NotRunError: onnxruntime does not open the graph, or does not run it on these feeds.
    """
    return run_source_session(open_graph(file, packed=packed), feeds, names, renamed)


def run_source_session(
    session: onnxruntime.InferenceSession,
    feeds: Feeds,
    names: Sequence[str],
    renamed: Mapping[str, str],
) -> Original:
    """As `run_source_graph`, for a graph that is open.

    Raises:
        NotRunError: onnxruntime does not run it on these feeds.
    """
    new = {old: name for name, old in renamed.items()}
    taken = {new.get(node.name, node.name): node for node in session.get_inputs()}
    besides = [node for name, node in taken.items() if name not in feeds]
    if any(NUMPY_NAMES.get(node.type) not in _DTYPES for node in besides):
        raise NotRunError(f"it has another input {besides[0].name}", lacking=True)
    # Inputs that the bundle's graph no longer has, such as a switch between two branches.
    specs = [TensorSpec(n.name, NUMPY_NAMES[n.type], _named(n.shape)) for n in besides]
    every = {**feeds, **Sample(specs, {}).feeds(*_sizes(feeds))}
    own = [new.get(node.name, node.name) for node in session.get_outputs()]
    given = {node.name: every[name] for name, node in taken.items()}
    requested = {renamed.get(name, name): name for name in names if name in own}
    outputs = run_graph(session, given, list(requested))
    return Original(feeds, {requested[name]: values for name, values in outputs.items()})


def _sizes(feeds: Feeds) -> tuple[int, ...]:
    """The rows, tokens and cached tokens of `feeds`; () if it has no tokens."""
    ids = feeds.get(INPUT_IDS)
    if ids is None or ids.ndim != 2:
        return ()
    rows, length = ids.shape
    mask = feeds.get(ATTENTION_MASK)
    return rows, length, 0 if mask is None else max(0, mask.shape[-1] - length)


def _named(shape: Sequence[int | str | None]) -> tuple[int | str, ...]:
    return tuple("?" if size is None else size for size in shape)
