"""Generated texts, as `loradeploy run` prints them, and its flags that are for generation only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from loradeploy.cli.answers.printer import Job
from loradeploy.cli.console import flag_of, given_options
from loradeploy.errors import UsageError
from loradeploy.runtime.decoding.choosing.options import GenerationOptions

if TYPE_CHECKING:
    from loradeploy.runtime.tasks.image_text import ImageTextGenerator

_Command = TypeVar("_Command", bound=Callable[..., Any])
_OWN: Final = "[default: generation_config.json's]"
_EARLY: Final = {"yes": True, "no": False, "never": "never"}

_FLAGS: Final = (
    click.option(
        "--chat",
        is_flag=True,
        default=None,
        help="Apply the chat template: each prompt is a user message.",
    ),
    click.option(
        "--max-new-tokens",
        type=int,
        help="Maximum number of generated tokens per prompt [default:"
        f" {GenerationOptions.max_new_tokens}; of a speech recognizer, as many as it has"
        " positions for].",
    ),
    click.option("--temperature", type=float, help="Sampling temperature [default: greedy]."),
    click.option("--top-k", type=int, help=f"Sample from this many most likely tokens {_OWN}."),
    click.option(
        "--top-p",
        type=float,
        help=f"Sample from the smallest set of tokens with this total probability {_OWN}.",
    ),
    click.option(
        "--min-p",
        type=float,
        help=f"Exclude tokens below this fraction of the highest probability when sampling {_OWN}.",
    ),
    click.option("--seed", type=int, help="Random seed for sampling."),
    click.option(
        "--n",
        type=int,
        help="Number of texts per prompt: samples, or best beams"
        f" [default: {GenerationOptions.n}].",
    ),
    click.option(
        "--stop",
        multiple=True,
        metavar="TEXT",
        help=f"Stop string: the text ends before it. Repeat for more {_OWN}.",
    ),
    click.option(
        "--repetition-penalty",
        type=float,
        help=f"Divide the logits of tokens in the prompt or the text by this number {_OWN}.",
    ),
    click.option(
        "--presence-penalty",
        type=float,
        help="Subtract this number from the logits of tokens in the text.",
    ),
    click.option(
        "--frequency-penalty",
        type=float,
        help="Subtract this number from a token's logit once per occurrence in the text.",
    ),
    click.option(
        "--no-repeat-ngram-size",
        type=int,
        help=f"No sequence of this many tokens occurs twice {_OWN}.",
    ),
    click.option(
        "--logit-bias",
        multiple=True,
        metavar="TOKEN=NUMBER",
        help="Add this number to the logit of a token, given by id or as a text of one token."
        " Repeat for more.",
    ),
    click.option(
        "--num-beams",
        "--beams",
        "num_beams",
        type=int,
        help="Number of beams of a beam search, which prints the best text"
        f" [default: {GenerationOptions.num_beams}, no search].",
    ),
    click.option(
        "--length-penalty",
        type=float,
        help=f"Divide the score of a beam by its length raised to this power {_OWN}.",
    ),
    click.option(
        "--early-stopping",
        type=click.Choice(list(_EARLY)),
        help="End a beam search as soon as there are enough texts (yes), when better ones are"
        f" unlikely (no), or when no better one is possible (never) {_OWN}.",
    ),
    click.option(
        "--logprobs",
        type=int,
        help="With --json, print each token's log-probability and this many most likely tokens at"
        " its position.",
    ),
    click.option(
        "--score",
        is_flag=True,
        default=None,
        help="Print the log-probability and perplexity of each prompt instead of generating text.",
    ),
)


@dataclass(frozen=True)
class Shown:
    """The images of each prompt, and the generator that reads them."""

    generator: ImageTextGenerator
    images: Sequence[Sequence[Path]]


def _images(shown: Shown | None, number: int) -> dict[str, Any]:
    """The images of a prompt, for JSON."""
    return {} if shown is None else {"images": list(map(str, shown.images[number]))}


def generation_flags(command: _Command) -> _Command:
    """Add the flags of text generation to `command`."""
    for flag in reversed(_FLAGS):
        command = flag(command)
    return command


def given_settings(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that were given, as parameters of the Python API."""
    given = given_options(values)
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
    job: Job,
    *,
    per_prompt: Sequence[Mapping[str, Any]],
    shown: Shown | None = None,
    **options: Any,
) -> None:
    """Print the text generated for each prompt; a single text is printed while it is generated.

    `shown`: the images of a vision-language model.
    """
    from loradeploy.runtime.tasks.generation import Generation, TextGenerator

    if options.pop("score", None):
        _score(job, shown, **options)
        return
    if options.get("logprobs") is not None and not job.printer.as_json:
        raise UsageError("--logprobs: give --json too, which prints them")
    several = options.get("n", 1) > 1 or options.get("num_beams", 1) > 1
    streamed = job.printer.one and not job.printer.as_json and not several
    done = -1  # the prompt of the last result

    def show(row: int, result: Generation) -> None:
        nonlocal done
        done += result.choice == 0
        values = asdict(result)
        values["token_ids"] = list(result.token_ids)
        text = "" if streamed else result.text
        given = {"prompt": job.prompts[done], **_images(shown, done)}
        job.printer.result(text, {**given, **values}, several=options.get("n", 1) > 1)

    if shown is None:
        run = partial(TextGenerator(job.session).generate, job.prompts)
    else:
        run = partial(shown.generator.generate, job.prompts, shown.images)
    run(
        job.adapters,
        batch_size=job.batch_size,
        per_prompt=list(per_prompt) if any(per_prompt) else None,
        on_text=(lambda _, piece: job.printer.piece(piece)) if streamed else None,
        on_result=show,
        **options,
    )


def _score(
    job: Job,
    shown: Shown | None,
    *,
    chat: bool = False,
    logprobs: int | None = None,
    **others: Any,
) -> None:
    from loradeploy.runtime.tasks.generation import TextGenerator

    if others:
        flags = ", ".join(map(flag_of, others))
        raise UsageError(f"--score generates nothing, and takes no {flags}")
    if shown is None:
        run = partial(TextGenerator(job.session).score, job.prompts)
    else:
        run = partial(shown.generator.score, job.prompts, shown.images)
    scores = run(job.adapters, chat=chat, batch_size=job.batch_size, logprobs=logprobs or 0)
    for number, (text, score) in enumerate(zip(job.prompts, scores, strict=True)):
        values = {**_images(shown, number), **asdict(score)}
        values["token_ids"] = list(score.token_ids)
        if logprobs is None:
            del values["logprobs"]
        plain = f"{score.logprob:.4f}\t{score.perplexity:.4f}"
        job.printer.result(plain, {"text": text, "perplexity": score.perplexity, **values})
