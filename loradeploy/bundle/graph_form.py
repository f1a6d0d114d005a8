"""The form of a bundle's graph: the table of all export options that affect it.

The same model and adapters can be exported in many forms that compute the same function. An option
that is not given is inherited if a bundle is exported again, and otherwise has the table's default.
An option that is given is applied, or refused by name. The arguments of `loradeploy.export`, the
options of the command, the manifest and the documentation use this table.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    INPUT_IDS,
    LAYOUTS,
    PAST,
    PIXEL_VALUES,
    REQUIRED_NAME,
    ROWS,
    SLOTS,
    is_cross,
)
from loradeploy.bundle.run_target import RUN_TARGETS, check_runs, choice_of, never_runs
from loradeploy.bundle.targets import takes_tokens
from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import Manifest

DEFAULT_PRECISION: Final = "fp32"
BFLOAT16: Final = "bf16"  # the dtype of stored weights; computation is in fp32
# The bits of weights that are packed after graph surgery or a merge.
PACKED_BITS: Final[Mapping[str, int]] = MappingProxyType({"int8": 8, "int4": 4})
PRECISIONS: Final = (DEFAULT_PRECISION, "fp16", BFLOAT16, *PACKED_BITS)
# The prefix of operators that use one scale for all rows of a batch: the results of a row depend on
# the other rows.
SHARED_SCALE: Final = "DynamicQuantize"
STANDARD, GQA = ATTENTIONS = ("standard", "gqa")
LORA, DORA, BIAS, EMBEDDING, TOKENS, EXPERTS = (
    *("lora", "dora", "bias", "embedding", "tokens", "experts"),
)
SIDE_INPUT_KINDS: Final[Mapping[str, str]] = MappingProxyType(
    {
        LORA: "low-rank factors of linear layers, always there",
        DORA: "scales of the outputs, for DoRA",
        BIAS: "offsets of the outputs, for trained biases",
        EMBEDDING: "low-rank factors of embeddings",
        TOKENS: "those of the token embedding and of an output head that is tied to it, for"
        " trained rows of tokens",
        EXPERTS: "low-rank factors of a mixture's experts",
    }
)
# The names of the dimensions of inputs, to find the static ones of a graph. None: never dynamic.
_DIMENSIONS: Final[Mapping[str, tuple[str | None, ...]]] = MappingProxyType(
    {
        INPUT_IDS: ("batch", "sequence"),
        ATTENTION_MASK: ("batch", "total"),
        PAST: ("batch", None, "past"),
        PIXEL_VALUES: ("batch",),
    }
)


@dataclass(frozen=True)
class GraphForm:
    """The form of a graph, independent of its model.

    `merge`: an adapter is merged into the weights. `layout` and `branches` are then None, because
    there are no side inputs.
    `side_inputs`: the kinds of side inputs in the graph, except lora.
    `operator`: whether nodes are calls that the operators' library can replace.
    `static_shapes`: the sizes of static dimensions.
    `logits_to_keep`: whether the positions that get logits can be chosen.
    `quantize_embedding`: the token embedding is stored in 8 bits.
    `target`: the device that the bundle is for, which set the options that were not given.
    """

    precision: str = DEFAULT_PRECISION
    merge: bool = False
    layout: str | None = None
    branches: bool | None = None
    attention: str = STANDARD
    side_inputs: frozenset[str] = frozenset()
    required_inputs: bool = False
    operator: bool = False
    static_shapes: Mapping[str, int] = field(default_factory=dict)
    logits_to_keep: bool = False
    quantize_embedding: bool = False
    target: str | None = None


@dataclass(frozen=True)
class FormOption:
    """An export option that affects the graph.

    `name`: the argument of `loradeploy.export`, whose flag is `flag`. `values`: the allowed values,
    if they are limited. `help`: a sentence that describes it. `default`: describes the value if
    neither the user nor the exported bundle has one. `inherited`: whether a bundle that is exported
    again keeps it. `excludes`: options that cannot be given with it, and why. `switch`: it is on
    if the flag is there, and has no value.
    """

    name: str
    flag: str
    help: str
    default: str
    values: tuple[str, ...] = ()
    inherited: bool = True
    excludes: Mapping[str, str] = field(default_factory=dict)
    switch: bool = False


_NO_SIDE_INPUTS: Final = "a merged graph has no side inputs"

FORM_OPTIONS: Final = (
    FormOption(
        "merge",
        "--merge",
        "Merge the adapter into the weights. The graph gets no side inputs.",
        "off",
        inherited=False,
        excludes=dict.fromkeys(
            ("layout", "branches", "side_inputs", "required_inputs"), _NO_SIDE_INPUTS
        ),
        switch=True,
    ),
    FormOption(
        "precision",
        "--precision",
        "Precision of the base's weights.",
        "fp32, or what an ONNX model has",
        PRECISIONS,
    ),
    FormOption(
        "side_inputs",
        "--side-inputs",
        "Kinds of side inputs that every layer gets, for adapters that are loaded later:"
        f" {', '.join(SIDE_INPUT_KINDS)}.",
        "lora, and what the given adapters need",
    ),
    FormOption(
        "layout",
        "--layout",
        "Layout of side inputs: rows, where slot i belongs to row i, which is faster, or slots,"
        " which adapter_ids selects for each row.",
        "rows; slots if embeddings have factors, and with --operator",
        LAYOUTS,
    ),
    FormOption(
        "branches",
        "--branches/--no-branches",
        "Give the base its own branch of the graph, so that idle side inputs cost nothing. With"
        " fp32 and fp16 each branch takes memory for its weights.",
        "on for int8 and int4; off with --operator",
    ),
    FormOption(
        "required_inputs",
        "--required-inputs/--no-required-inputs",
        "Also write required.onnx, for clients such as onnxruntime-node that drop inputs with"
        " defaults.",
        "off",
    ),
    FormOption(
        "operator",
        "--operator/--no-operator",
        "Make low-rank updates, products of int8 and int4 weights and attention calls that the"
        " library of `loradeploy operator` can replace by its kernels for the CPU. Clients without"
        " the library run the same file with standard operators. Low-rank updates need slots.",
        "off",
    ),
    FormOption(
        "fixed",
        "--fixed",
        "Make dimensions (batch, sequence, past, total) static, for providers that compile a graph"
        " for its shapes.",
        "none",
    ),
    FormOption(
        "attention",
        "--attention",
        "Attention of a decoder: ONNX's own, or GroupQueryAttention, whose cache can be updated in"
        " place.",
        STANDARD,
        ATTENTIONS,
    ),
    FormOption(
        "logits_to_keep",
        "--logits-to-keep/--no-logits-to-keep",
        "Give a decoder the optional input logits_to_keep, the positions to compute logits for, so"
        " that a prefill computes the logits of one position instead of all.",
        "on for decoders with side inputs, where the graph can have it",
        inherited=False,
        excludes={"fixed": "with fixed sizes the logits are of all positions"},
    ),
    FormOption(
        "quantize_embedding",
        "--quantize-embedding",
        "Store the token embedding of an int8 or int4 graph in 8 bits too, and once if the output"
        " head is tied to it. Adapters that change the embedding can then only be merged in the"
        " same export.",
        "off",
        switch=True,
    ),
    FormOption(
        "target",
        "--target",
        "The device that the bundle is for. Sets the options that are not given to what runs on"
        " it.",
        "none",
        tuple(row.name for row in RUN_TARGETS),
    ),
)
BY_NAME: Final[Mapping[str, FormOption]] = MappingProxyType(
    {option.name: option for option in FORM_OPTIONS}
)


def is_packed(precision: str) -> bool:
    """Whether weights are integers of few bits, which branches of a graph share."""
    return precision in PACKED_BITS


def default_of(option: str, precision: str, target: str | None, *, operator: bool = False) -> Any:
    """The value of an option that is not given, if the graph can have any of its values.

    `operator`: whether that option is given. Its low-rank updates need slots, and cost an idle
    graph nothing that branches could save.
    """
    packed = is_packed(precision)
    own = {
        "layout": SLOTS if operator else ROWS,
        "branches": packed and not operator,
        "required_inputs": False,
        "operator": False,
        "logits_to_keep": True,
    }
    chosen = choice_of(target, option, precision)
    return own[option] if chosen is None else chosen


def form_of(manifest: Manifest) -> GraphForm:
    """The form of the graph that a bundle's manifest describes."""
    merged = manifest.mode == "merged"
    added = manifest.added_tokens
    hidden = None if added is None else added.output
    kinds = {
        DORA: any(change.scale for change in manifest.changed),
        BIAS: any(
            change.offset and not change.scale and change.module != hidden
            for change in manifest.changed
        ),
        EMBEDDING: any(target.kind == "embedding" for target in manifest.targets),
        EXPERTS: any(target.kind == "experts" for target in manifest.targets),
        TOKENS: takes_tokens(manifest.own_weights, manifest.targets),
    }
    return GraphForm(
        precision=manifest.precision,
        merge=merged,
        layout=None if merged else manifest.layout,
        branches=None if merged else manifest.branches,
        attention=GQA if manifest.cache_in_place else STANDARD,
        side_inputs=frozenset(kind for kind, present in kinds.items() if present),
        required_inputs=REQUIRED_NAME in manifest.files,
        operator=bool(manifest.operators),
        static_shapes=dict(_static(manifest)),
        logits_to_keep=manifest.logits_to_keep,
        quantize_embedding=manifest.quantized_embedding is not None,
        target=manifest.target,
    )


