"""The table of backends that are compared with the reference, and their requirements."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.files.peft import names_targets
from loradeploy.bundle.fitting.added_tokens import with_all_tokens
from loradeploy.errors import UsageError
from loradeploy.parity.backends import evaluator, genai, ort
from loradeploy.parity.backends.onnx_model import NotRunError
from loradeploy.parity.context import CheckContext
from loradeploy.parity.names import (
    CHUNKED,
    DECODE,
    EMBEDDED,
    ENCODER,
    ONE_ROW,
    ONNX_GENAI,
    ONNX_MERGED,
    ONNX_MIXED,
    ONNX_NATIVE,
    ONNX_REFERENCE,
    ONNX_SIDE_INPUTS,
    PADDED_BATCH,
    PEFT,
    PERMUTED,
    PREFILL,
    REPEAT,
    TORCH_MERGED,
)
from loradeploy.parity.phases.models import Model
from loradeploy.parity.reference.loading import merged
from loradeploy.parity.reference.model import TorchModel
from loradeploy.parity.reference.peft import with_peft
from loradeploy.parity.reference.quantized import QUANTIZED
from loradeploy.parity.reference.tied import rows_of_tied, with_rows_of_tied

if TYPE_CHECKING:
    import torch

# A backend opened with each adapter in turn (None is the base); requesting the next model closes
# the previous one.
Opened = Iterator[tuple[str | None, Model]]

REFERENCE_TITLE: Final = "PyTorch, loradeploy's LoRA"


@dataclass(frozen=True)
class Backend:
    """A way to run the model that is compared with the reference.

    `needs_adapter`: it does not run the base alone. `mixed`: every row has its own adapter.
    `modes`: the kinds of bundle that it applies to. `needs`: an optional package that it requires.
    `on_torch`: it uses the reference's PyTorch model; other backends open ONNX files.
    `on_onnxruntime`: it runs in this process's onnxruntime, once for each variant of the check.
    `captured`: it runs in an `AdapterSession`, which can capture runs. `operated`: the kinds of
    bundle whose own graph it runs in one, which can have the operators' library.
    `batched`: it takes more than one row. `lacks`: returns any other reason why it cannot be run.
    `unasked`: returns whether it runs without being requested by name; if it does not, the report
    does not mention it.
    """

    name: str
    title: str
    modes: tuple[str, ...]
    phases: tuple[str, ...]
    open: Callable[..., Opened]
    on_torch: bool = False
    needs_adapter: bool = True
    mixed: bool = False
    needs: str | None = None
    on_onnxruntime: bool = False
    captured: bool = False
    operated: tuple[str, ...] = ()
    batched: bool = True
    lacks: Callable[[CheckContext], str | None] | None = None
    unasked: Callable[[CheckContext], bool] | None = None

    def missing(self, context: CheckContext) -> str | None:
        """Return why the backend cannot be run here; None if it can."""
        if self.needs is not None and importlib.util.find_spec(self.needs) is None:
            return f"{self.needs} is not installed"
        if self.needs_adapter and not context.adapters:
            return "no adapter is in the bundle or given"
        if self.on_torch and context.merged and context.manifest.precision in QUANTIZED:
            return "it does not round the merged weights, as the graph does"
        return None if self.lacks is None else self.lacks(context)


def _torch_merged(context: CheckContext, model: torch.nn.Module) -> Opened:
    for tested in context.adapters:
        whole = with_all_tokens(tested.adapter, context.manifest)
        with with_rows_of_tied(model, whole, context.manifest) as left, merged(model, left):
            yield tested.name, TorchModel.of(context, model)


def _peft(context: CheckContext, model: torch.nn.Module) -> Opened:
    unread: list[str] = []
    for tested in context.adapters:
        with with_peft(model, tested) as tensor:
            if tensor is not None:
                unread.append(f"PEFT does not read {tensor} of {tested.name}: it has other names")
                continue
            yield tested.name, TorchModel.of(context, model)
    if unread:
        raise NotRunError("; ".join(unread))


def _peft_lacks(context: CheckContext) -> str | None:
    """Return why PEFT cannot load an adapter as the graph does; None if it can.

    The adapter has no factors, or the model has rows for more tokens, or PEFT would replace rows of
    a tied quantized head, which the graph only changes.
    """
    for tested in context.adapters:
        own = tested.adapter.factors
        if not own and not tested.adapter.rows:
            return f"PEFT cannot load {tested.name}, an adapter without factors"
        if own and not names_targets(tested.path):
            return f"PEFT adapts other modules: the config of {tested.name} has no target_modules"
        whole = with_all_tokens(tested.adapter, context.manifest).factors
        if any(
            (own[module].A.shape, own[module].B.shape) != (pair.A.shape, pair.B.shape)
            for module, pair in whole.items()
        ):
            return f"{tested.name} has factors for fewer tokens than the bundle has rows"
        for shared in rows_of_tied(tested.adapter, context.manifest).values():
            return (
                f"PEFT replaces the trained rows of {shared[0]}; here the difference that"
                f" {tested.name} trained is added to the quantized rows"
            )
    return None


_SIDE, _MERGED = "side-inputs", "merged"
_IN_TORCH: Final = (ENCODER, PREFILL, ONE_ROW)
_ALL: Final = (PREFILL, ONE_ROW, CHUNKED, PADDED_BATCH, PERMUTED, DECODE, REPEAT)
_IN_SESSIONS: Final = (*_ALL, EMBEDDED, ENCODER)
_BATCHED: Final = (PADDED_BATCH, PERMUTED, DECODE, EMBEDDED, ENCODER)
_ROW_BY_ROW: Final = (PREFILL, CHUNKED, DECODE)

BACKENDS: Final[tuple[Backend, ...]] = (
    Backend(
        TORCH_MERGED,
        "PyTorch merged",
        (_SIDE, _MERGED),
        _IN_TORCH,
        _torch_merged,
        on_torch=True,
    ),
    Backend(
        PEFT,
        "PEFT",
        (_SIDE, _MERGED),
        _IN_TORCH,
        _peft,
        on_torch=True,
        needs="peft",
        lacks=_peft_lacks,
    ),
    Backend(
        ONNX_MERGED,
        "ONNX merged",
        (_SIDE, _MERGED),
        _IN_SESSIONS,
        ort.merged_graph,
        on_onnxruntime=True,
        captured=True,
        operated=(_MERGED,),
    ),
    Backend(
        ONNX_SIDE_INPUTS,
        "ONNX side inputs",
        (_SIDE,),
        _IN_SESSIONS,
        ort.side_inputs,
        needs_adapter=False,
        on_onnxruntime=True,
        captured=True,
        operated=(_SIDE,),
    ),
    Backend(
        ONNX_NATIVE,
        "ONNX Runtime adapter",
        (_SIDE,),
        _IN_SESSIONS,
        ort.native_adapter,
        on_onnxruntime=True,
    ),
    Backend(
        ONNX_MIXED,
        "ONNX mixed batch",
        (_SIDE,),
        _BATCHED,
        ort.mixed_batch,
        mixed=True,
        on_onnxruntime=True,
        captured=True,
        operated=(_SIDE,),
    ),
    Backend(
        ONNX_GENAI,
        "onnxruntime-genai",
        (_SIDE, _MERGED),
        _ROW_BY_ROW,
        genai.genai,
        needs_adapter=False,
        batched=False,
        lacks=genai.lacks,
        unasked=lambda context: genai.lacks(context) is None,
    ),
    Backend(
        ONNX_REFERENCE,
        "ONNX reference evaluator",
        (_SIDE, _MERGED),
        _ALL,
        evaluator.evaluator,
        needs_adapter=False,
        needs="onnx",
        lacks=evaluator.lacks,
        unasked=evaluator.is_quick,
    ),
)


def choose_backends(mode: str, asked: Sequence[str] | None) -> tuple[Backend, ...]:
    """Return the backends for a bundle of `mode`, or those of them named in `asked`.

    Raises:
        UsageError: an unknown name, or a backend that does not apply to this kind of bundle.
    """
    known = {backend.name: backend for backend in BACKENDS}
    for name in asked or ():
        if name not in known:
            raise UsageError(f"no backend is named {name!r}: there are {', '.join(known)}")
        if mode not in known[name].modes:
            raise UsageError(f"a bundle of the kind {mode!r} has no {known[name].title}: {name!r}")
    return tuple(
        backend
        for backend in BACKENDS
        if mode in backend.modes and (asked is None or backend.name in asked)
    )


def default_backends(
    backends: Sequence[Backend], context: CheckContext, asked: Collection[str]
) -> tuple[Backend, ...]:
    """Return `backends` without those that only run by request and are not in `asked`."""
    return tuple(
        backend
        for backend in backends
        if backend.name in asked or backend.unasked is None or backend.unasked(context)
    )


def open_backend(backend: Backend, context: CheckContext, model: Any) -> Opened:
    """Open `backend`; `model` is the reference's PyTorch model, for backends in PyTorch."""
    return backend.open(context, model) if backend.on_torch else backend.open(context)
