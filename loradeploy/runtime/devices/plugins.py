"""Plugin providers, whose library is not part of ONNX Runtime: register it, choose devices.

ONNX Runtime does not start such a provider by its name: the devices that the library found must be
added to a session's options. Providers are tried before the options are changed.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from loradeploy.errors import UsageError, first_line
from loradeploy.printable import logger_of
from loradeploy.runtime.devices.quiet import unlogged
from loradeploy.runtime.devices.starting import TINY_GRAPH, check_starts
from loradeploy.runtime.devices.table import CPU, DEVICE_NUMBER, Plugin, known

if TYPE_CHECKING:
    import onnxruntime

logger = logger_of(__name__)

# Session option with the providers that were added, so that it can be reused for another session.
_CHOSEN: Final = "loradeploy.providers"
_LIBRARY: Final = "library_path"  # in the metadata of a plugin's device
_registering: Final = threading.Lock()


def plugin_devices() -> dict[str, list[Any]]:
    """The devices of registered libraries' providers, by ONNX Runtime's provider name."""
    import onnxruntime

    found: dict[str, list[Any]] = {}
    for device in onnxruntime.get_ep_devices():
        if _LIBRARY in device.ep_metadata:
            found.setdefault(device.ep_name, []).append(device)
    return found


def is_installed(plugin: Plugin) -> bool:
    """Whether the plugin's package is installed."""
    return importlib.util.find_spec(plugin.module) is not None


def register(full: str, plugin: Plugin) -> bool:
    """Register the library of the provider `full`, if it is not; return whether it is installed.

    Raises:
        UsageError: ONNX Runtime cannot load the library.
    """
    import onnxruntime

    with _registering:
        if full in plugin_devices():
            return True
        if not is_installed(plugin):
            return False
        try:
            library = importlib.import_module(plugin.module).get_library_path()
            with unlogged():
                onnxruntime.register_execution_provider_library(full, os.fspath(library))
        except Exception as problem:  # onnxruntime's exceptions share no base but this
            if "already registered" not in str(problem):
                raise UsageError(
                    f"onnxruntime {onnxruntime.__version__} does not load {plugin.package}:"
                    f" {first_line(problem)}"
                ) from None
        return True


def add_started(
    options: onnxruntime.SessionOptions, providers: Sequence[tuple[str, Mapping[str, Any]]]
) -> list[tuple[str, dict[str, Any]]] | None:
    """Return the `providers` that start, or add them to `options` if one is a plugin.

    A provider that does not start is skipped with a logged warning if `providers` contains the
    CPU's too. None means that they are in the options, possibly from an earlier call.

    Raises:
        UsageError: a provider does not start, one cannot be combined with the plugin, or the
            options have other providers from an earlier call.
    """
    import onnxruntime

    devices = plugin_devices()
    by_name = set(onnxruntime.get_available_providers()) - devices.keys()
    fallback = any(name == CPU for name, _ in providers)
    started: list[tuple[str, dict[str, str], Any]] = []
    for name, given in providers:
        text = {key: str(value) for key, value in given.items()}
        try:
            device = None if name in by_name else _device(name, text, devices)
            if name != CPU:
                check_starts(name, text, device)
        except UsageError as problem:
            if not fallback:
                raise UsageError(f"{problem}. Or name {CPU} as well to run on the CPU.") from None
            logger.warning("%s; running without it", problem)
        else:
            started.append((name, text, device))
    if all(device is None for _, _, device in started):
        if chosen_before(options) is not None:
            raise _used_before()
        given_by_name = {name: dict(given) for name, given in providers}
        return [(name, given_by_name[name]) for name, _, _ in started]
    if _are_chosen(options, started):
        return None
    for name, text, device in started:
        if device is not None:
            options.add_provider_for_devices([device], text)
        elif name != CPU:  # which is always the last fallback
            _add(options, name, text)
    return None


def _device(name: str, options: dict[str, str], devices: Mapping[str, Sequence[Any]]) -> Any:
    """Remove the device number from `options` and return that device; the first by default."""
    found = devices.get(name, ())
    number = int(options.pop(DEVICE_NUMBER, 0))
    if not found:
        raise UsageError(
            f"{name} is installed and finds no device here. It needs {known(name).needs}"
        )
    if number >= len(found):
        raise UsageError(f"{name} has no device {number}: it has {len(found)}, counted from 0")
    return found[number]


def _are_chosen(
    options: onnxruntime.SessionOptions, started: Sequence[tuple[str, dict[str, str], Any]]
) -> bool:
    """Whether `options` have these providers from an earlier session; otherwise record them."""
    chosen = json.dumps(
        [
            (name, text, None if device is None else sorted(device.ep_metadata.items()))
            for name, text, device in started
        ],
        sort_keys=True,
    )
    before = chosen_before(options)
    if before is None:
        options.add_session_config_entry(_CHOSEN, chosen)
        return False
    if before != chosen:
        raise _used_before()
    return True


def _used_before() -> UsageError:
    return UsageError(
        "these session_options still contain the providers of an earlier session: give new"
        " SessionOptions"
    )


def chosen_before(options: onnxruntime.SessionOptions) -> str | None:
    """The record of `add_started` in the options; None if it added no providers."""
    try:
        return str(options.get_session_config_entry(_CHOSEN))
    except RuntimeError:  # raised if there is no such entry
        return None


def _add(options: onnxruntime.SessionOptions, name: str, text: Mapping[str, str]) -> None:
    """Add a built-in provider to options with a plugin."""
    try:
        with unlogged():
            options.add_provider(name, text)
    except Exception as problem:  # onnxruntime's exceptions share no base but this
        raise UsageError(
            f"{name} cannot be used together with a plugin here: {first_line(problem)}. It needs"
            f" {known(name).needs}"
        ) from None


def providers_in(options: onnxruntime.SessionOptions) -> list[str]:
    """The providers of a session with these options, in order, by ONNX Runtime's names.

    Raises:
        UsageError: one of them does not start.
    """
    import onnxruntime

    profiling, optimized = options.enable_profiling, options.optimized_model_filepath
    options.enable_profiling, options.optimized_model_filepath = False, ""
    try:
        with unlogged():
            session = onnxruntime.InferenceSession(TINY_GRAPH, options, enable_fallback=0)
    except Exception as problem:  # onnxruntime's exceptions share no base but this
        raise UsageError(
            f"the providers in session_options do not start here: {first_line(problem)}"
        ) from None
    finally:
        options.enable_profiling, options.optimized_model_filepath = profiling, optimized
    return list(session.get_providers())
