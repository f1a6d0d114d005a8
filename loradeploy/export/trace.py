"""From a checkpoint to a graph: torch.export and torch.onnx, for each kind of task."""

from __future__ import annotations

import inspect
import logging
import re
import traceback
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import (
    ATTENTION_MASK,
    CLASSIFICATIONS,
    DECODER_INPUT_IDS,
    FEATURE_EXTRACTION,
    IMAGE_CLASSIFICATION,
    INPUT_FEATURES,
    INPUT_IDS,
    PIXEL_VALUES,
    POSITION_IDS,
    SEQ2SEQ_LM,
    SEQUENCE_CLASSIFICATION,
    TOKEN_TYPE_IDS,
    past_name,
    present_name,
)
from loradeploy.errors import (
    ExportError,
    MissingDependencyError,
    ModelError,
    kind_and_line,
    listed_names,
    shortened,
)
from loradeploy.export.original import Original, of_module
from loradeploy.export.patches import traceable
from loradeploy.export.tasks import TASK_TABLE, Task, auto_class, own_task
from loradeploy.export.tidy import tidy
from loradeploy.export.write import read_config
from loradeploy.lora.checkpoint import pad_token
from loradeploy.lora.loading import load_pretrained
from loradeploy.lora.quiet import quiet

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from loradeploy.adapter.adapter import Adapter
    from loradeploy.bundle.sample import Feeds

logger = logging.getLogger(__name__)

OPSET: Final = 23
_COLOUR: Final = re.compile(r"\x1b\[\d*m")
# Every dynamic size of the example is at least 2, or torch.export takes it for a constant.
_BATCH, _SEQUENCE, _PAST = 2, 3, 4
POOLER_OUTPUT: Final = "pooler_output"
WRAPPED: Final = "wrapped"  # the attribute under which the traced model sits


@dataclass(frozen=True, eq=False)
class Cache:
    """One layer's share of a decoder's cache: keys and values [batch, heads, past, head_dim]."""

    key_heads: int
    key_size: int
    value_heads: int
    value_size: int


