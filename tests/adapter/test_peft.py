"""Reading and writing PEFT adapter directories, and refusals of invalid ones."""

from __future__ import annotations

import dataclasses
import errno
import json
import logging
import os
import shutil
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loradeploy.adapter import (
    Adapter,
    AdapterConfig,
    Factors,
    base_digest,
    load_adapter,
    save_adapter,
)
from loradeploy.adapter.files import peft, roles
from loradeploy.adapter.files.peft import WEIGHTS_NAME, names_targets
from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.errors import AdapterError, ModelError, OutputError

PREFIX = "base_model.model."
GOLDEN = (
    b'x\x00\x00\x00\x00\x00\x00\x00{"__metadata__":{"a":"1","b":"2"},"m":{"dtype":"F16","shape":[1],'
    b'"data_offsets":[0,2]},"n":{"dtype":"F32","shape":[1,1],"data_offsets":[2,6]}}'
)


# Of an adapter with the same tensors and another scaling.
OTHER = AdapterConfig(r=2, lora_alpha=64, target_modules=("q",), modules_to_save=("head",))


def an_adapter(**changes: Any) -> Adapter:
    config = AdapterConfig(r=2, lora_alpha=4, target_modules=("q",), modules_to_save=("head",))
    values: dict[str, Any] = {
        "config": config,
        "factors": {"l.q": Factors(np.ones((2, 3), np.float32), np.ones((4, 2), np.float32))},
        "saved": {"head.weight": np.ones((5, 4), np.float32)},
        "base_digest": "sha256:00",
        "labels": ("no", "yes"),
    }
    return Adapter(**{**values, **changes})


def write(directory: Path, tensors: dict[str, Any], **config: Any) -> Path:
    directory.mkdir(exist_ok=True)
    values = {
        "peft_type": "LORA",
        "r": 2,
        "lora_alpha": 4,
        "target_modules": ["q"],
        **config,
    }
    (directory / "adapter_config.json").write_text(json.dumps(values))
    write_arrays(directory / WEIGHTS_NAME, tensors, {})
    return directory


def good_tensors() -> dict[str, Any]:
    return {
        f"{PREFIX}l.q.lora_A.weight": np.ones((2, 3), np.float32),
        f"{PREFIX}l.q.lora_B.weight": np.ones((4, 2), np.float32),
    }


def test_a_saved_adapter_is_loaded_unchanged(tmp_path: Path) -> None:
    adapter = an_adapter()
    digest = save_adapter(adapter, tmp_path / "a")
    loaded = load_adapter(tmp_path / "a")

    assert loaded.digest == digest == adapter.digest
    assert loaded.config == adapter.config
    assert (loaded.base_digest, loaded.labels) == ("sha256:00", ("no", "yes"))
    np.testing.assert_array_equal(loaded.factors["l.q"].B, adapter.factors["l.q"].B)
    assert load_adapter(tmp_path / "a" / WEIGHTS_NAME).digest == digest


