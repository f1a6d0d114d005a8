"""The client for Node gives Python's tokens for every adapter, and refuses what it cannot run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.adapter.files.tensors import read_arrays, write_arrays
from loradeploy.bundle.text.vectors.files import RecipeReader
from loradeploy.errors import AdapterError, BundleError
from loradeploy.export.api import export
from loradeploy.runtime.reading.wire import node_names
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.tasks.tokens import TokenClassifier
from tests.clients.conftest import FORMS, Required
from tests.conftest import ROOT, MakeAdapter
from tests.export.adapters.vocabularies import BASE, CASES, TABLES, WORDS, Case, make
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance

TOKENS = [5, 6, 7, 8, 9]
TEXT = "News story: café £3m — “Shares” 🙂 rose\n"
CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
COUNT = 8
# Prompts of different lengths in one batch, and the adapter of each.
PROMPTS = [TEXT, TOKENS, TOKENS, CHAT, CHAT]
ADAPTERS = ["all", None, "few", "few", None]

Jobs = list[dict[str, Any]]
Node = Callable[[Jobs], list[Any]]


@pytest.fixture(scope="session")
def node(javascript: Path) -> Node:
    """A function that runs jobs (js/jobs.mjs) by the client in Node."""

    def run(jobs: Jobs) -> list[Any]:
        client = javascript / "clients" / "js" / "index.js"
        done = subprocess.run(
            ["node", ROOT / "tests" / "clients" / "js" / "node.mjs", client],
            input=json.dumps(jobs, default=str),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        results: list[Any] = json.loads(done.stdout)
        return results

    return run


def calls() -> list[list[Any]]:
    """The base, each adapter alone, and a batch in which each row has its own."""
    solo = [
        ["generate", {"prompt": TOKENS, "adapter": name, "maxNewTokens": COUNT}]
        for name in (None, "all", "few")
    ]
    mixed = {"prompts": PROMPTS, "adapters": ADAPTERS, "maxNewTokens": COUNT}
    return [*solo, ["generate", mixed]]


def answers(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The answers to all of `calls`, one after the other; their pieces are the texts."""
    found = []
    for call in result["value"]["answers"]:
        assert "value" in call, call
        rows = call["value"] if isinstance(call["value"], list) else [call["value"]]
        for number, row in enumerate(rows):
            assert call["pieces"].get(str(number), "") == row["text"]
        found += rows
    return found


def told_by_python(bundle: Path) -> list[dict[str, Any]]:
    """What TextGenerator answers to all of `calls`."""
    generator = TextGenerator(AdapterSession(bundle))
    solo = [(TOKENS, name) for name in (None, "all", "few")]
    made = [generator.generate([p], adapters=a, max_new_tokens=COUNT)[0] for p, a in solo]
    made += generator.generate(PROMPTS, adapters=ADAPTERS, max_new_tokens=COUNT)
    return [
        {
            "text": answer.text,
            "tokenIds": list(answer.token_ids),
            "finishReason": answer.finish_reason,
            "adapter": answer.adapter,
            "promptTokens": answer.prompt_tokens,
        }
        for answer in made
    ]


def check_effect(found: list[dict[str, Any]]) -> None:
    """The base and both adapters say different things, alone and in a batch."""
    assert len({tuple(answer["tokenIds"]) for answer in found[:3]}) == 3
    base, few = found[4], found[5]  # the same prompt
    assert base["tokenIds"] != few["tokenIds"]


def test_node_gives_pythons_tokens_in_every_form(
    node: Node, required: Required, client_adapters: dict[str, Path]
) -> None:
    # From PEFT's file too, whose factors the client casts and scales itself.
    again = {"prompt": TOKENS, "adapter": "again", "maxNewTokens": COUNT}
    job = {"add": {"again": client_adapters["all"]}, "calls": [*calls(), ["generate", again]]}
    results = node([{"bundle": required(form), **job} for form in FORMS])
    for form, result in zip(FORMS, results, strict=True):
        assert sorted(result["value"]["adapters"]) == ["again", "all", "few"]
        *theirs, from_peft = answers(result)
        ours = told_by_python(required(form))
        assert theirs == ours, form
        check_effect(theirs)
        assert from_peft["tokenIds"] == theirs[1]["tokenIds"]
        # The second adapter's own tokens end its texts, and its template makes its prompt.
        assert "stop" in {answer["finishReason"] for answer in ours if answer["adapter"] == "few"}
        assert ours[6]["promptTokens"] != ours[7]["promptTokens"]


