"""Transcripts, as `loradeploy run` prints them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from loradeploy.cli.answers.printer import Printer
from loradeploy.errors import UsageError

if TYPE_CHECKING:
    from loradeploy.runtime.adapters.resident import AdapterSpec
    from loradeploy.runtime.session import AdapterSession

_TEXT_ONLY = ("chat", "score", "n", "stop", "logprobs")


def transcribe(
    session: AdapterSession,
    prompts: Sequence[Any],
    adapters: Sequence[AdapterSpec | None],
    batch_size: int,
    printer: Printer,
    *,
    beside: Path,
    **options: Any,
) -> None:
    """Print the transcript of each WAV file; paths are relative to the directory `beside`."""
    from loradeploy.runtime.tasks.speech import SpeechRecognizer

    if refused := [name for name in _TEXT_ONLY if name in options]:
        raise UsageError(f"--{refused[0]}: only for texts, {session.path} takes audio")
    for number, prompt in enumerate(prompts, start=1):
        if not isinstance(prompt, str):
            raise UsageError(f"prompt {number} is not a path: {session.path} takes WAV files")
    files = [beside / prompt for prompt in prompts]
    found = SpeechRecognizer(session).transcribe(files, adapters, batch_size=batch_size, **options)
    for file, transcript in zip(files, found, strict=True):
        values = asdict(transcript)
        values["token_ids"] = list(transcript.token_ids)
        if not options.get("timestamps"):
            plain = transcript.text.strip()
        else:
            plain = "\n".join(
                f"[{segment.start:.2f} - {segment.end:.2f}] {segment.text.strip()}"
                for segment in transcript.segments
            )
        printer.result(plain, {"audio": str(file), **values})
