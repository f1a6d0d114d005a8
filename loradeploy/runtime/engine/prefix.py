"""Prefix cache: keys and values of prompt prefixes, computed once for prompts that share them.

They are stored in blocks of tokens. A block belongs to an adapter (by digest), a scope, and all
tokens before it: blocks of another adapter or scope are never used.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Tokens per block. Shared tokens beyond the last common block are computed again.
BLOCK: Final = 16

# The digest of a prompt's adapter, None for the base, and its scope.
Owner = tuple[str | None, str | None]
# An owner, the previous block, the block's tokens.
_Key = tuple[Owner, "_Block | None", tuple[int, ...]]


@dataclass(eq=False)
class _Block:
    """A block. `values`: [heads, BLOCK, size] per tensor. `followers`: number of next blocks."""

    key: _Key
    values: list[NDArray[Any]]
    followers: int = 0

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.values)


class PrefixCache:
    """Blocks of at most `budget` bytes in total; the least recently used are evicted.

    Not thread-safe. `evictions`: number of evicted blocks.
    """

    def __init__(self, budget: int) -> None:
        self._budget = budget
        self._blocks: OrderedDict[_Key, _Block] = OrderedDict()
        self.nbytes = 0
        self.evictions = 0

    def __len__(self) -> int:
        return len(self._blocks)

    def find(self, owner: Owner, ids: Sequence[int]) -> list[list[NDArray[Any]]]:
        """The values of the blocks that `ids` begin with, without the block of the last token.

        The last token must always be processed, for its logits.
        """
        found = self._chain(owner, ids, (len(ids) - 1) // BLOCK)
        return [block.values for block in found]

    def shares(self, one: Sequence[int], other: Sequence[int], found: int) -> bool:
        """Whether prompts of one owner share another block after the `found` cached tokens."""
        end = found + BLOCK
        return min(len(one), len(other)) > end and list(one[:end]) == list(other[:end])

    def keep(self, owner: Owner, ids: Sequence[int], values: Sequence[NDArray[Any]]) -> None:
        """Store the complete blocks of `ids`, whose keys and values are [heads, ≥ ids, size].

        Stops when the budget has no room for further blocks.
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
        """Remove all blocks."""
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
        # From the last to the first, so that no block is older than those after it.
        for block in reversed(chain):
            self._blocks.move_to_end(block.key)

    def _make_room(self, nbytes: int, spared: set[_Block]) -> bool:
        """Evict old blocks, but none in `spared`; return whether there is room."""
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