def test_node_takes_the_tokens_that_a_rows_own_adapter_adds(
    node: Node, tiny_llama: Path, tmp_path: Path
) -> None:
    make(CASES["trained rows"], tiny_llama, tmp_path / "two")
    one = {"trainable_token_indices": {name: [BASE] for name in TABLES}}
    make(Case(BASE + 1, one, saved=False), tiny_llama, tmp_path / "one", words=WORDS[:1])
    given = {name: tmp_path / name for name in ("one", "two")}
    export(tiny_llama, tmp_path / "b", adapters=given, required_inputs=True)
    prompts = [f"The match {WORDS[0]} was", [5, BASE + 1, 7], "The match was"]
    rows: dict[str, Any] = {"prompts": prompts, "adapters": ["one", "two", None]}
    wrong = [([5, BASE], None, 511), ([5, BASE + 1], "one", 512), ([5, BASE + 2], "two", 513)]
    calls = [rows, *({"prompt": prompt, "adapter": name} for prompt, name, _ in wrong)]
    asked = [["generate", {**call, "maxNewTokens": COUNT}] for call in calls]
    (result,) = node([{"bundle": tmp_path / "b", "calls": asked}])
    good, *refused = result["value"]["answers"]
    generator = TextGenerator(AdapterSession(tmp_path / "b"))
    expected = generator.generate(prompts, rows["adapters"], max_new_tokens=COUNT)
    assert [row["tokenIds"] for row in good["value"]] == [list(row.token_ids) for row in expected]
    assert [row["text"] for row in good["value"]] == [row.text for row in expected]
    for (_, _, last), told in zip(wrong, refused, strict=True):
        assert f"the vocabulary ends at {last}" in told["message"]


# -- adapters from PEFT directories ------------------------------------------------------------


def peft_directory(
    place: Path, like: Path, *, store: str = "F32", change: Any = None, **config: Any
) -> Path:
    """A copy of the PEFT directory `like` with another config, or its factors as another dtype.

    `change`: a function that is given the arrays by key, to change them.
    """
    place.mkdir(parents=True)
    values = json.loads((like / "adapter_config.json").read_text()) | config
    (place / "adapter_config.json").write_text(json.dumps(values))
    arrays, metadata = read_arrays(like / "adapter_model.safetensors", error=AdapterError)
    if change is not None:
        metadata = change(arrays) or metadata
    weights = place / "adapter_model.safetensors"
    if store == "F32":
        write_arrays(weights, arrays, metadata)
    elif store == "F16":
        write_arrays(weights, {n: v.astype(np.float16) for n, v in arrays.items()}, metadata)
    else:  # numpy has no bfloat16: the upper half of a float32's bits
        halves = {n: (v.view(np.uint32) >> 16).astype(np.int16) for n, v in arrays.items()}
        write_arrays(weights, halves, metadata)
        header = weights.read_bytes()
        size = int.from_bytes(header[:8], "little")
        named = header[8 : 8 + size].replace(b'"I16"', b'"BF16"')
        weights.write_bytes(len(named).to_bytes(8, "little") + named + header[8 + size :])
    return place


def shrink_q(arrays: dict[str, Any]) -> None:
    """One module has rank 3 in place of 4."""
    for name in list(arrays):
        if "layers.0.self_attn.q_proj" in name:
            arrays[name] = arrays[name][:3] if "lora_A" in name else arrays[name][:, :3].copy()


