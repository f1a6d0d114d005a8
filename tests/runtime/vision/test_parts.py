"""Which adapters two bundles run for one name: always the two parts of one adapter.

Sessions are simulated by their adapters and the known whole adapters of these. Real sessions are
tested in test_image_text.py.
"""

from __future__ import annotations

import logging
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final

import pytest

from loradeploy.bundle.manifest import AdapterEntry
from loradeploy.errors import UsageError
from loradeploy.runtime.adapters.wholes import Whole
from loradeploy.runtime.vision.parts import ImageParts

# Digests of whole adapters: A changes both parts, T only the decoder.
A, B, T = "sha256:aaaa", "sha256:bbbb", "sha256:0000"
SPLIT, OTHER, ALONE = Whole(A, split=True), Whole(B, split=True), Whole(T, split=False)
UNKNOWN: Final = "unknown"


def _session(name: str, merged: AdapterEntry | None = None, **adapters: Whole | str | None) -> Any:
    """A simulated session; values are the whole adapters of its adapters, None if not read yet."""
    known = {n: whole for n, whole in adapters.items() if isinstance(whole, Whole)}
    digests = {n: None if whole is None else f"{name} {n}" for n, whole in adapters.items()}
    return SimpleNamespace(
        path=Path(name),
        manifest=SimpleNamespace(merged_adapter=merged),
        adapters=digests,
        wholes=SimpleNamespace(of=lambda adapter, digest: known.get(adapter)),
        hold=lambda adapter: nullcontext(),
    )


def _names(parts: ImageParts, *names: Any) -> Any:
    """Return the adapter names that the parts run for prompts with images."""
    return parts.names(names, [True] * len(names))


def _merged(whole: str | None, *, split: bool = False, digest: str = A) -> AdapterEntry:
    return AdapterEntry(digest, whole_digest=whole, split=split)


def test_parts_of_one_adapter_run_together() -> None:
    parts = ImageParts(_session("d", a=SPLIT), _session("t", a=SPLIT))
    assert _names(parts, "a", None, "a") == [("a", "a"), (None, None), ("a", "a")]


@pytest.mark.parametrize("whole", [OTHER, ALONE])
def test_parts_of_two_adapters_under_one_name_are_refused(whole: Whole) -> None:
    decoder, tower = _session("d", a=SPLIT), _session("t", a=whole)
    with pytest.raises(UsageError, match="'a' stands for two adapters, aaaa in d and .* in t: exp"):
        ImageParts(decoder, tower)
    loaded = _session("t")
    parts = ImageParts(decoder, loaded)
    loaded.adapters, loaded.wholes = tower.adapters, tower.wholes  # after construction
    with pytest.raises(UsageError, match="'a' stands for two adapters"):
        _names(parts, "a")


@pytest.mark.parametrize("known", [SPLIT, UNKNOWN])
def test_adapters_of_unknown_origin_run_by_their_name(known: Whole | str) -> None:
    parts = ImageParts(_session("d", a=UNKNOWN), _session("t", a=known))
    assert _names(parts, "a") == [("a", "a")]


def test_a_part_that_the_adapter_does_not_change_runs_the_base() -> None:
    assert _names(ImageParts(_session("d", t=ALONE), _session("t")), "t") == [("t", None)]
    assert _names(ImageParts(_session("d"), _session("t", t=ALONE)), "t") == [(None, "t")]


def test_a_missing_part_of_an_adapter_is_refused() -> None:
    parts = ImageParts(_session("d", a=SPLIT), _session("t"))
    with pytest.raises(UsageError, match="'a' is not in t: d has only its own part of it: `load`"):
        _names(parts, "a")
    with pytest.raises(UsageError, match="'a' is not in t: `load` it"):
        _names(ImageParts(_session("d", a=UNKNOWN), _session("t")), "a")
    with pytest.raises(UsageError, match="'x' is not in d: `load` it"):
        _names(parts, "x")
    with pytest.raises(UsageError, match="blends of adapters"):
        _names(parts, {"a": 0.5})


