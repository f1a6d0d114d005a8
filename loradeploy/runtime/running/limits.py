"""Check values of feeds for which a graph would silently give wrong outputs.

sizes       equal symbols have equal sizes; there are rows and tokens; a cache may be empty
tokens      are in the vocabulary: a negative one would be counted from its end
mask        zeros and ones, for the cache and the new tokens; of a prompt, zeros at the end if
            the cache is updated in place, because the graph only counts the ones of a row
positions   are below the model's limit, or there are no more tokens than positions
numbers     of images and audio are finite

Only small inputs are read; of a cache, only the size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.adapter.tasks import SEQ2SEQ_LM
from loradeploy.bundle.model_config import FROM_PADDING_ON
from loradeploy.bundle.names import (
    ATTENTION_MASK,
    DECODER_INPUT_IDS,
    INPUT_IDS,
    INPUTS_EMBEDS,
    INPUTS_EMBEDS_MASK,
    LOGITS_TO_KEEP,
    MROPE_POSITION_IDS,
    PAST,
    POSITION_IDS,
    TOKEN_TYPE_IDS,
)
from loradeploy.bundle.outputs import LOGITS_NAMES
from loradeploy.bundle.sample import UNNAMED, past_axis
from loradeploy.bundle.text.tokenizer_files import positions_of_model
from loradeploy.errors import UsageError, shown

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest, TensorSpec

# Inputs whose values are checked, if they are on the host: small ones.
LOOKED_AT: Final = (
    *(INPUT_IDS, DECODER_INPUT_IDS, ATTENTION_MASK, POSITION_IDS, TOKEN_TYPE_IDS),
    *(LOGITS_TO_KEEP, INPUTS_EMBEDS_MASK, MROPE_POSITION_IDS),
)
# Inputs of which only the sizes are checked.
SIZED: Final = (INPUTS_EMBEDS,)
# Models with relative positions or ALiBi, which have no maximum length.
ENDLESS: Final = ("bloom", "deberta-v2", "mpt", "mt5", "t5", "umt5", "xlnet")


@dataclass(frozen=True)
class Limits:
    """The limits of the inputs of a bundle's graph.

    `vocabulary`, `positions`, `types`: the numbers of tokens, positions and token types; None if
    unknown. `symbols`: for each input, the axes with symbols whose sizes must agree between inputs.
    `first_past`, `past_axis`: a cache input and its axis of past tokens. `mask_ends`: whether the
    attention mask must be as long as the cache and the new tokens together. `image_blocks`: see
    `Manifest`. `mrope`: whether the graph takes positions in three dimensions.
    """

    vocabulary: int | None
    positions: int | None
    types: int | None
    symbols: Mapping[str, tuple[tuple[int, str], ...]]
    first_past: str | None
    past_axis: int
    mask_ends: bool
    image_blocks: bool
    mrope: bool = False

    @classmethod
    def of(cls, manifest: Manifest, config: Mapping[str, Any], file: Path) -> Limits:
        """The limits by the manifest and `config`, which was read from `file`.

        Raises:
            BundleError: `config` has no position for a token.
        """
        past = next((spec for spec in manifest.inputs if past_axis(spec) is not None), None)
        return cls(
            vocabulary=_vocabulary(manifest, config),
            positions=_positions(manifest, config, file),
            types=_size(config, "type_vocab_size"),
            symbols={spec.name: _shared(spec, manifest) for spec in manifest.inputs},
            first_past=None if past is None else past.name,
            past_axis=0 if past is None else past_axis(past) or 0,
            # A cache that is updated in place has room for more tokens.
            mask_ends=not manifest.cache_in_place,
            image_blocks=manifest.image_blocks,
            mrope=any(spec.name == MROPE_POSITION_IDS for spec in manifest.embeds),
        )

    def check_tokens(self, tokens: tuple[int, int], what: str) -> None:
        """Raise UsageError unless `tokens` (smallest and largest) are in the vocabulary."""
        least, largest = tokens
        if least < 0:
            raise UsageError(
                f"{what} contains the token {shown(least)}, and there are none below 0"
            )
        if self.vocabulary is not None and largest >= self.vocabulary:
            raise UsageError(
                f"{what} contains the token {shown(largest)}, the vocabulary ends at"
                f" {self.vocabulary - 1}"
            )

    def check(
        self, shapes: Mapping[str, tuple[int, ...]], numbers: Mapping[str, NDArray[Any]]
    ) -> None:
        """Raise UsageError unless the `shapes` and the available values of feeds are consistent."""
        sizes: dict[str, tuple[int, str]] = {}
        for name, shape in shapes.items():
            if name == LOGITS_TO_KEEP:
                _check_kept(shape, shapes, numbers.get(name))
                continue
            # A graph may have embeddings as its only tokens: they are a feed as any other.
            if name in (INPUTS_EMBEDS, INPUTS_EMBEDS_MASK) and INPUT_IDS in shapes:
                _check_embeds(name, shapes)
                if self.mrope and MROPE_POSITION_IDS not in shapes:
                    raise UsageError(
                        f"the feed {name} is given without {MROPE_POSITION_IDS} [3, batch,"
                        " sequence], the positions of an image's tokens: give them too, for"
                        f" other embeddings {POSITION_IDS} three times"
                    )
                continue
            if name == MROPE_POSITION_IDS:
                _check_mrope(shape, shapes[INPUT_IDS], numbers.get(name), self.positions)
                continue
            if 0 in shape:
                _check_empty(name, shape)
            for axis, symbol in self.symbols[name]:
                size, other = sizes.setdefault(symbol, (shape[axis], name))
                if size != shape[axis]:
                    raise UsageError(
                        f"the feeds do not fit together: {other} has {size} for {symbol}, {name}"
                        f" has {shape[axis]}"
                    )
        for name in (INPUT_IDS, DECODER_INPUT_IDS):
            if (ids := numbers.get(name)) is not None:
                self.check_tokens((int(ids.min()), int(ids.max())), f"the feed {name}")
        if (types := numbers.get(TOKEN_TYPE_IDS)) is not None:
            _check_range(TOKEN_TYPE_IDS, types, self.types)
        mask = numbers.get(ATTENTION_MASK)
        if mask is not None and (mask.ndim != 2 or mask.dtype.kind not in "iu"):
            mask = None  # an additive mask, or one for pairs of tokens
        if mask is not None:
            _check_range(ATTENTION_MASK, mask, 2)
        self._check_lengths(shapes, numbers, mask)

    def _check_lengths(
        self,
        shapes: Mapping[str, tuple[int, ...]],
        numbers: Mapping[str, NDArray[Any]],
        mask: NDArray[Any] | None,
    ) -> None:
        ids = shapes.get(INPUT_IDS, ())
        if len(ids) != 2:
            return
        cache = shapes.get(self.first_past or "", ())
        past = cache[self.past_axis] if cache and self.mask_ends else 0
        total = past + ids[1]
        places = numbers.get(INPUTS_EMBEDS_MASK)
        if self.image_blocks and past and places is not None and places[:, 0].any():
            raise UsageError(
                f"the feed {INPUTS_EMBEDS_MASK} begins within an image, of which a part may be in"
                " the cache: give all positions of an image in one run, after a text token"
            )
        if mask is not None:
            length = mask.shape[1]
            if length < ids[1] or (self.mask_ends and length != total):
                raise UsageError(
                    f"the feed {ATTENTION_MASK} is of {length} tokens, there are {past} in the"
                    f" cache and {ids[1]} new ones"
                )
            if not self.mask_ends and length == ids[1] and (mask[:, 1:] > mask[:, :-1]).any():
                raise UsageError(
                    f"the feed {ATTENTION_MASK} hides a token before others of its row, and a graph"
                    " that updates the cache in place cannot: pad rows on the right"
                )
        if self.positions is None:
            return
        told = numbers.get(POSITION_IDS)
        if told is not None:
            _check_range(POSITION_IDS, told, self.positions)
        elif POSITION_IDS not in shapes:
            longest = total if mask is None else int(mask.sum(axis=1).max())
            if longest > self.positions:
                raise UsageError(
                    f"a row has {longest} tokens, the model has {self.positions} positions: shorten"
                    " it"
                )


def check_finite(name: str, values: NDArray[Any]) -> None:
    """Raise UsageError unless a float feed is finite; the values of a cache are not checked."""
    if values.dtype.kind == "f" and not name.startswith(PAST) and not np.isfinite(values).all():
        raise UsageError(f"the feed {name} contains values that are not finite (NaN or infinite)")


def _check_empty(name: str, shape: tuple[int, ...]) -> None:
    empty = [axis for axis, size in enumerate(shape) if size == 0]
    if "past" in name and len(empty) == 1 and empty != [0]:
        return
    raise UsageError(f"the feed {name} is {list(shape)}: there must be rows, and tokens in them")


def _check_embeds(name: str, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UsageError unless embeddings and their mask are given for all tokens."""
    places = shapes[INPUT_IDS]
    for other in (INPUTS_EMBEDS, INPUTS_EMBEDS_MASK):
        if other not in shapes:
            raise UsageError(
                f"the feed {name} is given without {other}: embeddings [batch, sequence, hidden]"
                " are read where the mask [batch, sequence] is true"
            )
        if shapes[other][:2] != places:
            raise UsageError(
                f"the feed {other} is {list(shapes[other])} for {INPUT_IDS} {list(places)}: give an"
                " entry for each token"
            )


