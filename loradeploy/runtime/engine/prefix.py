"""Keys and values of beginnings of prompts, so that what prompts share is computed once.

They are kept in blocks of tokens. A block belongs to an adapter, by its digest, to a scope, and to
all tokens before it: what another adapter computed, or was asked in another scope, is never found.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens of a block: what two prompts share beyond their last common block is computed twice.
BLOCK: Final = 16

# Whose a prompt is: the digest of its adapter, None for the base, and its scope.
Owner = tuple[str | None, str | None]
# An owner, the block before, its tokens.
_Key = tuple[Owner, "_Block | None", tuple[int, ...]]


@dataclass(eq=False)
class _Block:
    """`values`: of each tensor, [heads, BLOCK, size]. `followers`: blocks behind it."""

    key: _Key
    values: list[NDArray[Any]]
    followers: int = 0

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.values)


class PrefixCache:
    """Blocks of at most `budget` bytes together; those that were not used the longest go.

    Its user calls it from one thread. `evictions`: how many went.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self.nbytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, owner: Owner, ids: Sequence[int]) -> list[list[NDArray[Any]]]:
        """The blocks that `ids` begin with, each as its values; the last token is never in them.

        Somebody has to read that one for its logits.
        """
        found = self._chain(owner, ids, (len(ids) - 1) // BLOCK)
        return [block.values for block in found]

    def shares(self, one: Sequence[int], other: Sequence[int], found: int) -> bool:
        """Whether prompts of one owner have a block in common behind the `found` tokens kept."""
        end = found + BLOCK
        return min(len(one), len(other)) > end and list(one[:end]) == list(other[:end])

    def keep(self, owner: Owner, ids: Sequence[int], values: Sequence[NDArray[Any]]) -> None:
        """Keep the whole blocks of `ids`, whose keys and values are `values` [heads, ≥ ids, size].

        As many as there is room for beside each other.
        """
        whole = len(ids) // BLOCK
        chain = self._chain(owner, ids, whole)
        for number in range(len(chain), whole):
            begin, end = number * BLOCK, (number + 1) * BLOCK
            last = chain[-1] if chain else None
            key = (owner, last, tuple(ids[begin:end]))
            nbytes = sum(part[:, begin:end].nbytes for part in values)
            if not self._make_room(nbytes, set(chain)):
                break
            block = _Block(key, [part[:, begin:end].copy() for part in values])
            self._blocks[key] = block
            self.nbytes += nbytes
            if last is not None:
                last.followers += 1
            chain.append(block)
        self._touch(chain)

    def clear(self) -> None:
        """Let go of all blocks."""
        self._blocks.clear()
        self.nbytes = 0

    def _chain(self, owner: Owner, ids: Sequence[int], most: int) -> list[_Block]:
        chain: list[_Block] = []
        for number in range(most):
            tokens = tuple(ids[number * BLOCK : (number + 1) * BLOCK])
            block = self._blocks.get((owner, chain[-1] if chain else None, tokens))
            if block is None:
                break
            chain.append(block)
        self._touch(chain)
        return chain

    def _touch(self, chain: Sequence[_Block]) -> None:
        # The last one first: no block is older than those behind it.
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)

    def _make_room(self, nbytes: int, spared: set[_Block]) -> bool:
        """Let go of the oldest blocks but those in `spared`; whether there is room now."""
        while self.nbytes + nbytes > self._budget:
            oldest = next(
                (
                    block
                    for block in self._blocks.values()
                    if not block.followers and block not in spared
                ),
                None,
            )
            if oldest is None:
                return False
            del self._blocks[oldest.key]
            before = oldest.key[1]
            if before is not None:
                before.followers -= 1
            self.nbytes -= oldest.nbytes
            self.evictions += 1
        return True
