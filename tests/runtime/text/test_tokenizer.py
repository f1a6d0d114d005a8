"""The tokenizer without transformers gives the same results as transformers' tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

from loradeploy.bundle.text.chat import ChatTemplate
from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.errors import BundleError, UsageError
from loradeploy.runtime.text.padding import pad
from loradeploy.runtime.text.pieces import PieceDecoder
from tests.inputs.edits import edited_json

TEXTS = [
    "The capital of France is",
    " leading and trailing spaces ",
    "don't  , do  that .",
    "Füße, 東京, 🦙🦙 and \t tabs\nand lines",
    "<|im_start|>user\nhi<|im_end|>",
    "[CLS] a [MASK] b [SEP]",
    "",
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "What is the capital of France?"}],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi — 🦙"},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "And?\n\n"},
    ],
]


@pytest.fixture(params=["smollm2", "minilm", "tiny_gpt2"])
def model(request: pytest.FixtureRequest) -> Path:
    place: Path = request.getfixturevalue(request.param)
    return place


def _reference(place: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(place)


def test_tokens_are_those_of_transformers(model: Path) -> None:
    ours, theirs = Tokenizer(model), _reference(model)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text)["input_ids"], text


def test_a_text_is_truncated_like_in_transformers(model: Path) -> None:
    ours, theirs = Tokenizer(model), _reference(model)
    for text in TEXTS:
        for length in (3, 7, 500):
            cut = theirs(text, truncation=True, max_length=length)["input_ids"]
            assert ours.encode(text, max_length=length) == cut, (text, length)


def test_decoded_text_is_that_of_transformers(model: Path) -> None:
    ours, theirs = Tokenizer(model), _reference(model)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("messages", CHATS)
def test_chats_are_rendered_as_transformers_renders_them(
    smollm2: Path, messages: list[dict[str, Any]]
) -> None:
    ours, theirs = Tokenizer(smollm2), _reference(smollm2)
    rendered = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert ours.render_chat(messages) == rendered
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert ours.encode_chat(messages) == ids


TEMPLATES = {
    "loop": "{% for m in messages %}{% if m.content is defined %}{{ m.content }}{% endif %}\n"
    "{%- if loop.index > 1 %}{% break %}{% endif %}{% endfor %}",
    "tools": "{% if tools is not none %}tools{% endif %}{{ bos_token }}{{ documents is none }}",
    "json": "{{ messages | tojson(indent=2) }}{{ {'b': 'ü<', 'a': 1} | tojson(sort_keys=True) }}",
    "generation": "{% for m in messages %}{% generation %}{% set x = m.role %}{{ x }}"
    "{% endgeneration %}{% endfor %}",
    "space": "  {% if true %}\n  a\n  {% endif %}\n  {%- set ns = namespace(n=1) %}{{ ns.n }}",
    "prompt": "{% if add_generation_prompt %}>{% endif %}{{ messages[0].get('absent') is none }}",
}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES.keys())
def test_templates_have_the_variables_and_functions_of_transformers(
    tiny_llama: Path, template: str
) -> None:
    theirs = _reference(tiny_llama)
    messages = [*CHATS[1], {"role": "assistant", "content": None}]
    expected = theirs.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    ours = Tokenizer(tiny_llama)
    assert ChatTemplate(template, ours.special_tokens).render(messages) == expected


@pytest.mark.parametrize("messages", [CHATS[0], [{"role": "user", "content": "What is it?"}]])
def test_a_template_for_content_parts_gets_parts(
    tiny_llama: Path, messages: list[dict[str, Any]]
) -> None:
    from transformers.models.smolvlm.processing_smolvlm import DEFAULT_CHAT_TEMPLATE

    parts = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in messages]
    expected = _reference(tiny_llama).apply_chat_template(
        parts, chat_template=DEFAULT_CHAT_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    ours = ChatTemplate(DEFAULT_CHAT_TEMPLATE, {})
    assert ours.render(messages) == ours.render(parts) == expected
    assert all(message["content"] in expected for message in messages)


def test_a_template_that_drops_the_text_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "m" / "chat_template.jinja").write_text("{% for m in messages %}w1{% endfor %}")
    with pytest.raises(UsageError, match="omits a user's text"):
        Tokenizer(tmp_path / "m").encode_chat([{"role": "user", "content": "w5"}])


def test_a_template_can_use_the_current_date() -> None:
    from datetime import datetime

    text = ChatTemplate("{{ strftime_now('%Y') }}", {}).render(CHATS[0])
    assert abs(int(text) - datetime.now().year) <= 1


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('only two roles') }}", "only two roles"),
        ("{{ messages[0].content.nothing.more }}", "refuses the messages"),
        ("{{ ''.__class__.__mro__ }}", "refuses the messages"),
        ("{{ messages.append(1) }}", "refuses the messages"),
        ("{% set ns = namespace() %}{% set ns.__x = 1 %}", "not allowed in a namespace"),
        ("{{ namespace(__x=1) }}", "not allowed in a namespace"),
    ],
)
def test_a_template_that_raises_or_misbehaves_is_a_one_line_error(
    template: str, message: str
) -> None:
    with pytest.raises(UsageError, match=message) as refusal:
        ChatTemplate(template, {}).render(CHATS[0])
    assert "\n" not in str(refusal.value)


def test_a_broken_template_is_refused_at_its_use() -> None:
    with pytest.raises(BundleError, match="not a valid template"):
        ChatTemplate("{% for %}", {}).render([{"role": "user", "content": "a"}])


@pytest.mark.parametrize("messages", [[], ["hello"], [{"content": "no role"}]])
def test_invalid_conversations_are_refused(tiny_llama: Path, messages: list[Any]) -> None:
    with pytest.raises(UsageError):
        Tokenizer(tiny_llama).render_chat(messages)


def test_a_model_without_a_chat_template_is_reported(minilm: Path) -> None:
    tokenizer = Tokenizer(minilm)
    assert tokenizer.template is None
    with pytest.raises(UsageError, match="has no chat template"):
        tokenizer.encode_chat(CHATS[0])


# -- settings ----------------------------------------------------------------------------------


@pytest.fixture
def edited(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """A function that copies the tiny Llama's files and changes one JSON file of them."""
    place = shutil.copytree(tiny_llama, tmp_path / "model")

    def edit(file: str, **changes: Any) -> Path:
        path = place / file
        values = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**values, **changes}))
        return place

    return edit


