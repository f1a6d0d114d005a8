"""Whether the manifest describes the adapters in the bundle as an export does.

Sessions read an adapter's labels, the meaning of its scores and the digests of its text files from
there, and its weights from the files that the backends check.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from loradeploy.adapter.files.peft import load_adapter
from loradeploy.bundle.fitting.added_tokens import tokens_of
from loradeploy.bundle.fitting.fit import fitted
from loradeploy.bundle.fitting.labels import head_of
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.names import ADAPTERS_DIRECTORY, NATIVE_SUFFIX
from loradeploy.bundle.text.beside import vocabulary_of
from loradeploy.disk import scratch_directory
from loradeploy.errors import LoraDeployError, first_line, shown
from loradeploy.export.files.texts import base_tokenizer, write_texts
from loradeploy.files import inside
from loradeploy.lora.quiet import quiet_loradeploy

if TYPE_CHECKING:
    from collections.abc import Mapping
    from typing import Any

    from loradeploy.bundle.manifest import AdapterEntry
    from loradeploy.bundle.text.tokenizer import Tokenizer
    from loradeploy.parity.context import CheckContext

ASPECT: Final = "adapters"
_SUFFIXES: Final = (NATIVE_SUFFIX, ".safetensors")


def differing_adapters(context: CheckContext) -> Iterator[tuple[str, str]]:
    """Yield the aspect and a message for each adapter that the manifest describes otherwise."""
    entries = context.manifest.adapters
    for name in _unnamed(context):
        yield ASPECT, f"{name} is of an adapter that the manifest does not name: export again"
    if not entries:
        return
    config = model_config(context.bundle)
    with quiet_loradeploy():
        try:
            base = base_tokenizer(context.bundle)
        except LoraDeployError:
            return  # another aspect names it
        for name, entry in entries.items():
            try:
                message = _difference(context, name, entry, config, base)
            except LoraDeployError as problem:
                message = first_line(problem)
            if message is not None:
                yield ASPECT, f"{name}: {message}: export again"


def _unnamed(context: CheckContext) -> Iterator[str]:
    """The directories and files of adapters that are not in the manifest."""
    directory = context.bundle / ADAPTERS_DIRECTORY
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        suffixes = ("",) if path.is_dir() else _SUFFIXES
        if not any(path.name == f"{n}{end}" for n in context.manifest.adapters for end in suffixes):
            yield f"{ADAPTERS_DIRECTORY}/{path.name}"


def _difference(
    context: CheckContext,
    name: str,
    entry: AdapterEntry,
    config: Mapping[str, Any],
    base: Tokenizer | None,
) -> str | None:
    manifest = context.manifest
    if entry.path != f"{ADAPTERS_DIRECTORY}/{name}":
        return f"its files are in {shown(entry.path)}, those of another name"
    directory = inside(context.bundle, entry.path)
    adapter = fitted(load_adapter(directory), manifest)
    head = head_of(adapter, manifest, config)
    for what, stated, own in (
        ("labels", entry.labels, head.labels),
        ("problem_type", entry.problem_type, head.problem_type),
    ):
        if stated != own:
            return f"the manifest's {what} are {shown(stated)}, those of its files {shown(own)}"
    own_tokens = tokens_of(adapter, manifest)
    vocabulary = vocabulary_of(manifest, config) if own_tokens is None else own_tokens
    with scratch_directory() as scratch:
        text = write_texts(name, directory, scratch, base, manifest, vocabulary)
    stated_files = {} if entry.text is None else entry.text.files
    own_files = {} if text is None else text.files
    for file in sorted({*stated_files, *own_files}):
        if stated_files.get(file) != own_files.get(file):
            return f"{entry.path}/{file} is not the file that came with the bundle"
    return None
