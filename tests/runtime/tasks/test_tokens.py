"""Token classification: each row has the entities of transformers' pipeline with its adapter."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import loradeploy as ld
from loradeploy.adapter.files.peft import load_adapter, save_adapter
from loradeploy.bundle.manifest import read_manifest
from loradeploy.conversion import convert
from loradeploy.errors import RunError, UsageError
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.entities import Entity, without_overlaps
from loradeploy.runtime.tasks.tokens import TokenClassifier
from tests.cli.calling import call
from tests.conftest import MakeAdapter
from tests.tolerances import tolerance

TASK = "token-classification"
LABELS = {
    "bytes": ("B-LOC", "B-PER", "I-LOC", "I-PER", "O"),
    "pieces": ("B-ORG", "I-ORG", "O"),
    "plain": ("O", "person", "place"),
}
TEXTS = [
    "Marie Curie was born in Warsaw, unbelievably early.",
    "Shares of Zürich Re fell: Anna-Lena Müller (CEO) of St. Gallen resigned!",
    "O",
]
LONG = " ".join(TEXTS[:2] * 6)
ADAPTERS = [*LABELS]


def word_pieces(place: Path) -> None:
    """Write a WordPiece tokenizer with special tokens around a text to the adapter directory."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words += ["marie", "warsaw", "shares", "of", "in", "was", "fell", "un", "##believ", "##ably"]
    letters = "abcdefghijklmnopqrstuvwxyz.,:!()-"
    words += [*letters, *(f"##{letter}" for letter in letters[:26])]
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    tokenizer.decoder = decoders.WordPiece()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "cls_token": "[CLS]"}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, sep_token="[SEP]", model_max_length=128, **special
    ).save_pretrained(place)


