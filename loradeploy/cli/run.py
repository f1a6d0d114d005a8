"""`loradeploy run`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from loradeploy.adapter.tasks import (
    CAUSAL_LM,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    IMAGE_FEATURE_EXTRACTION,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_CLASSIFICATION,
    VISION_TOWER,
)
from loradeploy.cli.answers.audio import transcribe
from loradeploy.cli.answers.encoders import (
    classify,
    classify_images,
    embed,
    embed_images,
    tag,
)
from loradeploy.cli.answers.generating import generate, generation_flags, given_settings
from loradeploy.cli.answers.printer import Job, Printer
from loradeploy.cli.answers.requests import load_adapters, naming_lines, read_prompts
from loradeploy.cli.answers.vision import shown_images
from loradeploy.cli.console import (
    GivenPath,
    capture_option,
    certificate_option,
    flag_of,
    operator_option,
    provider_option,
)
from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from loradeploy.bundle.proof.requirement import CertificateMinimum
    from loradeploy.runtime.prompts import InputPrompt
    from loradeploy.runtime.session import AdapterSession


@click.command(
    name="run",
    short_help="Run prompts or texts through a bundle.",
    epilog='Example: loradeploy run bundle "What is the capital of France?" --chat --adapter sport',
)
@click.argument("bundle", type=GivenPath())
@click.argument("prompt", required=False)
@click.option(
    "--input",
    "file",
    type=GivenPath(),
    help="Read prompts from this file, or from standard input (-): one per line, or JSONL objects"
    " with prompt, messages, text (and text_pair) or audio, optionally with images, adapter and"
    " settings such as temperature or stop. It is JSONL if it begins with an object.",
)
@click.option(
    "--vision",
    type=GivenPath(),
    help="The bundle of the vision tower of a vision-language model, whose decoder BUNDLE is.",
)
@click.option(
    "--image",
    "images",
    type=GivenPath(),
    multiple=True,
    help="With --vision, an image for PROMPT. Repeat for more. With --chat, the images come before"
    " the text; otherwise PROMPT contains the model's placeholder for each, such as <image>.",
)
@click.option(
    "--adapter",
    metavar="NAME|DIR",
    help="Use this adapter for all prompts that do not name their own [default: the base].",
)
@generation_flags
@click.option(
    "--prompt-name",
    metavar="NAME",
    help="Prefix each text with this named prompt of an embedding model [default: the model's"
    " default prompt].",
)
@click.option(
    "--threshold",
    type=float,
    help="With a multi-label classifier, assign all labels of at least this probability"
    " [default: 0.5].",
)
@click.option(
    "--aggregation",
    metavar="NAME",
    help="With a token classifier, aggregate tokens to entities with this strategy: none, simple,"
    " first, average or max [default: first].",
)
@click.option(
    "--ignore-label",
    metavar="LABEL",
    multiple=True,
    help="With a token classifier, omit entities with this label; repeat it for several labels, and"
    " give an empty one to omit none [default: O].",
)
@click.option(
    "--stride",
    type=int,
    help="With a token classifier, split texts that are too long into parts that overlap by this"
    " number of tokens [default: they are refused].",
)
@click.option(
    "--language",
    metavar="CODE",
    help="With a speech recognizer, the spoken language, such as en [default: it is detected].",
)
@click.option(
    "--task",
    metavar="NAME",
    help="With a speech recognizer, transcribe, or translate into English [default: the model's].",
)
@click.option(
    "--timestamps",
    is_flag=True,
    default=None,
    help="With a speech recognizer, print the segments of the transcript with their times.",
)
@click.option(
    "--batch-size", type=int, default=8, show_default=True, help="Run this many prompts at a time."
)
@provider_option
@capture_option
@operator_option
@certificate_option
@click.option(
    "--certificate-minimum",
    metavar="NAME=VALUE,…",
    help="Require a certificate of a check with at least this scope, such as prompts=16,"
    "generated=8,phases=decode+padded batch,providers=cpu,precision=fp32.",
)
@click.option(
    "--certificate-key",
    metavar="FILE.pem",
    help="Require a certificate signed with the private key of this public ed25519 key.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON, one object per prompt.")
def command(
    bundle: str,
    prompt: str | None,
    file: str | None,
    vision: str | None,
    images: tuple[str, ...],
    adapter: str | None,
    batch_size: int,
    provider: str,
    capture_graphs: bool,
    operator: str | None,
    require_certificate: bool,
    certificate_minimum: str | None,
    certificate_key: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Run BUNDLE on PROMPT, or on each line of a file, and print the results.

    Decoders print text as it is generated; classifiers print labels with their scores, or numbers;
    token classifiers print entities; embedding models print a vector. For speech recognizers and
    image models, PROMPT is the path of a WAV file or an image. For vision-language models, --vision
    is the bundle of the vision tower.

    With --input, each result is one line, in which a line break is written as \\n. Lines with
    different adapters and settings share batches. --json prints the unchanged texts, for decoders
    with their tokens and finish reasons. Control characters in a text are escaped on a terminal,
    but not in a pipe.
    """
    from loradeploy.runtime.prompts import InputPrompt
    from loradeploy.runtime.session import AdapterSession

    if (prompt is None) == (file is None):
        raise UsageError("give either a PROMPT or --input FILE")
    if images and vision is None:
        raise UsageError("--image: give --vision, the bundle of the model's vision tower")
    if images and file is not None:
        raise UsageError("--image: only with PROMPT, give the images of a file's rows as images")
    if file is not None:
        requests = read_prompts(file, adapter)
    elif prompt is not None:
        requests = [InputPrompt(prompt, adapter)]
    required = _required(require_certificate, certificate_minimum, certificate_key)
    one = file is None  # a file's prompts may take hours, during which a writer would be in the way
    session = AdapterSession(
        bundle,
        [provider],
        require_certificate=required,
        capture_graphs=capture_graphs,
        operator=operator,
        map_weights=one,
    )
    options = given_settings(settings)
    own = {name: options.pop(name) for name in _FLAGS_OF if name in options}
    beside = Path() if file in (None, "-") else Path(str(file)).parent
    known = session.adapters
    load: Callable[[str, Path], object] = session.load
    if vision is not None:
        tower = AdapterSession(vision, [provider], require_certificate=required, map_weights=one)
        with naming_lines(requests):
            shown = options["shown"] = shown_images(session, tower, requests, images, beside)
        known, load = {**known, **tower.adapters}, shown.generator.load
    adapters = load_adapters(session, known, load, requests, adapter)
    run, kind = runner_of(session)
    _check_fields(requests, run, kind, session, with_vision=vision is not None)
    if run not in (generate, transcribe) and options:
        flags = ", ".join(map(flag_of, options))
        raise UsageError(f"{flags}: only for text generation, {bundle} is a {kind} bundle")
    for name in own:
        meant, models = _FLAGS_OF[name]
        if run is not meant:
            raise UsageError(f"{flag_of(name)}: only for {models}, {bundle} is for {kind}")
    prompts = [request.prompt for request in requests]
    if run is generate:
        options["per_prompt"] = [request.settings for request in requests]
    elif run is transcribe:
        if any(request.settings for request in requests):
            raise UsageError(
                f"{file}: audio files have no settings of their own: give them as flags"
            )
        prompts = [request.audio or request.prompt for request in requests]
        options["beside"] = beside
    job = Job(session, prompts, adapters, batch_size, Printer(as_json, one=one))
    with naming_lines(requests):
        run(job, **options, **own)


