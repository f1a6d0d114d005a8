"""Write docs/api.md from the docstrings: `python -m tools.api_docs`."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import griffe

import loradeploy
from loradeploy.files import atomic_file

ROOT: Final = Path(__file__).resolve().parent.parent
PAGE: Final = ROOT / "docs" / "api.md"

# The sections of the page and their names, in order. The tree of errors follows.
ROOMS: Final = {
    "Train": ("train", "TrainConfig", "TrainResult"),
    "Export": ("export", "GraphForm", "Manifest"),
    "Run": (
        "AdapterSession", "build_operator", "TextGenerator", "GenerationOptions", "Generation",
        "TextPiece", "TokenLogprob", "TextScore", "TextClassifier", "Classification",
        "TextPairScorer", "RankedDocument", "TokenClassifier", "TokenClassification", "Entity",
        "SpeechRecognizer", "Transcript", "Segment",
        "TextEmbedder", "ImageClassifier", "ImageEmbedder", "ImageTextGenerator",
    ),
    "Serve": (
        "Engine", "Submission", "GenerationEvent", "Completion", "Usage", "EngineStatistics",
    ),
    "Prove": ("parity", "compare", "assert_parity", "ParityReport", "Limit", "CertificateMinimum"),
    "Adapters": (
        "load_adapter", "save_adapter", "combine", "reduce_rank", "Adapter", "AdapterConfig",
    ),
}  # fmt: skip

_OPENING: Final = """\
# Python API

Everything here is imported from `loradeploy`. The page is generated from the docstrings by
`python -m tools.api_docs`. The commands call these functions: an option of a command has the same
name here, with underscores.
"""


def main() -> None:
    """Write the page."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    with atomic_file(PAGE) as partial:
        partial.write_text(page(), encoding="utf-8")


def page() -> str:
    """Return the page in Markdown."""
    package = griffe.load("loradeploy", search_paths=[ROOT], docstring_parser="google")
    parts = [_OPENING]
    for title, names in ROOMS.items():
        parts.append(f"## {title}\n")
        for name in names:
            parts += _object(name, _found(package, name))
    parts.append("## Errors\n")
    tree = (loradeploy.errors.__doc__ or "").partition("\n")[2].strip("\n")
    parts.append(f"```text\n{_dedented(tree)}\n```\n")
    return "\n".join(parts)


def _found(package: Any, name: str) -> Any:
    value = getattr(loradeploy, name)
    module = value.__module__.removeprefix("loradeploy.")
    return package[f"{module}.{value.__qualname__}"]


def _object(name: str, found: Any) -> Iterator[str]:
    yield f"### `{name}`\n"
    if found.is_function:
        yield f"```python\n{_signature(name, found)}\n```\n"
    yield from _docstring(found)
    if not found.is_class:
        return
    fields = [m for m in found.members.values() if _is_public(m) and m.is_attribute]
    if fields := [field for field in fields if _type_of(found, field) is not None]:
        yield from _table(
            name,
            {
                field.name: _type_of(found, field)
                for field in fields
                if "property" not in field.labels
            },
        )
        for field in fields:
            if "property" in field.labels:
                yield f"#### `{name}.{field.name}`\n\nProperty, `{field.annotation}`.\n"
                yield from _docstring(field)
    for method in found.members.values():
        called = method.name == "__call__" or (method.name == "__init__" and method.docstring)
        if method.is_function and (_is_public(method) or called):
            title = {"__call__": f"{name}(…)", "__init__": name}.get(
                method.name, f"{name}.{method.name}"
            )
            yield f"#### `{title}`\n"
            yield f"```python\n{_signature(method.name, method)}\n```\n"
            yield from _docstring(method)


def _type_of(found: Any, field: Any) -> Any:
    """Return the annotation of an attribute, or that of the parameter it is set from, or None."""
    if field.annotation is not None or "__init__" not in found.members:
        return field.annotation
    parameters = found.members["__init__"].parameters
    return parameters[field.name].annotation if field.name in parameters else None


def _table(name: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Yield the table of a class's attributes; with defaults and meanings if it has help texts.

    `fields`: the type of each attribute.
    """
    if not fields:
        return
    found = getattr(loradeploy, name)
    kept = {f.name: f for f in dataclasses.fields(found)} if dataclasses.is_dataclass(found) else {}
    explained = all("help" in kept[field].metadata for field in fields if field in kept) and kept
    columns = ("Field", "Type", "Default", "Meaning")[: 4 if explained else 2]
    yield f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"
    for field, annotation in fields.items():
        row = f"| `{field}` | `{_escaped(str(annotation))}` |"
        if explained:
            own = kept[field]
            row += f" `{own.default!r}` | {_escaped(own.metadata['help'])} |"
        yield row
    yield ""


def _is_public(member: Any) -> bool:
    return not member.name.startswith("_") and not member.is_alias


def _signature(name: str, function: Any) -> str:
    """Return the signature; one argument per line if it is long."""
    parameters = [p for p in function.parameters if p.name not in ("self", "cls")]
    shown, starred = [], False
    for parameter in parameters:
        kind = parameter.kind
        if kind == griffe.ParameterKind.keyword_only and not starred:
            shown.append("*")
            starred = True
        stars = {
            griffe.ParameterKind.var_positional: "*",
            griffe.ParameterKind.var_keyword: "**",
        }.get(kind, "")
        starred = starred or stars == "*"
        text = stars + parameter.name
        if parameter.annotation is not None:
            text += f": {parameter.annotation}"
        if parameter.default is not None and not stars:
            text += f" = {parameter.default}"
        shown.append(text)
    returns = f" -> {function.returns}" if function.returns is not None else ""
    line = f"{name}({', '.join(shown)}){returns}"
    if len(line) <= 88:
        return line
    return f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){returns}"


def _docstring(found: Any) -> Iterator[str]:
    if found.docstring is None:
        return
    for section in found.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            yield f"{section.value}\n"
        elif kind == "parameters":
            for parameter in section.value:
                yield f"- `{parameter.name}`: {_one_line(parameter.description)}"
            yield ""
        elif kind == "raises":
            yield "Raises:\n"
            for error in section.value:
                yield f"- `{error.annotation}`: {_one_line(error.description)}"
            yield ""
        else:
            raise ValueError(f"{found.path}: a docstring with a section {kind!r} has no form here")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def _dedented(text: str) -> str:
    lines = text.splitlines()
    margin = min(len(line) - len(line.lstrip()) for line in lines if line.strip())
    return "\n".join(line[margin:] for line in lines)


if __name__ == "__main__":
    main()
