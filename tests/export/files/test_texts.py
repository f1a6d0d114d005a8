"""Text files that trainers save with an adapter: chat template, tokenizer, generation settings.

The reference is transformers with the adapter's own tokenizer and settings.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from loradeploy.bundle.manifest import read_manifest
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BundleError, LoraDeployError, UsageError
from loradeploy.export.api import export
from loradeploy.runtime.session import AdapterSession
from loradeploy.runtime.tasks.generation import TextGenerator
from tests.conftest import MakeAdapter, once
from tests.inputs.edits import edited_json
from tests.inputs.words import WORDS, write_tokenizer
from tests.runtime.test_run_command import lines, run

VOCABULARY = WORDS + 4  # the embedding has spare rows
NEW = 12  # tokens
TEXT = "w5 w9"
OURS = (
    "{% for m in messages %}w1 {{ m.content }} w2 {% endfor %}"
    "{% if add_generation_prompt %}w3{% endif %}"
)
THEIRS = OURS.replace("w1", "w10").replace("w2", "w11").replace("w3", "w12")


def _generation(place: Path, **settings: Any) -> None:
    (place / "generation_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="session")
def worded_llama(shared: Path) -> Path:
    """A one-layer Llama with random weights, a numbered word vocabulary, and a chat template."""

    def make(place: Path) -> None:
        import torch
        from transformers import AutoModelForCausalLM, LlamaConfig

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.2,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )
        AutoModelForCausalLM.from_config(config).eval().save_pretrained(place)
        write_tokenizer(place, template=OURS)

    return once(shared / "worded-llama", make)


def _plain(place: Path) -> None:
    write_tokenizer(place, template=OURS)


def _template(place: Path) -> None:
    (place / "chat_template.jinja").write_text(THEIRS)


def _word(place: Path) -> None:
    own = write_tokenizer(place, template=THEIRS.replace("w11", "<|end|>"))
    own.add_special_tokens({"eos_token": "<|end|>"})
    own.save_pretrained(place)


def _settings(place: Path) -> None:
    _generation(
        place, eos_token_id=[7, 8], repetition_penalty=1.3, begin_suppress_tokens=[20, 21, 22]
    )


def _list_of_templates(place: Path) -> None:
    named = [{"name": "default", "template": THEIRS}, {"name": "tools", "template": OURS}]
    (place / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))


KINDS: dict[str, Callable[[Path], None]] = {
    "plain": _plain,
    "template": _template,
    "word": _word,
    "settings": _settings,
    "list": _list_of_templates,
}


@pytest.fixture(scope="session")
def worded_adapters(worded_llama: Path, shared: Path, make_adapter: MakeAdapter) -> dict[str, Path]:
    """An adapter for each kind of text files."""

    def make(place: Path) -> None:
        for seed, (name, write) in enumerate(KINDS.items()):
            make_adapter(worded_llama, out=place / name, seed=seed, scale=0.3)
            write(place / name)

    place = once(shared / "worded-adapters", make)
    return {name: place / name for name in KINDS}


@pytest.fixture(scope="session")
def worded_bundle(worded_llama: Path, worded_adapters: dict[str, Path], shared: Path) -> Path:
    """A bundle of the base with all of the adapters."""
    return once(
        shared / "bundle-worded",
        lambda place: export(worded_llama, place, adapters=worded_adapters),
    )


@pytest.fixture(scope="session")
def expected(
    worded_llama: Path, worded_adapters: dict[str, Path]
) -> Callable[[str | None], tuple[list[int], list[int]]]:
    """A function: adapter → the tokens of its prompt and those that transformers generates."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    def generate(name: str | None) -> tuple[list[int], list[int]]:
        model = AutoModelForCausalLM.from_pretrained(worded_llama)
        place = worded_llama if name is None else worded_adapters[name]
        if name is not None:
            model = peft.PeftModel.from_pretrained(model, place)
        own = place if (place / "tokenizer.json").is_file() else worded_llama
        tokenizer = AutoTokenizer.from_pretrained(own)
        if name in ("template", "list"):
            tokenizer.chat_template = THEIRS
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": TEXT}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        file = (place if (place / "generation_config.json").is_file() else worded_llama).resolve()
        settings = GenerationConfig.from_pretrained(file)
        ends = [settings.eos_token_id] if isinstance(settings.eos_token_id, int) else []
        ends = ends or list(settings.eos_token_id)
        ends = [*ends, tokenizer.eos_token_id] if name == "word" else ends
        settings.update(max_new_tokens=NEW, do_sample=False, eos_token_id=ends, pad_token_id=0)
        given = torch.tensor([ids])
        with torch.no_grad():
            out = model.eval().generate(
                input_ids=given, attention_mask=torch.ones_like(given), generation_config=settings
            )
        made = out[0, len(ids) :].tolist()
        return ids, made[:-1] if made[-1] in ends else made

    return generate