def _required(
    any_certificate: bool, minimum: str | None, public_key: str | None
) -> bool | CertificateMinimum:
    """What the certificate has to prove; False if none is required."""
    from loradeploy.bundle.proof.requirement import CertificateMinimum

    if minimum is None and public_key is None:
        return any_certificate
    least = CertificateMinimum.parse(minimum) if minimum else CertificateMinimum()
    return dataclasses.replace(least, public_key=public_key)


RUNNERS: Final[Mapping[str, Callable[..., None]]] = {
    IMAGE_CLASSIFICATION: classify_images,
    IMAGE_FEATURE_EXTRACTION: embed_images,
    CAUSAL_LM: generate,
    SEQ2SEQ_LM: generate,
    SEQUENCE_CLASSIFICATION: classify,
    TOKEN_CLASSIFICATION: tag,
    FEATURE_EXTRACTION: embed,
}


# The flags that only one kind of model takes: what runs it, and its name for messages.
_FLAGS_OF: Final[Mapping[str, tuple[Callable[..., None], str]]] = {
    "prompt_name": (embed, "embedding models"),
    "threshold": (classify, "classifiers"),
    "aggregation": (tag, "token classifiers"),
    "ignore_label": (tag, "token classifiers"),
    "stride": (tag, "token classifiers"),
    "language": (transcribe, "speech recognizers"),
    "task": (transcribe, "speech recognizers"),
    "timestamps": (transcribe, "speech recognizers"),
}


def runner_of(session: AdapterSession) -> tuple[Callable[..., None], str]:
    """Return the function that runs a bundle and prints the results, and the bundle's task."""
    task = session.manifest.task
    if task not in RUNNERS:
        pair = "give the bundle of the decoder, and this one as --vision, or "
        raise UsageError(
            f"{session.path} is a {task} bundle, which this command cannot run alone:"
            f" {pair if task == VISION_TOWER else ''}use AdapterSession.run"
        )
    if session.manifest.encoder is not None:
        from loradeploy.runtime.tasks.speech import takes_audio

        if takes_audio(session):
            return transcribe, f"{task} of speech"
    return RUNNERS[task], task


def _check_fields(
    requests: Sequence[InputPrompt],
    run: Callable[..., None],
    kind: str,
    session: AdapterSession,
    *,
    with_vision: bool,
) -> None:
    """Raise UsageError if a prompt has a field that `run` does not read."""
    bundle = session.path
    for request in requests:
        where = "" if request.where is None else f"{request.where}: "
        if run is not classify and isinstance(request.prompt, tuple):
            raise UsageError(
                f"{where}text_pair: only for sequence classifiers, {bundle} is for {kind}"
            )
        if run is not transcribe and request.audio and not request.prompt:
            raise UsageError(f"{where}audio: only for speech recognizers, {bundle} is for {kind}")
        found = next(iter(request.images), None)
        if with_vision or found is None:
            continue
        if session.manifest.embeds:
            raise UsageError(
                f"{where}{found}: {bundle} is the decoder of a vision-language model: give"
                " --vision, the bundle of its vision tower"
            )
        if run not in (classify_images, embed_images):
            raise UsageError(
                f"{where}{found}: {bundle} is a {kind} bundle, which takes no images: leave the"
                " field out"
            )
