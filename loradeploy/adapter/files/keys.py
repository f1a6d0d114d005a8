"""Parse the keys of an adapter file: the base's parameter or module, and its role in PEFT.

[wrappers.]base_model.model.<name>      prefixes of PEFT, compilers and trainers

<module>.lora_A[.ADAPTER].weight        a factor; PEFT leaves the adapter's name out
<module>.lora_B[.ADAPTER].bias          the bias of a factor
<module>.modules_to_save[.ADAPTER].<p>  a fully trained parameter, as is <module>.<p>
<module>.original_module.<p>            the original parameter of the base
<module>.base_layer.<p>                 the base's parameter below the factors
<module>.token_adapter.trainable_tokens_delta[.ADAPTER]   individually trained rows
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from loradeploy.errors import AdapterError

PREFIX: Final = "base_model.model."
# PEFT's wrappers insert these after a module's name: for the layer of the base, for the original of
# a module in modules_to_save, and for trained rows.
INNER: Final = ".base_layer."
ORIGINAL: Final = ".original_module."
DELTA: Final = ".trainable_tokens_delta"
TRAINED_ROWS: Final = f".token_adapter{DELTA}"

# Inserted into names by torch.compile, FSDP and activation checkpointing.
_BETWEEN: Final = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Put before names by DistributedDataParallel, Lightning and PEFT; twice if PEFT wrapped a model
# again.
_BEFORE: Final = re.compile(
    r"(?:^|(?<=\.))(?:(?:_forward_module|module)\.)*(?:base_model\.model\.)+"
)

# The prefix of TRL's models with a value head, before or after PEFT's.
_BEFORE_VALUE_HEAD: Final = re.compile(
    r"(?P<peft>(?:module\.)*(?:base_model\.model\.)*)pretrained_model\."
)

Part = Literal["factor", "bias", "parameter", "saved", "original", "below", "rows"]

MAGNITUDE: Final = "lora_magnitude_vector"
_NAMED: Final = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
_FACTOR: Final = re.compile(
    rf"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|{MAGNITUDE}){_NAMED}"
    r"(?:\.(?P<leaf>weight|bias))?"
)
_ROWS: Final = re.compile(rf"(?P<module>.+){re.escape(TRAINED_ROWS)}(?:\.(?P<adapter>[^.]+))?")
_SAVED: Final = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
# The tensors that TRL saves with the adapter of a model with a value head.
_VALUE_HEAD: Final = re.compile(r"v_head\.summary\.(?:weight|bias)")
_BELOW: Final = (f".token_adapter{INNER}", INNER)


@dataclass(frozen=True)
class Key:
    """The role of a tensor in an adapter file.

    `name`: the module of a factor or of trained rows, else the parameter. `half`: which factor:
    lora_A, lora_B, lora_embedding_A, lora_embedding_B or lora_magnitude_vector.
    """

    part: Part
    name: str
    half: str = ""


def read_keys(keys: Iterable[str]) -> dict[str, Key]:
    """The role of each key of one file.

    Raises:
        AdapterError: some keys have PEFT's prefix and others lack it, or the file has several
            adapters.
    """
    names = {key: _BETWEEN.sub("", key) for key in keys}
    if are_below_value_head(names):
        names = {key: _BEFORE_VALUE_HEAD.sub(r"\g<peft>", name) for key, name in names.items()}
    bare = [key for key, name in names.items() if not _BEFORE.match(name)]
    if bare and len(bare) < len(names):
        raise AdapterError(
            f"{sorted(bare)[0]} does not begin with {PREFIX!r} as other keys of the file do"
        )
    names = {key: _BEFORE.sub("", name, count=1) for key, name in names.items()}
    own = [found for name in names.values() if (found := _FACTOR.fullmatch(name))]
    own += [found for name in names.values() if (found := _ROWS.fullmatch(name))]
    adapters = {found["adapter"] for found in own if found["adapter"] is not None}
    # PEFT also loads magnitudes with a name beside other factors without.
    named = {found["adapter"] for found in own if found.groupdict().get("part") != MAGNITUDE}
    if None in named and len(named) > 1:
        raise AdapterError(
            f"some keys name an adapter ({min(adapters)}) and others do not: save each adapter to a"
            " separate directory"
        )
    if len(adapters) > 1:
        raise AdapterError(
            f"the file has {len(adapters)} adapters ({', '.join(sorted(adapters)[:4])}): save"
            " each of them to a separate directory"
        )
    return {key: _key(name, adapters or {"default"}) for key, name in names.items()}


def are_below_value_head(keys: Iterable[str]) -> bool:
    """Whether all tensors are below the `pretrained_model` of TRL's models with a value head."""
    found = [_BEFORE_VALUE_HEAD.match(key) for key in keys]
    return bool(found) and all(found)


def is_value_head(key: str) -> bool:
    """Whether `key` is of TRL's value head, which reads the hidden states and changes no logits."""
    return _VALUE_HEAD.fullmatch(_BEFORE.sub("", _BETWEEN.sub("", key), count=1)) is not None


def _key(name: str, adapters: Iterable[str]) -> Key:
    if factor := _FACTOR.fullmatch(name):
        part: Part = "bias" if factor["leaf"] == "bias" else "factor"
        return Key(part, factor["module"], factor["part"])
    if rows := _ROWS.fullmatch(name):
        return Key("rows", rows["module"])
    if full := _SAVED.fullmatch(name):
        first, _, rest = full["rest"].partition(".")
        inner = rest if rest and first in adapters else full["rest"]
        return Key("saved", f"{full['module']}.{inner}")
    if ORIGINAL in name:
        return Key("original", name.replace(ORIGINAL, "."))
    for below in _BELOW:
        if below in name:
            return Key("below", name.replace(below, "."))
    return Key("parameter", name)