NAMES = [None, *KINDS]


def _check(
    results: list[Any], expected: Callable[[str | None], tuple[list[int], list[int]]]
) -> None:
    for name, result in zip(NAMES, results, strict=True):
        ids, made = expected(name)
        assert (result.prompt_tokens, list(result.token_ids)) == (len(ids), made), name
    assert len({result.token_ids for result in results}) > 3


def test_each_row_has_the_template_and_the_end_tokens_of_its_adapter(
    worded_bundle: Path, expected: Callable[[str | None], tuple[list[int], list[int]]]
) -> None:
    generator = TextGenerator(AdapterSession(worded_bundle))
    _check(generator.generate([TEXT] * len(NAMES), NAMES, chat=True, max_new_tokens=NEW), expected)


def test_an_adapter_loaded_later_has_its_own_text_files_too(
    worded_bundle: Path,
    worded_adapters: dict[str, Path],
    expected: Callable[[str | None], tuple[list[int], list[int]]],
    tmp_path: Path,
) -> None:
    export(worded_bundle, tmp_path / "b")
    session = AdapterSession(tmp_path / "b")
    for name, place in worded_adapters.items():
        (session.register if name == "word" else session.load)(name, place)
    generator = TextGenerator(session)
    _check(generator.generate([TEXT] * len(NAMES), NAMES, chat=True, max_new_tokens=NEW), expected)
    session.unload("template")
    session.load("template", worded_adapters["plain"])
    answers = generator.generate([TEXT] * 2, ["template", "plain"], chat=True)
    assert answers[0].token_ids == answers[1].token_ids


