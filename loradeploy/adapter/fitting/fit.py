"""Check whether an adapter fits a base model, in any form of the base.

A bundle, an ONNX graph and a PyTorch model are each described by an `AdaptableBase`, which is all
that the check reads.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from loradeploy.adapter.adapter import Adapter, Factors, Kind
from loradeploy.adapter.algebra.experts import targeted as targeted_parameters
from loradeploy.adapter.files.digest import short
from loradeploy.adapter.fitting.settle import same_values
from loradeploy.adapter.modules.targets import is_saved, match_targets
from loradeploy.adapter.tasks import CLASSIFIER_HEADS, OUTPUT_HEADS, QA_HEADS
from loradeploy.errors import AdapterMismatchError, listed, shortened
from loradeploy.printable import logger_of

logger = logger_of(__name__)

Shape = tuple[int, ...]

_LISTED: Final = 6
# The maximum number of trained rows of a weight as side inputs: each of them takes as many values
# as the vocabulary has tokens.
MOST_ROWS: Final = 64
_HUB_ID: Final = re.compile(r"[\w.-]+/(?P<name>[\w.-]+)", re.ASCII)
_A_LAYER: Final[Mapping[str, str]] = {
    "linear": "a linear layer",
    "embedding": "an embedding",
    "conv2d": "a convolution",
    "experts": "a parameter of experts",
}
# Why a graph has no side inputs for a layer of the kind, and what to do.
_NO_SIDE_INPUTS: Final[Mapping[str, str]] = {
    "linear": "not a target module of {base}",
    "embedding": "an embedding without side inputs in {base}: export with"
    " `side_inputs=['embedding']`, or merge it instead",
    "conv2d": "a convolution, which cannot have side inputs: merge it instead",
    "experts": "a parameter of experts without side inputs in {base}: export with"
    " `side_inputs=['experts']`, or merge it instead",
}


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer of a base that takes low-rank factors.

    `inputs`: the shape of A after the rank: [in], [vocabulary], or [in, height, width].
    `outputs`: the length of B. `groups`: the number of groups of a convolution. `experts`: the
    number of experts of the parameter.
    `scaled`: whether DoRA's scale can be applied to its output. `shifted`: whether a bias of the
    factors can be added to it.
    `refusal`: called with a rank and whether the weight is needed as one matrix; returns why the
    layer does not take such factors, or None.
    """

    kind: Kind
    inputs: Shape
    outputs: int
    groups: int = 1
    experts: int = 1
    scaled: bool = True
    shifted: bool = True
    refusal: Callable[[int, bool], str | None] = lambda rank, whole: None


@dataclass(frozen=True, eq=False)
class AdaptableBase:
    """The parts of a base model that an adapter can change.

    `name`: the name of the base in messages, such as "this bundle".
    `layers`: the layers that take factors, by module.
    `parameters`: shapes of the parameters that can be replaced (modules_to_save, biases).
    `biases`: sizes of the biases that can be passed as side inputs, by parameter.
    `weights`: shapes of the base's weights that an adapter's file may contain; None if unknown.
    `refused`: why a parameter cannot be replaced or overwritten, by parameter.
    `side_inputs`: whether adapters are side inputs of an unchanged base.
    `own_weights`: the weights whose values are known, once copies of them were removed from the
    adapter; None before that.
    `row_users`: the modules that use a weight, by parameter, for trained rows of it.
    `lacking`: parameters that get their values from an adapter.
    `digest`: digest of the checkpoint, if known. `model`: its id on the hub, or another name.
    `remedy`: advice at the end of a message about a missing module that the base model may have.
    `remedy_for_others`: advice for an output head without side inputs.
    `remedy_for_rows`: advice for trained rows of a module without side inputs.
    """

    name: str
    layers: Mapping[str, Layer]
    parameters: Mapping[str, Shape] = field(default_factory=dict)
    biases: Mapping[str, int] = field(default_factory=dict)
    weights: Mapping[str, Shape] | None = None
    refused: Mapping[str, str] = field(default_factory=dict)
    side_inputs: bool = False
    own_weights: Collection[str] | None = None
    row_users: Mapping[str, Collection[str]] = field(default_factory=dict)
    lacking: Collection[str] = ()
    digest: str | None = None
    model: str | None = None
    remedy: str = ""
    remedy_for_others: str = "merge it instead"
    remedy_for_rows: str = "merge it instead"


