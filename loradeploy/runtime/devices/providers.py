"""Resolve the names of execution providers, and check that they are installed.

A provider is named as on the command line ("cuda", or "cuda:1" for the second device) or as in ONNX
Runtime ("CUDAExecutionProvider"), alone or with options: ("cuda", {"device_id": 1}).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from loradeploy.bundle.proof.provider import SUFFIX
from loradeploy.errors import UsageError, shown
from loradeploy.printable import logger_of
from loradeploy.runtime.devices.plugins import plugin_devices, register
from loradeploy.runtime.devices.table import BY_FULL_NAME, BY_NAME, CPU, known

if TYPE_CHECKING:
    import onnxruntime

logger = logger_of(__name__)

# A provider's name, alone or with options.
Provider = str | tuple[str, Mapping[str, Any]]
# ONNX Runtime's name and options.
Resolved = tuple[str, dict[str, Any]]

_ON = ("1", "true")  # values that ONNX Runtime accepts as true


def resolve(providers: Sequence[Provider] | None) -> list[Resolved]:
    """The names and options for ONNX Runtime; the CPU's if `providers` is None.

    A short name implies fallback providers: "tensorrt" is TensorRT, then CUDA. The library of a
    plugin is registered.

    Raises:
        UsageError: no provider, one that is not installed, a device number that is invalid or for a
            provider without devices, or an option that captures runs, which a session cannot
            replay.
    """
    if providers is None:
        return [(CPU, {})]
    if isinstance(providers, str) or not isinstance(providers, Sequence):
        raise UsageError(f"providers is {shown(providers)}: give a list of names")
    if not providers:
        raise UsageError("providers is empty: nothing would run the graph")
    named: dict[str, dict[str, Any]] = {}
    implied: dict[str, tuple[str, ...]] = {}
    for provider in providers:
        name, options = _named(provider)
        full, device = split_device(name)
        row = known(full)
        if device is not None:
            if row.device_option is None:
                raise UsageError(f"{shown(name)}: {full} has no devices to choose by number")
            other_device = options.get(row.device_option, device)
            if str(other_device) != str(device):
                raise UsageError(f"{shown(name)}: its options choose device {shown(other_device)}")
            options = {row.device_option: device, **options}
        chosen = options.get(row.device_option or "", 0)
        if not str(chosen).isdecimal():
            raise UsageError(
                f"{shown(name)} has {row.device_option} {shown(chosen)}: give the number of a"
                " device, counted from 0"
            )
        if named.setdefault(full, options) != options:
            raise UsageError(f"providers has {full} twice, with different options")
        if full != name.partition(":")[0]:
            implied[full] = tuple(BY_NAME[other].full for other in row.before)
    found: dict[str, dict[str, Any]] = {}
    for full, options in named.items():
        row = known(full)
        if row.captures in options and str(options[row.captures]).lower() in _ON:
            raise UsageError(
                f"{full} with {row.captures}: a session binds other buffers at each run, and the"
                " captured graph would go on reading the first ones: "
                + ("give `capture_graphs` instead" if row.recording else "leave it out")
            )
        found[full] = {**row.options, **options}
        for other in implied.get(full, ()):
            if other not in named:
                device_options = _same_device(options, row.device_option, other)
                found.setdefault(other, {**known(other).options, **device_options})
    check_installed(found)
    return list(found.items())


def recording(asked: Sequence[Resolved]) -> list[Resolved]:
    """The providers `asked`, with the first one set to record runs.

    Raises:
        UsageError: it cannot record runs, or the options set this already.
    """
    (full, options), *others = asked
    row = known(full)
    if not row.recording:
        able = ", ".join(other.name for other in BY_NAME.values() if other.recording)
        raise UsageError(f"`capture_graphs`: {full} captures no runs here: give one of {able}")
    if other := [name for name in row.recording if name in options]:
        raise UsageError(f"`capture_graphs` sets {other[0]} of {full}: leave it out of the options")
    return [(full, {**options, **row.recording}), *others]


def _same_device(options: Mapping[str, Any], option: str | None, other: str) -> dict[str, Any]:
    """The options that choose for `other` the same device as `option` in `options`."""
    theirs = known(other).device_option
    if option is None or theirs is None or option not in options:
        return {}
    return {theirs: options[option]}


def split_device(name: str) -> tuple[str, int | None]:
    """ONNX Runtime's name of the provider `name`, and the device number after a colon, if any.

    An unknown name is returned unchanged.
    """
    short, colon, number = name.partition(":")
    if colon and not number.isdecimal():
        raise UsageError(f"{shown(name)} is not a provider: give NAME or NAME:NUMBER, as in cuda:1")
    device = int(number) if colon else None
    row = BY_NAME.get(short.lower())
    if row is not None:
        return row.full, device
    for full in (*BY_FULL_NAME, *available()):
        if short.lower() in (full.lower(), full.removesuffix(SUFFIX).lower()):
            return full, device
    return short, device


def full_name(name: str) -> str:
    """ONNX Runtime's name of a provider, with its device number if it has one."""
    full, device = split_device(name)
    return full if device is None else f"{full}:{device}"


def available() -> list[str]:
    """The providers of this ONNX Runtime, then those of registered libraries."""
    import onnxruntime

    return list(dict.fromkeys([*onnxruntime.get_available_providers(), *plugin_devices()]))


def check_installed(names: Iterable[str]) -> None:
    """Raise UsageError unless all providers `names`, by ONNX Runtime's names, are installed.

    The library of a plugin is registered. Whether it finds a device is checked when it starts.
    """
    for name in names:
        if name in (present := available()):
            continue
        row = known(name)
        if row.plugin is not None and register(row.full, row.plugin):
            continue
        if row.plugin is not None:
            advice = (
                f"pip install {row.plugin.package} (with --no-deps beside onnxruntime-gpu, which"
                " serves as its onnxruntime)"
            )
        elif row.builds:
            advice = f"pip install {row.builds[0]} in place of the onnxruntime there is"
        else:
            advice = "see https://onnxruntime.ai/docs/execution-providers for where it is"
        raise UsageError(f"this onnxruntime has no {name!r}, it has {', '.join(present)}: {advice}")


def device_of(session: onnxruntime.InferenceSession) -> tuple[str, int]:
    """The device and its id on which the session's first provider keeps tensors."""
    full = session.get_providers()[0]
    row = known(full)
    if row.device == "cpu":
        return "cpu", 0
    options = session.get_provider_options().get(full, {})
    return row.device, int(options.get(row.device_option or "", 0))


def needs_cuda(names: Iterable[str]) -> bool:
    """Whether one of the providers `names`, by ONNX Runtime's names, needs the CUDA libraries."""
    return any(known(name).device == "cuda" for name in names)


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed, which onnxruntime (1.31) does not find itself."""
    import onnxruntime

    with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints what is missing
        onnxruntime.preload_dlls()
    for line in said.getvalue().splitlines():
        logger.debug("%s", line)


def _named(provider: object) -> tuple[str, dict[str, Any]]:
    if isinstance(provider, str):
        return provider, {}
    if isinstance(provider, tuple) and len(provider) == 2:
        name, options = provider
        if isinstance(name, str) and isinstance(options, Mapping):
            return name, dict(options)
    raise UsageError(
        f"a provider is {shown(provider)}: give its name, or a tuple of name and options"
    )