@pytest.fixture(scope="session")
def peft_adapters(
    client_adapters: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """The first adapter in what other forms PEFT writes."""
    place, like = tmp_path_factory.mktemp("peft"), client_adapters["all"]
    pattern = {"layers.0.self_attn.q_proj": 3, "down_proj": 4}
    alphas = {"gate_proj": 3, "layers.1.mlp.up_proj": 20.5, r"^model\.layers\.0\.mlp\.up_proj": 1}
    return {
        "plain": like,
        "float16": peft_directory(place / "f16", like, store="F16"),
        "bfloat16": peft_directory(place / "bf16", like, store="BF16"),
        "rslora": peft_directory(place / "rslora", like, use_rslora=True),
        "patterns": peft_directory(
            place / "patterns", like, change=shrink_q, rank_pattern=pattern, alpha_pattern=alphas
        ),
        "another alpha": peft_directory(place / "other-alpha", like, lora_alpha=12),
    }


def test_node_reads_peft_directories_as_python_does(
    node: Node, required: Required, peft_adapters: dict[str, Path]
) -> None:
    bundle = required("slots")
    rows = [*peft_adapters, None]
    call = {"prompts": [TOKENS] * len(rows), "adapters": rows, "maxNewTokens": COUNT}
    places = {**peft_adapters, "rslora": peft_adapters["rslora"] / "adapter_model.safetensors"}
    (result,) = node([{"bundle": bundle, "add": places, "calls": [["generate", call]]}])
    session = AdapterSession(bundle)
    for name, place in peft_adapters.items():
        session.load(name, place)
    ours = TextGenerator(session).generate(
        [TOKENS] * len(rows), adapters=rows, max_new_tokens=COUNT
    )
    theirs = dict(zip(rows, answers(result), strict=True))
    assert [theirs[name]["tokenIds"] for name in rows] == [list(a.token_ids) for a in ours]
    # Scaling that is read wrongly is seen: each of these has another s somewhere.
    different = ("plain", "rslora", "patterns", "another alpha", None)
    assert len({tuple(theirs[name]["tokenIds"]) for name in different}) == len(different)


def uneven(arrays: dict[str, Any]) -> dict[str, str]:
    """A and B of the same products, of which float16 holds neither."""
    for key in arrays:
        arrays[key] = arrays[key] * np.float32(2.0**20 if "lora_A" in key else 2.0**-20)
    return {}


def test_node_keeps_factors_of_any_size_in_float16(
    node: Node, required: Required, client_adapters: dict[str, Path], tmp_path: Path
) -> None:
    place = peft_directory(tmp_path / "uneven", client_adapters["all"], change=uneven)
    rows = ["uneven", "all", None]
    call = {"prompts": [TOKENS] * 3, "adapters": rows, "maxNewTokens": COUNT}
    (result,) = node(
        [{"bundle": required("fp16"), "add": {"uneven": place}, "calls": [["generate", call]]}]
    )
    found = [answer["tokenIds"] for answer in answers(result)]
    assert found[0] == found[1] != found[2]


def other_base(arrays: dict[str, Any]) -> dict[str, str]:
    return {"loradeploy.base_digest": "sha256:" + "0" * 64}


def of_another_model(arrays: dict[str, Any]) -> None:
    for name in list(arrays):
        arrays[name.replace("self_attn", "attention")] = arrays.pop(name)


def wrong_sizes(arrays: dict[str, Any]) -> None:
    for name in arrays:
        if "q_proj.lora_A" in name:
            arrays[name] = arrays[name][:, :-1].copy()


def half_missing(arrays: dict[str, Any]) -> None:
    del arrays[next(name for name in arrays if "v_proj.lora_B" in name)]


def module_missing(arrays: dict[str, Any]) -> None:
    for name in [name for name in arrays if "layers.1.mlp.up_proj" in name]:
        del arrays[name]


def with_trained_tokens(arrays: dict[str, Any]) -> None:
    name = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
    arrays[name] = np.ones((1, 64), np.float32)


def not_finite(arrays: dict[str, Any]) -> None:
    next(iter(arrays.values()))[0, 0] = np.nan


# How an adapter is spoilt, and what the refusal says.
SPOILT: dict[str, tuple[dict[str, Any], str]] = {
    "another base": ({"change": other_base}, "trained on another base"),
    "another model": ({"change": of_another_model}, "is no target module of this bundle"),
    "wrong sizes": ({"change": wrong_sizes}, "q_proj.lora_A is [4,63]"),
    "half a module": ({"change": half_missing}, "lora_A and lora_B are needed"),
    "a module less": (
        {"change": module_missing, "target_modules": ["q_proj", "up_proj"]},
        "model.layers.1.mlp.up_proj is targeted and has no tensors",
    ),
    "no number": ({"change": not_finite}, "not finite"),
    "another rank": ({"r": 8}, "rank and base take [8,64]"),
    "DoRA": ({"use_dora": True}, "use_dora=true"),
    "an unknown field": ({"new_method": {"on": True}}, "new_method"),
    "adapted parameters": (
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        "target_parameters",
    ),
    "trained tokens": ({"trainable_token_indices": [3, 5]}, "trainable_token_indices=[3,5]"),
    "trained tokens of several embeddings": (
        {"trainable_token_indices": {"embed_tokens": [3]}},
        'trainable_token_indices={"embed_tokens":[3]}',
    ),
    "tokens that no field names": (
        {"change": with_trained_tokens},
        "trainable_tokens_delta is neither a factor nor a side input",
    ),
    "an expression": ({"alpha_pattern": {"(a+)+$": 2}}, "alpha_pattern has the expression"),
    "trained biases": ({"bias": "all"}, 'bias="all"'),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "no LoRA": ({"peft_type": "IA3"}, "only LORA"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
}


def test_node_refuses_adapters_by_name(
    node: Node, required: Required, client_adapters: dict[str, Path], tmp_path: Path
) -> None:
    bundle, like = required("slots"), client_adapters["all"]
    places: dict[str, Any] = {
        name: peft_directory(tmp_path / name, like, **how) for name, (how, _) in SPOILT.items()
    }
    said = {name: what for name, (_, what) in SPOILT.items()}

    def spoil(name: str, file: Path, content: bytes, what: str) -> None:
        if file.name == "adapter_model.safetensors":
            peft_directory(tmp_path / name, like)
            file = tmp_path / name / file.name
        file.write_bytes(content)
        places[name], said[name] = file, what

    weights = (like / "adapter_model.safetensors").read_bytes()
    native = (bundle / "adapters" / "all.onnx_adapter").read_bytes()
    in_directory, alone = Path("adapter_model.safetensors"), tmp_path / "x"
    alone.mkdir()
    spoil("a cut file", in_directory, weights[:-100], "no valid safetensors file")
    spoil("a cut header", in_directory, weights[:50], "no valid safetensors file")
    spoil("a long header", in_directory, b"\xff" * 16, "no valid safetensors file")
    spoil("more bytes", in_directory, weights + b"0000", "no valid safetensors file")
    spoil("a cut adapter", alone / "cut.onnx_adapter", native[:-4000], "truncated")
    spoil("no adapter", alone / "no.onnx_adapter", weights, "truncated or not an .onnx_adapter")
    spoil("a pickle", alone / "a.bin", b"", "is refused")
    of_texts = client_adapters["few"]
    places |= {"own texts": of_texts, "nothing": tmp_path / "nothing"}
    said |= {"own texts": "chat_template.jinja is not the base's", "nothing": "does not exist"}
    lost = [["generate", {"prompt": TOKENS, "adapter": "DoRA"}]]
    (result,) = node([{"bundle": bundle, "add": places, "calls": lost}])
    for name, what in said.items():
        told = result["value"]["added"][name]
        assert told.get("error") == "AdapterError", (name, told)
        assert what in told["message"], (name, told)
        assert "\n" not in told["message"]
    assert sorted(result["value"]["adapters"]) == ["all", "few"]  # what is refused is not there
    assert "no adapter is loaded as" in result["value"]["answers"][0]["message"]


def test_node_refuses_bundles_by_name(
    node: Node, required: Required, tiny_llama_bundle: Path, tmp_path: Path
) -> None:
    good = required("slots")

    def changed(name: str, **fields: Any) -> Path:
        place = tmp_path / name
        shutil.copytree(good, place)
        manifest = json.loads((place / "loradeploy.json").read_text()) | fields
        (place / "loradeploy.json").write_text(json.dumps(manifest))
        return place

    no_data = changed("data")
    (no_data / "required.safetensors").write_bytes(b"\x08")
    refused = {
        tiny_llama_bundle: "export it again with --required-inputs",
        changed("version", format_version=3): "format version 3, this client reads 2",
        changed("format", format="other"): "the field 'format'",
        changed("dtype", factor_dtype="bfloat16"): "factor_dtype is bfloat16",
        no_data: "no valid safetensors file",
        tmp_path / "none": "loradeploy.json does not exist",
    }
    for (bundle, what), told in zip(
        refused.items(), node([{"bundle": bundle} for bundle in refused]), strict=True
    ):
        assert told.get("error") == "BundleError", (bundle, told)
        assert what in told["message"], told
    (told,) = node([{"bundle": good, "backend": "cuda"}])
    assert told["error"] == "UsageError"


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"prompt": ""}, "prompt 1 is empty"),
    ({"prompt": TOKENS, "prompts": [TOKENS]}, "either prompt or prompts"),
    ({"prompts": [TOKENS], "adapters": ["all", None]}, "2 adapters for 1 prompts"),
    ({"prompt": [5, 512]}, "the token 512, the vocabulary ends at 511"),
    ({"prompt": [5, -1]}, "the token -1"),
    ({"prompt": [5] * 128}, "the model takes 127"),
    ({"prompt": TOKENS, "adapter": "other"}, 'no adapter is loaded as "other"'),
    ({"prompt": TOKENS, "max_new_tokens": 3}, "no option max_new_tokens"),
    ({"prompt": TOKENS, "maxNewTokens": 0}, "maxNewTokens is 0"),
    ({"prompt": TOKENS, "topK": 4}, "no effect at temperature 0"),
    ({"prompt": TOKENS, "temperature": -1}, "temperature is -1"),
]


