"""The files of a tokenizer as a checkpoint or an adapter has them, read and checked.

tokenizer.json             the `tokenizers` library's own file: the vocabulary and the rules
tokenizer_config.json      the special tokens by role, the padding side, perhaps a chat template
special_tokens_map.json    the special tokens, in older checkpoints
chat_template.jinja        the chat template, in newer ones (chat_template.json, of processors)
generation_config.json     which tokens end a text (config.json where it names none), and settings
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.model_config import context_length
from loradeploy.bundle.text.chat import MAX_TEMPLATE_BYTES, template_source
from loradeploy.errors import BundleError, shown
from loradeploy.files import read_json, read_text

TOKENIZER_NAME: Final = "tokenizer.json"
TEMPLATE_NAME: Final = "chat_template.jinja"
GENERATION_NAME: Final = "generation_config.json"
SETTINGS_NAME: Final = "tokenizer_config.json"
SPECIAL_NAME: Final = "special_tokens_map.json"
ADDED_NAME: Final = "added_tokens.json"
# In tokenizer_config.json alone: whether special tokens in a text are plain characters.
SPLIT_NAME: Final = "split_special_tokens"
# In tokenizer_config.json: the inputs that transformers' tokenizer gives.
INPUT_NAMES: Final = "model_input_names"
_TEMPLATE_OF_PROCESSOR: Final = "chat_template.json"
_ROLES: Final = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# The classes of transformers that are not of one model.
_CLASSES_FOR_ANY: Final = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers writes 10³⁰ where a tokenizer has no limit of its own.
_NO_LIMIT: Final = 10**9
_LARGEST_ID: Final = 2**31 - 1


def optional_json(file: Path) -> dict[str, Any]:
    """The JSON object in `file`, empty where there is no such file."""
    return read_json(file, error=BundleError) if file.exists() else {}


def special_tokens_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role; files hold each as a text or as an object with its content."""
    tokens = {}
    for role in _ROLES:
        value = settings.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def roles_without_token(settings: Mapping[str, Any]) -> frozenset[str]:
    """The roles for which a tokenizer with these `settings` has no token.

    transformers writes those that were removed as null. Its classes for any tokenizer have only
    what is named; others have tokens of their own where nothing is named (LlamaTokenizer's <s>).
    """
    named_only = settings.get("tokenizer_class") in _CLASSES_FOR_ANY
    return frozenset(
        role for role in _ROLES if settings.get(role, None if named_only else "") is None
    )


def chat_template_of(directory: Path, settings: Mapping[str, Any]) -> str | None:
    """The source of the chat template, in the order in which transformers looks for it."""
    file = directory / TEMPLATE_NAME
    if file.exists():
        return read_text(file, error=BundleError, limit=MAX_TEMPLATE_BYTES)
    source = template_source(settings.get("chat_template"))
    if source is None:
        source = template_source(
            optional_json(directory / _TEMPLATE_OF_PROCESSOR).get("chat_template")
        )
    return source


def token_ids(values: Mapping[str, Any], name: str, file: Path) -> tuple[int, ...]:
    """The token ids that `values`, of `file`, has under `name`; a negative one is none."""
    value = values.get(name)
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token <= _LARGEST_ID for token in listed):
        raise BundleError(f"{file}: {name} is {shown(value)}, which is not an id of a token")
    return tuple(token for token in listed if token >= 0)


def positions_of_model(config: Mapping[str, Any], file: Path) -> int | None:
    """How many tokens the model has positions for, by its `config`, which `file` holds.

    Raises:
        BundleError: not one.
    """
    positions = context_length(config)
    if positions is not None and positions < 1:
        raise BundleError(f"{file}: {positions} positions, which leaves none for a token")
    return positions


def max_length_of(positions: int | None, settings: Mapping[str, Any], file: Path) -> int | None:
    """How many tokens a text may have: `positions`, or fewer where `settings`, of `file`, say so.

    Raises:
        BundleError: the settings leave no token of a text.
    """
    limits = [] if positions is None else [positions]
    own = settings.get("model_max_length")
    if isinstance(own, int | float) and own < _NO_LIMIT:
        if own < 1:
            raise BundleError(f"{file}: model_max_length is {own}, which leaves no token of a text")
        limits.append(int(own))
    return min(limits, default=None)
