"""Labels and vectors: equal to those of transformers, and independent of the batch."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.adapter.heads import config_labels
from loradeploy.bundle.manifest import read_manifest
from loradeploy.conversion import convert
from loradeploy.errors import (
    AdapterError,
    AdapterMismatchError,
    BundleError,
    RunError,
    UsageError,
)
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.classification import TextClassifier
from loradeploy.runtime.tasks.embedding import TextEmbedder
from tests.cli.calling import call
from tests.conftest import MakeAdapter
from tests.inputs.edits import edited_json
from tests.tolerances import tolerance

TEXTS = ["Shares fell.", "The match was won in the last minute of extra time", "A"]


@pytest.fixture
def classifier(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> TextClassifier:
    """A classifier with an adapter `large` that names its labels and `small` that does not."""
    named = dataclasses.replace(load_adapter(bert_adapters["large"]), labels=("sport", "business"))
    save_adapter(named, tmp_path / "large")
    session = AdapterSession(tiny_bert_bundle)
    session.load("small", bert_adapters["small"])
    session.load("large", tmp_path / "large")
    return TextClassifier(session)


def test_scores_are_those_of_peft(
    classifier: TextClassifier, tiny_bert: Path, bert_adapters: dict[str, Path]
) -> None:
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(tiny_bert)
    model = peft.PeftModel.from_pretrained(base, bert_adapters["small"]).eval()
    for text, result in zip(TEXTS, classifier(TEXTS, "small"), strict=True):
        ids = torch.tensor([classifier.tokenizer.encode(text)])
        with torch.no_grad():
            expected = torch.softmax(model(input_ids=ids).logits, -1)[0].numpy()
        scores = np.array(list(result.scores.values()))
        assert np.abs(scores - expected).max() <= tolerance("torch-onnx-tiny")
        assert result.score == scores.max()
        assert result.label == list(result.scores)[int(scores.argmax())]


def test_the_score_of_a_text_does_not_depend_on_the_batch(classifier: TextClassifier) -> None:
    adapters = ["small", "large", "large"]
    together = classifier(TEXTS, adapters)
    for batch_size in (1, 2):
        for ours, theirs in zip(
            classifier(TEXTS, adapters, batch_size=batch_size), together, strict=True
        ):
            assert ours.label == theirs.label
            assert abs(ours.score - theirs.score) <= tolerance("rows")
    (alone,) = classifier(TEXTS[2], "large")
    assert abs(alone.score - together[2].score) <= tolerance("rows")


def test_labels_are_those_of_the_adapter_or_else_of_the_bundle(classifier: TextClassifier) -> None:
    small, large = classifier([TEXTS[0]] * 2, ["small", "large"])
    assert list(large.scores) == ["sport", "business"]
    assert list(small.scores) == ["LABEL_0", "LABEL_1"]
    assert (small.adapter, large.adapter) == ("small", "large")


@pytest.mark.parametrize("adapters", [None, ["small", None, "large"]])
def test_a_base_whose_checkpoint_has_no_head_classifies_nothing(
    classifier: TextClassifier, adapters: Any
) -> None:
    # Its outputs are zeros, which would be the first label for every text.
    with pytest.raises(UsageError, match="the base has no trained head.*give an adapter"):
        classifier(TEXTS, adapters)


def test_a_long_text_is_truncated_and_not_refused(classifier: TextClassifier) -> None:
    (result,) = classifier(["word " * 500], "small")
    assert 0 < result.score <= 1


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "no texts"),
        (["a"], {"adapters": ["small", "small"]}, "2 adapters for a batch of 1 rows"),
        (["a"], {"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_invalid_texts_and_options_are_refused(
    classifier: TextClassifier, texts: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        classifier(texts, **options)


def test_a_decoder_is_refused_as_a_classifier(llama_session: AdapterSession) -> None:
    with pytest.raises(UsageError, match="no classifier"):
        TextClassifier(llama_session)
    with pytest.raises(UsageError, match="no embeddings"):
        TextEmbedder(llama_session)


# -- problem types -----------------------------------------------------------------------------

LABELS = ("business", "sport", "tech", "world", "health")
# By adapter: its declared problem type, where it is declared, its outputs, the resulting type.
DECLARED: dict[str, tuple[str | None, str | None, int, str]] = {
    "several": ("multi_label_classification", "weights", 4, "multi_label_classification"),
    "number": ("regression", "weights", 1, "regression"),
    "numbers": ("regression", "weights", 2, "regression"),
    "saved": ("multi_label_classification", "config", 3, "multi_label_classification"),
    "older": ("multi_label_classification", "train.yaml", 3, "multi_label_classification"),
    "silent": (None, None, 5, "single_label_classification"),
    "one": (None, None, 1, "regression"),
}


@pytest.fixture(scope="module")
def declared(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """PEFT adapters with heads of all problem types, which their files declare or not."""
    place = tmp_path_factory.mktemp("declared")
    task = "sequence-classification"
    for seed, (name, (problem, where, count, _)) in enumerate(DECLARED.items()):
        made = make_adapter(tiny_bert, task=task, num_labels=count, seed=seed, scale=0.1)
        shutil.copytree(made, place / name)
        if where == "weights":
            adapter = dataclasses.replace(load_adapter(made), problem_type=problem)
            labels = LABELS[:count] if count > 2 else None
            save_adapter(dataclasses.replace(adapter, labels=labels), place / name)
        elif where == "config":
            names = {str(index): name for index, name in enumerate(LABELS[:count])}
            values = {"problem_type": problem, "id2label": names}
            (place / name / "config.json").write_text(json.dumps(values))
        elif where == "train.yaml":
            (place / name / "train.yaml").write_text("rank: 4\nproblem_type: multi-label\n")
    return {name: place / name for name in DECLARED}


@pytest.fixture(scope="module")
def typed_bundle(
    tiny_bert: Path, declared: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with all of them except `number` and `one`, which are loaded from elsewhere."""
    bundle = tmp_path_factory.mktemp("typed") / "bundle"
    inside = {name: path for name, path in declared.items() if name not in ("number", "one")}
    export(tiny_bert, bundle, adapters=inside, task="sequence-classification")
    return bundle


