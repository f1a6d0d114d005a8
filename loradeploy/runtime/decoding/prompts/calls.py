"""The arguments of a call of the generator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import numpy as np

from loradeploy.bundle.text.chat import Message
from loradeploy.errors import UsageError, shown
from loradeploy.given_numbers import checked_count
from loradeploy.runtime.adapters.resident import AdapterSpec
from loradeploy.runtime.arguments import Adapters, check_flag, each_row, is_list
from loradeploy.runtime.decoding.choosing.options import GenerationOptions
from loradeploy.runtime.decoding.graph import TokenEmbeds

# A text, a conversation, or token ids.
Prompt = str | Sequence[Message] | Sequence[int]


@dataclass(frozen=True)
class Call:
    """The arguments of a call, checked except for what depends on adapters.

    `firsts`: for each prompt, the index of its first text among the results. `embeds`: for each
    prompt, embeddings that replace tokens.
    """

    prompts: Sequence[Prompt]
    adapters: list[AdapterSpec | None]
    seeds: list[int]
    options: list[GenerationOptions]
    firsts: list[int]
    chat: bool
    batch_size: int
    embeds: Sequence[TokenEmbeds | None]

    @classmethod
    def of(
        cls,
        prompts: str | Sequence[Prompt],
        adapters: Adapters,
        seed: int | Sequence[int],
        chat: bool,
        batch_size: int | None,
        per_prompt: Sequence[Mapping[str, Any] | None] | None,
        options: Mapping[str, Any],
        embeds: Sequence[TokenEmbeds | None] | None = None,
    ) -> Call:
        """A call of `TextGenerator.generate` with these arguments.

        Raises:
            UsageError: as `generate`, except for errors that depend on adapters.
        """
        common = GenerationOptions.of(options)
        check_flag("chat", chat)
        if batch_size is not None:
            batch_size = checked_count("batch_size", batch_size)
        given = listed(prompts, "prompts")
        seeds: list[Any] = list(seed) if is_list(seed) else [seed] * len(given)
        if len(seeds) != len(given):
            raise UsageError(f"{len(seeds)} seeds for {len(given)} prompts: give one for each")
        each = [common] * len(given)
        if per_prompt is not None:
            if not is_list(per_prompt) or len(per_prompt) != len(given):
                raise UsageError(
                    f"per_prompt is {shown(per_prompt)}: give a list of {len(given)}, a mapping of"
                    " settings or None for each prompt"
                )
            for number, own in enumerate(per_prompt):
                if own is None:
                    continue
                if not isinstance(own, Mapping):
                    raise UsageError(
                        f"the settings of prompt {number + 1} are {shown(own)}: give a mapping"
                    )
                own = dict(own)
                seeds[number] = own.pop("seed", seeds[number])
                try:
                    each[number] = GenerationOptions.of(options, own)
                except UsageError as problem:
                    raise UsageError(f"prompt {number + 1}: {problem}") from None
        for own in seeds:
            if not isinstance(own, int | np.integer) or isinstance(own, bool) or own < 0:
                raise UsageError(f"a seed is {shown(own)}: give a whole number of 0 or more")
        counts = [one.n for one in each]
        return cls(
            prompts=given,
            adapters=each_row(adapters, len(given)),
            seeds=[int(own) for own in seeds],
            options=each,
            firsts=[0, *accumulate(counts)][:-1],
            chat=chat,
            batch_size=batch_size or len(given),
            embeds=check_one_each(embeds, len(given), "prompts"),
        )


def check_one_each(
    embeds: Sequence[TokenEmbeds | None] | None, count: int, what: str
) -> Sequence[TokenEmbeds | None]:
    """The embeddings of each of `count` prompts or texts; by default None for each."""
    if embeds is None:
        return [None] * count
    if not is_list(embeds):
        raise UsageError(f"embeds is {shown(embeds)}: give a list, with one for each of the {what}")
    if len(embeds) != count:
        raise UsageError(f"{len(embeds)} embeds for {count} {what}: give one for each")
    return embeds


def listed(given: str | Sequence[Prompt], what: str) -> Sequence[Prompt]:
    """The prompts or texts of a call, as a list."""
    listed: Sequence[Prompt] = [given] if isinstance(given, str) else given
    if not is_list(listed):
        raise UsageError(f"the {what} are {shown(given)}: give a text, or a list")
    if not len(listed):
        raise UsageError(f"there are no {what}")
    return listed