def test_a_prompt_without_images_needs_only_the_decoders_part() -> None:
    parts = ImageParts(_session("d", a=SPLIT), _session("t", b=SPLIT))
    assert parts.names(["a", None], [False, False]) == [("a", None), (None, None)]
    with pytest.raises(UsageError, match="'b' is not in d: t has only its own part of it"):
        parts.names(["b"], [False])


def test_an_adapter_loaded_into_one_part_runs_there_until_it_is_replaced() -> None:
    decoder, tower = _session("d", t=ALONE), _session("t", t=SPLIT)
    with pytest.raises(UsageError, match="stands for two adapters"):
        ImageParts(decoder, tower)
    tower.adapters = {}
    parts = ImageParts(decoder, tower)
    parts.loaded("t", tower)
    assert _names(parts, "t") == [("t", None)]
    tower.adapters = {"t": "t t"}  # another adapter under the name
    assert _names(parts, "t") == [("t", None)]
    tower.adapters = {}
    decoder.wholes = _session("d", t=SPLIT).wholes
    with pytest.raises(UsageError, match="d has only its own part of it"):
        _names(parts, "t")


def test_a_registered_adapter_is_read_first() -> None:
    decoder = _session("d", a=None)
    parts = ImageParts(decoder, _session("t", a=SPLIT))

    def read(name: str) -> Any:
        other = _session("d", **{name: OTHER})
        decoder.adapters, decoder.wholes = other.adapters, other.wholes
        return nullcontext()

    decoder.hold = read
    with pytest.raises(UsageError, match="'a' stands for two adapters, bbbb in d and aaaa in t"):
        _names(parts, "a")


def test_two_merged_parts_must_be_of_one_adapter() -> None:
    def make(first: AdapterEntry, second: AdapterEntry) -> ImageParts:
        return ImageParts(_session("d", first), _session("t", second))

    assert _names(make(_merged(A, split=True), _merged(A, split=True, digest=B)), None)
    assert _names(make(_merged(None), _merged(A, split=True)), None), "by the digest alone"
    for other in (_merged(B, split=True), _merged(None, digest=B)):
        with pytest.raises(UsageError, match="d and t have two adapters merged: merge one into"):
            make(_merged(A, split=True), other)


def test_a_merged_part_and_one_as_side_inputs_are_matched_by_the_digest(
    caplog: pytest.LogCaptureFixture,
) -> None:
    tower = _session("t", a=SPLIT, b=OTHER)
    parts = ImageParts(_session("d", _merged(A, split=True)), tower)
    assert _names(parts, "a") == [(None, "a")]
    with pytest.raises(UsageError, match="d has another adapter merged than 'b' of t: merge th"):
        _names(parts, "b")
    with pytest.raises(
        UsageError, match="runs the base without an adapter: give its name there, 'a'"
    ):
        _names(parts, None)
    with pytest.raises(UsageError, match="'x' is not in d"):
        _names(parts, "x")
    assert not caplog.records


def test_a_merged_part_with_the_base_of_the_other_part_is_refused() -> None:
    with pytest.raises(UsageError, match=r"d has an adapter merged \(aaaa\) that changes t too"):
        ImageParts(_session("d", _merged(A, split=True)), _session("t", b=OTHER))


def test_a_merged_adapter_of_only_one_part_needs_no_other_part(
    caplog: pytest.LogCaptureFixture,
) -> None:
    parts = ImageParts(_session("d", _merged(T)), _session("t", b=OTHER))
    assert _names(parts, None) == [(None, None)]
    with pytest.raises(UsageError, match="d has another adapter merged than 'b'"):
        _names(parts, "b")
    parts.loaded("b", parts.decoder)
    with pytest.raises(UsageError, match="d has another adapter merged than 'b'"):
        _names(parts, "b")
    assert not caplog.records


def test_a_merged_adapter_of_an_earlier_bundle_format_is_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING, "loradeploy"):
        parts = ImageParts(_session("d"), _session("t", _merged(None)))
    assert "t has an adapter merged and d has none: correct only if" in caplog.text
    assert _names(parts, None) == [(None, None)]