def _check_mrope(
    shape: tuple[int, ...],
    tokens: tuple[int, ...],
    positions: NDArray[Any] | None,
    end: int | None,
) -> None:
    """Raise UsageError unless there are three valid positions for each token."""
    if shape[1:] != tokens:
        raise UsageError(
            f"the feed {MROPE_POSITION_IDS} is {list(shape)} for {INPUT_IDS} {list(tokens)}: give"
            " three positions for each token"
        )
    if positions is not None:
        _check_range(MROPE_POSITION_IDS, np.maximum(positions, 0), end)


def _check_kept(
    shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], kept: NDArray[Any] | None
) -> None:
    """Raise UsageError unless the positions are of existing tokens, for all rows or for each."""
    ids = shapes.get(INPUT_IDS, ())
    if len(ids) != 2:
        return
    rows, tokens = ids
    if shape[0] not in (1, rows):
        raise UsageError(
            f"the feed {LOGITS_TO_KEEP} is {list(shape)} for {rows} rows: give positions once for"
            f" all, [1, kept], or for each row, [{rows}, kept]"
        )
    if kept is not None and kept.size and not -tokens <= kept.min() <= kept.max() < tokens:
        wrong = kept.min() if kept.min() < -tokens else kept.max()
        raise UsageError(
            f"the feed {LOGITS_TO_KEEP} contains {wrong}, there are {tokens} tokens: give positions"
            f" of {-tokens} to {tokens - 1}"
        )