def pipeline_scores(model: Path, adapter: Path, text: str, problem: str | None) -> NDArray[Any]:
    """Return the scores of transformers' pipeline with PEFT's model, in output order."""
    import peft
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    count = next(v.shape[0] for n, v in load_adapter(adapter).saved.items() if "weight" in n)
    base = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=count, problem_type=problem
    )
    merged = peft.PeftModel.from_pretrained(base, adapter).merge_and_unload().eval()
    pipe = pipeline(
        "text-classification", model=merged, tokenizer=AutoTokenizer.from_pretrained(model)
    )
    given = {entry["label"]: entry["score"] for entry in pipe(text, top_k=None)}
    return np.array([given[f"LABEL_{number}"] for number in range(count)])


def test_each_row_has_the_problem_type_of_its_adapter_as_in_transformers(
    typed_bundle: Path, tiny_bert: Path, declared: dict[str, Path]
) -> None:
    session = AdapterSession(typed_bundle)
    for name in ("number", "one"):
        session.load(name, declared[name])
    names = list(DECLARED)
    results = TextClassifier(session)([TEXTS[1]] * len(names), names, batch_size=5)
    for name, result in zip(names, results, strict=True):
        _, _, count, problem = DECLARED[name]
        assert (result.problem_type, len(result.scores)) == (problem, count), name
        expected = pipeline_scores(tiny_bert, declared[name], TEXTS[1], problem)
        scores = np.array(list(result.scores.values()))
        assert np.abs(scores - expected).max() <= tolerance("torch-onnx-tiny"), name
        assert result.score == scores.max()
        if problem == "multi_label_classification":
            likeliest = sorted(result.scores, key=lambda label: -result.scores[label])
            having = [label for label in likeliest if result.scores[label] >= 0.5]
            assert result.labels == tuple(having)
            assert not 0.99 < scores.sum() < 1.01, "they are no distribution"
    answers = dict(zip(names, results, strict=True))
    assert list(answers["several"].scores) == list(LABELS[:4])
    assert list(answers["saved"].scores) == list(LABELS[:3]), "as config.json beside it names them"
    assert answers["number"].labels == answers["one"].labels == ()
    assert answers["silent"].labels == (answers["silent"].label,)
    # The result of another adapter would be detected.
    assert abs(answers["number"].score - answers["one"].score) > 1e-2


