"""A bundle on ONNX Runtime, its adapters swapped per call and per row of a batch."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnxruntime

from loradeploy.adapter.digest import file_digest, tensors_digest
from loradeploy.adapter.peft import load_adapter
from loradeploy.adapter.tensors import read_arrays
from loradeploy.bundle.factors import check_side_inputs, side_inputs
from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.bundle.names import ADAPTER_IDS, DEFAULTS_NAME, GRAPH_NAME, NATIVE_SUFFIX
from loradeploy.bundle.native import read_onnx_adapter
from loradeploy.errors import AdapterError, BundleError, UnknownAdapterError, UsageError
from loradeploy.files import inside
from loradeploy.runtime.bank import AdapterBank

if TYPE_CHECKING:
    from numpy.typing import NDArray

Adapters = str | Sequence[str | None] | None
Feed = "NDArray[Any] | onnxruntime.OrtValue"

# Where factors and outputs live for a provider; for those not listed, in host memory.
_DEVICES: Final = {"CUDAExecutionProvider": "cuda", "TensorrtExecutionProvider": "cuda"}
_ORT_DTYPES: Final = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(bool)": "bool",
}
_ERRORS_ONLY: Final = 3


class AdapterSession:
    """An inference session on a bundle.

    `providers`: onnxruntime's execution providers in order of preference; the CPU's by default.
    `session_options`: onnxruntime's; by default its own but for the log level, since it warns once
    for every side input.

    The adapters that came with the bundle are loaded when they are first used. Loading, unloading
    and running are safe from several threads.

    Raises:
        BundleError: the bundle is broken, or its graph is not what its manifest says.
        UsageError: a provider that this onnxruntime does not have.
    """

    def __init__(
        self,
        bundle: str | os.PathLike[str],
        providers: Sequence[str] | None = None,
        *,
        session_options: onnxruntime.SessionOptions | None = None,
    ) -> None:
        self.path = Path(bundle)
        self.manifest: Manifest = read_manifest(bundle)
        self._session = _open(self.path, providers, session_options)
        _check_graph(self.path, self.manifest, self._session)
        self._device = _DEVICES.get(self.providers[0], "cpu")
        self._bank = AdapterBank(self.manifest, self._defaults(), device=self._device)
        self._loading = threading.Lock()
        self._inputs = {spec.name: np.dtype(spec.dtype) for spec in self.manifest.inputs}
        self._outputs = tuple(spec.name for spec in self.manifest.outputs)

    @property
    def providers(self) -> tuple[str, ...]:
        """The execution providers that run the graph, in order."""
        return tuple(self._session.get_providers())

    @property
    def adapters(self) -> dict[str, str]:
        """Name and digest of every adapter that a run can use, loaded already or in the bundle."""
        in_bundle = {name: entry.digest for name, entry in self.manifest.adapters.items()}
        loaded = {name: resident.digest for name, resident in self._bank.residents().items()}
        return dict(sorted({**in_bundle, **loaded}.items()))

    def load(self, name: str, path: str | os.PathLike[str]) -> str:
        """Load the adapter at `path` as `name` and return its digest.

        `path` is a PEFT directory, its .safetensors file, or an .onnx_adapter file. A failure
        leaves the session as it was.

        Raises:
            AdapterError: the adapter is refused, or does not fit (AdapterMismatchError).
            UsageError: another adapter has this name.
        """
        place = Path(path)
        if place.suffix == NATIVE_SUFFIX:
            arrays = read_onnx_adapter(place)
            check_side_inputs(arrays, self.manifest)
            digest, labels = tensors_digest(arrays, {}), None
        else:
            adapter = load_adapter(place)
            arrays = side_inputs(adapter, self.manifest)
            digest, labels = adapter.digest, adapter.labels
        self._bank.add(name, arrays, digest=digest, labels=labels)
        return digest

    def unload(self, name: str) -> None:
        """Let go of the adapter `name`, once the runs that use it have ended.

        One that came with the bundle can still be used: it is then loaded again.

        Raises:
            UnknownAdapterError: no adapter is loaded under this name.
        """
        self._bank.remove(name)

    def labels(self, name: str | None) -> tuple[str, ...] | None:
        """The label names that the adapter `name` was trained with, where it says."""
        if name is None:
            return None
        self._ensure_loaded([name])
        resident = self._bank.residents().get(name)
        return None if resident is None else resident.labels

    def run(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, NDArray[Any] | onnxruntime.OrtValue],
        adapters: Adapters = None,
    ) -> list[NDArray[Any]]:
        """Run the graph, as `onnxruntime.InferenceSession.run` does, with adapters.

        `adapters`: None is the base, a name one adapter for all rows, a sequence one for each row
        of the batch, in which None is the base. `output_names` None means all outputs.

        Raises:
            UnknownAdapterError: an adapter that was never loaded.
            UsageError: a missing or unknown feed or output, or not one adapter for each row.
        """
        binding = self._run(output_names, feeds, adapters)
        outputs: list[NDArray[Any]] = binding.copy_outputs_to_cpu()
        return outputs

    def run_with_ort_values(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, NDArray[Any] | onnxruntime.OrtValue],
        adapters: Adapters = None,
    ) -> list[onnxruntime.OrtValue]:
        """As `run`, but the outputs stay on the device: a cache goes round without a copy."""
        outputs: list[onnxruntime.OrtValue] = self._run(output_names, feeds, adapters).get_outputs()
        return outputs

    def _run(
        self,
        output_names: Sequence[str] | None,
        feeds: Mapping[str, NDArray[Any] | onnxruntime.OrtValue],
        adapters: Adapters,
    ) -> onnxruntime.IOBinding:
        wanted = self._outputs if output_names is None else tuple(output_names)
        self._check_names(wanted, feeds)
        binding = self._session.io_binding()
        rows = 0
        for name, value in feeds.items():
            if not isinstance(value, onnxruntime.OrtValue):
                array = np.ascontiguousarray(value, dtype=self._inputs[name])
                value = onnxruntime.OrtValue.ortvalue_from_numpy(array)
            rows = value.shape()[0]
            binding.bind_ortvalue_input(name, value)
        for name in wanted:
            binding.bind_output(name, self._device)
        names = self._check_adapters(adapters, rows)
        with self._bank.lease(names) as values:
            for name, value in values.items():
                binding.bind_ortvalue_input(name, value)
            self._session.run_with_iobinding(binding)
        return binding

    def _check_names(self, outputs: Sequence[str], feeds: Mapping[str, object]) -> None:
        if unknown := [name for name in outputs if name not in self._outputs]:
            raise UsageError(f"no output is called {unknown[0]!r}: there are {self._outputs}")
        if feeds.keys() != self._inputs.keys():
            missing = sorted(self._inputs.keys() - feeds.keys())
            unknown = sorted(feeds.keys() - self._inputs.keys())
            raise UsageError(
                f"the feeds do not fit the graph: missing {missing}, unknown {unknown}"
            )

    def _check_adapters(self, adapters: Adapters, rows: int) -> Adapters:
        if adapters is None:
            return None
        names = [adapters] if isinstance(adapters, str) else list(adapters)
        if not isinstance(adapters, str) and len(names) != rows:
            raise UsageError(f"{len(names)} adapters for a batch of {rows} rows: give one for each")
        if self.manifest.mode == "merged" and any(name is not None for name in names):
            raise UsageError(
                "this bundle is merged and takes no adapters: export the base without --merge"
            )
        self._ensure_loaded(names)
        return adapters if isinstance(adapters, str) else names

    def _ensure_loaded(self, names: Sequence[str | None]) -> None:
        """Load those of `names` that came with the bundle and are not loaded yet."""
        for name in names:
            if name is None or name in self._bank:
                continue
            entry = self.manifest.adapters.get(name)
            if entry is None or entry.path is None:
                usable = ", ".join(self.adapters) or "none"
                raise UnknownAdapterError(f"no adapter is loaded as {name!r}; there are: {usable}")
            with self._loading:
                if name not in self._bank:
                    digest = self.load(name, inside(self.path, entry.path))
                    if digest != entry.digest:
                        self._bank.remove(name)
                        raise BundleError(
                            f"{self.path / entry.path} is not the adapter that came with the"
                            " bundle: its digest has changed; export again, or load it by hand"
                        )

    def _defaults(self) -> Mapping[str, NDArray[Any]]:
        if not self.manifest.saved:
            return {}
        defaults, _ = read_arrays(self.path / DEFAULTS_NAME, error=BundleError)
        try:
            check_side_inputs(defaults, self.manifest)
        except AdapterError as problem:
            raise BundleError(f"{self.path / DEFAULTS_NAME}: {problem}") from None
        if missing := [s.input for s in self.manifest.saved if s.input not in defaults]:
            raise BundleError(f"{self.path / DEFAULTS_NAME} lacks {missing[0]}: export again")
        return defaults


def _open(
    bundle: Path,
    providers: Sequence[str] | None,
    options: onnxruntime.SessionOptions | None,
) -> onnxruntime.InferenceSession:
    asked = list(providers) if providers is not None else ["CPUExecutionProvider"]
    available = onnxruntime.get_available_providers()
    for provider in asked:
        if provider not in available:
            raise UsageError(
                f"this onnxruntime has no {provider}; it has {', '.join(available)}:"
                " install the onnxruntime build for that provider"
            )
    graph = bundle / GRAPH_NAME
    if not graph.is_file():
        raise BundleError(f"{bundle} holds no {GRAPH_NAME}: export again")
    if options is None:
        options = onnxruntime.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
    try:
        return onnxruntime.InferenceSession(os.fspath(graph), options, providers=asked)
    except Exception as problem:  # onnxruntime's own exceptions share no base but this
        first = str(problem).strip().splitlines()[0]
        raise BundleError(f"onnxruntime cannot open {graph}: {first}") from None


def _check_graph(bundle: Path, manifest: Manifest, session: onnxruntime.InferenceSession) -> None:
    """Raise BundleError unless the graph takes and gives what the manifest says."""
    required = {node.name: node for node in session.get_inputs()}
    overridable = {node.name: node for node in session.get_overridable_initializers()}
    outputs = {node.name: node for node in session.get_outputs()}
    problems = []
    for specs, nodes, kind in (
        (manifest.inputs, required, "input"),
        (manifest.outputs, outputs, "output"),
    ):
        for spec in specs:
            node = nodes.get(spec.name)
            if node is None:
                problems.append(f"the graph has no {kind} {spec.name}")
            elif _ORT_DTYPES.get(node.type) != spec.dtype or not _fits(node.shape, spec.shape):
                problems.append(
                    f"the {kind} {spec.name} is {node.type} {node.shape},"
                    f" the manifest says {spec.dtype} {list(spec.shape)}"
                )
        problems += [
            f"the graph's {kind} {name} is not in the manifest"
            for name in nodes
            if name not in {spec.name for spec in specs}
        ]
    shapes: dict[str, tuple[int | str, ...]] = {}
    for target in manifest.targets:
        shapes[target.lora_A] = ("adapters", target.in_features, "rank")
        shapes[target.lora_B] = ("adapters", "rank", target.out_features)
    for saved in manifest.saved:
        shapes[saved.input] = ("adapters", *saved.slot_shape)
    for name, shape in shapes.items():
        node = overridable.get(name)
        if node is None:
            problems.append(f"the graph has no side input {name}")
        elif not _fits(node.shape, shape):
            problems.append(f"the side input {name} is {node.shape}, the manifest says {shape}")
    if shapes and ADAPTER_IDS not in overridable:
        problems.append(f"the graph has no side input {ADAPTER_IDS}")
    if not problems and manifest.graph_digest not in (None, file_digest(bundle / GRAPH_NAME)):
        problems.append("its digest has changed since the export")
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise BundleError(
            f"{bundle / GRAPH_NAME} does not fit {bundle}'s manifest:"
            f" {'; '.join(problems[:3])}{more}. Export again."
        )


def _fits(actual: Sequence[int | str | None], told: Sequence[int | str]) -> bool:
    """Whether two shapes have one length and agree wherever both are numbers."""
    return len(actual) == len(told) and all(
        a == t
        for a, t in zip(actual, told, strict=True)
        if isinstance(a, int) and isinstance(t, int)
    )
