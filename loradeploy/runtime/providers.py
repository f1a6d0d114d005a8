"""ONNX Runtime's execution providers: what they are called, where they come from, what they need.

A provider is named as on the command line ("cuda", or "cuda:1" for the second device) or as ONNX
Runtime does ("CUDAExecutionProvider"), alone or with its options: ("cuda", {"device_id": 1}).
"""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import UsageError, listed_names, shown
from loradeploy.printable import logger_of

if TYPE_CHECKING:
    import onnxruntime

logger = logger_of(__name__)

# The name of a provider, alone or with options for it.
Provider = str | tuple[str, Mapping[str, Any]]
# As ONNX Runtime takes them.
Resolved = tuple[str, dict[str, Any]]

_SUFFIX: Final = "ExecutionProvider"
CPU: Final = f"CPU{_SUFFIX}"


@dataclass(frozen=True)
class KnownProvider:
    """An execution provider.

    `name`: that of the command line. `full`: ONNX Runtime's. `package`: that brings it.
    `device`: where it keeps tensors, in ONNX Runtime's words; factors and caches live there.
    `device_option`: its option for the number of a device; None where it has none.
    `before`: the providers, by name, that take over the operators which it has no kernels for.
    """

    name: str
    full: str
    package: str
    device: str = "cpu"
    device_option: str | None = None
    before: tuple[str, ...] = ()


KNOWN: Final = (
    KnownProvider("cpu", CPU, "onnxruntime"),
    KnownProvider("cuda", f"CUDA{_SUFFIX}", "onnxruntime-gpu", "cuda", "device_id"),
    KnownProvider(
        "tensorrt", f"Tensorrt{_SUFFIX}", "onnxruntime-gpu", "cuda", "device_id", ("cuda",)
    ),
    KnownProvider("directml", f"Dml{_SUFFIX}", "onnxruntime-directml", device_option="device_id"),
    KnownProvider("openvino", f"OpenVINO{_SUFFIX}", "onnxruntime-openvino"),
    KnownProvider("qnn", f"QNN{_SUFFIX}", "onnxruntime-qnn"),
    KnownProvider("rocm", f"ROCM{_SUFFIX}", "onnxruntime-rocm", device_option="device_id"),
)
_BY_NAME: Final = {provider.name: provider for provider in KNOWN}
_BY_FULL_NAME: Final = {provider.full: provider for provider in KNOWN}
# Distributions of ONNX Runtime, which write the same files.
PACKAGES: Final = tuple(dict.fromkeys(provider.package for provider in KNOWN))


def resolve(providers: Sequence[Provider] | None) -> list[Resolved]:
    """What ONNX Runtime is to be given for `providers`; the CPU's where there is None.

    A short name brings those that stand behind it: "tensorrt" is TensorRT, then CUDA.

    Raises:
        UsageError: no provider, one that is not installed, or a device of a provider without any.
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
        known = _BY_FULL_NAME.get(full)
        if device is not None:
            if known is None or known.device_option is None:
                raise UsageError(f"{shown(name)}: {full} has no devices to choose by number")
            other_device = options.get(known.device_option, device)
            if str(other_device) != str(device):
                raise UsageError(f"{shown(name)}: its options choose device {shown(other_device)}")
            options = {known.device_option: device, **options}
        if named.setdefault(full, options) != options:
            raise UsageError(f"providers has {full} twice, with different options")
        if known is not None and full != name.partition(":")[0]:
            implied[full] = tuple(_BY_NAME[other].full for other in known.before)
    found: dict[str, dict[str, Any]] = {}
    for full, options in named.items():
        found[full] = options
        number = {key: options[key] for key in ("device_id",) if key in options}
        for other in implied.get(full, ()):
            if other not in named:
                found.setdefault(other, dict(number))
    check_installed(found)
    return list(found.items())


def split_device(name: str) -> tuple[str, int | None]:
    """ONNX Runtime's name of the provider `name`, and the number of a device behind a colon.

    What is known under neither name stays as it is.
    """
    short, colon, number = name.partition(":")
    if colon and not number.isdecimal():
        raise UsageError(f"{shown(name)} is no provider: give NAME or NAME:NUMBER, as in cuda:1")
    device = int(number) if colon else None
    known = _BY_NAME.get(short.lower())
    if known is not None:
        return known.full, device
    for full in (*_BY_FULL_NAME, *available()):
        if short.lower() in (full.lower(), full.removesuffix(_SUFFIX).lower()):
            return full, device
    return short, device


def full_name(name: str) -> str:
    """ONNX Runtime's name of a provider, with the number of its device where it has one."""
    full, device = split_device(name)
    return full if device is None else f"{full}:{device}"