def test_the_manifest_has_the_problem_type_of_each_head(typed_bundle: Path) -> None:
    manifest = read_manifest(typed_bundle)
    assert manifest.problem_type == "single_label_classification"
    for name, entry in manifest.adapters.items():
        assert entry.problem_type == DECLARED[name][3]
    assert manifest.adapters["saved"].labels == LABELS[:3]


def test_an_adapter_without_a_problem_type_in_the_manifest_has_that_of_its_files(
    typed_bundle: Path, tmp_path: Path
) -> None:
    expected = TextClassifier(AdapterSession(typed_bundle))(TEXTS[:2], ["several", "numbers"])
    bundle = tmp_path / "bundle"
    shutil.copytree(typed_bundle, bundle)
    with edited_json(bundle / "loradeploy.json") as values:
        for entry in values["adapters"].values():
            entry["problem_type"] = None
    results = TextClassifier(AdapterSession(bundle))(TEXTS[:2], ["several", "numbers"])
    assert results == expected
    assert results[0].problem_type != results[1].problem_type


@pytest.mark.parametrize("name", ["several", "number", "saved"])
def test_a_merged_bundle_classifies_like_its_adapter(
    name: str, typed_bundle: Path, declared: dict[str, Path], tmp_path: Path
) -> None:
    export(typed_bundle, tmp_path / "b", adapters={name: declared[name]}, merge=True)
    side = AdapterSession(typed_bundle)
    side.load("given", declared[name])
    (expected,) = TextClassifier(side)(TEXTS[1], "given")
    (result,) = TextClassifier(AdapterSession(tmp_path / "b"))(TEXTS[1])
    assert (result.problem_type, result.labels) == (expected.problem_type, expected.labels)
    assert result.scores == pytest.approx(expected.scores, abs=tolerance("torch-onnx-tiny"))
    config = json.loads((tmp_path / "b" / "config.json").read_text())
    assert config["problem_type"] == DECLARED[name][3], "transformers reads it too"


def test_a_text_has_all_labels_that_reach_the_threshold(typed_bundle: Path) -> None:
    classify = TextClassifier(AdapterSession(typed_bundle))
    (every,) = classify(TEXTS[0], "several", threshold=0.0)
    assert set(every.labels) == set(LABELS[:4])
    second = every.scores[every.labels[1]]
    (two,) = classify(TEXTS[0], "several", threshold=second)
    assert two.labels == every.labels[:2]
    assert classify(TEXTS[0], "several", threshold=1.0)[0].labels == ()
    with pytest.raises(UsageError, match="`threshold` is for multi_label_classification, and"):
        classify(TEXTS[0], "silent", threshold=0.3)
    with pytest.raises(UsageError, match="`threshold` is 1.5: give a probability"):
        classify(TEXTS[0], "several", threshold=1.5)
    for given in ("0.5", True, float("nan"), np.complex64(0.5)):
        with pytest.raises(UsageError, match=r"`threshold` is .*: give a probability"):
            classify(TEXTS[0], "several", threshold=given)  # type: ignore[arg-type]


def test_the_command_prints_labels_and_numbers(
    typed_bundle: Path, declared: dict[str, Path]
) -> None:
    classify = TextClassifier(AdapterSession(typed_bundle))
    several, numbers = classify([TEXTS[1]] * 2, ["several", "numbers"])
    message = call("run", typed_bundle, TEXTS[1], "--adapter", "several", "--threshold", "0")
    first = max(several.scores, key=lambda label: several.scores[label])
    assert message.split("\t")[:2] == [first, f"{several.scores[first]:.4f}"]
    assert len(message.split("\t")) == 8
    none = call("run", typed_bundle, TEXTS[1], "--adapter", "several", "--threshold", "1")
    assert none == "(no label)\n"
    message = call("run", typed_bundle, TEXTS[1], "--adapter", "numbers")
    assert message == "\t".join(f"{v:.6g}" for v in numbers.scores.values()) + "\n"
    values = json.loads(call("run", typed_bundle, TEXTS[1], "--adapter", "numbers", "--json"))
    assert values["scores"] == pytest.approx(numbers.scores)
    assert (values["problem_type"], values["labels"]) == ("regression", [])


