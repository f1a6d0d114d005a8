"""Write the tokenizer of a bundle: the one that transformers makes from a directory's files.

transformers reads more than tokenizer.json: tokenizer_config.json, added_tokens.json and the class
of the tokenizer change case, accents, leading spaces, added words and the tokens around a text.
Models are trained with the result. The runtime reads only tokenizer.json, so the result is written
there.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.text.tokenizer import Tokenizer
from loradeploy.bundle.text.tokenizer_files import INPUT_NAMES, SETTINGS_NAME, TOKENIZER_NAME
from loradeploy.errors import BundleError, ExportError, ModelError, first_line, shown
from loradeploy.files import optional_json, write_json
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    from tokenizers import Tokenizer as FastTokenizer

logger = logger_of(__name__)

# Files that the tokenizers library does not read, from which transformers makes a tokenizer.json.
OLDER_TOKENIZERS: Final = (
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
)

# Texts in which rules that files disagree about become visible: case, accents (composed and not),
# leading and repeated spaces, numbers, Chinese, wide letters, contractions, line ends.
_PROBES: Final = (
    "Hello World",
    "HELLO wORLD don't DON'T",
    "Été e\u0301te\u0301 Ångström straße ﬁne",
    " leading and  double   spaces ",
    "tabs\tand\nlines\r\n\nend",
    "1234567 3.14 a1b2",
    "中文字 かな 한국어 ＡＢＣ",
    "emoji 🙂🏽 and punctuation?! (a-b_c) .,;",
)


def make_tokenizer(source: Path, output: Path) -> None:
    """Write tokenizer.json to `output`, made from older files of `source`, if it has any."""
    if not any((source / name).is_file() for name in OLDER_TOKENIZERS):
        return
    try:
        _of_transformers(source).backend_tokenizer.save(str(output / TOKENIZER_NAME))
    except Exception as problem:  # transformers is missing, or any error of reading an old format
        logger.warning(
            "no %s could be made of the tokenizer's older files, the bundle takes token ids only:"
            " %s",
            TOKENIZER_NAME,
            problem,
        )


def corrected_tokenizer(source: Path, vocabulary: int) -> FastTokenizer | None:
    """transformers' tokenizer for the files of `source`, if it differs from tokenizer.json.

    None also if transformers is missing or cannot read the files: then tokenizer.json is used as it
    is. `vocabulary`: the model's number of tokens; words beyond it cannot be fed, and are ignored.

    Raises:
        ExportError: transformers' tokenizer has rules in Python that result in other tokens
            (SigLIP's removes case and punctuation).
    """
    try:
        with Tokenizer(source).library() as own:
            found = _of_transformers(source)
    except ModelError:
        logger.warning(
            "%s has a tokenizer with its own Python code, which is not run: the tokens are those"
            " that %s alone makes of a text",
            source,
            TOKENIZER_NAME,
        )
        return None
    except Exception:  # transformers is missing, or any error of its readers
        return None
    made: FastTokenizer | None = getattr(found, "backend_tokenizer", None)
    if made is None:
        _check_same_tokens(source, own, found)
        return None
    made.no_truncation()
    made.no_padding()
    text = first_difference(own, made, vocabulary)
    if text is None:
        return None
    logger.warning(
        "%s makes other tokens of %s than transformers, which reads %s too: the bundle has"
        " transformers' tokenizer",
        source / TOKENIZER_NAME,
        shown(text),
        SETTINGS_NAME,
    )
    return made


def correct_tokenizer(source: Path, output: Path, vocabulary: int) -> None:
    """Write the `corrected_tokenizer` of `source` to `output`, if there is one."""
    made = corrected_tokenizer(source, vocabulary)
    if made is not None:
        made.save(str(output / TOKENIZER_NAME))


def declare_token_types(source: Path, bundle: Path) -> None:
    """Write the names of the inputs that `source`'s tokenizer returns into `bundle`'s settings.

    transformers decides this by the class of the tokenizer, which the runtime does not know.
    """
    file = bundle / SETTINGS_NAME
    settings = optional_json(file, error=BundleError)
    if not (bundle / TOKENIZER_NAME).is_file() or isinstance(settings.get(INPUT_NAMES), list):
        return
    try:
        names = _of_transformers(source).model_input_names
    except Exception as problem:  # transformers is missing, or any error of its readers
        logger.warning("the bundle takes no pairs of texts: %s", first_line(problem))
        return
    write_json(file, settings | {INPUT_NAMES: list(names)})


def _of_transformers(source: Path) -> Any:
    from transformers import AutoTokenizer

    from loradeploy.lora.base.loading import from_pretrained

    return from_pretrained(AutoTokenizer, source)


def _check_same_tokens(source: Path, own: FastTokenizer, found: Any) -> None:
    """Raise ExportError if `found`, in Python, makes other tokens than `own`, tokenizer.json."""
    for text in _PROBES:
        if own.encode(text).ids != list(found(text)["input_ids"]):
            raise ExportError(
                f"{source / TOKENIZER_NAME} makes other tokens of {shown(text)} than transformers'"
                f" {type(found).__name__}, whose rules are in Python and cannot be written into it:"
                f" export a copy without {TOKENIZER_NAME}, and give the bundle token ids"
            )


def first_difference(
    own: FastTokenizer, made: FastTokenizer, vocabulary: int, texts: Iterable[str] = ()
) -> str | None:
    """A text that the two tokenizers encode or decode differently; None if there is none.

    Tried are `texts`, texts in which rules become visible, and the words below `vocabulary`.
    """
    words = {
        token.content
        for tokenizer in (own, made)
        for index, token in tokenizer.get_added_tokens_decoder().items()
        if index < vocabulary
    }
    known = sorted(word for word in words if (made.token_to_id(word) or 0) < vocabulary)
    probes = (
        *texts,
        *_PROBES,
        *(text for word in known for text in (f"Say {word} now", f"Say {word}now")),
    )
    for text in probes:
        one, other = own.encode(text), made.encode(text)
        if one.ids != other.ids or own.decode(one.ids) != made.decode(one.ids):
            return text
    one, other = own.encode(*_PROBES[:2]), made.encode(*_PROBES[:2])
    same = (one.ids, one.type_ids) == (other.ids, other.type_ids)
    return None if same else " and ".join(_PROBES[:2])