def available() -> list[str]:
    """The providers that this ONNX Runtime has, those of registered libraries behind its own."""
    import onnxruntime

    return list(dict.fromkeys([*onnxruntime.get_available_providers(), *plugin_devices()]))


def plugin_devices() -> dict[str, list[Any]]:
    """The devices of providers that come from registered libraries, by provider."""
    import onnxruntime

    devices: list[Any] = getattr(onnxruntime, "get_ep_devices", list)()
    built_in = {CPU, *_BY_FULL_NAME}
    found: dict[str, list[Any]] = {}
    for device in devices:
        if device.ep_name not in built_in:
            found.setdefault(device.ep_name, []).append(device)
    return found


def check_installed(names: Sequence[str] | Mapping[str, Any]) -> None:
    """Raise UsageError unless this ONNX Runtime has every provider of `names`, its own names."""
    present = available()
    for name in names:
        if name in present:
            continue
        known = _BY_FULL_NAME.get(name)
        advice = (
            "see https://onnxruntime.ai/docs/execution-providers for where it is"
            if known is None
            else f"pip install {known.package} in place of the onnxruntime there is"
        )
        raise UsageError(f"this onnxruntime has no {name!r}, it has {', '.join(present)}: {advice}")


def device_of(session: onnxruntime.InferenceSession) -> tuple[str, int]:
    """Where the session's first provider keeps tensors, in ONNX Runtime's words: device and id."""
    full = session.get_providers()[0]
    known = _BY_FULL_NAME.get(full)
    if known is None or known.device == "cpu":
        return "cpu", 0
    options = session.get_provider_options().get(full, {})
    return known.device, int(options.get(known.device_option or "", 0))


def needs_cuda(names: Sequence[str]) -> bool:
    """Whether one of the providers `names`, ONNX Runtime's names, needs the CUDA libraries."""
    return any(name in _BY_FULL_NAME and _BY_FULL_NAME[name].device == "cuda" for name in names)


def preload_cuda() -> None:
    """Load the CUDA libraries that pip installed, which onnxruntime (1.31) does not find itself."""
    import onnxruntime

    preload = getattr(onnxruntime, "preload_dlls", None)
    if preload is not None:
        with contextlib.redirect_stdout(io.StringIO()) as said:  # it prints what is missing
            preload()
        for line in said.getvalue().splitlines():
            logger.debug("%s", line)


def add_plugins(options: onnxruntime.SessionOptions, providers: Sequence[Resolved]) -> bool:
    """Put `providers` into `options` where one comes from a registered library; whether one does.

    Such a provider is not started by its name: ONNX Runtime takes its devices, in the options.

    Raises:
        UsageError: providers that ONNX Runtime takes by name alone stand beside one of a library.
    """
    devices = plugin_devices()
    if not any(name in devices for name, _ in providers):
        return False
    for name, given in providers:
        text = {key: str(value) for key, value in given.items()}
        if name in devices:
            options.add_provider_for_devices(devices[name], text)
        elif name != CPU:  # which is there by itself, behind all others
            raise UsageError(
                f"{name} and {listed_names(devices)} cannot be given together by name: put them"
                " into session_options, with add_provider_for_devices"
            )
    return True


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
