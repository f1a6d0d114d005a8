"""Cast a model to fp16 as transformers loads it in that dtype.

transformers keeps two kinds of tensors in fp32, and the cast of a module (`half`) rounds both:

    weights    of the model's `_keep_in_fp32_modules`: T5's `wo`, whose products are larger than
               fp16's maximum in released checkpoints
    buffers    of frequencies: a rotary embedding multiplies them by the position, and with it the
               rounding (by more than 0.5 rad at position 4096)
"""

from __future__ import annotations

import re
from typing import Any, Final

from loradeploy.errors import ExportError

# `inv_freq`, `local_inv_freq`, `freqs`, `sinusoid_freq`, `inv_timescales`, …
_FREQUENCIES: Final = re.compile(r"(freqs?|timescales)$")


def to_float16(model: Any) -> Any:
    """Cast `model`, which is in fp32, in place; return it.

    Raises:
        ExportError: a weight is larger than fp16's maximum. A trial would not meet a token's row.
    """
    kept = _kept(model)
    for path, module in model.named_modules():
        for name, parameter in module.named_parameters(path, recurse=False):
            finite = parameter.isfinite().sum()  # a bias may have -inf, to suppress tokens
            if parameter.is_floating_point() and not kept.search(name):
                parameter.data = parameter.data.half()
            if parameter.isfinite().sum() != finite:
                raise ExportError(
                    f"{name} has values that are too large for float16, which ends at 65504: give"
                    " `precision='fp32'` or `precision='bf16'`"
                )
        for name, buffer in list(module.named_buffers(path, recurse=False)):
            exact = _FREQUENCIES.search(name) or kept.search(name)
            if buffer.is_floating_point() and not exact:
                setattr(module, name.rpartition(".")[2], buffer.half())
    return model


def _kept(model: Any) -> re.Pattern[str]:
    """Finds in the name of a parameter or buffer what transformers keeps in fp32.

    As in transformers 5.23 (core_model_loading.build_glob_alternation), an entry is a regular
    expression in which * stands for any characters, and may match anywhere in a name: `norm` also
    keeps `layernorm.weight`.
    """
    lists = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    names = sorted({name for each in lists for name in getattr(model, each, None) or ()})
    return re.compile("|".join(names).replace("*", ".*") if names else r"(?!)")