@pytest.fixture(scope="module")
def taggers(
    tiny_bert: Path, make_adapter: MakeAdapter, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Adapters with their own label sets; `pieces` has its own tokenizer too."""
    place = tmp_path_factory.mktemp("taggers")
    for seed, (name, labels) in enumerate(LABELS.items()):
        # PEFT's all-linear would include the head.
        targets = ["query", "value", "dense"]
        made = make_adapter(
            tiny_bert,
            task=TASK,
            num_labels=len(labels),
            seed=seed,
            scale=0.1,
            target_modules=targets,
        )
        shutil.copytree(made, place / name)
        save_adapter(dataclasses.replace(load_adapter(made), labels=labels), place / name)
    word_pieces(place / "pieces")
    return {name: place / name for name in LABELS}


@pytest.fixture(scope="module")
def tagged_bundle(
    tiny_bert: Path, taggers: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A bundle with all of them except `plain`, which is loaded later."""
    bundle = tmp_path_factory.mktemp("tagged") / "bundle"
    inside = {name: path for name, path in taggers.items() if name != "plain"}
    ld.export(tiny_bert, bundle, adapters=inside)
    return bundle


@pytest.fixture(scope="module")
def classify(tagged_bundle: Path, taggers: dict[str, Path]) -> TokenClassifier:
    session = AdapterSession(tagged_bundle)
    session.load("plain", taggers["plain"])
    return TokenClassifier(session)


@pytest.fixture(scope="module")
def pipelines(tiny_bert: Path, taggers: dict[str, Path]) -> dict[str, Any]:
    """transformers' pipeline with PEFT's model, by adapter."""
    import peft
    from transformers import AutoModelForTokenClassification, AutoTokenizer, pipeline

    found = {}
    for name, labels in LABELS.items():
        base = AutoModelForTokenClassification.from_pretrained(
            tiny_bert, num_labels=len(labels), id2label=dict(enumerate(labels))
        )
        model = peft.PeftModel.from_pretrained(base, taggers[name]).merge_and_unload().eval()
        place = taggers[name] if name == "pieces" else tiny_bert
        tokenizer = AutoTokenizer.from_pretrained(place)
        found[name] = pipeline(TASK, model=model, tokenizer=tokenizer)
    return found


def check(entities: tuple[Entity, ...], expected: list[dict[str, Any]]) -> None:
    assert len(entities) == len(expected)
    for ours, theirs in zip(entities, expected, strict=True):
        label = theirs.get("entity", theirs.get("entity_group"))
        assert (ours.label, ours.word) == (label, theirs["word"])
        assert (ours.start, ours.end) == (theirs["start"], theirs["end"])
        assert ours.index == theirs.get("index")
        assert abs(ours.score - theirs["score"]) <= tolerance("torch-onnx-tiny")


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", ["none", "simple", "first", "average", "max"])
def test_entities_of_a_mixed_batch_are_those_of_transformers_pipeline(
    aggregation: str, classify: TokenClassifier, pipelines: dict[str, Any]
) -> None:
    texts = [text for text in TEXTS for _ in ADAPTERS]
    names = ADAPTERS * len(TEXTS)
    results = classify(texts, names, aggregation=aggregation, batch_size=4)
    for text, name, result in zip(texts, names, results, strict=True):
        assert result.adapter == name
        check(result.entities, pipelines[name](text, aggregation_strategy=aggregation))
    found = [{entity.label for entity in result.entities} for result in results]
    kinds = {"ORG"} if aggregation != "none" else {"B-ORG", "I-ORG"}
    assert all(labels <= kinds for labels in found[1::3]), "each adapter has its own labels"
    assert sum(len(result.entities) for result in results) > len(texts)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("aggregation", ["none", "simple", "max"])
@pytest.mark.parametrize("ignored", [[], ["O", "B-LOC"], ["LOC", "place"]], ids=str)
def test_ignored_labels_are_those_of_the_pipeline(
    ignored: list[str], aggregation: str, classify: TokenClassifier, pipelines: dict[str, Any]
) -> None:
    results = classify(TEXTS[:2], "bytes", aggregation=aggregation, ignore_labels=ignored)
    for text, result in zip(TEXTS, results, strict=False):
        pipe = pipelines["bytes"]
        pipe._postprocess_params, kept = dict(pipe._postprocess_params), pipe._postprocess_params
        expected = pipe(text, aggregation_strategy=aggregation, ignore_labels=ignored)
        pipe._postprocess_params = kept
        check(result.entities, expected)
        assert not {entity.label for entity in result.entities} & set(ignored)


@pytest.mark.filterwarnings("ignore:Tokenizer does not support real words")
@pytest.mark.parametrize("name", ["bytes", "pieces"])
def test_a_long_text_is_split_into_overlapping_parts_as_in_the_pipeline(
    name: str, classify: TokenClassifier, pipelines: dict[str, Any]
) -> None:
    pipe = pipelines[name]
    results = classify([LONG, TEXTS[0]], name, aggregation="simple", stride=20, batch_size=2)
    for text, result in zip([LONG, TEXTS[0]], results, strict=True):
        pipe._preprocess_params, kept = dict(pipe._preprocess_params), pipe._preprocess_params
        check(result.entities, pipe(text, aggregation_strategy="simple", stride=20))
        pipe._preprocess_params = kept
    assert max(entity.end for entity in results[0].entities) > 0.8 * len(LONG)
    with pytest.raises(UsageError, match=r"has \d+ tokens, and the model takes \d+: give `stride`"):
        classify(LONG, name)


def test_a_merged_bundle_finds_the_entities_of_its_adapter(
    classify: TokenClassifier, tagged_bundle: Path, taggers: dict[str, Path], tmp_path: Path
) -> None:
    assert {read_manifest(tagged_bundle).adapters[n].labels for n in ("bytes", "pieces")} == {
        LABELS["bytes"],
        LABELS["pieces"],
    }
    for name in ("pieces", "bytes"):
        ld.export(tagged_bundle, tmp_path / name, adapters={name: taggers[name]}, merge=True)
        merged = TokenClassifier(AdapterSession(tmp_path / name))
        for text in TEXTS:
            (ours,), (theirs,) = merged(text), classify(text, name)
            assert [e.label for e in ours.entities] == [e.label for e in theirs.entities]
            spans = [[(e.start, e.end) for e in found.entities] for found in (ours, theirs)]
            assert spans[0] == spans[1]


def test_a_native_file_with_a_head_is_refused_because_it_has_no_labels(
    tagged_bundle: Path,
) -> None:
    session = AdapterSession(tagged_bundle)
    session.load("native", tagged_bundle / "adapters" / "pieces.onnx_adapter")
    with pytest.raises(UsageError, match="'native' was loaded from a file that does not declare"):
        TokenClassifier(session)(TEXTS[0], "native")
    # Under a name that has labels it changes nothing.
    session.load("pieces")
    session.load("bytes", tagged_bundle / "adapters" / "bytes.onnx_adapter")
    found = TokenClassifier(session)(TEXTS[0], "bytes", aggregation="none")[0].entities
    assert {entity.label for entity in found} <= set(LABELS["bytes"])


def test_labels_are_declared_again_after_a_conversion_to_onnx_adapter_and_back(
    classify: TokenClassifier, tagged_bundle: Path, tmp_path: Path
) -> None:
    native = tagged_bundle / "adapters" / "pieces.onnx_adapter"
    convert(native, tmp_path / "back", bundle=tagged_bundle)
    word_pieces(tmp_path / "back")
    session = AdapterSession(tagged_bundle)
    session.load("back", tmp_path / "back")
    with pytest.raises(UsageError, match="'back' was loaded from a file that does not declare"):
        TokenClassifier(session)(TEXTS[0], "back")
    config = {"id2label": dict(enumerate(LABELS["pieces"]))}
    (tmp_path / "back" / "config.json").write_text(json.dumps(config))
    session.load("back", tmp_path / "back", replace=True)
    (again,), (before,) = (TokenClassifier(session)(TEXTS[0], "back"), classify(TEXTS[0], "pieces"))
    assert before.entities
    for ours, theirs in zip(again.entities, before.entities, strict=True):
        assert dataclasses.replace(ours, score=theirs.score) == theirs


def test_logits_that_are_not_finite_are_refused(
    tagged_bundle: Path, taggers: dict[str, Path], tmp_path: Path
) -> None:
    adapter = load_adapter(taggers["bytes"])
    wide = {
        module: dataclasses.replace(pair, A=pair.A * 0 + 1e17, B=pair.B * 0 + 1e17)
        for module, pair in adapter.factors.items()
    }
    save_adapter(dataclasses.replace(adapter, factors=wide), tmp_path)
    session = AdapterSession(tagged_bundle)
    session.load("bytes", taggers["bytes"])
    session.load("wide", tmp_path)
    with pytest.raises(RunError, match="text 2: the graph gave numbers that are not finite"):
        TokenClassifier(session)(TEXTS[:2], ["bytes", "wide"])
    with pytest.raises(UsageError, match="the base has no trained head"):
        TokenClassifier(session)(TEXTS[:2], ["bytes", None])


def test_a_text_without_words_has_no_entities(classify: TokenClassifier) -> None:
    empty, full = classify(["", TEXTS[0]], "bytes")
    assert empty.entities == ()
    assert full.entities
    assert classify("", "pieces")[0].entities == (), "special tokens are no words"


@pytest.mark.parametrize(
    ("texts", "options", "message"),
    [
        ([], {}, "there are no texts"),
        ([("a", "b")], {}, "text 1 is a pair"),
        (["a"], {"aggregation": "all"}, "`aggregation` is 'all': give one of none, simple, first"),
        (["a"], {"aggregation": "none", "stride": 4}, "`stride` needs an `aggregation`"),
        (["a"], {"stride": 128}, "`stride` is 128: give 0 to 127 tokens"),
        (["a"], {"stride": "4"}, "`stride` is '4': give 0 or more"),
        (["a"], {"ignore_labels": "O"}, "`ignore_labels` is 'O': give a list of labels"),
        (["a"], {"ignore_labels": [1]}, "`ignore_labels` is .*: give a list of labels"),
        (["a"], {"adapters": ["bytes"] * 2}, "2 adapters for a batch of 1 rows"),
    ],
)
def test_invalid_texts_and_options_are_refused(
    classify: TokenClassifier, texts: list[str], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        classify(texts, **options)


def test_the_command_prints_entities(classify: TokenClassifier, tagged_bundle: Path) -> None:
    (result,) = classify(TEXTS[0], "pieces")
    message = call("run", tagged_bundle, TEXTS[0], "--adapter", "pieces")
    first = result.entities[0]
    text = TEXTS[0][first.start : first.end]
    assert message.startswith(f"{text} ({first.label}, {first.score:.4f})")
    assert message.count("; ") == len(result.entities) - 1
    given = ("--aggregation", "none", "--json")
    values = json.loads(call("run", tagged_bundle, TEXTS[0], "--adapter", "pieces", *given))
    (tokens,) = classify(TEXTS[0], "pieces", aggregation="none")
    assert values["entities"] == [dataclasses.asdict(entity) for entity in tokens.entities]
    values = json.loads(
        call("run", tagged_bundle, LONG, "--adapter", "pieces", "--stride", 9, "--json")
    )
    assert max(entity["end"] for entity in values["entities"]) > 0.8 * len(LONG)
    flags = ("--ignore-label", "ORG", "--ignore-label", "O", "--json")
    values = json.loads(call("run", tagged_bundle, TEXTS[0], "--adapter", "pieces", *flags))
    assert values["entities"] == []
    flags = ("--ignore-label", "", "--json")
    values = json.loads(call("run", tagged_bundle, TEXTS[0], "--adapter", "pieces", *flags))
    (every,) = classify(TEXTS[0], "pieces", ignore_labels=[])
    assert values["entities"] == [dataclasses.asdict(entity) for entity in every.entities]
    with pytest.raises(UsageError, match="--threshold: only for classifiers"):
        call("run", tagged_bundle, TEXTS[0], "--threshold", 0.5)


def test_the_longer_of_two_overlapping_entities_is_kept() -> None:
    short, long = Entity("A", 0.9, "x", 2, 4), Entity("B", 0.1, "y", 3, 9)
    likelier, apart = Entity("C", 0.2, "z", 4, 10), Entity("D", 0.3, "w", 10, 11)
    assert without_overlaps([apart, short, long, likelier]) == [likelier, apart]
    assert without_overlaps([]) == []
