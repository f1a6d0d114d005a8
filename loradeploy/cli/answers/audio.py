"""Transcripts, as `loradeploy run` prints them."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from loradeploy.cli.answers.printer import Job
from loradeploy.errors import UsageError

_TEXT_ONLY = ("chat", "score", "n", "stop", "logprobs")


def transcribe(job: Job, *, beside: Path, **options: Any) -> None:
    """Print the transcript of each WAV file; paths are relative to the directory `beside`."""
    from loradeploy.runtime.tasks.speech import SpeechRecognizer

    if refused := [name for name in _TEXT_ONLY if name in options]:
        raise UsageError(f"--{refused[0]}: only for texts, {job.session.path} takes audio")
    for number, prompt in enumerate(job.prompts, start=1):
        if not isinstance(prompt, str):
            raise UsageError(f"prompt {number} is not a path: {job.session.path} takes WAV files")
    files = [beside / prompt for prompt in job.prompts]
    found = SpeechRecognizer(job.session).transcribe(
        files, job.adapters, batch_size=job.batch_size, **options
    )
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
        job.printer.result(plain, {"audio": str(file), **values})
