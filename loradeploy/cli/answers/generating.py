"""The flags of `loradeploy run` that are for decoders alone, and what it prints of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeVar

import click

from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.session import AdapterSession

_Command = TypeVar("_Command", bound=Callable[..., Any])
_OWN: Final = "[default: generation_config.json's]"
_EARLY: Final = {"yes": True, "no": False, "never": "never"}

_FLAGS: Final = (
    click.option(
        "--chat",
        is_flag=True,
        default=None,
        help="Give each prompt to the model as a user's message.",
    ),
    click.option(
        "--max-new-tokens", type=int, help="Generate at most this many tokens for a prompt."
    ),
    click.option("--temperature", type=float, help="Sample at this temperature [default: greedy]."),
    click.option("--top-k", type=int, help=f"Sample from this many tokens {_OWN}."),
    click.option(
        "--top-p", type=float, help=f"Sample from the tokens of this probability mass {_OWN}."
    ),
    click.option(
        "--min-p",
        type=float,
        help="Sample from the tokens that have at least this share of the likeliest one's"
        f" probability {_OWN}.",
    ),
    click.option("--seed", type=int, help="Sample with this seed, so that a run can be repeated."),
    click.option(
        "--n",
        type=int,
        help="Generate this many texts for each prompt: samples, or the best of its beams.",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help=f"End a text before this one. May be given several times {_OWN}.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help=f"Divide the logits of tokens that were in the prompt or the text by this {_OWN}.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        help="Subtract this from the logits of tokens that are in the text.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        help="Subtract this from a token's logit as often as it is in the text.",
    ),
    click.option(
        "--no-repeat-ngram-size",
        type=int,
        help=f"Let no run of this many tokens come twice {_OWN}.",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="TOKEN=NUMBER",
        help="Add this number to the logit of a token: its id, or a text that is one token. May be"
        " given several times.",
    ),
    click.option(
        "--num-beams",
        "--beams",
        "num_beams",
        type=int,
        help="Search with this many beams, and print the best text.",
    ),
    click.option(
        "--length-penalty",
        type=float,
        help="Divide the score of a beam by its length to this power [default: 1].",
    ),
    click.option(
        "--early-stopping",
        type=click.Choice(list(_EARLY)),
        help="End a beam search as soon as there are enough texts (yes), when better ones are"
        " unlikely (no), or when there can be no better one (never) [default: no].",
    ),
    click.option(
        "--logprobs",
        type=int,
        help="With --json, print each token's log-probability and this many of the likeliest"
        " tokens in its position.",
    ),
    click.option(
        "--score",
        is_flag=True,
        default=None,
        help="Generate nothing: print the log-probability and the perplexity of each prompt.",
    ),
)


class Results(Protocol):
    """What results are printed with."""

    as_json: bool
    one: bool

    def piece(self, text: str) -> None: ...

    def result(self, plain: str, values: dict[str, Any]) -> None: ...


def generation_flags(command: _Command) -> _Command:
    """Give `command` the flags of a generation."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, as Python's parameters."""
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    if "stop" in given:
        given["stop"] = list(given["stop"])
    if "early_stopping" in given:
        given["early_stopping"] = _EARLY[given["early_stopping"]]
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    return given


def _bias(text: str) -> tuple[int | str, float]:
    token, _, number = text.rpartition("=")
    try:
        value = float(number)
    except ValueError:
        token = ""
    if not token:
        raise UsageError(f"--logit-bias {text}: give TOKEN=NUMBER, such as 50=-100")
    return (int(token) if token.isascii() and token.isdigit() else token), value


def generate(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Results,
    *,
    per_prompt: Sequence[Mapping[str, Any]],
    **options: Any,
) -> None:
    """Print what each prompt becomes; as it appears, where it is one text."""
    from loradeploy.runtime.tasks.generation import Generation, TextGenerator

    if options.pop("score", None):
        _score(session, prompts, adapters, batch_size, printer, **options)
        return
    if options.get("logprobs") is not None and not printer.as_json:
        raise UsageError("--logprobs: give --json too, which prints them")
    several = options.get("n", 1) > 1 or options.get("num_beams", 1) > 1
    streamed = printer.one and not printer.as_json and not several
    done = -1  # the prompt of the last result

    def show(row: int, result: Generation) -> None:
        nonlocal done
        done += result.choice == 0
        values = asdict(result)
        values["token_ids"] = list(result.token_ids)
        printer.result("" if streamed else result.text, {"prompt": prompts[done], **values})

    TextGenerator(session).generate(
        prompts,
        adapters,
        batch_size=batch_size,
        per_prompt=list(per_prompt) if any(per_prompt) else None,
        on_text=(lambda _, piece: printer.piece(piece)) if streamed else None,
        on_result=show,
        **options,
    )


def _score(
    session: AdapterSession,
    texts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Results,
    *,
    chat: bool = False,
    logprobs: int | None = None,
    **others: Any,
) -> None:
    from loradeploy.runtime.tasks.generation import TextGenerator

    if others:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise UsageError(f"--score generates nothing, and takes no {flags}")
    scores = TextGenerator(session).score(
        texts, adapters, chat=chat, batch_size=batch_size, logprobs=logprobs or 0
    )
    for text, score in zip(texts, scores, strict=True):
        values = asdict(score)
        values["token_ids"] = list(score.token_ids)
        if logprobs is None:
            del values["logprobs"]
        plain = f"{score.logprob:.4f}\t{score.perplexity:.4f}"
        printer.result(plain, {"text": text, "perplexity": score.perplexity, **values})
