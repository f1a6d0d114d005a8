"""Convert adapters: to and from ONNX Runtime's format, from other libraries, to a lower rank."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from loradeploy.bundle.names import NATIVE_SUFFIX
from loradeploy.errors import AdapterError, UsageError
from loradeploy.files import check_keeps_inputs, check_replaceable_file
from loradeploy.paths import takes_paths

if TYPE_CHECKING:
    from loradeploy.adapter import Adapter
    from loradeploy.adapter.algebra.reduce import RankReport
    from loradeploy.adapter.readers.table import Arrays

StrPath = str | os.PathLike[str]


@dataclass(frozen=True)
class Conversion:
    """The converted adapter. `reduction`: the errors of the rank reduction, if there was one."""

    adapter: Adapter
    reduction: RankReport | None = None


@takes_paths("adapter", "output", "bundle", "model")
def convert(
    adapter: StrPath,
    output: StrPath,
    *,
    bundle: StrPath | None = None,
    rank: int | None = None,
    model: StrPath | None = None,
    name: str | None = None,
    trust_remote_code: bool = False,
) -> Conversion:
    """Convert the adapter at `adapter` in one of four ways, and write it to `output`.

    An adapter of another library (mlx-lm, torchtune, litgpt, llama.cpp, AdapterHub, Olive, a text
    encoder's of kohya or diffusers, a task's of jina-embeddings-v3, a state_dict() with adapters)
    is recognized by its content and converted to a PEFT directory, without further arguments where
    its files suffice.

    Args:
        adapter: a PEFT directory, another library's directory or .safetensors or .gguf file, or
            an .onnx_adapter file, if `bundle` is given or Olive wrote it.
        output: a PEFT directory, or an .onnx_adapter file if `bundle` is given.
        bundle: convert between both formats, for the graph of this bundle. The factors in an
            .onnx_adapter file include the scaling; a PEFT directory converted from one has alpha
            equal to the rank, and does not declare what a classifier's head answers: it is refused
            as a classifier until a config.json beside it states problem_type and id2label.
        rank: reduce to the best approximation of this rank, by singular values.
        model: convert an adapter of PiSSA or OLoRA, which needs a changed base, to standard LoRA
            of twice the rank on this unchanged base. Adapters of torchtune, litgpt, llama.cpp and
            kohya need the base too, for its names and its number of heads.
        name: which adapter to convert, if another library's file has several.
        trust_remote_code: run the Python files that the configuration of `model` names.

    Raises:
        UsageError: not exactly one conversion is requested, or it does not apply to this adapter;
            `output` has files that loradeploy did not write;
            the form of another library needs `model` or `name`, or does not use the one given.
        AdapterError: the adapter cannot be read, or (AdapterMismatchError) does not fit the bundle.
        BundleError, ModelError: the bundle or the model cannot be read.
    """
    from loradeploy.adapter.files.formats import other_file
    from loradeploy.adapter.readers.table import other_form

    theirs = None if bundle is not None else _arrays_of(Path(adapter))
    other = bundle is None and rank is None and other_form(adapter, theirs) is not None
    given = 3 - [bundle, rank, model].count(None)
    if not other and given != 1:
        if given:
            raise UsageError("give only one of `bundle`, `rank` and `model`")
        if not Path(adapter).exists():
            raise UsageError(f"{adapter} does not exist: give an adapter")
        if Path(adapter).is_file() and (found := other_file(Path(adapter))) is not None:
            raise AdapterError(f"{adapter} {found}")
        raise UsageError(
            f"give one of `bundle`, `rank` and `model`: {adapter} is not recognized as another"
            " library's adapter"
        )
    if not other and name is not None:
        raise UsageError("`name` is for another library's file with several adapters")
    if trust_remote_code and (model is None or other):
        raise UsageError("`trust_remote_code` is for the code of `model`, which is not run here")
    check_keeps_inputs(output, [path for path in (adapter, bundle, model) if path is not None])
    if bundle is not None:
        return Conversion(_between_forms(Path(adapter), Path(bundle), Path(output)))
    if rank is not None:
        return _of_lower_rank(adapter, rank, Path(output))
    if other:
        return Conversion(_of_another_library(adapter, Path(output), model, name, theirs))
    return Conversion(_of_unchanged_base(adapter, str(model), Path(output), trust_remote_code))


def _between_forms(adapter: Path, bundle: Path, output: Path) -> Adapter:
    from loradeploy.adapter import load_adapter
    from loradeploy.bundle.adapter_inputs.base import BundleBase
    from loradeploy.bundle.adapter_inputs.factors import adapter_from_side_inputs
    from loradeploy.bundle.adapter_inputs.native import (
        is_onnx_adapter,
        read_onnx_adapter,
        write_onnx_adapter,
    )
    from loradeploy.bundle.manifest import read_manifest

    manifest = read_manifest(bundle)
    base = BundleBase(bundle, manifest)
    to_native, from_native = (path.suffix == NATIVE_SUFFIX for path in (output, adapter))
    if to_native == from_native:
        raise UsageError(
            f"one of the adapter and `output` is an {NATIVE_SUFFIX} file, the other a PEFT"
            f" directory: {adapter} and {output} are not"
        )
    if to_native:
        check_replaceable_file(output, kind=f"an {NATIVE_SUFFIX} file", own=is_onnx_adapter)
        converted = load_adapter(adapter)
        write_onnx_adapter(converted, manifest, output, base)
    else:
        converted = adapter_from_side_inputs(read_onnx_adapter(adapter), manifest, base)
        _save(converted, output)
    return converted


def _arrays_of(adapter: Path) -> Arrays | None:
    """The tensors of an .onnx_adapter file; None for other files and directories."""
    from loradeploy.bundle.adapter_inputs.native import read_onnx_adapter

    is_native = adapter.suffix == NATIVE_SUFFIX and adapter.is_file()
    return read_onnx_adapter(adapter) if is_native else None


def _of_another_library(
    adapter: StrPath, output: Path, model: StrPath | None, name: str | None, arrays: Arrays | None
) -> Adapter:
    from loradeploy.adapter.readers.source import Base
    from loradeploy.adapter.readers.table import read_other
    from loradeploy.lora.base.checkpoint import find_checkpoint

    base = None if model is None else Base(find_checkpoint(model))
    converted = read_other(adapter, name=name, base=base, arrays=arrays)
    _save(converted, output)
    return converted


def _of_lower_rank(adapter: StrPath, rank: int, output: Path) -> Conversion:
    from loradeploy.adapter import load_adapter
    from loradeploy.adapter.algebra.reduce import reduce_rank

    before = load_adapter(adapter)
    highest = max((pair.rank for pair in before.factors.values()), default=0)
    if rank >= highest:
        raise UsageError(
            f"{os.fspath(adapter)} has no module with a rank above {highest}: give a lower rank"
        )
    reduced, reduction = reduce_rank(before, rank)
    _save(reduced, output)
    return Conversion(reduced, reduction)


def _of_unchanged_base(adapter: StrPath, model: str, output: Path, trusted: bool) -> Adapter:
    from loradeploy.adapter import load_adapter
    from loradeploy.lora.base.loading import custom_code

    before = load_adapter(adapter)
    if not before.changes_base:
        raise UsageError(f"{os.fspath(adapter)} is for the unchanged base: it needs no conversion")

    from loradeploy.lora.standard import to_standard_lora_from_checkpoint

    with custom_code(trusted):
        converted = to_standard_lora_from_checkpoint(before, model)
    _save(converted, output)
    return converted


def _save(adapter: Adapter, output: Path) -> None:
    from loradeploy.adapter import save_adapter
    from loradeploy.adapter.files.peft import own_files
    from loradeploy.files import atomic_directory
    from loradeploy.names import ADAPTER_CONFIG_NAME

    if output.suffix == NATIVE_SUFFIX:
        raise UsageError(f"{output}: an {NATIVE_SUFFIX} file is for a bundle, give `bundle`")
    with atomic_directory(output, marker=ADAPTER_CONFIG_NAME, own_files=own_files) as directory:
        save_adapter(adapter, directory)