def test_equal_weights_with_different_text_files_are_different_adapters(
    worded_bundle: Path, worded_adapters: dict[str, Path], tmp_path: Path
) -> None:
    session = AdapterSession(worded_bundle)
    for name, place in worded_adapters.items():
        session.load(name, place)  # again, from the directory given to the export
    name, place = next(iter(worded_adapters.items()))
    shutil.copytree(place, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text("{{ messages[0].content }} w9")
    with pytest.raises(UsageError, match="another tokenizer, chat template or settings"):
        session.load(name, tmp_path / "other")
    session.load(name, tmp_path / "other", replace=True)


def test_the_command_mixes_adapters_with_their_own_templates(
    worded_bundle: Path,
    tmp_path: Path,
    expected: Callable[[str | None], tuple[list[int], list[int]]],
) -> None:
    messages = [{"role": "user", "content": TEXT}]
    file = lines(tmp_path, *({"messages": messages, "adapter": name} for name in NAMES))
    result = run(worded_bundle, "--input", file, "--json", "--max-new-tokens", NEW)
    assert result.exit_code == 0, result.output
    for name, line in zip(NAMES, result.stdout.splitlines(), strict=True):
        assert json.loads(line)["token_ids"] == expected(name)[1], name


@pytest.mark.parametrize("name", ["template", "word", "settings", "list"])
def test_in_a_merged_bundle_they_replace_the_files_of_the_base(
    name: str,
    worded_bundle: Path,
    worded_adapters: dict[str, Path],
    expected: Callable[[str | None], tuple[list[int], list[int]]],
    tmp_path: Path,
) -> None:
    export(worded_bundle, tmp_path / "b", adapters={name: worded_adapters[name]}, merge=True)
    generator = TextGenerator(AdapterSession(tmp_path / "b"))
    (result,) = generator.generate([TEXT], chat=True, max_new_tokens=NEW)
    ids, made = expected(name)
    assert (result.prompt_tokens, list(result.token_ids)) == (len(ids), made)
    genai = json.loads((tmp_path / "b" / "genai_config.json").read_text())
    ends = {"word": [2, WORDS], "settings": [7, 8]}.get(name, 2)
    assert genai["model"]["eos_token_id"] == ends
    assert generator.tokenizer.eos_ids == ({2} if ends == 2 else set(ends))  # type: ignore[call-overload]
    if name == "settings":
        assert genai["search"]["repetition_penalty"] == 1.3


def test_transformers_reads_the_adapters_tokenizer_from_a_merged_bundle(
    worded_bundle: Path, worded_adapters: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    export(worded_bundle, tmp_path / "b", adapters={"word": worded_adapters["word"]}, merge=True)
    for name in ("chat_template", "eos_token_id"):
        own, theirs = (
            getattr(AutoTokenizer.from_pretrained(place), name)
            for place in (tmp_path / "b", worded_adapters["word"])
        )
        assert own == theirs


def test_a_merged_bundle_has_no_special_token_that_the_adapters_tokenizer_dropped(
    worded_bundle: Path, worded_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(worded_adapters["plain"], tmp_path / "a")
    with edited_json(adapter / "tokenizer_config.json") as settings:
        del settings["bos_token"]
    (adapter / "chat_template.jinja").write_text("{{ bos_token }} w1 {{ messages[0].content }}")
    base = shutil.copytree(worded_bundle, tmp_path / "base")
    (base / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>"}))
    assert Tokenizer(base).special_tokens["bos_token"] == "<s>"
    export(base, tmp_path / "b", adapters={"a": adapter}, merge=True)
    merged = Tokenizer(tmp_path / "b")
    assert "bos_token" not in merged.special_tokens
    message = [{"role": "user", "content": TEXT}]
    with AdapterSession(worded_bundle) as session:
        session.load("a", adapter)
        assert session.texts.of("a").tokenizer.encode_chat(message) == merged.encode_chat(message)


def test_a_word_added_only_in_the_tokenizers_settings_is_one_token(
    worded_bundle: Path, worded_adapters: dict[str, Path], tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    adapter = shutil.copytree(worded_adapters["plain"], tmp_path / "a")
    with edited_json(adapter / "tokenizer_config.json") as settings:
        settings["added_tokens_decoder"] = {str(WORDS): {"content": "<|end|>", "special": True}}
    text = "w5 <|end|> w9"
    expected = AutoTokenizer.from_pretrained(adapter)(text)["input_ids"]
    assert WORDS in expected
    export(worded_bundle, tmp_path / "b", adapters={"a": adapter})
    with AdapterSession(tmp_path / "b") as session:
        generator = TextGenerator(session)
        assert generator.session.texts.of("a").tokenizer.encode(text) == expected
        assert WORDS not in generator.session.texts.base.tokenizer.encode(text)


# -- the log of the export -------------------------------------------------------------------------


def test_a_difference_from_the_base_is_logged_in_one_line(
    worded_bundle: Path,
    worded_adapters: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING):
        export(worded_bundle, tmp_path / "b", adapters=worded_adapters)
    reported = {r.message.partition(":")[0]: r.message for r in caplog.records}
    assert reported["template"] == "template: with its own chat template in place of the base's"
    assert "tokenizer (new words: '<|end|>') and end tokens (2, 60)" in reported["word"]
    assert "end tokens (7, 8) and generation settings" in reported["settings"]
    assert "plain" not in reported and len(caplog.records) == 4


def test_the_manifest_records_the_text_files_of_an_adapter(worded_bundle: Path) -> None:
    adapters = read_manifest(worded_bundle).adapters
    text = {name: entry.text for name, entry in adapters.items()}
    assert text["plain"] is None
    assert text["template"] is not None and text["template"].chat_template == THEIRS
    assert text["word"] is not None and text["word"].eos_token_ids == (2, WORDS)
    assert text["settings"] is not None
    assert text["settings"].generation["repetition_penalty"] == 1.3
    assert not (worded_bundle / "adapters" / "plain" / "tokenizer.json").exists()


def test_the_same_export_has_the_same_bytes(
    worded_bundle: Path, worded_adapters: dict[str, Path], tmp_path: Path
) -> None:
    for name in ("one", "two"):
        export(worded_bundle, tmp_path / name, adapters=worded_adapters)
    files = sorted(p for p in (tmp_path / "one").rglob("*") if p.is_file())
    for file in files:
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes(), file.name


# -- refusals --------------------------------------------------------------------------------------


def _many_words(place: Path) -> None:
    write_tokenizer(place, words=VOCABULARY + 2)


def _older_words(place: Path) -> None:
    (place / "added_tokens.json").write_text(json.dumps({"<|turn|>": WORDS}))


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (_many_words, "has 'w60' as token 64, and 1 more; the graph's vocabulary ends at 63"),
        (_older_words, r"adds the word '<\|turn\|>' as token 60, which the base's tokenizer lacks"),
        (lambda p: (p / "chat_template.jinja").write_text("{% if %}"), "not a valid template"),
        (lambda p: _generation(p, repetition_penalty="high"), "repetition_penalty is 'high'"),
    ],
)
def test_files_that_cannot_be_used_are_refused_by_name(
    write: Callable[[Path], None],
    message: str,
    worded_bundle: Path,
    worded_adapters: dict[str, Path],
    tmp_path: Path,
) -> None:
    adapter = tmp_path / "bad"
    adapter.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(worded_adapters["plain"] / name, adapter)
    write(adapter)
    with pytest.raises(LoraDeployError, match=f"bad: .*{message}") as problem:
        export(worded_bundle, tmp_path / "b", adapters=[adapter])
    assert len(str(problem.value).replace(str(tmp_path), "")) < 300
    session = AdapterSession(worded_bundle)
    session.load("bad", adapter)
    with pytest.raises(LoraDeployError, match=f"'bad': .*{message}"):
        TextGenerator(session).generate([TEXT], "bad")


def test_a_word_used_only_for_padding_needs_no_row(
    worded_bundle: Path, worded_adapters: dict[str, Path], tmp_path: Path
) -> None:
    adapter = shutil.copytree(worded_adapters["plain"], tmp_path / "padded")
    own = write_tokenizer(adapter, words=VOCABULARY, template=OURS)
    own.add_special_tokens({"pad_token": "[PAD]"})
    own.save_pretrained(adapter)
    session = AdapterSession(worded_bundle)
    session.load("padded", adapter)
    answers = TextGenerator(session).generate([TEXT] * 2, ["padded", "plain"], chat=True)
    assert answers[0].token_ids == answers[1].token_ids


def test_a_file_that_changed_since_the_export_is_refused(
    worded_bundle: Path, tmp_path: Path
) -> None:
    bundle = shutil.copytree(worded_bundle, tmp_path / "b")
    (bundle / "adapters" / "template" / "chat_template.jinja").write_text(OURS)
    generator = TextGenerator(AdapterSession(bundle))
    with pytest.raises(BundleError, match="is not the file that came with the bundle"):
        generator.generate([TEXT], "template", chat=True)
    assert generator.generate([TEXT], "word", chat=True)


def test_a_combination_uses_text_files_only_if_its_adapters_agree(worded_bundle: Path) -> None:
    generator = TextGenerator(AdapterSession(worded_bundle))
    alike = {"template": 1.0, "list": 0.0}
    both = generator.generate([TEXT] * 2, [alike, "template"], chat=True, max_new_tokens=NEW)
    assert both[0].token_ids == both[1].token_ids
    torn = {"template": 0.5, "plain": 0.5}
    assert generator.generate([TEXT], torn)
    with pytest.raises(UsageError, match="'plain' and 'template' of the blend have different chat"):
        generator.generate([TEXT], torn, chat=True)
    with pytest.raises(UsageError, match="'template' and 'word' of the blend have different tok"):
        generator.generate([TEXT], {"template": 0.5, "word": 0.5})


def test_settings_of_generation_in_config_json_apply_without_a_generation_config(
    worded_llama: Path, tmp_path: Path
) -> None:
    """transformers before 4.26 saved them there, and later versions read them from there."""
    import torch
    from transformers import AutoModelForCausalLM

    base = tmp_path / "base"
    shutil.copytree(worded_llama, base)
    (base / "generation_config.json").unlink()
    file = base / "config.json"
    penalty = {"repetition_penalty": 1.8, "no_repeat_ngram_size": 1}
    file.write_text(json.dumps(json.loads(file.read_text()) | penalty))
    export(base, tmp_path / "bundle")
    export(worded_llama, tmp_path / "other")
    (got,) = TextGenerator(AdapterSession(tmp_path / "bundle")).generate([TEXT], max_new_tokens=NEW)
    (other,) = TextGenerator(AdapterSession(tmp_path / "other")).generate(
        [TEXT], max_new_tokens=NEW
    )
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    ids = torch.tensor([Tokenizer(base).encode(TEXT)])
    with torch.no_grad():
        out = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False
        )
    made = out[0, ids.shape[1] :].tolist()
    ends = Tokenizer(base).eos_ids
    assert list(got.token_ids) == (made[:-1] if made[-1] in ends else made)
    assert got.token_ids != other.token_ids