def test_node_samples_by_seed_and_refuses_wrong_options(node: Node, required: Required) -> None:
    bundle = required("slots")
    warm = {"temperature": 2.0, "maxNewTokens": COUNT}
    sampled: list[dict[str, Any]] = [
        {"prompts": [TOKENS] * 2, "adapters": ["all", None], "seed": 1, **warm},
        {"prompt": TOKENS, "adapter": "all", "seed": 1, **warm},
        {"prompt": TOKENS, "adapter": "all", "seed": 2, **warm},
        {"prompt": TOKENS, "adapter": "all", "topK": 1, **warm},
        {"prompt": TOKENS, "adapter": "all", "topP": 1e-6, **warm},
        {"prompt": TOKENS, "adapter": "all", "maxNewTokens": COUNT},
    ]
    given = [*sampled, *(options for options, _ in WRONG)]
    (result,) = node([{"bundle": bundle, "calls": [["generate", options] for options in given]}])
    told = result["value"]["answers"]
    batch, alone, other, most, mass, greedy = (call["value"] for call in told[: len(sampled)])
    assert batch[0]["tokenIds"] == alone["tokenIds"] != other["tokenIds"]
    assert batch[0]["tokenIds"] != batch[1]["tokenIds"]
    assert most["tokenIds"] == mass["tokenIds"] == greedy["tokenIds"] != alone["tokenIds"]
    for (options, what), call in zip(WRONG, told[len(sampled) :], strict=True):
        assert call.get("error") in ("UsageError", "AdapterError"), (options, call)
        assert what in call["message"], call


