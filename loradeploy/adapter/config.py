"""The configuration of an adapter, as PEFT writes it in `adapter_config.json`.

Each field is in exactly one of four groups: honored (an attribute of `AdapterConfig`), neutral
(kept as read: it cannot change the numbers of a finished adapter), refused unless it is off (it
changes the numbers and is not supported), or unknown (refused unless it is off).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import Any, Final

from loradeploy.adapter.files.formats import other_peft_type
from loradeploy.adapter.modules.patterns import Ends, Matcher, check_patterns, endings, is_name
from loradeploy.errors import AdapterError, shown

# The field for modules that are tied in the base to share their factors or their trained weight.
TYING: Final = "ensure_weight_tying"
# The field with the ids of tokens whose rows were trained: a list, or lists by module.
TOKENS: Final = "trainable_token_indices"
# The field with parameters that have factors: those of experts, and weights such as a router's.
PARAMETERS: Final = "target_parameters"

# Fields that cannot change the numbers of a finished adapter.
_NEUTRAL: Final = frozenset(
    {
        "auto_mapping",
        "corda_config",
        *("lora_dtype", "lorap_emb_lr", "lorap_lr_ratio"),  # of ms-swift, only used in training
        TYING,  # the file has the shared tensors once for each tied module
        "eva_config",
        "inference_mode",
        "loftq_config",
        "lora_ga_config",
        "megatron_core",
        "merge_weights",  # of PEFT before 0.4: whether eval() merged them
        "qalora_group_size",
        "revision",
        "runtime_config",
        PARAMETERS,  # read with the factors themselves (adapter/algebra/experts.py)
        TOKENS,  # read with the rows themselves (adapter/files/roles.py)
        "velora_config",
    }
)

# The ending of fields that record which version saved the adapter: peft_version, unsloth_version, …
_VERSION: Final = "_version"

# Fields that change the numbers and are not supported, and what to do instead.
_REFUSED: Final = {
    **dict.fromkeys(
        ("alora_invocation_tokens", "alora_invocation_string", "invocation_string"),
        "activated LoRA depends on the prompt and cannot be exported",
    ),
    "enable_lora": "PEFT before 0.4 adapted parts of a fused layer with it: merge the adapter with"
    " that PEFT and export the merged model",
    "arrow_config": "routing between adapters cannot be exported",
    "kasa_config": "merge it with PEFT and export the merged model",
    "layer_replication": "apply it to the base model first and train on the result",
    "megatron_config": "export from a Hugging Face checkpoint instead",
    "monteclora_config": "merge it with PEFT and export the merged model",
    "use_bdlora": "merge it with PEFT and export the merged model",
    "use_qalora": "merge it with PEFT and export the merged model",
}

# Initializations that leave the base weights as they are.
_BASE_KEEPING_INITS: Final = (True, False, "gaussian", "eva", "orthogonal", "mica")

# Initializations that subtract from the base weights a part that can be recomputed from them. The
# others (CorDA, LoftQ, LoRA-GA) cannot be undone without the data they were computed from.
_BASE_CHANGING_INIT: Final = re.compile(r"pissa(_niter_[1-9]\d*)?|olora")

BIASES: Final = ("none", "all", "lora_only")

# Limits: ranks fit int32, and other numbers fit float32, in which factors are scaled.
_MAX_RANK: Final = 2**31 - 1
_MAX_NUMBER: Final = 3.4e38


@dataclass(frozen=True)
class AdapterConfig:
    """How the tensors of an adapter are used. Field names and meanings are those of PEFT.

    `r`, `lora_alpha`: rank and alpha of modules that `rank_pattern` and `alpha_pattern` do not
    name.
    `target_modules`: endings of module names, or one regular expression, or "all-linear".
    `modules_to_save`: modules trained in full, such as a classifier head.
    `bias`: which biases are also trained: "none", "all", or "lora_only" (those of the targets).
    `use_dora`: weights are split into magnitude and direction (Liu et al., 2024, arXiv:2402.09353).
    `lora_bias`: B has a bias: the update of an output is s · (B A x + b).
    `extra`: other fields, kept as read so that a round trip loses nothing.
    """

    r: int = 8
    lora_alpha: float = 8
    target_modules: str | tuple[str, ...] | None = None
    lora_dropout: float = 0.0
    bias: str = "none"
    use_rslora: bool = False
    use_dora: bool = False
    lora_bias: bool = False
    fan_in_fan_out: bool = False
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    exclude_modules: str | tuple[str, ...] | None = None
    layers_to_transform: int | tuple[int, ...] | None = None
    layers_pattern: str | tuple[str, ...] | None = None
    modules_to_save: tuple[str, ...] = ()
    task_type: str | None = None
    base_model_name_or_path: str | None = None
    init_lora_weights: bool | str = True
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for problem in _problems(self):
            raise AdapterError(f"adapter config: {problem}")

    @classmethod
    def from_peft(cls, values: Mapping[str, Any]) -> AdapterConfig:
        """The configuration in `values`, the contents of `adapter_config.json`.

        Raises:
            AdapterError: not LoRA, a value of the wrong type, or a field that changes the numbers
                and is not supported; the message names the field.
        """
        peft_type = values.get("peft_type", "LORA")
        if peft_type != "LORA":
            raise AdapterError(
                f"adapter config: peft_type is {shown(peft_type)}, only LORA, ADALORA and"
                f" TRAINABLE_TOKENS are supported: {other_peft_type(peft_type)}"
            )
        for name, advice in _REFUSED.items():
            if values.get(name):
                raise AdapterError(
                    f"adapter config: {name}={shown(values[name])} is refused: {advice}"
                )
        parameters = values.get(PARAMETERS) or []
        if not _is_list(parameters) or not all(isinstance(name, str) for name in parameters):
            raise AdapterError(
                f"adapter config: target_parameters is {shown(parameters)}, a list of names is"
                " needed"
            )
        for name in ("r", "lora_alpha"):
            if name in values and values[name] is None:  # a default could differ from the training
                raise AdapterError(
                    f"adapter config: {name} is null, expected a number: take it from the settings"
                    " of the training"
                )
        known = {f.name for f in fields(cls)} - {"extra"}
        extra: dict[str, Any] = {}
        for name, value in values.items():
            if name in known or name == "peft_type":
                continue
            saved_by = name.endswith(_VERSION) and isinstance(value, str)
            if value and name not in _NEUTRAL and not saved_by:
                raise AdapterError(
                    f"adapter config: the field {name}={shown(value)} is unknown and may change the"
                    " numbers: merge the adapter with PEFT, or remove the field if it does not"
                )
            extra[name] = value
        honored: dict[str, Any] = {
            name: _ordered(value) if name in _UNORDERED and _is_list(value) else value
            for name, value in values.items()
            if name in known and value is not None
        }
        for name in ("layers_to_transform", "layers_pattern"):
            if _is_list(honored.get(name)):
                honored[name] = tuple(honored[name])
        if "r" in honored:
            honored["r"] = as_integer(honored["r"])
        if isinstance(ranks := honored.get("rank_pattern"), Mapping):
            honored["rank_pattern"] = {key: as_integer(rank) for key, rank in ranks.items()}
        return cls(**honored, extra=extra)

    def to_peft(self) -> dict[str, Any]:
        """The object to write in `adapter_config.json`, with the same bytes for the same config."""
        values: dict[str, Any] = dict(self.extra)
        values["peft_type"] = "LORA"
        for f in fields(self):
            if f.name != "extra":
                value = getattr(self, f.name)
                values[f.name] = list(value) if isinstance(value, tuple) else value
        values["rank_pattern"] = dict(self.rank_pattern)
        values["alpha_pattern"] = dict(self.alpha_pattern)
        values["modules_to_save"] = list(self.modules_to_save) or None
        return dict(sorted(values.items()))

    @property
    def changes_base(self) -> bool:
        """Whether the initialization changed the base weights that the factors belong to."""
        init = self.init_lora_weights
        return isinstance(init, str) and _BASE_CHANGING_INIT.fullmatch(init) is not None

    @property
    def method(self) -> str:
        """The name of the method: LoRA, rsLoRA, DoRA, rsLoRA + DoRA; with lora_bias."""
        names = ["rsLoRA"] if self.use_rslora else []
        names += ["DoRA"] if self.use_dora else []
        return " + ".join(names or ["LoRA"]) + (" with lora_bias" if self.lora_bias else "")

    def rank_of(self, module: str) -> int:
        """The rank of `module`'s factors: `rank_pattern` first, then `r`."""
        key = self._rank_ends.first(self.targeted_name(module))
        return self.r if key is None else self.rank_pattern[key]

    def alpha_of(self, module: str) -> float:
        """Alpha for `module`: `alpha_pattern` first, then `lora_alpha`."""
        key = self._alpha_ends.first(self.targeted_name(module))
        return self.lora_alpha if key is None else self.alpha_pattern[key]

    def unused_patterns(self, modules: Iterable[str]) -> list[str]:
        """The keys of `rank_pattern` and `alpha_pattern` that apply to none of `modules`."""
        names = [self.targeted_name(module) for module in modules]
        return [
            f"{field}: {key}"
            for field, ends, keys in (
                ("rank_pattern", self._rank_ends, self.rank_pattern),
                ("alpha_pattern", self._alpha_ends, self.alpha_pattern),
            )
            for key in sorted(set(keys) - {ends.first(name) for name in names})
        ]

    def targets_weight(self, module: str) -> bool:
        """Whether `target_parameters` lists the weight of `module`, as for a mixture's router."""
        names = self.target_parameters
        return bool(names) and not names.isdisjoint(endings(f"{module}.weight"))

    def targeted_name(self, module: str) -> str:
        """The name of `module`, or of its weight if that is the target, as PEFT's patterns see."""
        return f"{module}.weight" if self.targets_weight(module) else module

    @cached_property
    def target_parameters(self) -> frozenset[str]:
        """The names of parameters in `target_parameters`, or endings of them."""
        names = self.extra.get(PARAMETERS)
        return frozenset(names if isinstance(names, list | tuple) else ())

    @cached_property
    def matcher(self) -> Matcher:
        """Matches the patterns of this config in bounded time."""
        return Matcher()

    @cached_property
    def _rank_ends(self) -> Ends:
        return Ends(self.rank_pattern, self.matcher)

    @cached_property
    def _alpha_ends(self) -> Ends:
        return Ends(self.alpha_pattern, self.matcher)

    @cached_property
    def saved_by_length(self) -> Mapping[int, Mapping[str, int]]:
        """The names of `modules_to_save` with their indices in it, grouped by length."""
        found: dict[int, dict[str, int]] = {}
        for number, name in enumerate(self.modules_to_save):
            found.setdefault(len(name), {}).setdefault(name, number)
        return found

    @cached_property
    def saved_expressions(self) -> tuple[str, ...]:
        """The entries of `modules_to_save` that can match several parts of a dotted name.

        PEFT uses them as regular expressions, in which a dot matches any character.
        """
        return tuple(name for name in self.modules_to_save if "." in name or not is_name(name))

    @cached_property
    def layers(self) -> frozenset[int]:
        """The indices of `layers_to_transform`."""
        layers = self.layers_to_transform
        return frozenset((layers,) if isinstance(layers, int) else layers or ())

    @cached_property
    def listed(self) -> Mapping[str, frozenset[str]]:
        """`target_modules`, `exclude_modules` and `modules_to_save`, if they are lists."""
        lists = {
            "target_modules": self.target_modules,
            "exclude_modules": self.exclude_modules,
            "modules_to_save": self.modules_to_save,
        }
        return {name: frozenset(v) for name, v in lists.items() if isinstance(v, tuple)}


