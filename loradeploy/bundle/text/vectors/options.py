"""Options of sentence-transformers' encoder that change how texts are tokenized or run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from loradeploy.errors import BundleError, listed_names, shown

# By task: the output of the model in transformers that the encoder returns.
EXPECTED_OUTPUTS: Final[Mapping[str, str]] = {
    "feature-extraction": "last_hidden_state",
    "sequence-classification": "logits",
}
# Where the files are loaded from.
_LOADING: Final = (
    *("trust_remote_code", "revision", "token", "cache_dir", "local_files_only", "force_download"),
    *("subfolder", "use_auth_token"),
)
# How the model is computed: precision and kernels.
_COMPUTING: Final = ("torch_dtype", "dtype", "attn_implementation", "use_cache", "unpad_inputs")
# The arguments of the tokenizer and of its calls that set the maximum number of tokens.
_TOKENIZER_LIMIT: Final = "model_max_length"
_CALL_LIMIT: Final = "max_length"
# By option of the encoder, the arguments in it that do not change results, or that are applied.
# sentence-transformers 5 renamed model_args, tokenizer_args and config_args.
_APPLIED: Final[Mapping[str, tuple[str, ...]]] = {
    **dict.fromkeys(
        ("model_kwargs", "model_args"),
        (
            *(*_LOADING, *_COMPUTING, "device_map", "low_cpu_mem_usage", "use_safetensors"),
            *("add_pooling_layer", "file_name", "provider", "export", "backend"),
        ),
    ),
    **dict.fromkeys(
        ("processor_kwargs", "tokenizer_args"),
        (*_LOADING, "use_fast", "padding_side", _TOKENIZER_LIMIT),
    ),
    **dict.fromkeys(
        ("config_kwargs", "config_args"),
        (*_LOADING, *_COMPUTING, "use_memory_efficient_attention"),
    ),
}
# The same for calls of the tokenizer.
_CALLS: Final = (
    *("padding", "padding_side", "pad_to_multiple_of", "return_tensors", "truncation"),
    _CALL_LIMIT,
)
# Options with an effect only in encode_query and encode_document.
_BY_TASK: Final = ("query_length", "document_length", "query_expansion")
_TRUNCATIONS: Final = (None, True, "longest_first")


def longest_text(values: Mapping[str, Any], where: Path, output: str) -> int | None:
    """The maximum number of tokens of a text; None if no option sets it.

    `values`: the options of the encoder in sentence_bert_config.json. `output`: the output of the
    model in transformers that the encoder must return.

    Raises:
        BundleError: an option is invalid, or changes results in a way that is not supported.
    """
    _check_ways(values.get("modality_config"), where, output)
    for name in _BY_TASK:
        if values.get(name) is not None:
            raise _refused(where, name, values[name])
    limits = [values.get("max_seq_length")]
    for option, known in _APPLIED.items():
        given = _object(values, option, where, known)
        if option in ("processor_kwargs", "tokenizer_args") and _TOKENIZER_LIMIT in given:
            limits.append(given[_TOKENIZER_LIMIT])
    calls = _object(values, "processing_kwargs", where, None)
    for part in ("common", "text"):  # other modalities and chats are never used
        given = _object(calls, part, where, _CALLS)
        if given.get("truncation") not in _TRUNCATIONS:
            raise _refused(where, "truncation", given["truncation"])
        limits.append(given.get(_CALL_LIMIT))
    found = [limit for limit in limits if limit is not None]
    for limit in found:
        if not (type(limit) is int and limit > 0):
            raise BundleError(f"{where}: max_seq_length is {shown(limit)}")
    return found[-1] if found else None  # the later one overrides the others


def _check_ways(ways: Any, where: Path, output: str) -> None:
    """Raise BundleError unless plain texts are what the encoder takes, and `output` is returned."""
    if not isinstance(ways, Mapping):
        return
    if "text" not in ways:
        raise BundleError(f"{where}: the encoder takes {listed_names(ways)}, and no plain text")
    if "message" in ways:
        raise BundleError(
            f"{where}: the encoder converts texts to messages of a chat (modality_config), which is"
            " not supported"
        )
    way = ways["text"] if isinstance(ways["text"], Mapping) else {}
    for name, expected in (("method", "forward"), ("method_output_name", output)):
        if way.get(name, expected) != expected:
            raise BundleError(f"{where}: {name} is {shown(way[name])}, expected {expected}")


def _object(
    values: Mapping[str, Any], option: str, where: Path, known: tuple[str, ...] | None
) -> Mapping[str, Any]:
    """The object at `option`, whose keys must be `known`; empty if there is none."""
    given = values.get(option)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise BundleError(f"{where}: {option} is {shown(given)}, expected an object")
    for name in given:
        if known is not None and name not in known:
            raise _refused(where, f"{option}.{name}", given[name])
    return given


def _refused(where: Path, name: str, value: Any) -> BundleError:
    return BundleError(
        f"{where}: {name} is {shown(value)}, which is not supported: without it the results would"
        " differ from sentence-transformers"
    )