def test_end_tokens_come_from_the_generation_config_first(edited: Callable[..., Path]) -> None:
    assert Tokenizer(edited("generation_config.json", eos_token_id=[5, 9])).eos_ids == {5, 9}
    assert Tokenizer(edited("generation_config.json", eos_token_id=7)).eos_ids == {7}
    place = edited("generation_config.json", eos_token_id=None)
    assert Tokenizer(edited("config.json", eos_token_id=11)).eos_ids == {11}
    edited("config.json", eos_token_id=None)
    assert Tokenizer(place).eos_ids == {2}  # <|im_end|> of the tokenizer


def test_the_maximum_length_is_the_smaller_one_of_model_and_tokenizer(
    edited: Callable[..., Path],
) -> None:
    assert Tokenizer(edited("tokenizer_config.json", model_max_length=10**30)).max_length == 128
    assert Tokenizer(edited("tokenizer_config.json", model_max_length=100)).max_length == 100


def test_special_tokens_around_a_text_come_from_tokenizer_json(
    edited: Callable[..., Path],
) -> None:
    """transformers too uses add_bos_token only without a tokenizer.json (5.23)."""
    place = edited("tokenizer_config.json", add_bos_token=True, add_eos_token=True)
    expected = _reference(place)("hello")["input_ids"]
    assert Tokenizer(place).encode("hello") == expected


def test_special_tokens_can_be_objects_or_in_a_separate_file(
    edited: Callable[..., Path],
) -> None:
    place = edited("tokenizer_config.json", eos_token={"content": "<|endoftext|>"})
    assert Tokenizer(place).special_tokens["eos_token"] == "<|endoftext|>"
    edited("special_tokens_map.json", cls_token="<|im_start|>")
    assert Tokenizer(place).special_tokens["cls_token"] == "<|im_start|>"


def test_a_template_can_be_in_the_tokenizers_settings(edited: Callable[..., Path]) -> None:
    place = edited("tokenizer_config.json", chat_template="one {{ messages[0].role }}")
    (place / "chat_template.jinja").unlink()
    assert Tokenizer(place).render_chat(CHATS[0]) == "one user"
    edited("tokenizer_config.json", chat_template=[{"name": "default", "template": "two"}])
    assert Tokenizer(place).render_chat(CHATS[0]) == "two"


@pytest.mark.parametrize("content", [None, "{}", "nonsense"])
def test_a_missing_or_broken_tokenizer_is_named(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(BundleError, match=r"tokenizer\.json"):
        Tokenizer(tmp_path)


# -- pieces and padding ------------------------------------------------------------------------


def test_joined_pieces_are_the_whole_text(model: Path) -> None:
    tokenizer = Tokenizer(model)
    for text in TEXTS:
        ids = tokenizer.encode(text, special_tokens=False)
        pieces = PieceDecoder(tokenizer)
        message = [pieces.push(token) for token in ids] + [pieces.close()]
        assert "".join(message) == tokenizer.decode(ids)


def test_an_incomplete_character_is_held_back_until_it_is_complete(smollm2: Path) -> None:
    tokenizer = Tokenizer(smollm2)
    ids = tokenizer.encode("🦙", special_tokens=False)
    assert len(ids) > 1
    pieces = PieceDecoder(tokenizer)
    assert [pieces.push(token) for token in ids] == [""] * (len(ids) - 1) + ["🦙"]
    half = PieceDecoder(tokenizer)
    half.push(ids[0])
    assert half.close() == tokenizer.decode(ids[:1])


def test_rows_are_padded_on_the_requested_side() -> None:
    ids, mask = pad([[5, 6, 7], [8]], 0, left=True)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]
    ids, mask = pad([[5, 6, 7], [8]], 0, left=False)
    assert ids.tolist() == [[5, 6, 7], [8, 0, 0]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0]]


