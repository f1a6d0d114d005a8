"""`run` enforces its certificate flags, and `parity --sign` signs a certificate."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.calling import Run, one_line
from tests.inputs.signing import key_pair

pytest.importorskip("cryptography")


def test_run_requires_the_minimum_given_by_its_flag(certified: Path, run: Run) -> None:
    prompt = (certified, "hi", "--max-new-tokens", 1)
    status, _, err = run("run", *prompt, "--certificate-minimum", "prompts=1,phases=decode")
    assert (status, err) == (0, "")
    status, out, err = run("run", *prompt, "--certificate-minimum", "prompts=9999")
    assert (status, out) == (2, "")
    assert "9999 are required" in one_line(err)
    (certified / "parity.json").unlink()
    assert run("run", *prompt, "--certificate-minimum", "prompts=0")[0] == 2, "one is required"


def test_run_accepts_only_the_signature_written_by_parity(
    certified: Path, tiny_llama: Path, tmp_path: Path, run: Run
) -> None:
    private, public = key_pair(tmp_path, "owner")
    _, other = key_pair(tmp_path, "other")
    prompt = (certified, "hi", "--max-new-tokens", 1)
    status, _, err = run("run", *prompt, "--certificate-key", public)
    assert status == 2
    assert "has no signature" in one_line(err)

    narrow = ("--tokens", 1, "--backends", "peft,onnx-side-inputs", "--phases", "prefill")
    checked = run("parity", certified, "--model", tiny_llama, *narrow, "--sign", private)
    assert checked[0] == 0, checked[2]
    assert run("run", *prompt, "--certificate-key", public)[0] == 0
    status, _, err = run("run", *prompt, "--certificate-key", other)
    assert status == 2
    assert "someone else signed it" in one_line(err)
    both = ("--certificate-key", public, "--certificate-minimum", "phases=decode")
    status, _, err = run("run", *prompt, *both)
    assert status == 2
    assert "phase 'decode' was not checked" in one_line(err)
