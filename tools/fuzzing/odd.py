"""Odd values in files and from users: patterns, templates, prompts, options, feeds."""

from __future__ import annotations

from collections.abc import Mapping
from random import Random
from typing import Any, Final

import numpy as np

_PATTERNED: Final = (
    *("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("modules_to_save", "layers_pattern"),
)
_REGULAR: Final = (
    "(",
    ")",
    "a{9999999999999}",
    "(?i)x",
    "(?P<index>x)",
    "(a+)+$",
    "[",
    "*",
    ".*",
    "q_proj",
)
PROMPTS: Final[tuple[Any, ...]] = (
    *("hi", "", "\ud800", None, 3, b"abc", [], ["a", "b"], [""], [None], [[]], [[1, 2]], [[-1]]),
    *([[2**70]], [[300, 9**9]], [[True]], [1, 2], [[1.5]], ["a", [5]], [[5] * 500], ("a",), {"a"}),
    *([[{"role": "user", "content": "x"}]], [[{"role": 1}]], [[{}]], [["a"]], "\0", "a" * 3000),
)
ADAPTERS: Final[tuple[Any, ...]] = (
    *("nobody", 3, [3], [], {"own"}, {"own": 1e39}, {"own": float("nan")}, {"own": 10**400}, {}),
    *({"own": 0.5}, {"own": 1, "nobody": 1}, {3: 1}, {"own": "1"}, {"own": True}, ["own"], b"own"),
    *(
        [{"own": 2}],
        [b"own"],
        ["own", None, "own"],
        {"own": -1.0},
        {"own": 3e38},
        {"own": 1j},
        [""],
    ),
)
OPTIONS: Final[Mapping[str, tuple[Any, ...]]] = {
    "adapters": ("own", None, *ADAPTERS),
    "max_new_tokens": (1, 2),
    "temperature": (0.5, 1e-30, 1e30),
    "top_k": (1, 5, 10**9),
    "top_p": (0.5, 1e-9),
    "seed": (1, 2**64, [1], [1, 2]),
    "batch_size": (1, 100),
    "chat": (True,),
}
ODD_OPTIONS: Final[tuple[Any, ...]] = (
    *(None, -1, 0, 2.5, "1", float("nan"), float("inf"), True, [], 10**30),
)


def patterns(random: Random, content: bytes) -> bytes:
    """Return a config with odd patterns in the fields that may have patterns."""
    import json

    values = json.loads(content)
    for _ in range(random.choice((1, 2))):
        name = random.choice(_PATTERNED)
        odd = "".join(random.choice(_REGULAR) for _ in range(random.choice((1, 1, 2, 30))))
        if name.endswith("_pattern") and name != "layers_pattern":
            values[name] = {odd: 2}
        else:
            values[name] = random.choice(([odd], odd))
        if name == "layers_pattern":
            values["layers_to_transform"] = [0]
    return json.dumps(values).encode()


_TEMPLATES: Final = (
    *("{{ messages[0]['content'] }}", "{% for m in messages %}", "{% endfor %}", "{{ 1/0 }}"),
    *("{{ x.y.z }}", "{% for i in range(10**6) %}", "{{ cycler() }}", "{{ 1|dictsort }}"),
    *("{{ m.content }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{{ ''.__class__ }}"),
    *("{{ namespace(__class__=1) }}", "{{ [].append(1) }}", "{{ raise_exception('no') }}"),
    *(
        "{{ raise_exception('a\nb') }}",
        "{{ raise_exception('a' * 9000) }}",
        "{{ (",
        "{#",
        "{{ 2**99",
    ),
    *("{{ strftime_now('%Q') }}", "{{ strftime_now(3) }}", "{{ messages|tojson }}", "\ufffd"),
    *("{% set x = messages %}", "{% if add_generation_prompt %}", "{% endif %}", "{{ 2**10**5 }}"),
    *("{{ messages|tojson(indent='a'*3) }}", "{{ '%s'|format }}", "{{ lipsum(n=3) }}"),
    *("{% generation %}a{% endgeneration %}", "{{ messages|sum }}", "{{ {}|first }}"),
    *("{{ -1|round(-5000) }}", "{{ '\\ud800' }}", "{{ (" * 300, "{% if 1 %}" * 300, "{{ 9" * 30),
)


def template(random: Random) -> str:
    return "".join(random.choice(_TEMPLATES) for _ in range(random.choice((1, 1, 2, 4))))


def other_feed(random: Random, values: Any) -> Any:
    """Return something other than a valid array."""
    import onnxruntime

    numbers = isinstance(values, np.ndarray) and values.ndim > 0 and values.dtype.kind in "biuf"
    array = values if numbers else np.zeros((1, 1))
    what = random.randrange(10)
    if what == 0:
        return array.astype(
            random.choice((np.float32, np.float16, np.int8, np.uint64, bool, object))
        )
    if what == 1:
        return array[:, : random.randrange(3)] if array.ndim > 1 else array[:0]
    if what == 2:
        return array[: random.randrange(3)]
    if what == 3:
        return array[..., np.newaxis]
    if what == 4:
        return np.full(array.shape, random.choice((-1, 2, 300, 127, 2**31 - 1)))
    if what == 5 and array.dtype.kind == "f":
        return np.full_like(array, random.choice((np.nan, np.inf, 1e38)))
    if what == 6:
        return onnxruntime.OrtValue.ortvalue_from_numpy(np.ascontiguousarray(array))
    if what == 7:
        return array.tolist()
    if what == 8:
        odd = array.reshape(-1)[:1].astype(random.choice((np.int32, np.float64)))
        return onnxruntime.OrtValue.ortvalue_from_numpy(odd)
    return random.choice(
        (None, "x", 3, [], [[1], [1, 2]], {}, [["a"]], 10**30, b"a", np.array("a"))
    )
