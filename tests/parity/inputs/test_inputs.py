"""The inputs of a parity check: prompts, random tokens, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from loradeploy.adapter.adapter import Adapter
from loradeploy.adapter.config import AdapterConfig
from loradeploy.adapter.files.base_files import base_tensors
from loradeploy.bundle.manifest import BaseIdentity, Manifest, TensorSpec
from loradeploy.errors import DataError, LoraDeployError, UsageError
from loradeploy.parity.checks.rows import mixed_rows
from loradeploy.parity.inputs.prompts import GENERATED, PROMPTS
from loradeploy.parity.inputs.tokens import MOST_TRAINED, Cases, make_cases
from loradeploy.parity.inputs.trained import trained_tokens
from loradeploy.parity.phases.rows import Row

DECODER = Manifest(
    task="causal-lm",
    mode="side-inputs",
    base=BaseIdentity("tiny", None, "checkpoint"),
    precision="fp32",
    opset=23,
    inputs=(),
    outputs=(TensorSpec("logits", "float32", ("batch", "sequence", 512)),),
)
ENCODER = dataclasses.replace(DECODER, task="feature-extraction")


def cases(bundle: Path, manifest: Manifest = DECODER, **options: object) -> Cases:
    given = {"prompts": None, "generated": None, "seed": 0, **options}
    return make_cases(bundle, manifest, **given)  # type: ignore[arg-type]


CLASSIFIER = dataclasses.replace(DECODER, task="sequence-classification")


@pytest.mark.parametrize(
    "pair", [("a cup", "a bank"), ["a cup", "a bank"], {"text": "a cup", "text_pair": "a bank"}]
)
def test_a_pair_of_texts_is_one_input(pair: object, tiny_bert: Path) -> None:
    from transformers import AutoTokenizer

    expected = AutoTokenizer.from_pretrained(tiny_bert)("a cup", "a bank")["input_ids"]
    assert cases(tiny_bert, CLASSIFIER, prompts=[pair]).prompts[0] == tuple(expected)
    with pytest.raises(UsageError, match="pairs of texts, and the bundle is for feature-extracti"):
        cases(tiny_bert, ENCODER, prompts=[pair])


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (("a",), r"prompt 2 is \('a',\): give a text, a pair of texts, a list of messages, or an"),
        ((1, "b"), r"prompt 2 is \(1, 'b'\): give a text"),
        (7, "prompt 2 is 7: give a text"),
        ({"text": "a", "text_pair": 1}, "prompt 2: give a pair as two texts, text and text_pair"),
        ({"label": "a"}, "prompt 2: give a text as prompt or text, a list of messages, or a path"),
        (
            {"audio": "a.wav"},
            "prompt 2: a path of an audio file; parity generates audio from a seed",
        ),
    ],
)
def test_an_invalid_prompt_is_named(prompt: object, message: str, tiny_bert: Path) -> None:
    with pytest.raises(LoraDeployError, match=message):
        cases(tiny_bert, CLASSIFIER, prompts=["a text", prompt])


def test_the_built_in_prompts_are_enough_and_all_different() -> None:
    assert len(set(PROMPTS)) == len(PROMPTS) == 16


def test_a_decoder_gets_the_built_in_prompts_and_generates(tiny_llama: Path) -> None:
    found = cases(tiny_llama)
    assert (len(found.prompts) - found.edges, found.generated) == (len(PROMPTS), GENERATED)


def test_an_encoder_generates_nothing(tiny_bert: Path) -> None:
    assert cases(tiny_bert, ENCODER).generated == 0
    with pytest.raises(UsageError, match="a feature-extraction bundle generates no tokens"):
        cases(tiny_bert, ENCODER, generated=4)


def test_prompts_leave_positions_for_the_generated_tokens(tiny_llama: Path) -> None:
    found = cases(tiny_llama, generated=100)
    assert max(map(len, found.prompts)) == 128 - 100


def test_too_many_generated_tokens_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(UsageError, match="leave no room in the model's 128 positions"):
        cases(tiny_llama, generated=128)


def test_a_text_file_has_one_prompt_per_line(tiny_llama: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("one\n\ntwo\n")
    found = cases(tiny_llama, prompts=file)
    assert len(found.prompts) - found.edges == 2


def test_jsonl_can_contain_prompts_texts_and_conversations(
    tiny_llama: Path, tmp_path: Path
) -> None:
    file = tmp_path / "prompts.jsonl"
    message = [{"role": "user", "content": "Hi"}]
    lines = [{"prompt": "Hi"}, {"text": "Hi"}, {"messages": message}]
    file.write_text("\n".join(map(json.dumps, lines)))
    plain, text, chat, *_ = cases(tiny_llama, prompts=file).prompts
    assert plain == text
    assert len(chat) > len(plain)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.txt", None, "does not exist"),
        ("empty.txt", "\n", "has no prompts"),
        ("broken.jsonl", '{"text": "a"}\n{"text"', "line 2: not JSON"),
        ("other.jsonl", '{"question": "a"}', "line 1: give a text as prompt"),
        ("latin.txt", b"caf\xe9", "cannot be read"),
    ],
)
def test_prompts_that_cannot_be_read_are_refused(
    tiny_llama: Path, tmp_path: Path, name: str, content: str | bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError, match=message):
        cases(tiny_llama, prompts=tmp_path / name)


@pytest.mark.parametrize("options", [{"prompts": []}, {"generated": 0}])
def test_no_inputs_at_all_are_refused(tiny_llama: Path, options: dict[str, object]) -> None:
    with pytest.raises(UsageError):
        cases(tiny_llama, **options)


def test_without_a_tokenizer_the_tokens_are_random_and_depend_on_the_seed(
    tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copy(tiny_llama / "config.json", tmp_path)
    first, again, other = (cases(tmp_path, seed=seed).prompts for seed in (1, 1, 2))
    assert first == again != other
    assert all(0 <= token < 512 for row in first for token in row)
    with pytest.raises(LoraDeployError, match="no tokenizer.json"):
        cases(tmp_path, prompts=["Hi"])


def test_the_last_cases_are_a_single_token_and_the_longest_possible_input(tiny_llama: Path) -> None:
    found = cases(tiny_llama, generated=100)
    assert found.edges == 2
    assert [len(row) for row in found.prompts[-2:]] == [1, 128 - 100]


def test_few_tokens_are_generated_after_inputs_of_extreme_lengths(tiny_llama: Path) -> None:
    (usual, after), (edges, after_edges) = cases(tiny_llama).groups
    assert (len(usual), after) == (len(PROMPTS), GENERATED)
    assert (len(edges), after_edges) == (2, 2)


def test_fuzz_inputs_are_random_tokens_of_varied_lengths_and_depend_on_the_seed(
    tiny_llama: Path,
) -> None:
    def fuzz(**options: int) -> tuple[tuple[int, ...], ...]:
        found = cases(tiny_llama, **options)
        return found.prompts[len(PROMPTS) : -found.edges]

    first, again, other = fuzz(fuzz=20), fuzz(fuzz=20), fuzz(fuzz=20, seed=1)
    assert first == again != other
    assert len(first) == 20
    assert len(set(map(len, first))) > 5
    assert all(0 <= token < 512 for row in first for token in row)
    assert len({token for row in first for token in row}) > 200


def test_trained_tokens_are_inputs_though_no_prompt_has_them(tiny_llama: Path) -> None:
    found = cases(tiny_llama, prompts=["The capital of France is"], trained=[301, 17])
    assert not {301, 17} & set(found.prompts[0])
    short, long = found.prompts[-found.edges :]
    assert (short, long[0], long[1:3]) == ((301,), found.prompts[0][0], (301, 17))
    assert found.unfed == 0


@pytest.mark.parametrize("longest", [127, 9])
def test_all_trained_tokens_are_inputs_up_to_a_limit_in_separate_rows(
    longest: int, tiny_llama: Path
) -> None:
    def fed(trained: range) -> Cases:
        return cases(tiny_llama, prompts=["a"], generated=128 - longest, trained=trained)

    for count in (0, 1, 48, 49, 64, MOST_TRAINED):
        found = fed(range(1000, 1000 + count))
        assert {token for row in found.prompts for token in row if token >= 1000} == set(
            range(1000, 1000 + count)
        )
        assert all(1 <= len(row) <= longest for row in found.prompts)
        assert (found.edges, found.unfed) == (len(found.prompts) - 1, 0)
    assert fed(range(MOST_TRAINED + 3)).unfed == 3


def test_rows_of_a_saved_embedding_that_differ_from_the_models_count_as_trained(
    tiny_llama: Path, tiny_gpt2: Path
) -> None:
    def trained(table: str, model: Path, *, saved: bool = False) -> tuple[int, ...]:
        own = next(t.array() for n, t in base_tensors(model).items() if n.endswith(embed[model]))
        values = np.concatenate([own, np.ones_like(own[:2])])
        values[[40, 301]] += np.array([[0.5], [1.0]], np.float32)
        whole = {table: values, "dense.weight": own[:4]}
        adapter = Adapter(config, {}, saved=whole if saved else {}, carried={} if saved else whole)
        return trained_tokens([adapter], model)

    config = AdapterConfig(r=1, lora_alpha=1, target_modules=("q_proj",))
    embed = {tiny_llama: "embed_tokens.weight", tiny_gpt2: "wte.weight"}
    expected = (512, 513, 301, 40)  # the added ones, then the furthest ones
    assert trained("model.embed_tokens.weight", tiny_llama) == expected
    assert trained("model.embed_tokens.weight", tiny_llama, saved=True) == expected
    assert trained("transformer.wte.weight", tiny_gpt2) == expected
    assert trained("lm_head.weight", tiny_gpt2) == expected, "tied, so not stored"


def test_a_mixed_batch_has_an_extreme_row_of_each_adapter() -> None:
    def rows(adapter: str | None) -> tuple[Row, ...]:
        values = np.zeros((1, 2), np.float32)
        return tuple(Row(i, adapter, (i,), (), values, edge=i > 2) for i in range(5))

    adapters = (None, "a", "b", "c")
    mixed = mixed_rows({name: rows(name) for name in adapters})
    assert {row.adapter for row in mixed if row.edge} == set(adapters)
    assert {row.adapter for row in mixed if not row.edge} == set(adapters)
    assert all(one.adapter != other.adapter for one, other in pairwise(mixed))