def test_the_same_adapter_gives_the_same_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        save_adapter(an_adapter(), tmp_path / name)
    for file in (WEIGHTS_NAME, "adapter_config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_a_failure_to_save_keeps_the_existing_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_adapter(an_adapter(), tmp_path)
    new = an_adapter(config=OTHER)
    assert new.digest != old

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for writer in ("write_tensors", "json_text"):
        with monkeypatch.context() as patch, pytest.raises(OutputError, match="No space left"):
            patch.setattr(peft, writer, full)
            save_adapter(new, tmp_path)
        assert load_adapter(tmp_path).digest == old
        assert len(list(tmp_path.iterdir())) == 2


def test_no_moment_of_a_save_has_a_config_beside_weights_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    digests = [save_adapter(an_adapter(), tmp_path / "a")]
    moments = []
    replace = os.replace

    def seen(source: Path, target: Path) -> None:
        replace(source, target)
        moments.append(shutil.copytree(tmp_path / "a", tmp_path / f"moment-{len(moments)}"))

    monkeypatch.setattr(os, "replace", seen)
    digests.append(save_adapter(an_adapter(config=OTHER), tmp_path / "a"))
    assert len(moments) == 3
    for moment in moments[:2]:  # as a kill leaves it
        with pytest.raises(AdapterError, match="safetensors does not exist"):
            load_adapter(moment)
        assert save_adapter(an_adapter(config=OTHER), moment) == load_adapter(moment).digest
        assert len(os.listdir(moment)) == 2
    assert load_adapter(moments[2]).digest == digests[1] != digests[0]


def test_a_reader_waits_for_the_weights_that_are_being_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(an_adapter(), tmp_path)
    replace = os.replace
    readers = []

    def seen(source: Path, target: Path) -> None:
        replace(source, target)
        if target.name == "adapter_config.json":  # between the files
            readers.append(pool.submit(load_adapter, tmp_path))
            with pytest.raises(NotYetError):
                readers[0].result(0.05)

    monkeypatch.setattr("loradeploy.writing._TURN_SECONDS", 60.0)  # whatever the machine does
    with ThreadPoolExecutor() as pool:
        monkeypatch.setattr(os, "replace", seen)
        digest = save_adapter(an_adapter(config=OTHER), tmp_path)
        assert readers[0].result().digest == digest


def test_a_save_that_fails_between_its_files_keeps_the_existing_adapter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = save_adapter(an_adapter(), tmp_path)
    replace = os.replace

    def failing(source: Path, target: Path) -> None:
        if target.name == "adapter_config.json":
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT), str(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", failing)
    with pytest.raises(OutputError, match="quota"):
        save_adapter(an_adapter(config=OTHER), tmp_path)
    assert load_adapter(tmp_path).digest == old
    assert len(os.listdir(tmp_path)) == 2


@pytest.mark.parametrize("place", ["file", "file/inside", "link"])
def test_an_adapter_is_not_saved_where_no_directory_can_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("file")
    with pytest.raises(OutputError, match="cannot be written"):
        save_adapter(an_adapter(), tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_file_larger_than_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(an_adapter(), tmp_path)

    def too_large(_: Path) -> bytes:
        raise MemoryError

    with monkeypatch.context() as patch, pytest.raises(AdapterError, match="takes more memory"):
        patch.setattr(Path, "read_bytes", too_large)
        load_adapter(tmp_path)
    assert load_adapter(tmp_path).digest == an_adapter().digest


def test_a_config_of_one_version_is_not_read_with_the_weights_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = an_adapter(), an_adapter(config=OTHER)
    save_adapter(old, tmp_path)
    replacements = [new]

    def replaced_meanwhile(*given: Any, **named: Any) -> Any:
        if replacements:
            save_adapter(replacements.pop(0), tmp_path)
        return read_arrays(*given, **named)

    monkeypatch.setattr(peft, "read_arrays", replaced_meanwhile)
    assert load_adapter(tmp_path).digest == new.digest != old.digest
    replacements = [old, new, old]  # at every attempt
    with pytest.raises(AdapterError, match="was written to while it was read"):
        load_adapter(tmp_path)


def test_golden_bytes_do_not_depend_on_the_order_of_tensors(tmp_path: Path) -> None:
    tensors = {"n": np.zeros((1, 1), np.float32), "m": np.zeros(1, np.float16)}
    write_arrays(tmp_path / "g", tensors, {"b": "2", "a": "1"})
    content = (tmp_path / "g").read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    assert length % 8 == 0
    assert content[8 : 8 + length].rstrip() == GOLDEN[8:]
    assert content[8 + length :] == bytes(6)


def test_nothing_of_a_peft_adapter_is_lost_by_loading_and_saving(
    tiny_llama: Path, make_adapter: Callable[..., Path], tmp_path: Path
) -> None:
    from safetensors.numpy import load_file

    theirs = make_adapter(tiny_llama, r=4, seed=3)
    adapter = load_adapter(theirs)
    save_adapter(adapter, tmp_path / "ours")
    before, after = (load_file(d / WEIGHTS_NAME) for d in (theirs, tmp_path / "ours"))
    assert before.keys() == after.keys()
    for name in before:
        np.testing.assert_array_equal(before[name], after[name])


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_float_dtype_is_read(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.tensor([[1.0, -2.5, 3.25]], dtype=getattr(torch, dtype))
    save_file({"x": values}, tmp_path / "x.safetensors")
    arrays, _ = read_arrays(tmp_path / "x.safetensors", error=AdapterError)
    np.testing.assert_array_equal(arrays["x"], values.float().numpy())


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
def test_every_float8_number_is_read_as_in_pytorch(dtype: str, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    values = torch.arange(256, dtype=torch.uint8).view(getattr(torch, dtype))
    values = values[values.float().isfinite()].reshape(2, -1)
    save_file({"x": values}, tmp_path / "x.safetensors")
    arrays, _ = read_arrays(tmp_path / "x.safetensors", error=AdapterError)
    np.testing.assert_array_equal(arrays["x"], values.float().numpy())
    save_file({"x": torch.full((1,), torch.nan).to(values.dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(AdapterError, match="not finite"):
        read_arrays(tmp_path / "x.safetensors", error=AdapterError)


def test_the_digest_depends_on_values_and_not_on_dtype_or_key_spelling() -> None:
    half = {"l.q": Factors(np.ones((2, 3), np.float16), np.ones((4, 2), np.float16))}
    spelled = AdapterConfig(
        r=9,
        rank_pattern={"q": 2},
        lora_alpha=4,
        target_modules=("q",),
        modules_to_save=("head",),
    )
    assert an_adapter(factors=half).digest == an_adapter().digest
    assert an_adapter(config=spelled).digest == an_adapter().digest


def test_the_digest_of_an_adapter_is_stable_across_versions() -> None:
    golden = "sha256:2606aa2aedc0fbfe197e856bd7984308d44bae4d42d18656f11d67cdef24882b"
    assert an_adapter().digest == golden, "bundles and certificates know adapters by their digests"


@pytest.mark.parametrize(
    "change", ["A", "B", "alpha", "saved", "module", "kind", "magnitude", "bias", "changed base"]
)
def test_the_digest_changes_with_everything_that_affects_results(change: str) -> None:
    base = an_adapter()
    pair = base.factors["l.q"]
    other = {
        "A": {"factors": {"l.q": Factors(pair.A * 2, pair.B)}},
        "B": {"factors": {"l.q": Factors(pair.A, pair.B * 2)}},
        "alpha": {"config": AdapterConfig(r=2, lora_alpha=8, modules_to_save=("head",))},
        "saved": {"saved": {"head.weight": np.zeros((5, 4), np.float32)}},
        "module": {"factors": {"l.k": pair}},
        "kind": {"factors": {"l.q": Factors(pair.A, pair.B, kind="embedding")}},
        "magnitude": {
            "factors": {"l.q": Factors(pair.A, pair.B, np.ones(4, np.float32))},
            "config": dataclasses.replace(base.config, use_dora=True),
        },
        "bias": {
            "factors": {"l.q": dataclasses.replace(pair, bias=np.zeros(4, np.float32))},
            "config": dataclasses.replace(base.config, lora_bias=True),
        },
        "changed base": {"config": dataclasses.replace(base.config, init_lora_weights="pissa")},
    }[change]
    assert an_adapter(**other).digest != base.digest


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", ["linear", "embedding", "conv2d"])
def test_every_kind_of_factors_is_written_with_pefts_names(
    kind: Any, dora: bool, tmp_path: Path
) -> None:
    ones = (4, 2, 1, 1) if kind == "conv2d" else (4, 2)
    A = np.ones((2, 3, 5, 5) if kind == "conv2d" else (2, 3), np.float32)
    magnitude = np.ones(4, np.float32) if dora else None
    pair = Factors(A, np.ones(ones, np.float32), magnitude, kind)
    config = AdapterConfig(
        r=2, target_modules=("q",), modules_to_save=("head",), use_dora=dora, bias="all"
    )
    saved = {"l.q.bias": np.zeros(4, np.float32), "n.bias": np.ones(2, np.float32)}
    adapter = an_adapter(config=config, factors={"l.q": pair}, saved=saved)
    digest = save_adapter(adapter, tmp_path)

    arrays, _ = read_arrays(tmp_path / WEIGHTS_NAME, error=AdapterError)
    A_key = "lora_embedding_A" if kind == "embedding" else "lora_A.weight"
    B_key = "lora_embedding_B" if kind == "embedding" else "lora_B.weight"
    expected = {f"l.q.{A_key}", f"l.q.{B_key}", "l.q.base_layer.bias", "n.bias"}
    if dora:
        expected.add("l.q.lora_magnitude_vector")
        shape = (1, 4, 1, 1) if kind == "conv2d" else (4,)
        assert arrays[f"{PREFIX}l.q.lora_magnitude_vector"].shape == shape
    assert arrays.keys() == {f"{PREFIX}{key}" for key in expected}
    loaded = load_adapter(tmp_path)
    assert loaded.digest == digest
    assert (loaded.factors["l.q"].kind, loaded.saved.keys()) == (kind, saved.keys())


@settings(max_examples=40, deadline=None)
@given(position=st.integers(0, 400), value=st.integers(0, 255), cut=st.integers(0, 400))
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    position: int, value: int, cut: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    directory = write(tmp_path_factory.mktemp("damaged"), good_tensors())
    file = directory / WEIGHTS_NAME
    content = bytearray(file.read_bytes())
    content[position % len(content)] = value
    file.write_bytes(content[: len(content) - cut % len(content)])
    try:
        load_adapter(directory)
    except AdapterError as refusal:
        assert "\n" not in str(refusal)


def break_adapter(change: str, directory: Path) -> Path:
    """Break an adapter directory in the way named by `change`."""
    tensors: dict[str, Any] = good_tensors()
    key = f"{PREFIX}l.q.lora_A.weight"
    if change == "nan":
        tensors[key] = np.full((2, 3), np.nan, np.float32)
    elif change == "integers":
        tensors[key] = np.ones((2, 3), np.int32)
    elif change == "half":
        del tensors[key]
    elif change == "base weights":
        tensors[f"{PREFIX}l.q.weight"] = np.ones((4, 3), np.float32)
    elif change == "rank":
        tensors[key] = np.ones((3, 3), np.float32)
    elif change == "prefix":
        tensors["l.k.lora_A.weight"] = tensors.pop(key)
    elif change == "dora":
        tensors[f"{PREFIX}l.q.lora_magnitude_vector"] = np.ones(4, np.float32)
    elif change == "embedding":
        tensors[f"{PREFIX}e.lora_embedding_A"] = np.ones((2, 4), np.float32)
    elif change == "rows of positions":
        name = "decoder.embed_positions.token_adapter.trainable_tokens_delta"
        tensors[f"{PREFIX}{name}"] = np.ones((1, 3), np.float32)
    elif change == "positions":
        tensors[f"{PREFIX}decoder.embed_positions.lora_embedding_A"] = np.ones((2, 4), np.float32)
        tensors[f"{PREFIX}decoder.embed_positions.lora_embedding_B"] = np.ones((3, 2), np.float32)
    elif change == "convolution":
        tensors[key] = np.ones((2, 3, 1, 1), np.float32)
    elif change == "twice":
        tensors[f"{PREFIX}_orig_mod.l.q.lora_A.weight"] = 2 * tensors[key]
    elif change == "empty":
        tensors = {}
    write(directory, tensors)
    file = directory / WEIGHTS_NAME
    content = file.read_bytes()
    if change == "truncated":
        file.write_bytes(content[:-4])
    elif change == "lying header":
        file.write_bytes(content.replace(b"[2,3]", b"[9,3]"))
    elif change == "huge header":
        file.write_bytes(struct.pack("<Q", 1 << 60) + content[8:])
    elif change == "no weights":
        file.unlink()
    elif change == "no config":
        (directory / "adapter_config.json").unlink()
    elif change == "broken config":
        (directory / "adapter_config.json").write_text("{")
    elif change == "config is a list":
        (directory / "adapter_config.json").write_text("[]")
    elif change == "pickle":
        file.rename(directory / "adapter_model.bin")
    return directory


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("nan", "lora_A.weight has values that are not finite"),
        ("integers", "is int32, not floating point"),
        ("half", "has lora_B but no lora_A"),
        ("base weights", "l.q.weight is neither a factor"),
        ("rank", "the config has rank 2"),
        ("prefix", "does not begin with"),
        ("dora", "use_dora is False, and the file has a lora_magnitude_vector"),
        ("embedding", "e has lora_embedding_A but no lora_embedding_B"),
        ("rows of positions", "decoder.embed_positions has trained rows, and is an embedding that"),
        ("positions", "decoder.embed_positions is an embedding that computes its positions itself"),
        ("convolution", "are not factors of a linear layer"),
        ("twice", r"differs from what the file has for l\.q\.lora_A under another key"),
        ("empty", "has no tensors"),
        ("truncated", "not a valid safetensors"),
        ("lying header", "not a valid safetensors"),
        ("huge header", "not a valid safetensors"),
        ("no weights", "does not exist"),
        ("no config", "does not exist"),
        ("broken config", "not readable as JSON"),
        ("config is a list", "expected an object"),
        ("pickle", "is a pickle.*torch.load"),
    ],
)
def test_a_broken_adapter_is_refused_in_one_line(change: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message) as refusal:
        load_adapter(break_adapter(change, tmp_path / "adapter"))
    assert "\n" not in str(refusal.value)
    assert "adapter" in str(refusal.value)


@pytest.mark.parametrize(
    ("config", "tensors", "message"),
    [
        ({}, {"lora_B.bias": 4}, "lora_bias is false, and the file has a lora_B.bias"),
        ({"lora_bias": True}, {}, "lora_bias is true, and the file has no lora_B.bias"),
        ({"lora_bias": True}, {"lora_A.bias": 2}, "lora_A.bias is a bias, which only lora_B can"),
        ({"lora_bias": True}, {"lora_B.bias": 3}, r"lora_B.bias is \[3\], lora_B is \[4, 2\]"),
        ({"lora_bias": True, "use_dora": True}, {"lora_B.bias": 4}, "not combine with use_dora"),
        ({"lora_bias": True, "init_lora_weights": "pissa"}, {"lora_B.bias": 4}, "with init_lora"),
        ({"lora_bias": "all"}, {"lora_B.bias": 4}, "lora_bias is 'all', expected true or false"),
    ],
)
def test_a_bias_of_factors_that_contradicts_the_config_is_refused(
    config: dict[str, Any], tensors: dict[str, int], message: str, tmp_path: Path
) -> None:
    biases = {f"{PREFIX}l.q.{name}": np.ones(size, np.float32) for name, size in tensors.items()}
    write(tmp_path, {**good_tensors(), **biases}, modules_to_save=["head"], **config)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


@pytest.mark.parametrize(
    ("config", "ignored"),
    [
        ({"target_modules": ["q"]}, "1.k"),
        ({"target_modules": ["q", "k"]}, None),
        ({"target_modules": ["q", "k"], "exclude_modules": ["k"]}, "1.k"),
        ({"target_modules": ["q", "k"], "layers_to_transform": [0, 2]}, "1.k"),
        ({"target_modules": ["q", "k"], "layers_to_transform": [0, 1]}, None),
        ({"target_modules": r".*layers\.\d\.q"}, "1.k"),
        ({"target_modules": r"model\.layers\.\d\.[qk]"}, None),
        ({"target_modules": r"language_model\.layers\.\d\.[qk]"}, None),  # renamed since
        ({"target_modules": r".*\.q|layers\.\d\.k"}, "1.k"),  # PEFT compares whole names
        ({"target_modules": "all-linear"}, None),
        ({"target_modules": "all-linear", "exclude_modules": ".*k"}, "1.k"),
        ({"target_modules": None}, None),
    ],
)
@pytest.mark.parametrize("before", ["", "model."])
def test_factors_outside_the_target_modules_are_refused(
    config: dict[str, Any], ignored: str | None, before: str, tmp_path: Path
) -> None:
    tensors = {}
    for module in ("layers.0.q", "layers.1.k"):
        tensors[f"{PREFIX}{before}model.{module}.lora_A.weight"] = np.ones((2, 3), np.float32)
        tensors[f"{PREFIX}{before}model.{module}.lora_B.weight"] = np.ones((4, 2), np.float32)
    place = write(tmp_path / "a", tensors, **config)
    if ignored is None:
        assert len(load_adapter(place).factors) == 2
        return
    with pytest.raises(AdapterError, match=rf"layers\.{ignored}: the file has factors, and"):
        load_adapter(place)
    zeros = f"{PREFIX}{before}model.layers.{ignored}.lora_B.weight"
    tensors[zeros] = np.zeros_like(tensors[zeros])
    assert len(load_adapter(write(place, tensors, **config)).factors) == 2


@pytest.mark.parametrize("targets", [None, [], ""])
def test_factors_without_targets_are_all_used_with_a_log_line(
    targets: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roles._warn_of_targets.cache_clear()
    with caplog.at_level(logging.WARNING):
        adapter = load_adapter(write(tmp_path / "a", good_tensors(), target_modules=targets))
    assert adapter.config.target_modules == ("l.q",) == tuple(adapter.factors)
    save_adapter(adapter, tmp_path / "b")
    assert not names_targets(tmp_path / "a")
    assert names_targets(tmp_path / "b"), "PEFT would use its own targets"
    assert "target_modules in the adapter's config is missing or empty" in caplog.text
    assert "ignores other factors" in caplog.text


@pytest.mark.parametrize("head", ["lm_head", "embed_out", "model.lm_head"])
@pytest.mark.parametrize("all_linear", ["all-linear", "All-Linear"])
def test_factors_of_an_output_head_are_no_part_of_all_linear(
    head: str, all_linear: str, tmp_path: Path
) -> None:
    tensors = dict(good_tensors())
    tensors[f"{PREFIX}{head}.lora_A.weight"] = np.ones((2, 3), np.float32)
    tensors[f"{PREFIX}{head}.lora_B.weight"] = np.ones((4, 2), np.float32)
    with pytest.raises(AdapterError, match=rf"refused: {head}: the file has factors, and"):
        load_adapter(write(tmp_path / "a", tensors, target_modules=all_linear))


def test_factors_of_an_embedding_are_no_part_of_all_linear(tmp_path: Path) -> None:
    tensors = dict(good_tensors())
    tensors[f"{PREFIX}wte.lora_embedding_A"] = np.ones((2, 9), np.float32)
    tensors[f"{PREFIX}wte.lora_embedding_B"] = np.ones((4, 2), np.float32)
    with pytest.raises(AdapterError, match="refused: wte: the file has factors, and"):
        load_adapter(write(tmp_path / "a", tensors, target_modules="all-linear"))


@pytest.mark.parametrize("module", ["head", "pre_head", "model.head", "head.dense"])
def test_modules_to_save_match_by_suffix_as_in_peft(module: str, tmp_path: Path) -> None:
    tensors = {**good_tensors(), f"{PREFIX}{module}.weight": np.ones((5, 4), np.float32)}
    adapter = load_adapter(write(tmp_path / "a", tensors, modules_to_save=["head"]))
    assert set(adapter.saved) == {f"{module}.weight"}


@pytest.mark.parametrize("prefix", ["", PREFIX])
def test_a_value_head_of_trl_is_omitted_with_a_log_line(
    prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    roles._warn_of_value_head.cache_clear()
    head = {f"{prefix}v_head.summary.weight": np.ones((1, 4), np.float32)}
    right = load_adapter(write(tmp_path / "right", good_tensors()))
    found = load_adapter(write(tmp_path / "adapter", {**good_tensors(), **head}))
    assert found.digest == right.digest
    assert not found.carried
    assert f"{prefix}v_head.summary.weight: a value head of TRL" in caplog.text


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("", f"pretrained_model.{PREFIX}"),
        (PREFIX, f"{PREFIX}pretrained_model."),
        (PREFIX, "pretrained_model."),
        (PREFIX, f"module.{PREFIX}pretrained_model."),
    ],
)
def test_names_below_trl_s_value_head_are_read_and_said(
    before: str, after: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """PEFT loads none of them, and warns of missing keys."""
    roles._warn_of_wrapper.cache_clear()
    expected = load_adapter(write(tmp_path / "plain", good_tensors()))
    assert "pretrained_model" not in caplog.text
    start = after if before else after.removesuffix(PREFIX)
    below = {start + key.removeprefix(before): v for key, v in good_tensors().items()}
    head = {"v_head.summary.weight": np.ones((1, 4), np.float32)}
    found = load_adapter(write(tmp_path / "below", {**below, **head}))
    assert found.digest == expected.digest
    assert "all other keys have TRL's prefix pretrained_model. before" in caplog.text


def test_a_value_head_of_the_model_itself_is_kept(tmp_path: Path) -> None:
    head = {f"{PREFIX}v_head.summary.weight": np.ones((1, 4), np.float32)}
    place = write(tmp_path / "adapter", {**good_tensors(), **head}, modules_to_save=["v_head"])
    assert "v_head.summary.weight" in load_adapter(place).saved


@pytest.mark.parametrize("place", ["nowhere", "empty", "file.txt"])
def test_a_directory_without_an_adapter_is_refused(place: str, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("hello")
    with pytest.raises(AdapterError, match=place):
        load_adapter(tmp_path / place)


def test_the_base_digest_ignores_sharding_and_depends_on_every_byte(tmp_path: Path) -> None:
    a, b = np.arange(6, dtype=np.float32), np.ones((2, 2), np.float16)
    for name, files in {
        "whole": {"model.safetensors": {"a": a, "b": b}},
        "sharded": {"model-1.safetensors": {"b": b}, "model-2.safetensors": {"a": a}},
        "other": {"model.safetensors": {"a": a + 1, "b": b}},
    }.items():
        (tmp_path / name).mkdir()
        for file, tensors in files.items():
            write_arrays(tmp_path / name / file, tensors, {})
        index = {"weight_map": {t: file for file, tensors in files.items() for t in tensors}}
        if len(files) > 1:
            (tmp_path / name / "model.safetensors.index.json").write_text(json.dumps(index))
    whole, sharded, other = (base_digest(tmp_path / n) for n in ("whole", "sharded", "other"))
    assert whole == sharded != other
    with pytest.raises(ModelError, match=r"neither \.safetensors"):
        base_digest(tmp_path)


@pytest.mark.parametrize("tokens", [[3.5, 5], ["3", 5], [-1, 5], [True, 5]])
def test_an_invalid_token_id_is_named(tokens: list[Any], tmp_path: Path) -> None:
    rows = {f"{PREFIX}embed.token_adapter.trainable_tokens_delta": np.ones((2, 3), np.float32)}
    place = write(tmp_path / "a", {**good_tensors(), **rows}, trainable_token_indices=tokens)
    with pytest.raises(AdapterError, match=rf"names {tokens[0]!r} for embed, which is not the id"):
        load_adapter(place)
