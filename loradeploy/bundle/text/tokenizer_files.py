"""Read and check the tokenizer files of a checkpoint or an adapter.

tokenizer.json             the file of the `tokenizers` library: the vocabulary and the rules
tokenizer_config.json      the special tokens by role, the padding side, optionally a chat template
special_tokens_map.json    the special tokens, in older checkpoints
chat_template.jinja        the chat template, in newer ones (in processors, chat_template.json)
generation_config.json     the tokens that end a text (else in config.json), and other settings
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.bundle.model_config import context_length
from loradeploy.bundle.text.chat import MAX_TEMPLATE_BYTES, template_source
from loradeploy.errors import BundleError, shown
from loradeploy.files import optional_json, read_text

TOKENIZER_NAME: Final = "tokenizer.json"
TEMPLATE_NAME: Final = "chat_template.jinja"
GENERATION_NAME: Final = "generation_config.json"
SETTINGS_NAME: Final = "tokenizer_config.json"
SPECIAL_NAME: Final = "special_tokens_map.json"
ADDED_NAME: Final = "added_tokens.json"
# In tokenizer_config.json only: whether special tokens in a text are plain characters.
SPLIT_NAME: Final = "split_special_tokens"
# In tokenizer_config.json: the model inputs that transformers' tokenizer returns.
INPUT_NAMES: Final = "model_input_names"
_TEMPLATE_OF_PROCESSOR: Final = "chat_template.json"
_ROLES: Final = tuple(
    f"{role}_token" for role in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")
)
# The classes of transformers for any tokenizer, not for one model.
_GENERIC_CLASSES: Final = ("PreTrainedTokenizerFast", "TokenizersBackend")
# transformers writes 10³⁰ if a tokenizer has no limit.
_NO_LIMIT: Final = 10**9
_LARGEST_ID: Final = 2**31 - 1


def special_tokens_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens by role. In files, each is a text or an object with its content."""
    tokens = {}
    for role in _ROLES:
        value = settings.get(role)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            tokens[role] = text
    return tokens


def roles_without_token(settings: Mapping[str, Any]) -> frozenset[str]:
    """The roles for which a tokenizer with these `settings` has no token.

    transformers writes removed tokens as null. Its generic classes only have tokens that the file
    names; other classes have default tokens (LlamaTokenizer's <s>).
    """
    named_only = settings.get("tokenizer_class") in _GENERIC_CLASSES
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
        processor = optional_json(directory / _TEMPLATE_OF_PROCESSOR, error=BundleError)
        source = template_source(processor.get("chat_template"))
    return source


def token_ids(values: Mapping[str, Any], name: str, file: Path) -> tuple[int, ...]:
    """The token ids under `name` in `values`, read from `file`; negative ones are left out."""
    value = values.get(name)
    listed = [] if value is None else value if isinstance(value, list) else [value]
    if not all(type(token) is int and token <= _LARGEST_ID for token in listed):
        raise BundleError(f"{file}: {name} is {shown(value)}, which is not an id of a token")
    return tuple(token for token in listed if token >= 0)


def positions_of_model(config: Mapping[str, Any], file: Path) -> int | None:
    """The number of tokens that the model has positions for, from its `config`, read from `file`.

    Raises:
        BundleError: it is below 1.
    """
    positions = context_length(config)
    if positions is not None and positions < 1:
        raise BundleError(f"{file}: {positions} positions, which leaves no room for a token")
    return positions


def max_length_of(positions: int | None, settings: Mapping[str, Any], file: Path) -> int | None:
    """The maximum number of tokens of a text: `positions`, or fewer if `settings` say so.

    `settings`: the contents of tokenizer_config.json, read from `file`.

    Raises:
        BundleError: the settings allow no tokens.
    """
    limits = [] if positions is None else [positions]
    own = settings.get("model_max_length")
    if isinstance(own, int | float) and own < _NO_LIMIT:
        if own < 1:
            raise BundleError(
                f"{file}: model_max_length is {own}, which leaves no room for a token"
            )
        limits.append(int(own))
    return min(limits, default=None)