_UNORDERED: Final = ("target_modules", "exclude_modules", "modules_to_save")


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple | set | frozenset)


def _ordered(values: Iterable[Any]) -> tuple[Any, ...]:
    """`values` sorted if all are strings; other values are refused later."""
    found = tuple(values)
    return tuple(sorted(found)) if all(isinstance(value, str) for value in found) else found


def as_integer(value: object) -> object:
    """8.0, as JSON may spell an integer, as 8; other values unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _is_name_list(value: object) -> bool:
    return isinstance(value, tuple) and all(isinstance(v, str) for v in value)


def _is_number(value: object) -> bool:
    # math.isfinite would raise an error for an integer that is too large for a float.
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_MAX_NUMBER <= value <= _MAX_NUMBER


def _is_share(value: object) -> bool:
    return _is_number(value) and 0 <= value <= 1  # type: ignore[operator]


def _is_rank(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= _MAX_RANK


def _is_selection(value: object) -> bool:
    return value is None or isinstance(value, str) or _is_name_list(value)


def _is_name(value: object) -> bool:
    return isinstance(value, str | None)


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _are_layers(value: object) -> bool:
    several = isinstance(value, tuple) and all(isinstance(v, int) for v in value)
    return value is None or isinstance(value, int) or several


def _is_pattern_of(valid: Callable[[object], bool]) -> Callable[[object], bool]:
    def check(value: object) -> bool:
        return isinstance(value, Mapping) and all(
            isinstance(k, str) and valid(v) for k, v in value.items()
        )

    return check


# The condition that each value has to meet, and its description, by field.
_RULES: Final[Mapping[str, tuple[Callable[[object], bool], str]]] = {
    "r": (_is_rank, "a positive integer"),
    "lora_alpha": (_is_number, "a number"),
    **dict.fromkeys(
        ("target_modules", "exclude_modules", "layers_pattern"),
        (_is_selection, "a string or a list"),
    ),
    **dict.fromkeys(("task_type", "base_model_name_or_path"), (_is_name, "a name or null")),
    "lora_dropout": (_is_share, "a number from 0 to 1"),
    "bias": (lambda value: value in BIASES, "one of " + ", ".join(BIASES)),
    **dict.fromkeys(
        ("use_rslora", "use_dora", "lora_bias", "fan_in_fan_out"), (_is_switch, "true or false")
    ),
    "rank_pattern": (_is_pattern_of(_is_rank), "an object of positive integers"),
    "alpha_pattern": (_is_pattern_of(_is_number), "an object of numbers"),
    "layers_to_transform": (_are_layers, "an integer or a list of integers"),
    "modules_to_save": (_is_name_list, "a list of names"),
}


def _problems(config: AdapterConfig) -> list[str]:
    """Invalid values, and values that cannot be combined."""
    found = [
        f"{name} is {shown(value)}, expected {needs}"
        for name, (valid, needs) in _RULES.items()
        if not valid(value := getattr(config, name))
    ]
    if config.lora_bias and (config.use_dora or config.changes_base):
        other = "use_dora" if config.use_dora else f"init_lora_weights {config.init_lora_weights}"
        found.append(f"lora_bias is true, which PEFT does not combine with {other}")
    if not (config.changes_base or config.init_lora_weights in _BASE_KEEPING_INITS):
        found.append(
            f"init_lora_weights is {shown(config.init_lora_weights)}, expected PiSSA, OLoRA or an"
            " initialization that keeps the base weights (others: convert with PEFT's"
            " save_pretrained(path_initial_model_for_weight_conversion=…))"
        )
    return found or _pattern_problems(config)


def _pattern_problems(config: AdapterConfig) -> list[str]:
    patterns: dict[str, Iterable[str]] = {
        "rank_pattern": config.rank_pattern,
        "alpha_pattern": config.alpha_pattern,
        "modules_to_save": config.modules_to_save,
    }
    for name in ("target_modules", "exclude_modules", "layers_pattern"):
        value = getattr(config, name)
        if isinstance(value, str):
            patterns[name] = (value,)
        elif name == "layers_pattern":
            patterns[name] = value or ()
    for name, expressions in patterns.items():
        if problem := check_patterns(expressions):
            return [f"{name} {problem}"]
    return []