def _check_range(name: str, values: NDArray[Any], end: int | None) -> None:
    least, largest = values.min(), values.max()
    if least < 0 or (end is not None and largest >= end):
        wrong = least if least < 0 else largest
        expected = "0 or more" if end is None else f"0 to {end - 1}"
        raise UsageError(f"the feed {name} contains {wrong}, the graph takes {expected}")


def _vocabulary(manifest: Manifest, config: Mapping[str, Any]) -> int | None:
    """The size of the embedding, of which the logits and config.json may have fewer."""
    if manifest.added_tokens is not None:
        return manifest.added_tokens.size
    inner = config.get("text_config")
    found = [_size(config, "vocab_size")]
    found.append(_size(inner, "vocab_size") if isinstance(inner, Mapping) else None)
    for output in manifest.outputs:
        if output.name in LOGITS_NAMES and len(output.shape) == 3:
            last = output.shape[-1]
            found.append(last if isinstance(last, int) else None)
    return max((size for size in found if size is not None), default=None)


def _positions(manifest: Manifest, config: Mapping[str, Any], file: Path) -> int | None:
    endless = config.get("model_type") in ENDLESS or config.get("alibi") is True
    if endless or manifest.task == SEQ2SEQ_LM:
        return None
    inputs = {spec.name for spec in manifest.inputs}
    if POSITION_IDS in inputs and config.get("model_type") in FROM_PADDING_ON:
        return None  # with an offset, see FROM_PADDING_ON
    return positions_of_model(config, file)


def _size(values: Mapping[str, Any], name: str) -> int | None:
    value = values.get(name)
    return value if type(value) is int and value > 0 else None


def _shared(spec: TensorSpec, manifest: Manifest) -> tuple[tuple[int, str], ...]:
    """The axes of an input whose symbols must have equal sizes in all inputs.

    These are all named symbols if loradeploy traced the graph. Other exporters may use one symbol
    for different sizes, except for the number of rows.
    """
    ours = manifest.base.kind == "checkpoint"
    return tuple(
        (axis, symbol)
        for axis, symbol in enumerate(spec.shape)
        if isinstance(symbol, str) and symbol not in UNNAMED and (ours or axis == 0)
    )