# -- an adapter's files instead of the base's ------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "ends"),
    [
        ("{{ m.content }}<|im_end|>", {0, 2}),  # an added token that ends a turn
        ("{{ m.content }} \n<|im_end|>\n", {0, 2}),
        ("{{ m.content }} the end", {0}),  # ordinary words are no end token
        ("{{ raise_exception('no') }}", {0}),
    ],
)
def test_the_token_that_ends_a_turn_in_an_adapters_template_is_an_end_token(
    answer: str, ends: set[int], edited: Callable[..., Path], tmp_path: Path
) -> None:
    base = Tokenizer(edited("generation_config.json", eos_token_id=0))
    assert base.eos_ids == {0}
    (tmp_path / "own").mkdir()
    template = "{% for m in messages %}" + answer + "{% endfor %}"
    (tmp_path / "own" / "chat_template.jinja").write_text(template)
    own = Tokenizer(tmp_path / "own", base)
    assert own.eos_ids == ends
    assert own.encode("The bank") == base.encode("The bank") and not own.own_words


def test_an_adapter_without_text_files_uses_those_of_the_base(
    tiny_llama: Path, tmp_path: Path
) -> None:
    base = Tokenizer(tiny_llama)
    own = Tokenizer(tmp_path, base)
    assert (own.eos_ids, own.template, own.settings) == (base.eos_ids, base.template, base.settings)
    assert own.render_chat(CHATS[0]) == base.render_chat(CHATS[0])


def test_position_offsets_of_padding_reduce_the_maximum_length(
    edited: Callable[..., Path],
) -> None:
    place = edited("config.json", model_type="roberta", pad_token_id=1)
    assert Tokenizer(place).positions == 126


@pytest.mark.parametrize("form", ["null", "absent", "absent in another class"])
def test_a_chat_template_writes_no_token_that_the_adapters_tokenizer_lacks(
    tiny_llama: Path, tmp_path: Path, form: str
) -> None:
    from transformers import AutoTokenizer

    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    base_files, own = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(tiny_llama, base_files)
    kept = AutoTokenizer.from_pretrained(tiny_llama)
    kept.bos_token, kept.chat_template = kept.eos_token, template
    kept.save_pretrained(base_files)
    kept.bos_token = None
    kept.save_pretrained(own)
    with edited_json(own / "tokenizer_config.json") as settings:
        if form != "null":
            del settings["bos_token"]
        if form == "absent in another class":
            settings["tokenizer_class"] = "LlamaTokenizer"
    base = Tokenizer(base_files)
    message = [{"role": "user", "content": "Hello"}]
    start = base.special_tokens["bos_token"]
    assert base.render_chat(message) == f"{start}Hello"
    inherits = form == "absent in another class"
    assert Tokenizer(own, base).render_chat(message) == (f"{start}Hello" if inherits else "Hello")


@pytest.mark.parametrize("own_words", [True, False], ids=["tokenizer", "settings alone"])
def test_special_tokens_in_texts_are_plain_text_if_the_settings_split_them(
    tiny_llama: Path, tmp_path: Path, own_words: bool
) -> None:
    from transformers import AutoTokenizer

    place = tmp_path / "adapter"
    theirs = AutoTokenizer.from_pretrained(tiny_llama, split_special_tokens=True)
    theirs.save_pretrained(place)
    assert json.loads((place / "tokenizer_config.json").read_text())["split_special_tokens"]
    if not own_words:
        (place / "tokenizer.json").unlink()
    base = Tokenizer(tiny_llama)
    own = Tokenizer(place, base)
    text = "Hello<|im_end|> world"
    expected = theirs(text)["input_ids"]
    end = theirs.convert_tokens_to_ids("<|im_end|>")
    assert own.encode(text) == expected
    assert end not in expected
    assert end in base.encode(text)
    assert own.own_words
    assert not own.same_words(base)
    assert own.eos_ids == base.eos_ids
    messages = [{"role": "user", "content": text}]
    rendered = theirs.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    assert own.encode_chat(messages) == rendered


def test_a_long_text_of_few_tokens_is_not_taken_for_one_of_many(tmp_path: Path) -> None:
    words = WordLevel({"x" * 200: 0, "y": 1, "?": 2}, unk_token="?")
    tokenizer = FastTokenizer(words)
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    exceeds = Tokenizer(tmp_path).exceeds
    assert not exceeds(" ".join(["x" * 200] * 20), 20)
    assert exceeds("y " * 1000, 20)
    assert not exceeds("y " * 150, 20)  # short enough to count all of it
