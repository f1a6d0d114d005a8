"""Map nodes to modules by a JSON file of the user.

    {"/model/layers\\.(\\d+)/attn/o_proj/MatMul": "model.layers.\\1.self_attn.o_proj",
     "qkv_(\\d+)": [["layers.\\1.q_proj", 64], ["layers.\\1.k_proj", 32], …]}

A key is a regular expression for the full name of a node, of its weight, or of its output. A value
is the module, or a list of modules with their outputs, in the order of the fused weight.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import UsageError
from loradeploy.export.match.modules.naming import Named
from loradeploy.export.match.products import Product, describe
from loradeploy.files import read_json

FOUND_BY: Final = "the given map"


class ModuleMap:
    """The map in the file `path`; names products, and records unused entries.

    Raises:
        UsageError: the file is not such a map.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._file = Path(path)
        entries = read_json(self._file, error=UsageError)
        self._entries = [(self._pattern(key), value) for key, value in entries.items()]
        for (pattern, value), key in zip(self._entries, entries, strict=True):
            self._check(key, pattern, value)
        self._unused = dict.fromkeys(entries)

    def __call__(self, product: Product) -> Named | None:
        """The modules of `product`; None if no entry matches.

        Raises:
            UsageError: the entry has another number of outputs than the product.
        """
        node = product.node
        names = [str(name) for name in (node.name, product.weight.name, node.outputs[0].name)]
        for pattern, value in self._entries:
            found = next((m for name in names if (m := pattern.fullmatch(name))), None)
            if found is None:
                continue
            self._unused.pop(pattern.pattern, None)
            if isinstance(value, str):
                return Named(((found.expand(value), product.out_features),), FOUND_BY)
            modules = tuple((found.expand(module), outputs) for module, outputs in value)
            if sum(outputs for _, outputs in modules) != product.out_features:
                raise UsageError(
                    f"{self._file}: {pattern.pattern!r} has"
                    f" {sum(outputs for _, outputs in modules)} outputs, {describe(product)} has"
                    f" {product.out_features}"
                )
            return Named(modules, FOUND_BY)
        return None

    def check_used(self) -> None:
        """Raise UsageError for an unused entry, which may be a typing error."""
        for key in self._unused:
            raise UsageError(f"{self._file}: no product of the graph is named {key!r}")

    def _pattern(self, key: str) -> re.Pattern[str]:
        try:
            return re.compile(key)
        except re.error as problem:
            raise UsageError(
                f"{self._file}: {key!r} is not a regular expression: {problem}"
            ) from None

    def _check(self, key: str, pattern: re.Pattern[str], value: Any) -> None:
        several = isinstance(value, list) and bool(value)
        for item in value if several else [[value, 1]]:
            if not (
                isinstance(item, list)
                and len(item) == 2
                and isinstance(item[0], str)
                and isinstance(item[1], int)
                and item[1] > 0
            ):
                raise UsageError(
                    f"{self._file}: {key!r} needs a module, or a list of [module, outputs]"
                )
            groups = [int(number) for number in re.findall(r"\\(\d+)", item[0])]
            if any(group > pattern.groups for group in groups):
                raise UsageError(f"{self._file}: {key!r} has no group for {item[0]!r}")
