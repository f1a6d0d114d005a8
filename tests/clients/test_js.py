"""The Node client: Python's tokens for every adapter, and refusals of unsupported bundles."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from loradeploy.bundle.text.vectors.files import RecipeReader
from loradeploy.errors import BundleError
from loradeploy.export.api import export
from loradeploy.runtime.reading.wire import node_names
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.embedding import TextEmbedder
from loradeploy.runtime.tasks.generation import TextGenerator
from loradeploy.runtime.tasks.tokens import TokenClassifier
from tests.clients.conftest import FORMS, Node, Required
from tests.clients.generations import COUNT, TOKENS, answers, calls, check_effect, results_of_python
from tests.conftest import MakeAdapter
from tests.export.adapters.vocabularies import BASE, CASES, TABLES, WORDS, Case, make
from tests.runtime.feeds import feeds
from tests.tolerances import tolerance


def test_node_gives_pythons_tokens_in_every_form(
    node: Node, required: Required, client_adapters: dict[str, Path]
) -> None:
    # Also from PEFT's file, where the client casts and scales the factors itself.
    again = {"prompt": TOKENS, "adapter": "again", "maxNewTokens": COUNT}
    job = {"add": {"again": client_adapters["all"]}, "calls": [*calls(), ["generate", again]]}
    results = node([{"bundle": required(form), **job} for form in FORMS])
    for form, result in zip(FORMS, results, strict=True):
        assert sorted(result["value"]["adapters"]) == ["again", "all", "few"]
        *theirs, from_peft = answers(result)
        ours = results_of_python(required(form))
        assert theirs == ours, form
        check_effect(theirs)
        assert from_peft["tokenIds"] == theirs[1]["tokenIds"]
        # The second adapter has its own end tokens and chat template.
        assert "stop" in {answer["finishReason"] for answer in ours if answer["adapter"] == "few"}
        assert ours[6]["promptTokens"] != ours[7]["promptTokens"]


def test_node_supports_tokens_added_by_the_adapter_of_a_row(
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
    for (_, _, last), message in zip(wrong, refused, strict=True):
        assert f"the vocabulary ends at {last}" in message["message"]


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
        no_data: "not a valid safetensors file",
        tmp_path / "none": "loradeploy.json does not exist",
    }
    for (bundle, what), message in zip(
        refused.items(), node([{"bundle": bundle} for bundle in refused]), strict=True
    ):
        assert message.get("error") == "BundleError", (bundle, message)
        assert what in message["message"], message
    (message,) = node([{"bundle": good, "backend": "cuda"}])
    assert message["error"] == "UsageError"


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
    message = result["value"]["answers"]
    batch, alone, other, most, mass, greedy = (call["value"] for call in message[: len(sampled)])
    assert batch[0]["tokenIds"] == alone["tokenIds"] != other["tokenIds"]
    assert batch[0]["tokenIds"] != batch[1]["tokenIds"]
    assert most["tokenIds"] == mass["tokenIds"] == greedy["tokenIds"] != alone["tokenIds"]
    for (options, what), call in zip(WRONG, message[len(sampled) :], strict=True):
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


def test_node_blends_adapters_like_python(
    node: Node, required: Required, tiny_llama: Path, make_adapter: MakeAdapter
) -> None:
    other = make_adapter(tiny_llama, r=2, seed=6, scale=0.3, target_modules=["q_proj"])
    rows: list[Any] = [{"all": 0.75, "again": -0.5}, None, {"all": 2}, "all", {"all": 1}]
    options = {"prompts": [TOKENS] * len(rows), "adapters": rows, "maxNewTokens": COUNT}
    wrong: dict[str, Any] = {
        'the weight of "all" is 1e+39': {"all": 1e39},
        "names no adapter": {},
        'no adapter is loaded as "none"': {"all": 1, "none": 1},
        "all and few have different tokenizers, chat templates or settings": {"all": 1, "few": 1},
        "give a name": ["all"],
    }
    calls = [["generate", {"prompt": TOKENS, "adapter": spec}] for spec in wrong.values()]
    for form in ("slots", "rows", "fp16"):
        bundle = required(form)
        job = {"bundle": bundle, "add": {"again": other}, "calls": [["generate", options], *calls]}
        (result,) = node([job])
        reported = result["value"]["answers"]
        session = AdapterSession(bundle)
        session.load("again", other)
        ours = TextGenerator(session).generate(
            [TOKENS] * len(rows), adapters=rows, max_new_tokens=COUNT
        )
        found = [answer["tokenIds"] for answer in reported[0]["value"]]
        assert found == [list(answer.token_ids) for answer in ours], form
        assert found[3] == found[4]  # a blend of one adapter with weight 1 is that adapter
        assert len({tuple(ids) for ids in found}) == 4
        assert reported[0]["value"][0]["adapter"] == rows[0]
        for message, call in zip(wrong, reported[1:], strict=True):
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
    for (number, own), reported in zip(OTHERWISE, results[2:], strict=True):
        place = tmp_path / str(number)
        with pytest.raises(BundleError) as refused:
            RecipeReader(place).pooling("1_Pooling")
        for message in (str(refused.value), reported["message"]):
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


# Pooling configs that contradict themselves or have no mode.
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
    """Copy the bundle, with its graph as a link and another 1_Pooling/config.json."""
    shutil.copytree(bundle, place, copy_function=os.link)
    file = place / "1_Pooling" / "config.json"
    file.unlink()
    file.write_text(json.dumps(values), encoding="utf-8")
    return place


def with_sentence_files(model: Path, place: Path) -> None:
    """Copy the model with three pooling modes, truncated vectors, and prompts not pooled."""
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
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "Search:"}, "truncate_dim": 100},
        ),
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
    # Another adapter of the name does not have the labels of the bundle's adapter.
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


def test_the_nodes_placed_on_the_cpu_are_found_by_operator(
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
    assert "not an ONNX model" in cut


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


def test_the_type_declarations_match_the_package(javascript: Path, tmp_path: Path) -> None:
    client = javascript / "clients" / "js"
    (tmp_path / "node_modules").mkdir()
    (tmp_path / "node_modules" / "loradeploy-client").symlink_to(client)
    (tmp_path / "use.mts").write_text(TYPED)
    command = [client / "node_modules" / ".bin" / "tsc", "--noEmit", "--strict", "--skipLibCheck"]
    command += ["--module", "nodenext", "--lib", "esnext,dom", "--target", "esnext", "use.mts"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    # The exports at run time equal the declared ones.
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