def test_node_classifies_each_text_by_its_adapter(
    node: Node, tiny_bert_bundle: Path, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_bert, task="sequence-classification", seed=7, scale=0.3)
    bundle = tmp_path / "bundle"
    export(tiny_bert_bundle, bundle, adapters={"own": adapter}, required_inputs=True)
    texts = ["Shares rose", "Shares rose", "The striker scored twice"]
    names = ["own", "again", "own"]
    job = {
        "bundle": bundle,
        "add": {"again": adapter},
        "calls": [["classify", {"texts": texts, "adapters": names}]],
    }
    ((call,),) = [result["value"]["answers"] for result in node([job])]
    assert "value" in call, call
    session = AdapterSession(bundle)
    theirs = np.array([row["logits"] for row in call["value"]])
    for row, text in enumerate(texts):
        ids = np.array([session.texts.base.tokenizer.encode(text)])
        (logits,) = session.run(["logits"], feeds(session.manifest, ids), adapters="own")
        assert np.abs(theirs[row] - logits[0]).max() < tolerance("rows")
    assert np.abs(theirs[0] - theirs[2]).max() > 100 * tolerance("rows")


def test_node_blends_adapters_as_python_does(
    node: Node, required: Required, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    other = make_adapter(tiny_llama, r=2, seed=6, scale=0.3, target_modules=["q_proj"])
    rows: list[Any] = [{"all": 0.75, "again": -0.5}, None, {"all": 2}, "all", {"all": 1}]
    options = {"prompts": [TOKENS] * len(rows), "adapters": rows, "maxNewTokens": COUNT}
    wrong: dict[str, Any] = {
        'the weight of "all" is 1e+39': {"all": 1e39},
        "names no adapter": {},
        'no adapter is loaded as "none"': {"all": 1, "none": 1},
        "all and few read or write texts differently": {"all": 1, "few": 1},
        "give a name": ["all"],
    }
    calls = [["generate", {"prompt": TOKENS, "adapter": spec}] for spec in wrong.values()]
    for form in ("slots", "rows", "fp16"):
        bundle = required(form)
        job = {"bundle": bundle, "add": {"again": other}, "calls": [["generate", options], *calls]}
        (result,) = node([job])
        told = result["value"]["answers"]
        session = AdapterSession(bundle)
        session.load("again", other)
        ours = TextGenerator(session).generate(
            [TOKENS] * len(rows), adapters=rows, max_new_tokens=COUNT
        )
        found = [answer["tokenIds"] for answer in told[0]["value"]]
        assert found == [list(answer.token_ids) for answer in ours], form
        assert found[3] == found[4]  # a blend of one adapter with weight 1 is that adapter
        assert len({tuple(ids) for ids in found}) == 4
        assert told[0]["value"][0]["adapter"] == rows[0]
        for message, call in zip(wrong, told[1:], strict=True):
            assert message in call["message"], call


def test_node_embeds_each_text_by_its_adapter(
    node: Node, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {
        name: make_adapter(tiny_bert, task="feature-extraction", seed=seed, scale=0.3, r=seed)
        for name, seed in (("one", 2), ("two", 3))
    }
    bundle, weighted = tmp_path / "bundle", tmp_path / "weighted"
    export(tiny_bert, bundle, task="feature-extraction", adapters=adapters, required_inputs=True)
    with_sentence_files(tiny_bert, tmp_path / "model")
    export(tmp_path / "model", weighted, task="feature-extraction", required_inputs=True)
    texts = ["Shares rose", "The striker scored twice in the last minute", "A", "word " * 200]
    names: list[Any] = ["one", None, {"one": 0.5, "two": 0.5}, "two"]
    jobs = [
        {"bundle": bundle, "calls": [["embed", {"texts": texts, "adapters": names}]]},
        {
            "bundle": weighted,
            "add": {"one": adapters["one"]},
            "calls": [
                ["embed", {"texts": texts, "adapter": "one"}],
                ["embed", {"texts": texts, "adapter": "one", "promptName": "query"}],
                ["embed", {"text": "A", "promptName": "none"}],
            ],
        },
    ]
    jobs += [{"bundle": pooled_otherwise(weighted, tmp_path / str(n), own)} for n, own in OTHERWISE]
    results = node(jobs)
    for (number, own), told in zip(OTHERWISE, results[2:], strict=True):
        place = tmp_path / str(number)
        with pytest.raises(BundleError) as refused:
            RecipeReader(place).pooling("1_Pooling")
        for message in (str(refused.value), told["message"]):
            assert f"{place}" in message and "pooling_mode is" in message, own
    first, second = (result["value"]["answers"] for result in results[:2])
    session = AdapterSession(weighted)
    session.load("one", adapters["one"])
    expected = [
        TextEmbedder(AdapterSession(bundle))(texts, names),
        TextEmbedder(session)(texts, "one"),
        TextEmbedder(session)(texts, "one", prompt_name="query"),
    ]
    theirs = [[row["embedding"] for row in call["value"]] for call in (*first, *second[:2])]
    for found, own in zip(theirs, expected, strict=True):
        assert np.abs(np.array(found) - own).max() < tolerance("rows")
    base = TextEmbedder(AdapterSession(bundle))(texts)
    changed = np.abs(expected[0] - base).max(axis=1)
    assert changed[[0, 2, 3]].min() > 100 * tolerance("rows") and changed[1] < tolerance("rows")
    assert np.abs(expected[1] - expected[2]).max() > 100 * tolerance("rows")
    assert "no prompt is called" in second[2]["message"]


# Fields of a pooling that contradict each other, or name none.
OTHERWISE: list[tuple[int, dict[str, Any]]] = list(
    enumerate(
        [
            {"pooling_mode": "cls", "pooling_mode_mean_tokens": True},
            {"pooling_mode": ["cls", "max"], "pooling_mode_cls_token": True},
            {"pooling_mode": []},
        ]
    )
)


def pooled_otherwise(bundle: Path, place: Path, values: dict[str, Any]) -> Path:
    """A copy of the bundle, its graph a link, with another 1_Pooling/config.json."""
    shutil.copytree(bundle, place, copy_function=os.link)
    file = place / "1_Pooling" / "config.json"
    file.unlink()
    file.write_text(json.dumps(values), encoding="utf-8")
    return place


def with_sentence_files(model: Path, place: Path) -> None:
    """A copy of the model that pools in two ways, and has prompts that are not pooled."""
    shutil.copytree(model, place)
    kinds = [("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")]
    modules = [
        {"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for n, (path, kind) in enumerate(kinds)
    ]
    pooling = {"pooling_mode": ["weightedmean", "max", "cls"], "include_prompt": False}
    (place / "1_Pooling").mkdir()
    for name, values in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": 24, "do_lower_case": False}),
        ("config_sentence_transformers.json", {"prompts": {"query": "Search:"}}),
    ):
        (place / name).write_text(json.dumps(values), encoding="utf-8")


def test_node_classifies_tokens_by_each_adapters_labels(
    node: Node, tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = {
        name: make_adapter(
            tiny_bert,
            task="token-classification",
            seed=seed,
            scale=0.3,
            num_labels=3,
            target_modules=["query", "value"],
            modules_to_save=["classifier"],
        )
        for name, seed in (("one", 5), ("two", 6))
    }
    named = tmp_path / "named"
    shutil.copytree(adapters["one"], named)
    labels = {"id2label": {"0": "O", "1": "B-City", "2": "I-City"}}
    (named / "config.json").write_text(json.dumps(labels), encoding="utf-8")
    bundle = tmp_path / "bundle"
    export(
        tiny_bert,
        bundle,
        task="token-classification",
        adapters={"one": named, "two": adapters["two"]},
        required_inputs=True,
    )
    texts = ["Shares rose in London", "A", "The striker scored twice"]
    names = ["one", "two", "added"]
    job = {
        "bundle": bundle,
        "add": {"added": adapters["one"]},
        "calls": [
            ["classifyTokens", {"texts": texts, "adapters": names}],
            ["removeAdapter", ["one"]],
            ["addAdapter", ["one", adapters["two"]]],
            ["classifyTokens", {"text": texts[0], "adapter": "one"}],
            ["classifyTokens", {"text": texts[0], "adapter": "two"}],
        ],
    }
    ((call, *_, other, two),) = [result["value"]["answers"] for result in node([job])]
    assert "value" in call, call
    # Another adapter of the name has not the labels of the one that came with the bundle.
    assert other["value"]["labels"] is None and two["value"]["labels"] is not None
    assert [t["logits"] for t in other["value"]["tokens"]] == [
        t["logits"] for t in two["value"]["tokens"]
    ]
    session = AdapterSession(bundle)
    tokenizer = session.texts.base.tokenizer
    for row, (text, name) in enumerate(zip(texts, ("one", "two", "one"), strict=True)):
        found = call["value"][row]
        ids = np.array([tokenizer.encode(text)])
        (logits,) = session.run(["logits"], feeds(session.manifest, ids), adapters=name)
        own = [n for n, token in enumerate(ids[0]) if not tokenizer.is_special(int(token))]
        assert [token["id"] for token in found["tokens"]] == ids[0][own].tolist()
        theirs = np.array([token["logits"] for token in found["tokens"]])
        assert np.abs(theirs - logits[0][own]).max() < tolerance("rows")
    first, _, added = call["value"]
    assert first["labels"] == ["O", "B-City", "I-City"] and added["labels"] is None
    (expected,) = TokenClassifier(session)(texts[0], "one", aggregation="none")
    labeled = [t for t in first["tokens"] if t["label"] != "O"]
    assert [t["label"] for t in labeled] == [entity.label for entity in expected.entities]
    assert [t["token"] for t in labeled] == [entity.word for entity in expected.entities]
    assert np.allclose([t["score"] for t in labeled], [e.score for e in expected.entities])
    assert labeled and added["tokens"][0]["label"] is None


NAMES = """
import { readFileSync } from "node:fs";
const { nodeNames } = await import(process.argv[1]);
const names = (file) => {
  try {
    return nodeNames(readFileSync(file), ["And", "Or", "Xor"]);
  } catch (problem) {
    return problem.message;
  }
};
console.log(JSON.stringify(process.argv.slice(2).map(names)));
"""


def test_the_nodes_that_stay_off_the_gpu_are_found_by_operator(
    javascript: Path, required: Required, tmp_path: Path
) -> None:
    graph = required("branches") / "required.onnx"
    content = graph.read_bytes()
    (tmp_path / "cut.onnx").write_bytes(content[:-3])
    module = javascript / "clients" / "js" / "src" / "onnx.js"
    command = ["node", "--input-type=module", "-e", NAMES, module, graph, tmp_path / "cut.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found, cut = json.loads(done.stdout)
    assert sorted(found) == sorted(node_names(content, ("And", "Or", "Xor")))
    assert {name.split("/")[0] for name in found} == {"adapted", "base"}  # both branches
    assert "no ONNX model" in cut


TYPED = """
import { load, AdapterError, type Answer } from "loradeploy-client";
const onProgress = ({ loaded }: { loaded: number }) => console.log(loaded);
const model = await load(new URL("file:///bundle"), { backend: "node", onProgress });
const onToken = (text: string, row: number) => console.log(text, row);
const one: Answer = await model.generate({ prompt: "a", adapter: null, onToken });
const prompts = ["a", [1, 2], [{ role: "user", content: "b" }]];
const many: Answer[] = await model.generate({ prompts, adapters: ["x", null, null] });
// @ts-expect-error no such option
await model.generate({ prompt: "a", max_new_tokens: 3 });
const logits: Float32Array = (await model.classify({ text: "a" })).logits;
const { embedding } = await model.embed({ text: "a", adapter: { x: 0.5, y: 1 } });
const vector: Float32Array = embedding;
const label: string | null = (await model.classifyTokens({ texts: ["a"] }))[0].tokens[0].label;
export { one, many, logits, vector, label, AdapterError };
"""


def test_the_types_are_those_of_the_package(javascript: Path, tmp_path: Path) -> None:
    client = javascript / "clients" / "js"
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "loradeploy-client").symlink_to(client)
    (tmp_path / "use.mts").write_text(TYPED)
    command = [client / "node_modules" / ".bin" / "tsc", "--noEmit", "--strict", "--skipLibCheck"]
    command += ["--module", "nodenext", "--lib", "esnext,dom", "--target", "esnext", "use.mts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    # And what the package has at run time is what they declare.
    declared = {
        line.split()[2].split("(")[0].split("<")[0]
        for line in (client / "index.d.ts").read_text().splitlines()
        if line.startswith(("export function", "export class"))
    }
    program = "import(process.argv[1]).then((m) => console.log(Object.keys(m).join()))"
    done = subprocess.run(
        ["node", "-e", program, client / "index.js"], capture_output=True, text=True, check=True
    )
    assert set(done.stdout.strip().split(",")) == declared