def load_model(
    directory: Path,
    task: str,
    *,
    labels: int | None = None,
    brought: Collection[str] = (),
    meta: bool = False,
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """The model of the checkpoint in `directory` with the task's head, in fp32 and eval mode.

    A head that the checkpoint lacks is set to zero, so that every export of the same checkpoint is
    the same; its parameters are named in the second value. An encoder that lacks its pooler has
    none, unless that is part of a classifier's head or its parameters are `brought` by adapters.
    With `meta` nothing is read but the config: the modules have shapes and no values.

    Raises:
        ModelError: transformers cannot load it, or it lacks more than a head.
        MissingDependencyError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as problem:
        raise MissingDependencyError(
            f"exporting a checkpoint needs {problem.name}: pip install 'loradeploy[export]'"
        ) from None
    changes: dict[str, Any] = {} if labels is None else {"num_labels": labels}
    try:
        with quiet():
            config = transformers.AutoConfig.from_pretrained(directory, **changes)
            auto = getattr(transformers, auto_class(task, config.to_dict()))
            if task == SEQUENCE_CLASSIFICATION:
                told = config.get_text_config()
                known = told.pad_token_id is not None
                config.pad_token_id = pad_token(told, None if known else _tokenizer(directory))
            if meta:
                with torch.device("meta"):
                    return auto.from_config(config), ()
            loaded = load_pretrained(
                auto,
                directory,
                config=config,
                dtype=torch.float32,
                # A head with another number of labels than the checkpoint's is a head of its own.
                ignore_mismatched_sizes=labels is not None,
            )
    except (MemoryError, ModelError):
        raise
    except Exception as problem:  # transformers raises nearly everything
        raise ModelError(_unloadable(directory, task, problem)) from None
    model = loaded.model.eval()
    return model, _zero_head(model, set(loaded.lacking), directory, task, brought)


def trace(model: torch.nn.Module, task: str) -> ir.Model:
    """The ONNX graph of `model`, tidied; batch, sequence and past are dynamic.

    Decoders: `input_ids`, `attention_mask`, `position_ids` where the model takes them, and the
    cache → `logits` [batch, sequence, vocabulary] and the cache. Encoders: `input_ids`,
    `attention_mask`, `token_type_ids` where the model has several types → `logits` [batch, labels]
    or `last_hidden_state` [batch, sequence, hidden] and `pooler_output` [batch, hidden] where there
    is a pooler. Token classifiers: `logits` [batch, sequence, labels]. Image classifiers:
    `pixel_values` → `logits`. Encoder-decoders: `input_ids` and `attention_mask`, or
    `input_features`, and `decoder_input_ids` → `logits` [batch, target, vocabulary], no cache.

    Raises:
        ExportError: torch.export or torch.onnx refuses the model.
    """
    import torch

    kind = TASK_TABLE[task]
    with quiet(), traceable(), torch.no_grad():
        caches = _caches(model) if kind.cached else ()
        wrapper = _wrapper(model, kind)
        arguments, dynamic, names = _example(model, kind, caches)
        outputs = _outputs(model, kind)
        outputs += [present_name(i, part) for i in range(len(caches)) for part in ("key", "value")]
        try:
            logger.info("tracing %s with torch.export", type(model).__name__)
            program = torch.export.export(wrapper, arguments, dynamic_shapes=dynamic, strict=False)
            logger.info("translating the trace to ONNX")
            onnx_program = torch.onnx.export(
                program,
                dynamo=True,
                opset_version=OPSET,
                input_names=names,
                output_names=outputs,
                optimize=False,
                verify=False,
                verbose=False,
            )
        except Exception as problem:  # torch's own errors have no common base
            raise ExportError(
                f"{type(model).__name__} cannot be traced for {task}: {_root(problem)} (--debug"
                " shows where): give an ONNX file that another exporter made of it"
            ) from problem
    if onnx_program is None:
        raise ExportError(f"torch.onnx gave no graph for {type(model).__name__}")
    logger.info("optimising the graph")
    return tidy(onnx_program.model, prefix=WRAPPED)


def _unloadable(directory: Path, task: str, problem: Exception) -> str:
    """Why transformers does not load the checkpoint, and what to do about it."""
    if "Unrecognized configuration class" in str(problem):
        config = read_config(directory)
        own = own_task(config)
        advice = f"give --task {own}" if own not in (None, task) else "give another --task"
        named = config.get("model_type")
        return f"{directory} ({shortened(str(named), 40)}) cannot be loaded for {task}: {advice}"
    return f"{directory} cannot be loaded for {task}: {_root(problem)}"


def answers(
    model: torch.nn.Module,
    task: str,
    names: Sequence[str],
    feeds: Feeds,
    adapters: Mapping[str, Adapter],
) -> Original | None:
    """What PyTorch gives of the graph's outputs `names` for `feeds`: see `original.of_module`."""
    with quiet():
        return of_module(model, _wrapper(model, TASK_TABLE[task]), names, feeds, adapters)


def _tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer; None where it has none, or none that transformers can read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(directory)
    except Exception:  # whatever its readers raise
        return None


def _zero_head(
    model: Any, lacking: set[str], directory: Path, task: str, brought: Collection[str]
) -> tuple[str, ...]:
    """Zero what the checkpoint lacks and adapters bring; nothing else may be missing."""
    import torch

    bare = model is model.base_model
    if bare and getattr(model, "pooler", None) is not None:
        # An encoder that was trained for something else than its pooler is exported without one.
        unpooled = {name for name in lacking if name.startswith("pooler.")}
        if unpooled and unpooled.isdisjoint(brought):
            model.pooler = None
            lacking = lacking - unpooled
    # Of a classifier the head may be yet to be trained, and a pooler is a part of it.
    classifies = task in CLASSIFICATIONS and not bare
    body = f"{model.base_model_prefix}." if classifies else ""
    missing = sorted(
        name
        for name in lacking.difference(brought)
        if name.startswith(body) and not (classifies and name.startswith(f"{body}pooler."))
    )
    if missing:
        raise ModelError(
            f"{directory} lacks weights of {type(model).__name__}: {listed_names(missing)}: it is"
            f" no complete checkpoint, or one for another task than {task} (--task)"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in lacking:
            parameters[name].zero_()
    return tuple(sorted(lacking))


def _caches(model: Any) -> tuple[Cache, ...]:
    """The cache's layout, from a run of two tokens: every architecture tells it this way."""
    import torch

    ids = torch.ones((1, 2), dtype=torch.int64)
    result = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
    layers = getattr(getattr(result, "past_key_values", None), "layers", None)
    if not layers or any(getattr(layer, "keys", None) is None for layer in layers):
        raise ExportError(
            f"{type(model).__name__} keeps another state than keys and values per layer, which"
            " cannot be exported as a cache yet"
        )
    return tuple(
        Cache(
            key_heads=layer.keys.shape[1],
            key_size=layer.keys.shape[3],
            value_heads=layer.values.shape[1],
            value_size=layer.values.shape[3],
        )
        for layer in layers
    )


def _wrapper(model: Any, kind: Task) -> torch.nn.Module:
    """`model` as a module of positional tensors, in the order of `_example`."""
    import torch
    from transformers.cache_utils import DynamicCache

    names, taken, outputs = _plain_inputs(model, kind), _parameters(model), _outputs(model, kind)
    # The fused rotary embedding needs positions for every row; left to itself, a model makes one.
    rotates = POSITION_IDS in taken and bool(getattr(model.config, "rope_parameters", None))

    class Decoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(
            self, plain: Sequence[torch.Tensor], past: Sequence[tuple[torch.Tensor, torch.Tensor]]
        ) -> tuple[torch.Tensor, ...]:
            cache = DynamicCache([(key, value) for key, value in past])
            feeds = dict(zip(names, plain, strict=True))
            result = self.wrapped(**feeds, past_key_values=cache, use_cache=True)
            present = (part for layer in cache.layers for part in (layer.keys, layer.values))
            return (result.logits, *present)

    class Encoder(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wrapped = model

        def forward(self, plain: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
            feeds: dict[str, Any] = dict(zip(names, plain, strict=True))
            if "use_cache" in taken:
                feeds["use_cache"] = False
            if rotates:
                ids = plain[0]
                feeds[POSITION_IDS] = torch.zeros_like(ids) + torch.arange(ids.shape[1])
            result = self.wrapped(**feeds)
            return tuple(result[name] for name in outputs)

    return Decoder() if kind.cached else Encoder()


def _outputs(model: Any, kind: Task) -> list[str]:
    """What the model gives, the cache apart; an encoder with a pooler gives its output too."""
    pooled = kind.name == FEATURE_EXTRACTION and getattr(model, "pooler", None) is not None
    return [kind.output, POOLER_OUTPUT] if pooled else [kind.output]


def _plain_inputs(model: Any, kind: Task) -> list[str]:
    """The inputs of `model`, the cache apart."""
    taken = _parameters(model)
    if kind.name == IMAGE_CLASSIFICATION:
        return [PIXEL_VALUES]
    if kind.name == SEQ2SEQ_LM:
        heard = INPUT_FEATURES in taken
        source = [INPUT_FEATURES] if heard else [INPUT_IDS, ATTENTION_MASK]
        return [*source, DECODER_INPUT_IDS]
    names = [INPUT_IDS, ATTENTION_MASK]
    if kind.cached and POSITION_IDS in taken:
        names.append(POSITION_IDS)
    types = getattr(model.config, "type_vocab_size", None) or 0
    if not kind.cached and TOKEN_TYPE_IDS in taken and types > 1:
        names.append(TOKEN_TYPE_IDS)
    return names


def _example(
    model: Any, kind: Task, caches: Sequence[Cache]
) -> tuple[tuple[Any, ...], tuple[Any, ...], list[str]]:
    """Example arguments, their dynamic dimensions, and the names of the graph's inputs."""
    import torch

    batch, past = torch.export.Dim("batch"), torch.export.Dim("past")
    # Free to find its limit: encoders' positions end at the length of their embedding table.
    total = torch.export.Dim.AUTO
    sequence = torch.export.Dim("sequence") if kind.cached else total
    dtype = next(model.parameters()).dtype
    ids = torch.ones((_BATCH, _SEQUENCE), dtype=torch.int64)
    held = _PAST if kind.cached else 0
    examples: Mapping[str, tuple[torch.Tensor, dict[int, Any]]] = {
        INPUT_IDS: (ids, {0: batch, 1: sequence}),
        ATTENTION_MASK: (
            torch.ones((_BATCH, held + _SEQUENCE), dtype=torch.int64),
            {0: batch, 1: total},
        ),
        POSITION_IDS: (
            torch.arange(held, held + _SEQUENCE)[None].repeat(_BATCH, 1),
            {0: batch, 1: sequence},
        ),
        TOKEN_TYPE_IDS: (torch.zeros_like(ids), {0: batch, 1: sequence}),
        DECODER_INPUT_IDS: (torch.ones((_BATCH, _PAST), dtype=torch.int64), {0: batch, 1: total}),
    }
    names = _plain_inputs(model, kind)
    sizes = _fixed_sizes(model.config, names[0])
    if sizes is not None:
        examples = {**examples, names[0]: (torch.zeros(_BATCH, *sizes, dtype=dtype), {0: batch})}
    plain = [examples[name][0] for name in names]
    plain_dims = [examples[name][1] for name in names]
    if not kind.cached:
        return (plain,), (plain_dims,), names
    make: Callable[..., torch.Tensor] = torch.ones
    cached = [
        (
            make((_BATCH, layer.key_heads, _PAST, layer.key_size), dtype=dtype),
            make((_BATCH, layer.value_heads, _PAST, layer.value_size), dtype=dtype),
        )
        for layer in caches
    ]
    cached_dims = [({0: batch, 2: past}, {0: batch, 2: past}) for _ in caches]
    names += [past_name(i, part) for i in range(len(caches)) for part in ("key", "value")]
    return (plain, cached), (plain_dims, cached_dims), names


def _fixed_sizes(config: Any, name: str) -> tuple[int, ...] | None:
    """The sizes of an image or of sound, the batch apart; None for another input."""
    if name == PIXEL_VALUES:
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return config.num_channels, height, width
    # Whisper's encoder halves the frames into its positions.
    return (
        (config.num_mel_bins, 2 * config.max_source_positions) if name == INPUT_FEATURES else None
    )


def _parameters(model: Any) -> Mapping[str, Any]:
    return inspect.signature(model.forward).parameters


def _root(problem: BaseException) -> str:
    """What went wrong at the root, in a line: torch wraps it in advice and colours.

    An error that says nothing but its kind, or a key, is told with the function that raised it.
    """
    while problem.__cause__ is not None:
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if lines and not isinstance(problem, AssertionError | LookupError):
        return shortened(_COLOUR.sub("", lines[0]), 200)
    frames = traceback.extract_tb(problem.__traceback__)
    place = f" in {frames[-1].name} of {Path(frames[-1].filename).name}" if frames else ""
    return f"{kind_and_line(problem)}{place}"
