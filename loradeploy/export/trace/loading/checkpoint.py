"""Load the PyTorch model to trace: a checkpoint with the head of the task."""

from __future__ import annotations

import contextlib
import re
import traceback
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.adapter.tasks import CLASSIFICATIONS, SEQUENCE_CLASSIFICATION, VISION_TOWER
from loradeploy.bundle.model_config import model_config
from loradeploy.bundle.text.tokenizer_files import SETTINGS_NAME, TOKENIZER_NAME
from loradeploy.errors import (
    ExportError,
    MissingDependencyError,
    ModelError,
    kind_and_line,
    listed_names,
    shortened,
)
from loradeploy.export.files.tokenizers import OLDER_TOKENIZERS
from loradeploy.export.tasks import auto_class, own_task
from loradeploy.export.towers import tower_kind
from loradeploy.export.trace.loading.file_memory import Scratch, takes_file, weights_in_file
from loradeploy.export.trace.loading.image_text import family_of, vision_part
from loradeploy.export.trace.loading.towers import make_tower, text_form
from loradeploy.lora.base.architectures import untraceable
from loradeploy.lora.base.checkpoint import pad_token
from loradeploy.lora.base.loading import from_config, from_pretrained, load_pretrained
from loradeploy.lora.quiet import quiet

if TYPE_CHECKING:
    import torch

# Settings of config.json that change no result, but would prevent tracing with other values.
_SETTINGS: Final[Mapping[str, Any]] = {"return_dict": True, "chunk_size_feed_forward": 0}
_COLOR: Final = re.compile(r"\x1b\[\d*m")


def load_model(
    directory: Path,
    task: str,
    *,
    labels: int | None = None,
    brought: Collection[str] = (),
    meta: bool = False,
    scratch: Scratch | None = None,
) -> tuple[torch.nn.Module, tuple[str, ...]]:
    """Load the checkpoint in `directory` with the task's head, in fp32 and eval mode.

    A head that the checkpoint lacks is set to zero, so that exports of the same checkpoint are
    equal; the second value has the names of its parameters. A pooler that an encoder's checkpoint
    lacks is removed, unless it is part of a classifier's head or an adapter has it. `brought`: the
    names of parameters in adapters. With `meta` only the config is read, and the modules have
    shapes but no values. For a two-tower model it is the tower of the task (`towers.make_tower`).
    `scratch`: where the weights of a large checkpoint are kept in a temporary file; None: nowhere.

    Raises:
        ModelError: transformers cannot load the checkpoint, or it lacks more than a head.
        MissingDependencyError: torch or transformers is not installed.
    """
    try:
        import torch
        import transformers
    except ImportError as problem:
        raise MissingDependencyError(
            f"exporting a checkpoint needs {problem.name}: pip install 'loradeploy[export]'"
        ) from None
    changes = {**_SETTINGS} if labels is None else {**_SETTINGS, "num_labels": labels}
    try:
        with quiet():
            config = from_pretrained(transformers.AutoConfig, directory, **changes)
            for own in (config, config.get_text_config()):
                _check_traceable(own.model_type, directory)
            family_of(config.to_dict(), task)
            auto = getattr(transformers, auto_class(task, config.to_dict()))
            kind = tower_kind(config.to_dict(), task)
            if task == SEQUENCE_CLASSIFICATION:
                text = config.get_text_config()
                known = getattr(text, "pad_token_id", None) is not None
                config.pad_token_id = pad_token(text, None if known else _tokenizer(directory))
            if meta:
                with torch.device("meta"):
                    skeleton = from_config(auto, config, directory)
                return skeleton if kind is None else make_tower(skeleton, kind), ()
            loading: AbstractContextManager[None] = contextlib.nullcontext()
            if scratch is not None and takes_file(directory, scratch):
                loading = weights_in_file(scratch.directory)
            with loading:
                loaded = load_pretrained(
                    auto,
                    directory,
                    config=config,
                    dtype=torch.float32,
                    # A head with another number of labels is not the checkpoint's.
                    ignore_mismatched_sizes=labels is not None,
                )
    except (MemoryError, ModelError, ExportError):
        raise
    except Exception as problem:  # transformers raises errors of many types
        raise ModelError(_unloadable(directory, task, problem)) from None
    model = loaded.model.eval()
    zeroed = _zero_head(model, set(loaded.lacking), directory, task, brought)
    if kind is None:
        return (vision_part(model) if task == VISION_TOWER else model), zeroed
    padded = kind.padded
    form = text_form(config.text_config, _tokenizer(directory), directory) if padded else None
    return make_tower(model, kind, form).eval(), zeroed


def _check_traceable(model_type: str, directory: Path) -> None:
    """Raise ModelError for an architecture that is known to be untraceable, before loading it."""
    if (reason := untraceable(model_type)) is not None:
        raise ModelError(f"{directory} {reason}")


def _unloadable(directory: Path, task: str, problem: Exception) -> str:
    """Why transformers does not load the checkpoint, and what to do about it."""
    if "Unrecognized configuration class" in str(problem):
        config = model_config(directory, error=ModelError)
        own = own_task(config)
        advice = f'give `task="{own}"`' if own not in (None, task) else "give another `task`"
        named = config.get("model_type")
        return f"{directory} ({shortened(str(named), 40)}) cannot be loaded for {task}: {advice}"
    return f"{directory} cannot be loaded for {task}: {root_cause(problem)}"


def _tokenizer(directory: Path) -> Any:
    """The checkpoint's tokenizer; None if it has none that transformers can read."""
    from transformers import AutoTokenizer

    names = (TOKENIZER_NAME, SETTINGS_NAME, *OLDER_TOKENIZERS)
    if not any((directory / name).is_file() for name in names):
        return None  # transformers would make an empty one
    try:
        return from_pretrained(AutoTokenizer, directory)
    except ModelError:
        raise
    except Exception:  # any error of its readers
        return None


def _zero_head(
    model: Any, lacking: set[str], directory: Path, task: str, brought: Collection[str]
) -> tuple[str, ...]:
    """Zero the head's parameters, and those in adapters, that the checkpoint lacks.

    Raises:
        ModelError: the checkpoint lacks other parameters too.
    """
    import torch

    bare = model is model.base_model
    if bare and getattr(model, "pooler", None) is not None:
        # An encoder that was trained without its pooler is exported without it.
        unpooled = {name for name in lacking if name.startswith("pooler.")}
        if unpooled and unpooled.isdisjoint(brought):
            model.pooler = None
            lacking = lacking - unpooled
    # A classifier's head may be untrained, and a pooler is part of it.
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
            f" no complete checkpoint, or one for another task than {task} (`task`)"
        )
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name in lacking:
            parameters[name].zero_()
    return tuple(sorted(lacking))


def root_cause(problem: BaseException) -> str:
    """The root cause of an error in one line, without the advice and colors that torch adds.

    For an error without a message, or with a key only, the line has the function that raised it.
    """
    while problem.__cause__ is not None:
        problem = problem.__cause__
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    if lines and not isinstance(problem, AssertionError | LookupError):
        return shortened(_COLOR.sub("", lines[0]), 200)
    frames = traceback.extract_tb(problem.__traceback__)
    where = f" in {frames[-1].name} of {Path(frames[-1].filename).name}" if frames else ""
    return f"{kind_and_line(problem)}{where}"
