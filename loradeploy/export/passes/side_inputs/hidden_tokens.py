"""Hide tokens that a row's adapter does not have: their logits are made too small to be chosen.

    logits = logits + offset[adapter_ids]

`logits.offset` [adapters, tokens] has zeros for the tokens of an adapter. The default, for the
base, hides all tokens that adapters add. The offset is added after all other operations on the
logits, such as a soft cap, which would bring the logits back into range.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from loradeploy.bundle.fitting.added_tokens import base_offset
from loradeploy.bundle.manifest import OutputTarget
from loradeploy.bundle.names import offset_name
from loradeploy.errors import ExportError
from loradeploy.export.graph.edit import replace_uses
from loradeploy.export.graph.names import OFFSET_ADD

if TYPE_CHECKING:
    from loradeploy.bundle.manifest import AddedTokens
    from loradeploy.export.passes.side_inputs.surgery import Surgery

_ALL: Final = "all"


def hide_tokens(surgery: Surgery, added: AddedTokens) -> OutputTarget:
    """Add the side input that hides the added tokens which an adapter does not have.

    Raises:
        ExportError: the graph's logits are not [batch, sequence, tokens].
    """
    assert added.output is not None
    logits = next(value for value in surgery.graph.outputs if value.name == added.output)
    last = logits.producer()
    if last is None or logits.dtype is None or logits.shape is None or len(logits.shape) != 3:
        raise ExportError(
            f"{added.output} of the graph are not [batch, sequence, tokens], so that tokens that"
            " adapters add cannot be side inputs: merge the adapter instead"
        )
    name, dtype = offset_name(added.output), surgery.dtype.numpy()
    default = base_offset(added, dtype)[None].astype(dtype)
    offset = surgery.side_input(name, ["adapters", added.size], default)
    chain = surgery.chain(last, added.output)
    value = chain.add("Gather", "offset_gather", [offset, surgery.ids], axis=0)
    value = chain.add("Unsqueeze", "offset_unsqueeze", [value, surgery.sequence_axis])
    if logits.dtype != surgery.dtype:
        chain = surgery.chain(chain.last, added.output, logits.dtype)
        value = chain.add("Cast", "offset_cast", [value], to=int(logits.dtype))
    shown = chain.add("Add", OFFSET_ADD, [logits, value])
    replace_uses(logits, shown, keep={chain.last})
    logits.name = f"{added.output}/{_ALL}"  # the head's own output may be its "before"
    return OutputTarget(module=added.output, size=added.size, offset=name)
