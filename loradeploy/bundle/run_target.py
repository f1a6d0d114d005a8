"""The table of devices that a bundle can be exported for, with the form of the graph for each.

`loradeploy.export(target=…)`, `--target` and docs/bundles.md use it. A target sets the options that
are not given. An option that is given is applied if the target can run the resulting graph on its
device, and refused by name otherwise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Final

from loradeploy.bundle.names import ROWS
from loradeploy.errors import UsageError


@dataclass(frozen=True)
class Refusal:
    """A combination of options with which parts of the graph do not run on the target's device.

    `form`: the values of the options. `why`: the reason. `cache`: the dtype of the cache and of
    attention for which it applies; None: any.
    """

    form: Mapping[str, tuple[Any, ...]]
    why: str
    cache: str | None = None


@dataclass(frozen=True)
class RunTarget:
    """A row of the table.

    `runs_in`: the software that opens the bundle. `chooses`: the values of options that are not
    given; `with_precision`: those for one precision only. `why`: the reasons. `refuses`: the forms
    that it does not run on its device. `rank_one`: whether clients feed zeros of rank 1 in place of
    side inputs of rank 0.
    """

    name: str
    runs_in: str
    why: str
    chooses: Mapping[str, Any] = field(default_factory=dict)
    with_precision: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    refuses: tuple[Refusal, ...] = ()
    rank_one: bool = False


_NOT_FP16: Final = ("fp32", "bf16", "int8", "int4")
_ROWS: Final = "rows gather nothing"
_NO_OPERATOR: Final = Refusal(
    {"operator": (True,)}, "the operators' library computes on the CPU, for target='cpu'"
)

RUN_TARGETS: Final = (
    RunTarget(
        "cpu", "onnxruntime on the CPU", "the defaults of each precision were measured there"
    ),
    RunTarget(
        "cuda",
        "onnxruntime-gpu",
        "every node is on the device, and a CUDA graph can be captured: it takes no branches;"
        f" {_ROWS}; GroupQueryAttention updates its cache in place, in fp16 only",
        {"precision": "fp16", "layout": ROWS, "branches": False},
        {"fp16": {"attention": "gqa"}},
        (
            Refusal(
                {"attention": ("gqa",), "precision": _NOT_FP16},
                "CUDA computes GroupQueryAttention only in fp16, and would copy every layer's"
                " cache to the CPU and back at each step (int8 and int4 made of an fp16 bundle"
                " compute it in fp16)",
                cache="float32",
            ),
            _NO_OPERATOR,
        ),
    ),
    RunTarget(
        "webgpu",
        "onnxruntime with onnxruntime-ep-webgpu",
        f"{_ROWS}; branches are run from the host; a product over a rank of 0 ends the process, so"
        " that zeros have rank 1. Attention is on the CPU: GroupQueryAttention has a kernel, which"
        " was wrong from 32 tokens on where it was tried (SwiftShader)",
        {"layout": ROWS, "branches": False},
        refuses=(_NO_OPERATOR,),
        rank_one=True,
    ),
    RunTarget(
        "openvino",
        "onnxruntime with onnxruntime-ep-openvino",
        f"it opens no graph whose inputs have defaults, and takes no branches; {_ROWS}",
        {
            "layout": ROWS,
            "branches": False,
            "required_inputs": True,
            "logits_to_keep": False,
        },
        refuses=(
            Refusal(
                {"branches": (True,)}, "it leaves all nodes within branches to the CPU provider"
            ),
            _NO_OPERATOR,
        ),
    ),
    RunTarget(
        "web",
        "onnxruntime-web and onnxruntime-node",
        "it drops feeds of inputs that have defaults; int4 is the smallest download; on WebGPU"
        " zeros need rank 1",
        {"precision": "int4", "required_inputs": True},
        refuses=(
            Refusal(
                {"required_inputs": (False,), "merge": (False,)},
                "onnxruntime-web drops feeds of inputs that have defaults, and every adapter would"
                " answer as the base",
            ),
            _NO_OPERATOR,
        ),
        rank_one=True,
    ),
)
BY_TARGET: Final[Mapping[str, RunTarget]] = MappingProxyType({row.name: row for row in RUN_TARGETS})


def choice_of(target: str | None, option: str, precision: str) -> Any:
    """The target's value for an option that is not given; None if it does not set the option."""
    if target is None:
        return None
    row = BY_TARGET[target]
    return {**row.chooses, **row.with_precision.get(precision, {})}.get(option)


def never_runs(target: str | None, option: str, value: object) -> bool:
    """Whether the target refuses this value of the option in every form."""
    return target is not None and any(
        refusal.form.keys() == {option} and value in refusal.form[option]
        for refusal in BY_TARGET[target].refuses
        if refusal.cache is None
    )


def zeros_have_rank_one(target: str | None) -> bool:
    """Whether clients on the target feed zeros of rank 1 in place of side inputs of rank 0."""
    return target is not None and BY_TARGET[target].rank_one


def check_runs(target: str | None, form: Mapping[str, Any]) -> None:
    """Refuse a form with which parts of the graph would not run on the target's device.

    `form`: the values of the form's options by name, and `cache`, the dtype of the cache; values
    that are not known yet are left out.

    Raises:
        UsageError: the target does not run the form.
    """
    for refusal in () if target is None else BY_TARGET[target].refuses:
        applies = refusal.cache in (None, form.get("cache"))
        if applies and all(form.get(name) in values for name, values in refusal.form.items()):
            named = [f"`{name}={form[name]!r}`" for name in refusal.form if name != "merge"]
            raise UsageError(
                f"{' with '.join(named)} does not run on the device of `target={target!r}`:"
                f" {refusal.why}"
            )