def check_fit(adapter: Adapter, base: AdaptableBase) -> None:
    """Raise AdapterMismatchError unless `adapter` fits `base`.

    One message lists the first mismatches and counts the others. The adapter's modules must have
    the names of the base (`names.named_as`). If the digests of the bases cannot be compared,
    different names on the hub cause a warning.

    Raises:
        AdapterMismatchError: the adapter does not fit.
        AdapterError: the factors apply to a base that the initialization changed.
    """
    adapter.check_plain()
    trained_on = adapter.config.base_model_name_or_path
    if trained_on and base.model and None in (base.digest, adapter.base_digest):
        _warn_of_name(trained_on, base.model)
    refuse(
        [
            *_other_base(adapter, base),
            *_factor_mismatches(adapter, base),
            *_parameter_mismatches(adapter, base),
            *missing_parameters(adapter, base.lacking),
            *_weight_mismatches(adapter, base),
            *_scale_mismatches(adapter, base),
            *_bias_mismatches(adapter, base),
            *_missing(adapter, base),
        ],
        base.name,
    )


def refuse(problems: list[str], base: str) -> None:
    """Raise AdapterMismatchError if `problems` is not empty."""
    if problems:
        raise AdapterMismatchError(f"the adapter does not fit {base}: {listed(problems, _LISTED)}")


def missing_parameters(adapter: Adapter, lacking: Iterable[str]) -> list[str]:
    """Messages for the parameters `lacking` in the base that `adapter` lacks, too."""
    return [
        f"{parameter} is in neither the base nor the adapter, so its outputs would be"
        " random: train it with the adapter (modules_to_save), or use a base that has it"
        for parameter in sorted(set(lacking).difference(adapter.saved, adapter.carried))
    ]


def _other_base(adapter: Adapter, base: AdaptableBase) -> list[str]:
    if None in (base.digest, adapter.base_digest) or base.digest == adapter.base_digest:
        return []
    theirs, ours = short(adapter.base_digest), short(base.digest)
    found = f"digest {theirs}, {base.name}'s is {ours}"
    return [f"it was trained on another base{_trained_on(adapter)} ({found})"]


@functools.cache  # warns once, although an export and a run check an adapter several times
def _warn_of_name(trained_on: str, model: str) -> None:
    theirs, ours = _HUB_ID.fullmatch(trained_on), _HUB_ID.fullmatch(model)
    if theirs is None or ours is None or os.path.exists(trained_on):
        return
    if theirs["name"].lower() != ours["name"].lower():  # a copy has another owner
        logger.warning(
            "the adapter was trained on %s, this base is %s: if their weights differ, so do the"
            " outputs from those of the training",
            shortened(trained_on, 60),
            shortened(model, 60),
        )


def _trained_on(adapter: Adapter) -> str:
    """The base that the adapter's config names, for a message."""
    name = adapter.config.base_model_name_or_path
    return f", {shortened(name, 60)}" if isinstance(name, str) and name else ""


def _factor_mismatches(adapter: Adapter, base: AdaptableBase) -> list[str]:
    linear = all(pair.kind == "linear" for pair in adapter.factors.values())
    if len(adapter.factors) > 1 and linear and base.layers.keys().isdisjoint(adapter.factors):
        others = len(adapter.factors) - 1
        first = f"{shortened(min(adapter.factors))} is {_absent('linear', base)}"
        reason = f"it was trained on another model{_trained_on(adapter)}"
        return [f"{first}, nor are the other {others}: {reason}{base.remedy}"]
    return [
        problem
        for module, pair in sorted(adapter.factors.items())
        for problem in _layer_mismatches(module, pair, base)
    ]


def _of_another_head(module: str, base: AdaptableBase) -> str:
    """The end of a message on a module below a name that the base lacks, as cls of BertForMaskedLM.

    Empty for other modules.
    """
    top, _, below = module.partition(".")
    if not below or any(name == top or name.startswith(f"{top}.") for name in base.layers):
        return ""
    return (
        f" (it has no {shortened(top, 60)}: the adapter was trained with another head; train it"
        " without this module, or remove the module's tensors if its outputs are not needed)"
    )


def _has_weight(module: str, base: AdaptableBase) -> bool:
    """Whether `module` is known to be one of the base, as an output head without side inputs is."""
    weight = f"{module}.weight"
    return weight in base.parameters or weight in (base.own_weights or ())


def _absent(kind: Kind, base: AdaptableBase) -> str:
    if base.side_inputs:
        return _NO_SIDE_INPUTS[kind].format(base=base.name)
    return f"not {_A_LAYER[kind]} of {base.name}"


