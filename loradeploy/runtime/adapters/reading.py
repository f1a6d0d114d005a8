"""Read adapters as side inputs of a bundle: those in the bundle, and others by path."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.files.digest import file_digest, short, tensors_digest
from loradeploy.adapter.files.peft import load_adapter
from loradeploy.adapter.files.tensors import read_arrays
from loradeploy.adapter.heads import UNDECLARED, Head
from loradeploy.bundle.adapter_inputs.base import BundleBase
from loradeploy.bundle.adapter_inputs.factors import check_side_inputs, side_inputs_of_fitted
from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter
from loradeploy.bundle.fitting.fit import fit_to
from loradeploy.bundle.fitting.labels import head_of, may_replace_head
from loradeploy.bundle.manifest import Manifest
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import DEFAULTS_NAME, NATIVE_SUFFIX
from loradeploy.bundle.proof.certificate import parity_command
from loradeploy.bundle.text.beside import text_directory
from loradeploy.bundle.trained_config import warn_of_trained_config
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    BundleError,
    UnknownAdapterError,
    listed_names,
    prefixing_errors,
)
from loradeploy.files import inside
from loradeploy.printable import logger_of
from loradeploy.runtime.adapters.resident import Arrays, FittedAdapter, Resident
from loradeploy.runtime.adapters.wholes import Wholes
from loradeploy.snapshot import Snapshot, of_one_version

logger = logger_of(__name__)

# The files that an adapter is read from; the directory may also have logs that are being written.
_SUFFIXES: Final = frozenset({".json", ".safetensors", NATIVE_SUFFIX})


@dataclass(frozen=True, eq=False)
class AdapterReader:
    """Reads adapters for the bundle in `directory`; `path` is its name in messages.

    `certified`: the digests of the adapters that a session may run; None allows any.
    `wholes`: records the complete adapters that split adapters are parts of.
    """

    path: Path
    directory: Path
    manifest: Manifest
    base: BundleBase
    certified: frozenset[str] | None
    wholes: Wholes

    def own(self, name: str) -> FittedAdapter:
        """Read the adapter `name` of the bundle.

        Raises:
            UnknownAdapterError: the bundle has no adapter of this name.
            BundleError: the adapter's files have changed since the export.
        """
        entry = self.manifest.adapters.get(name)
        if entry is None or entry.path is None:
            own = listed_names(sorted(self.manifest.adapters))
            raise UnknownAdapterError(
                f"{self.path} has no adapter {name!r}, it has: {own}. Give a path."
            )
        source = inside(self.directory, entry.path)
        if entry.native_digest is None:
            found = self._read(source)
        else:
            found = self._computed(source, entry.native_digest)
        if found.digest != entry.digest:
            raise BundleError(
                f"{source} is not the adapter that came with the bundle, its digest has changed:"
                " export again, or load it by its path under another name"
            )
        labels = found.head.labels
        if entry.labels is not None and labels != entry.labels:
            raise BundleError(
                f"{source} has other labels ({listed_names(labels or (), 3)}) than the adapter that"
                " came with the bundle: export again, or load it by its path under another name"
            )
        if entry.problem_type is None:  # bundles of earlier versions
            return found
        return replace(found, head=replace(found.head, problem_type=entry.problem_type))

    def _read(self, source: Path, given_as: str | None = None) -> FittedAdapter:
        """Read an adapter that fits the graph.

        `given_as`: the name of an adapter that is not the bundle's; its complete adapter is
        recorded.
        """
        with prefixing_errors(source, AdapterMismatchError):
            if source.suffix == NATIVE_SUFFIX:
                arrays = read_onnx_adapter(source)
                check_side_inputs(arrays, self.manifest)
                # The file cannot declare labels or a problem type. Without a head in it, the base's
                # apply.
                undeclared = may_replace_head(arrays, self.manifest)
                problem = UNDECLARED if undeclared else self.manifest.problem_type
                return FittedAdapter(arrays, tensors_digest(arrays, {}), Head(None, problem))
            whole = load_adapter(source)
            adapter = fit_to(whole, self.manifest)
            if given_as is not None:
                self.wholes.add(given_as, whole, adapter)
            arrays = side_inputs_of_fitted(adapter, self.manifest, self.base)
            return FittedAdapter(arrays, adapter.digest, self._head(adapter))

    def given(self, name: str, source: Path) -> FittedAdapter:
        """Read the adapter at `source`, which is not the bundle's, to be loaded as `name`.

        Raises:
            AdapterError: it is refused, does not fit (AdapterMismatchError), is not certified, or
                its files changed during each of several attempts.
        """
        found = of_one_version(
            source, lambda: _states(source), lambda: self._read(source, name), AdapterError
        )
        warn_of_trained_config(name, text_directory(source), model_config(self.directory))
        self._warn_of_ranges(name, source, found)
        if self.certified is not None and found.digest not in self.certified:
            form = ""
            if source.suffix == NATIVE_SUFFIX:
                form = ", which names PEFT directories: load its PEFT directory"
            raise AdapterError(
                f"{source} ({short(found.digest)}) is not among the adapters of the"
                f" certificate{form}; run {parity_command(self.path, adapter=True)} to check it"
            )
        return found

    def _warn_of_ranges(self, name: str, source: Path, found: FittedAdapter) -> None:
        """Warn of an adapter that the export did not measure in a graph that clips activations."""
        measured = {entry.digest for entry in self.manifest.adapters.values()}
        count = self.manifest.fixed_ranges
        if not count or found.digest in measured or found.digest in (self.certified or ()):
            return
        if source.suffix != NATIVE_SUFFIX or not self._is_own(found):
            logger.warning(
                "the adapter %s was not measured in this bundle, whose graph clips %d activations"
                " to ranges that were measured on the base, and may cut off its effect: export the"
                " bundle again with the adapter, or run %s",
                name,
                count,
                parity_command(self.path, adapter=True),
            )

    def _is_own(self, found: FittedAdapter) -> bool:
        """Whether an adapter of the bundle has the side inputs of `found`, an .onnx_adapter file.

        Such a file has another digest than the PEFT directory that it was made from.
        """
        for name in self.manifest.adapters:
            with contextlib.suppress(AdapterError, BundleError):
                own = self.own(name)
                if Resident(own.digest, own.arrays).computes(found):
                    return True
        return False

    def _computed(self, source: Path, native_digest: str) -> FittedAdapter:
        """Like `_read`, for an adapter whose side inputs the export computed before packing."""
        file = source.with_name(f"{source.name}{NATIVE_SUFFIX}")
        if not file.is_file() or file_digest(file) != native_digest:
            raise BundleError(
                f"{file} is not the file that came with the bundle: export again with the adapter"
            )
        arrays = self._read(file).arrays
        adapter = load_adapter(source)
        return FittedAdapter(arrays, adapter.digest, self._head(adapter))

    def _head(self, adapter: Adapter) -> Head:
        """The labels and problem type of `adapter`."""
        return head_of(adapter, self.manifest, model_config(self.directory))

    def defaults(self) -> Arrays:
        """Read the base's values of the parameters that adapters replace, by side input.

        Raises:
            BundleError: the file with them is not the bundle's.
        """
        if not self.manifest.saved:
            return {}
        file = self.directory / DEFAULTS_NAME
        defaults, _ = read_arrays(file, error=BundleError)
        replaced = {saved.input for saved in self.manifest.saved}
        if unknown := sorted(defaults.keys() - replaced):
            raise BundleError(
                f"{file} contains {unknown[0]}, which no adapter replaces: export again"
            )
        try:
            check_side_inputs(defaults, self.manifest)
        except AdapterError as problem:
            raise BundleError(f"{file}: {problem}") from None
        if missing := sorted(replaced - defaults.keys()):
            raise BundleError(f"{file} lacks {missing[0]}: export again")
        return defaults


def _states(source: Path) -> Snapshot:
    """The states of the files that the adapter at `source` is read from."""
    place = source if source.is_dir() else source.parent
    names = {source.name} if source != place else set()
    if source.suffix != NATIVE_SUFFIX:
        with contextlib.suppress(OSError):  # it was removed
            names |= {one.name for one in place.iterdir() if one.suffix in _SUFFIXES}
    return Snapshot.of(place, names)
