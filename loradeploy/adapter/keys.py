"""The keys of an adapter file: the base's parameter or module, and which part of PEFT's it is.

[wrappers.]base_model.model.<name>      what PEFT, compilers and trainers put before a name

<module>.lora_A[.ADAPTER].weight        a factor; PEFT leaves the adapter's name out
<module>.modules_to_save[.ADAPTER].<p>  a parameter trained whole, as is <module>.<p>
<module>.original_module.<p>            what the base had in its place
<module>.base_layer.<p>                 what the base has below the factors
<module>.token_adapter.trainable_tokens_delta[.ADAPTER]   rows trained alone
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final, Literal

from loradeploy.errors import AdapterError

PREFIX: Final = "base_model.model."

# Of the modules that torch.compile, FSDP and activation checkpointing put between a model's own.
_BETWEEN: Final = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# Of DistributedDataParallel and the like; twice where an adapted model was adapted again.
_BEFORE: Final = re.compile(r"(?:module\.)*(?:base_model\.model\.)+")

Part = Literal["factor", "bias", "plain", "whole", "original", "below", "rows"]

_NAMED: Final = r"(?:\.(?!weight$|bias$)(?P<adapter>[^.]+))?"
_FACTOR: Final = re.compile(
    rf"(?P<module>.+)\.(?P<part>lora_[AB]|lora_embedding_[AB]|lora_magnitude_vector){_NAMED}"
    r"(?:\.(?P<leaf>weight|bias))?"
)
_ROWS: Final = re.compile(
    r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.(?P<adapter>[^.]+))?"
)
_WHOLE: Final = re.compile(r"(?P<module>.+)\.modules_to_save\.(?P<rest>.+)")
_ORIGINAL: Final = ".original_module."
_BELOW: Final = (".token_adapter.base_layer.", ".base_layer.")


@dataclass(frozen=True)
class Key:
    """What a tensor of an adapter file is.

    `name`: the module of a factor or of trained rows, else the parameter. `half`: of a factor,
    which one: lora_A, lora_B, lora_embedding_A, lora_embedding_B or lora_magnitude_vector.
    """

    part: Part
    name: str
    half: str = ""


def read_keys(keys: Iterable[str]) -> dict[str, Key]:
    """What each of the keys of one file is.

    Raises:
        AdapterError: some keys have PEFT's prefix and some have not, or the file holds several
            adapters.
    """
    names = {key: _BETWEEN.sub("", key) for key in keys}
    bare = [key for key, name in names.items() if not _BEFORE.match(name)]
    if bare and len(bare) < len(names):
        raise AdapterError(
            f"{sorted(bare)[0]} does not begin with {PREFIX!r} as other keys of the file do"
        )
    names = {key: _BEFORE.sub("", name, count=1) for key, name in names.items()}
    adapters = {
        found["adapter"]
        for name in names.values()
        for form in (_FACTOR, _ROWS)
        if (found := form.fullmatch(name)) and found["adapter"] is not None
    }
    if len(adapters) > 1:
        raise AdapterError(
            f"the file holds {len(adapters)} adapters ({', '.join(sorted(adapters)[:4])}): save"
            " each of them to a directory of its own"
        )
    return {key: _key(name, adapters or {"default"}) for key, name in names.items()}


def _key(name: str, adapters: Iterable[str]) -> Key:
    if factor := _FACTOR.fullmatch(name):
        part: Part = "bias" if factor["leaf"] == "bias" else "factor"
        return Key(part, factor["module"], factor["part"])
    if rows := _ROWS.fullmatch(name):
        return Key("rows", rows["module"])
    if whole := _WHOLE.fullmatch(name):
        first, _, rest = whole["rest"].partition(".")
        inner = rest if rest and first in adapters else whole["rest"]
        return Key("whole", f"{whole['module']}.{inner}")
    if _ORIGINAL in name:
        return Key("original", name.replace(_ORIGINAL, "."))
    for below in _BELOW:
        if below in name:
            return Key("below", name.replace(below, "."))
    return Key("plain", name)