def _layer_mismatches(module: str, pair: Factors, base: AdaptableBase) -> list[str]:
    layer = base.layers.get(module)
    if layer is None or (layer.kind != pair.kind and base.side_inputs):
        is_missing = layer is None and pair.kind == "linear"
        remedy = base.remedy if is_missing else ""
        if is_missing and base.side_inputs and _has_weight(module, base):
            return [f"{module} has no side inputs for its factors: {base.remedy_for_others}"]
        return [f"{module} is {_absent(pair.kind, base)}{_of_another_head(module, base) or remedy}"]
    if layer.kind != pair.kind:
        actual, expected = _A_LAYER[layer.kind], _A_LAYER[pair.kind]
        return [f"{module} is not {expected} of {base.name}, but {actual}"]
    if reason := layer.refusal(pair.rank, pair.magnitude is not None):
        return [f"{module} {reason}"]
    if layer.groups != pair.groups:
        groups = f"{layer.groups} groups, the adapter's factors are for {pair.groups}"
        return [f"{module} is a convolution of {groups}"]
    if layer.experts != pair.experts:
        return [f"{module} is of {layer.experts} experts, the adapter's factors of {pair.experts}"]
    problems = []
    if pair.A.shape[1:] != layer.inputs:
        takes = layer.inputs[0] if len(layer.inputs) == 1 else list(layer.inputs)
        problems.append(f"{module}.lora_A is {list(pair.A.shape)}, the base takes {takes}")
    if pair.B.shape[0] != layer.outputs:
        problems.append(f"{module}.lora_B is {list(pair.B.shape)}, the base gives {layer.outputs}")
    return problems


def _parameter_mismatches(adapter: Adapter, base: AdaptableBase) -> list[str]:
    problems = []
    for parameter, values in sorted(adapter.saved.items()):
        shape = base.parameters.get(parameter)
        if shape is None and parameter in base.biases:
            shape = (base.biases[parameter],)
        if parameter in base.refused:
            problems.append(base.refused[parameter])
        elif shape is None:
            problems.append(_no_parameter(parameter, is_saved(parameter, adapter.config), base))
        elif values.shape != shape:
            problems.append(f"{parameter} is {list(values.shape)}, the base has {list(shape)}")
    return problems


def _no_parameter(parameter: str, saved: bool, base: AdaptableBase) -> str:
    named = f"{parameter} ({'modules_to_save' if saved else 'a trained bias'})"
    if not base.side_inputs:
        return f"{named} is not a parameter of {base.name}"
    if saved:
        module = parameter.rpartition(".")[0].rpartition(".")[2]
        head = module in (*OUTPUT_HEADS, *CLASSIFIER_HEADS, *QA_HEADS)
        remedy = base.remedy_for_others if head else "merge it instead"
        return f"{named} is not a side input of {base.name}: {remedy}"
    remedy = "export with `side_inputs=['bias']`, or merge it"
    return f"{named} is not a side input of {base.name}: {remedy}"


def _weight_mismatches(adapter: Adapter, base: AdaptableBase) -> list[str]:
    """Messages for base weights, and rows of them, that the adapter contains with other values."""
    problems = [] if base.weights is None else _shape_mismatches(adapter, base.weights)
    problems += [base.refused[n] for n in (*adapter.carried, *adapter.rows) if n in base.refused]
    if not base.side_inputs:
        return problems
    for parameter in sorted(adapter.carried) if base.own_weights is not None else ():
        known = parameter in (base.own_weights or ())
        problems.append(
            f"{parameter} is in the adapter and {'differs' if known else 'may differ'} from the"
            " base's: merge it instead"
        )
    problems += [
        f"rows of {parameter} were trained (trainable_token_indices), {problem}"
        for parameter in sorted(adapter.rows)
        if (problem := _rows_problem(parameter, adapter, base)) is not None
    ]
    return problems


def _rows_problem(parameter: str, adapter: Adapter, base: AdaptableBase) -> str | None:
    """Why trained rows of `parameter` cannot be side inputs of `base`; None if they can."""
    rows, users = adapter.rows[parameter], base.row_users.get(parameter)
    if users is None and parameter in (base.own_weights or ()):
        return (
            f"and it is not known whether another weight of {base.name} is tied to it: export the"
            " ONNX model with `checkpoint`, the directory of the model that it was made from"
        )
    if users is None:
        return f"and it is not known which modules of {base.name} use it: merge it instead"
    if len(rows.indices) > MOST_ROWS:
        return (
            f"{len(rows.indices)} of them, and side inputs have at most {MOST_ROWS}: merge it"
            " instead"
        )
    for module in sorted(users):
        own, pair, layer = f"{module}.weight", adapter.factors.get(module), base.layers.get(module)
        if own in adapter.saved:
            continue  # the adapter replaces the weight of this module
        if own in adapter.rows and not same_values(adapter.rows[own], rows):
            return (
                f"and other rows of {own}, which is tied to it in {base.name}: give the base"
                " untied (tie_word_embeddings: false), as it was trained"
            )
        if own in adapter.carried:
            return f"and so was all of {own}: merge it instead"
        if pair is not None and pair.magnitude is not None:
            return f"and {module} has DoRA, whose scale depends on them: merge it instead"
        head = base.layers.get(parameter.removesuffix(".weight"))
        of_head = head is not None and head.kind == "linear"
        if of_head and layer is not None and layer.kind == "embedding" and own not in adapter.rows:
            return f"and none of {own}, which is tied to it: in PEFT these only change the output"
        if layer is None or layer.kind not in ("linear", "embedding"):
            return f"and {module} has no side inputs in {base.name}: {base.remedy_for_rows}"
        vocabulary, size = (
            (layer.inputs[0], layer.outputs)
            if layer.kind == "embedding"
            else (layer.outputs, layer.inputs[0])
        )
        if max(rows.indices, default=0) >= vocabulary or rows.values.shape[1] != size:
            return (
                f"{list(rows.values.shape)} of tokens up to {max(rows.indices, default=0)}, and"
                f" {module} has {vocabulary} tokens of {size} values: it was trained on another"
                " base, or with a larger vocabulary, which is merged (`merge=True`)"
            )
    return None