def _static(manifest: Manifest) -> Iterator[tuple[str, int]]:
    for spec in manifest.inputs:
        if is_cross(spec.name):  # the encoder's results, whose size the model may fix
            continue
        known = _DIMENSIONS.get(PAST if spec.name.startswith(PAST) else spec.name, ())
        for name, size in zip(known, spec.shape, strict=False):
            if name is not None and isinstance(size, int):
                yield name, size


def check_form(asked: Mapping[str, Any]) -> None:
    """Refuse invalid values, and options that cannot be combined.

    `asked`: the values of `FORM_OPTIONS` by name; None or empty if an option is not given.

    Raises:
        UsageError: a value is invalid, or options cannot be combined.
    """
    given = {name for name, value in asked.items() if value}
    for option in FORM_OPTIONS:
        value = asked.get(option.name)
        if option.name in given and option.values and value not in option.values:
            expected = ", ".join(option.values)
            raise UsageError(f"`{option.name}={value!r}`: expected one of {expected}")
    for kind in asked.get("side_inputs") or ():
        if kind not in SIDE_INPUT_KINDS:
            raise UsageError(f"`side_inputs=[{kind!r}]`: expected {', '.join(SIDE_INPUT_KINDS)}")
    for option in FORM_OPTIONS:
        for other in given & option.excludes.keys() if option.name in given else ():
            reason = option.excludes[other]
            raise UsageError(f"`{other}` and `{option.name}` do not go together: {reason}")
    for kind in (EMBEDDING, TOKENS):
        if asked.get("layout") == ROWS and kind in (asked.get("side_inputs") or ()):
            raise UsageError(
                f"`layout='rows'` and `side_inputs=['{kind}']` do not go together: factors of"
                " embeddings need slot numbers"
            )
    if asked.get("operator") and asked.get("precision") == "fp16":
        raise UsageError(
            "`precision='fp16'` and `operator` do not go together: its kernels compute in fp32"
        )
    _check_embedding(asked)
    known = {name: value for name, value in asked.items() if value is not None}
    check_runs(asked.get("target"), known)