def test_the_problem_type_of_a_head_is_never_guessed(
    typed_bundle: Path, declared: dict[str, Path], tmp_path: Path
) -> None:
    older = shutil.copytree(typed_bundle, tmp_path / "older")
    with edited_json(older / "loradeploy.json") as manifest:
        del manifest["problem_type"]
    with pytest.raises(BundleError, match="export again"):
        TextClassifier(AdapterSession(older))
    session = AdapterSession(typed_bundle)
    session.load("native", typed_bundle / "adapters" / "several.onnx_adapter")
    with pytest.raises(UsageError, match="'native' was loaded from a file that does not declare"):
        TextClassifier(session)(TEXTS[0], "native")


# -- several names of equal weights ------------------------------------------------------------


def labeled(place: Path, source: Path, **changes: Any) -> Path:
    """Copy the adapter to `place` with other declared labels and the same tensors."""
    save_adapter(dataclasses.replace(load_adapter(source), **changes), place)
    return place


def test_each_name_has_the_labels_of_its_own_files(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    source = bert_adapters["large"]
    news = labeled(tmp_path / "news", source, labels=("sport", "business"))
    mood = labeled(tmp_path / "mood", source, labels=("good", "bad"))
    session = AdapterSession(tiny_bert_bundle)
    session.load("news", news)
    before = session.statistics.host_bytes
    session.load("mood", mood)
    session.register("silent", source)
    classify = TextClassifier(session)
    rows = classify([TEXTS[1]] * 3, ["mood", "news", "silent"])
    named = [["good", "bad"], ["sport", "business"], ["LABEL_0", "LABEL_1"]]
    assert [list(row.scores) for row in rows] == named
    assert [row.score for row in rows] == [rows[0].score] * 3
    assert session.statistics.host_bytes == before, "their numbers are in memory once"

    right = labeled(tmp_path / "right", source, labels=("finance", "sport"))
    with pytest.raises(UsageError, match="another adapter is loaded as 'news'"):
        session.load("news", right)
    session.load("news", right, replace=True)
    assert list(classify(TEXTS[1], "news")[0].scores) == ["finance", "sport"]
    assert list(classify(TEXTS[1], "mood")[0].scores) == ["good", "bad"]
    session.unload("mood")
    assert list(classify(TEXTS[1], "news")[0].scores) == ["finance", "sport"]


def test_an_adapter_of_the_bundle_keeps_its_labels_beside_one_with_equal_weights(
    typed_bundle: Path, declared: dict[str, Path], tmp_path: Path
) -> None:
    session = AdapterSession(typed_bundle)
    session.load("given", labeled(tmp_path / "a", declared["several"], labels=tuple("abcd")))
    given, own = TextClassifier(session)([TEXTS[1]] * 2, ["given", "several"])
    assert list(given.scores) == list("abcd")
    assert list(own.scores) == list(LABELS[:4])


def test_edited_labels_of_an_adapter_in_the_bundle_are_refused(
    typed_bundle: Path, tmp_path: Path
) -> None:
    shutil.copytree(typed_bundle, tmp_path / "bundle")
    place = tmp_path / "bundle/adapters/several"
    digest = load_adapter(place).digest
    labeled(place, place, labels=tuple("abcd"))
    assert load_adapter(place).digest == digest, "names of labels are not in the digest"
    with pytest.raises(BundleError, match=r"other labels \(a, b, c and 1 more\) than"):
        AdapterSession(tmp_path / "bundle").load("several")


def test_labels_that_changed_on_disk_are_refused_and_not_mixed(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    place = labeled(tmp_path / "it", bert_adapters["large"], labels=("sport", "business"))
    session = AdapterSession(tiny_bert_bundle, host_budget=100_000)
    session.register("it", place)
    session.register("other", bert_adapters["small"])
    classify = TextClassifier(session)
    assert list(classify(TEXTS[1], "it")[0].scores) == ["sport", "business"]
    labeled(place, place, labels=("good", "bad"))
    classify(TEXTS[1], "other")
    assert session.statistics.evictions
    with pytest.raises(AdapterError, match="'it' has changed on disk"):
        classify(TEXTS[1], "it")


def test_a_conversion_to_onnx_adapter_and_back_loses_no_label_silently(
    typed_bundle: Path, declared: dict[str, Path], tiny_bert: Path, tmp_path: Path
) -> None:
    source, native, back = declared["several"], tmp_path / "a.onnx_adapter", tmp_path / "back"
    convert(source, native, bundle=typed_bundle)
    convert(native, back, bundle=typed_bundle)
    assert load_adapter(back).saved["classifier.bias"].shape == (4,), "what was padded is gone"
    session = AdapterSession(typed_bundle)
    session.load("back", back)
    with pytest.raises(UsageError, match="'back' was loaded from a file that does not declare"):
        TextClassifier(session)(TEXTS[1], "back")
    with pytest.raises(AdapterError, match="it: its files do not declare what the outputs"):
        export(tiny_bert, tmp_path / "b", adapters={"it": back}, task="sequence-classification")

    config = {"problem_type": DECLARED["several"][0], "id2label": dict(enumerate(LABELS[:4]))}
    (back / "config.json").write_text(json.dumps(config))
    session.load("back", back, replace=True)
    again, before = TextClassifier(session)([TEXTS[1]] * 2, ["back", "several"])
    assert (again.problem_type, again.labels) == (before.problem_type, before.labels)
    assert again.scores == pytest.approx(before.scores, abs=1e-6)


@pytest.mark.parametrize(
    ("numbers", "expected"),
    [
        ((0, 1, 2), ("a", "b", "c")),
        ((2, 1, 0), ("c", "b", "a")),
        ((0, 2, 5), ("a", "LABEL_1", "b")),
        ((1, 2, 3), ("LABEL_0", "a", "b")),
        ((-1, 0, 1), "are not the numbers of outputs"),
        ((0, 1, 10**9), "are not the numbers of outputs"),
        ((0, 1, "two"), "are not numbers"),
    ],
)
def test_an_output_has_the_label_of_its_index(
    numbers: tuple[Any, ...], expected: tuple[str, ...] | str, tmp_path: Path
) -> None:
    """As in transformers, which fails if an index is missing."""
    config = {"id2label": {str(n): name for n, name in zip(numbers, "abc", strict=True)}}
    if isinstance(expected, str):
        with pytest.raises(BundleError, match=expected):
            config_labels(config, "it", error=BundleError, outputs=3)
        return
    assert config_labels(config, "it", error=BundleError, outputs=3) == expected


@pytest.fixture
def base_of_three(tiny_bert: Path, tmp_path: Path) -> Path:
    """The tiny BERT with a head of its own, of three labels."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(tiny_bert, num_labels=3)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def test_a_classifier_uses_the_labels_by_index(base_of_three: Path, tmp_path: Path) -> None:
    file = base_of_three / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"id2label": {"0": "a", "2": "b", "5": "c"}}))
    export(base_of_three, tmp_path / "bundle")
    (answer,) = TextClassifier(AdapterSession(tmp_path / "bundle"))(TEXTS[0])
    assert [*answer.scores] == ["a", "LABEL_1", "b"]


def test_scores_that_are_not_finite_are_refused(
    tiny_bert_bundle: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = load_adapter(bert_adapters["small"])
    wide = {
        module: dataclasses.replace(
            pair, A=np.full_like(pair.A, 1e17), B=np.full_like(pair.B, 1e17)
        )
        for module, pair in adapter.factors.items()
    }
    session = AdapterSession(tiny_bert_bundle)
    session.load("small", bert_adapters["small"])
    session.load("wide", labeled(tmp_path / "wide", bert_adapters["small"], factors=wide))
    with pytest.raises(RunError, match="text 2: the graph gave numbers that are not finite"):
        TextClassifier(session)(TEXTS[:2], ["small", "wide"])


def test_a_base_with_its_own_head_keeps_it_beside_smaller_ones(
    tiny_bert: Path,
    declared: dict[str, Path],
    bert_adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

    torch.manual_seed(3)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_bert,
        num_labels=4,
        id2label=dict(enumerate("abcd")),
        problem_type="multi_label_classification",
    )
    model.classifier.weight.data.normal_()
    model.save_pretrained(tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokenizer.save_pretrained(tmp_path / "base")
    export(tmp_path / "base", tmp_path / "b", adapters={"it": declared["number"]})
    classify = TextClassifier(AdapterSession(tmp_path / "b"))
    base, own = classify([TEXTS[1]] * 2, [None, "it"])
    pipe = pipeline("text-classification", model=model.eval(), tokenizer=tokenizer)
    expected = {entry["label"]: entry["score"] for entry in pipe(TEXTS[1], top_k=None)}
    assert base.scores == pytest.approx(expected, abs=tolerance("torch-onnx-tiny"))
    assert base.problem_type == "multi_label_classification"
    assert (own.problem_type, len(own.scores)) == ("regression", 1)
    (number,) = pipeline_scores(tiny_bert, declared["number"], TEXTS[1], "regression")
    assert abs(own.score - number) <= tolerance("torch-onnx-tiny")

    # A blend uses the base's head with the problem type of all its members, or is refused.
    for name, problem in (("a", "regression"), ("b", "regression"), ("c", None)):
        changed = labeled(tmp_path / name, bert_adapters["headless"], problem_type=problem)
        classify.session.load(name, changed)
    blend, member, other = classify([TEXTS[1]] * 3, [{"a": 0.75, "b": 0.25}, "a", "c"])
    assert (blend.problem_type, other.problem_type) == ("regression", base.problem_type)
    assert blend.scores == pytest.approx(member.scores, abs=1e-5)
    with pytest.raises(UsageError, match="'a' and 'c' declare different labels or problem types"):
        classify(TEXTS[1], {"a": 0.5, "c": 0.5})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a", "b")}, "names 2 labels, and its head has 4 outputs"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking', not one of single_label"),
    ],
)
def test_an_adapter_that_contradicts_itself_is_refused(
    changes: dict[str, Any], message: str, declared: dict[str, Path], tmp_path: Path
) -> None:
    save_adapter(dataclasses.replace(load_adapter(declared["several"]), **changes), tmp_path)
    with pytest.raises(AdapterError, match=message):
        load_adapter(tmp_path)


def test_bad_texts_are_refused_by_number(typed_bundle: Path) -> None:
    classify = TextClassifier(AdapterSession(typed_bundle))
    with pytest.raises(UsageError, match=r"text 2 \(''\) has no tokens"):
        classify(["a", ""], "silent")
    with pytest.raises(UsageError, match="text 1 is .*: give a str"):
        classify([("a", "b", "c")], "silent")  # type: ignore[list-item]


def test_vectors_are_masked_means_of_length_one(
    tiny_bert: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    import peft
    import torch
    from transformers import AutoModel

    from loradeploy.export.api import export

    export(tiny_bert, tmp_path / "bundle", task="feature-extraction")
    session = AdapterSession(tmp_path / "bundle")
    session.load("small", bert_adapters["headless"])
    embed = TextEmbedder(session)
    vectors = embed(TEXTS, ["small", None, "small"])
    assert vectors.shape == (3, 48) and vectors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    model = peft.PeftModel.from_pretrained(
        AutoModel.from_pretrained(tiny_bert), bert_adapters["headless"]
    ).eval()
    ids = torch.tensor([embed.tokenizer.encode(TEXTS[0])])
    with torch.no_grad():
        mean = model(input_ids=ids).last_hidden_state[0].mean(0)
    expected = (mean / mean.norm()).numpy()
    assert np.abs(vectors[0] - expected).max() <= tolerance("torch-onnx-tiny")
    assert np.abs(vectors[0] - embed(TEXTS[0])[0]).max() > 1e-3


def test_adapters_with_different_numbers_of_labels_share_a_batch(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    task = "sequence-classification"
    adapters = {
        f"n{count}": make_adapter(tiny_bert, task=task, num_labels=count, seed=count, scale=0.1)
        for count in (2, 5, 3)
    }
    bundle = tmp_path / "bundle"
    manifest = export(tiny_bert, bundle, adapters=adapters, task=task)
    assert {s.shape[0] for s in manifest.saved if s.parameter.startswith("classifier")} == {5}
    classify = TextClassifier(AdapterSession(bundle))
    texts = ["Shares rose", "The striker", "A new phone"]
    for result, count in zip(classify(texts, ["n2", "n5", "n3"]), (2, 5, 3), strict=True):
        assert len(result.scores) == count
        assert sum(result.scores.values()) == pytest.approx(1)
        (alone,) = classify([texts[(2, 5, 3).index(count)]], f"n{count}")
        assert result.label == alone.label
        assert result.score == pytest.approx(alone.score, abs=1e-5)
    report = ld.parity(bundle, model=tiny_bert, prompts=texts)
    assert report.passed
    # The offset that hides labels that an adapter lacks does not count as its effect.
    assert all(0.1 < facts.effect < 100 for facts in report.adapters)
    later = make_adapter(tiny_bert, task=task, num_labels=4, seed=9)
    classify.session.load("later", later)
    assert len(classify([texts[0]], "later")[0].scores) == 4
    many = make_adapter(tiny_bert, task=task, num_labels=6, seed=9)
    with pytest.raises(AdapterMismatchError, match=r"classifier\.\w+ is \[6"):
        classify.session.load("many", many)


def test_labels_of_another_number_than_the_outputs_are_refused_everywhere(
    base_of_three: Path, bert_adapters: dict[str, Path], tmp_path: Path
) -> None:
    """The adapter has no head, so its labels can only be those of the base's three outputs."""
    source = load_adapter(bert_adapters["large"])
    headless = dataclasses.replace(
        source, saved={}, config=dataclasses.replace(source.config, modules_to_save=())
    )
    for name, labels in (("two", ("a", "b")), ("three", ("a", "b", "c"))):
        save_adapter(dataclasses.replace(headless, labels=labels), tmp_path / name)
    bundle = tmp_path / "bundle"
    export(base_of_three, bundle, adapters=[tmp_path / "three"])
    session = AdapterSession(bundle)
    assert list(TextClassifier(session)(TEXTS[0], "three")[0].scores) == ["a", "b", "c"]
    message = r"it names 2 labels \(a, b\), and the graph has 3 outputs: correct the labels"
    with pytest.raises(AdapterMismatchError, match=message):
        session.load("two", tmp_path / "two")
    for options in ({}, {"merge": True}):
        with pytest.raises(AdapterMismatchError, match=message):
            export(base_of_three, tmp_path / "b", adapters=[tmp_path / "two"], **options)
    with pytest.raises(AdapterMismatchError, match=f"two: {message}"):
        ld.parity(bundle, model=base_of_three, adapters=[tmp_path / "two"])


def test_a_head_of_another_size_is_refused_by_its_shape_not_by_its_labels(
    tiny_bert: Path, bert_adapters: dict[str, Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    export(tiny_bert, tmp_path / "bundle", adapters=[bert_adapters["large"]])
    more = load_adapter(make_adapter(tiny_bert, task="sequence-classification", num_labels=4))
    save_adapter(dataclasses.replace(more, labels=("a", "b", "c", "d")), tmp_path / "more")
    for merge in (False, True):
        with pytest.raises(AdapterMismatchError, match=r"classifier\.\w+ is \[4"):
            export(tmp_path / "bundle", tmp_path / "b", adapters=[tmp_path / "more"], merge=merge)