def _shape_mismatches(adapter: Adapter, shapes: Mapping[str, Shape]) -> list[str]:
    problems = []
    for name, values in sorted(adapter.carried.items()):
        shape = shapes.get(name)
        if shape is None:
            problems.append(f"{name} is not a weight of the base (PEFT ignores it)")
        elif shape != values.shape:
            problems.append(f"{name} is {list(values.shape)}, the base has {list(shape)}")
            if values.ndim == 2 and shape[1:] == values.shape[1:]:
                ours, theirs = shape[0], len(values)
                problems[-1] += (
                    f": the adapter's vocabulary has {theirs} tokens, the base's {ours}: resize the"
                    f" base, resize_token_embeddings({theirs})"
                )
    for name, rows in sorted(adapter.rows.items()):
        shape = shapes.get(name)
        if shape is None:
            problems.append(f"{name}, of which rows were trained, is not a weight of the base")
        elif shape[1:] != rows.values.shape[1:] or max(rows.indices, default=0) >= shape[0]:
            problems.append(
                f"{name} is {list(shape)} in the base, the adapter has rows"
                f" {list(rows.values.shape)} of tokens up to {max(rows.indices, default=0)}"
            )
    return problems


def _scale_mismatches(adapter: Adapter, base: AdaptableBase) -> list[str]:
    """Messages for DoRA modules whose outputs cannot be scaled in the base."""
    unscaled = [
        module
        for module, pair in sorted(adapter.factors.items())
        if pair.magnitude is not None
        and not ((layer := base.layers.get(module)) is not None and layer.scaled)
    ]
    if not unscaled or not base.side_inputs:
        return []
    others = f" and {len(unscaled) - 1} more have" if len(unscaled) > 1 else " has"
    lacking = f"{unscaled[0]}{others} no scale in {base.name}"
    remedy = "export with `side_inputs=['dora']`, or merge it"
    return [f"it is a DoRA adapter (use_dora) and {lacking}: {remedy}"]


def _bias_mismatches(adapter: Adapter, base: AdaptableBase) -> list[str]:
    """Messages for biases of factors (`lora_bias`) that cannot be added in the base."""
    biased = [module for module, pair in sorted(adapter.factors.items()) if pair.bias is not None]
    problems = [base.refused[name] for m in biased if (name := f"{m}.bias") in base.refused]
    fixed = [m for m in biased if (layer := base.layers.get(m)) is not None and not layer.shifted]
    if fixed:
        others = f" and {len(fixed) - 1} more have" if len(fixed) > 1 else " has"
        problems.append(
            f"its factors have biases (lora_bias) and {fixed[0]}{others} no offset in {base.name}:"
            " export with this adapter, or merge it"
        )
    return problems


def _missing(adapter: Adapter, base: AdaptableBase) -> list[str]:
    """Messages for modules that the config targets and that have no tensors in the adapter."""
    modules = [name for name, layer in base.layers.items() if layer.kind != "experts"]
    targeted = match_targets(modules, adapter.config, linear_names=tuple(adapter.factors))
    experts = [name for name, layer in base.layers.items() if layer.kind == "experts"]
    expected = [*targeted, *targeted_parameters(experts, adapter.config)]
    parameters = {*base.parameters, *(base.own_weights or ())}
    return [
        *(f"{m} is targeted and has no tensors" for m in expected if m not in adapter.factors),
        *(
            f"{name} is in modules_to_save and has no tensors"
            for name in sorted(parameters)
            if name not in adapter.saved
            and name not in adapter.rows
            and name not in adapter.carried
            and is_saved(name, adapter.config)
        ),
    ]