def _check_embedding(asked: Mapping[str, Any]) -> None:
    """Raise UsageError if `quantize_embedding` cannot be combined with the other options."""
    if not asked.get("quantize_embedding"):
        return
    if asked.get("precision") not in (None, *PACKED_BITS):
        raise UsageError("`quantize_embedding` is for `precision='int8'` and `precision='int4'`")
    for kind in (EMBEDDING, TOKENS):
        if kind in (asked.get("side_inputs") or ()):
            raise UsageError(
                f"`quantize_embedding` and `side_inputs=['{kind}']` do not go together: side inputs"
                " add to an embedding that is not quantized"
            )


def inherit(asked: Mapping[str, Any], before: Manifest) -> dict[str, Any]:
    """The options `asked` for, with those that are not given inherited from the bundle `before`.

    Options that have the default of the bundle's precision and target are not inherited: they get
    the default of the new ones, or what the graph can have. Neither are those that a new target
    sets or never runs. Options of side inputs are not inherited from or by merged graphs.
    Precision, attention and the kinds of side inputs are properties of the graph itself. A bundle
    that gets the operator does not keep a layout and branches, with which it would do less.

    Raises:
        UsageError: a static shape is given with another size than the bundle has, or side inputs of
            an embedding that the bundle has quantized.
    """
    form, result = form_of(before), dict(asked)
    for kind in (EMBEDDING, TOKENS) if form.quantize_embedding else ():
        if kind in (asked.get("side_inputs") or ()):
            raise UsageError(
                f"`side_inputs=['{kind}']`: {before.quantized_embedding} of the bundle is quantized"
                " and takes none: export the checkpoint without `quantize_embedding`"
            )
    target = result["target"] = asked.get("target") or form.target
    moved = target != form.target
    smaller = choice_of(target, "precision", form.precision)
    if moved and asked.get("precision") is None and form.precision == DEFAULT_PRECISION:
        # Without the checkpoint, a graph in fp32 can only be packed.
        result["precision"] = smaller if smaller in PACKED_BITS else None
    precision = result.get("precision") or form.precision
    for name in ("layout", "branches", "required_inputs", "operator"):
        if name in ("layout", "branches") and asked.get("operator"):
            continue
        value = getattr(form, name)
        set_by_target = choice_of(target, name, precision) is not None
        if result.get(name) is not None or (
            moved and (set_by_target or never_runs(target, name, value))
        ):
            continue
        if value != default_of(name, form.precision, form.target, operator=form.operator):
            sides = name != "operator" and (asked.get("merge") or form.merge)
            result[name] = None if sides else value
    sizes = dict(asked.get("fixed") or {})
    for name, size in sizes.items():
        if form.static_shapes.get(name, size) != size:
            found = f"{name}={form.static_shapes[name]}"
            raise UsageError(
                f"`fixed={{{name!r}: {size}}}`: the bundle's graph has {found}: export the bundle"
                " that has open shapes"
            )
    result["fixed"] = {n: size for n, size in sizes.items() if n not in form.static_shapes}
    return result
