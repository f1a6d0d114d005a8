"""The provider and the device that run a session, as recorded in certificates."""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import onnxruntime

from loradeploy.bundle.proof.provider import Device, ProviderFacts
from loradeploy.runtime.devices.table import BY_NAME, CPU, known

if TYPE_CHECKING:
    from collections.abc import Iterable

# Options of any provider that change results; `precision` and `load_config` are OpenVINO's.
NUMERIC_OPTIONS: Final = frozenset(
    {
        "use_tf32",
        "trt_fp16_enable",
        "trt_bf16_enable",
        "trt_int8_enable",
        "trt_fp8_enable",
        "precision",
        "load_config",
        "enable_htp_fp16_precision",
        "AllowLowPrecisionAccumulationOnGPU",
        "migraphx_fp16_enable",
        "migraphx_bf16_enable",
        "migraphx_int8_enable",
        "migraphx_fp8_enable",
    }
)
_NVIDIA: Final = Path("/proc/driver/nvidia/gpus")
_NVIDIA_ID: Final = 0x10DE
_PROCESSORS: Final = Path("/proc/cpuinfo")


def facts_of(session: onnxruntime.InferenceSession) -> ProviderFacts:
    """The provider that runs `session`, its fallback providers, its device and its options."""
    chain = tuple(session.get_providers())
    options = session.get_provider_options().get(chain[0], {})
    there = [device for device in _input_devices(session) if device.ep_name == chain[0]]
    return _facts(chain, options, there)


def facts_of_chain(chain: Sequence[tuple[str, Mapping[str, Any]]]) -> ProviderFacts:
    """The facts of a session that is opened with the providers `chain`, as from `resolve`."""
    names = [name for name, _ in chain]
    names += [] if CPU in names else [CPU]
    return _facts(tuple(names), chain[0][1], [])


def label_of(chain: Sequence[str], options: Mapping[str, Any]) -> str:
    """The command line's name of the first provider in `chain`, which has ONNX Runtime's names.

    A short name implies fallback providers, so it is used only for a chain that contains them. A
    device number other than 0 follows after a colon.
    """
    first = chain[0]
    row = known(first)
    behind = all(BY_NAME[other].full in chain for other in row.before)
    name = row.name if behind else first
    number = _number(first, options)
    return f"{name}:{number}" if number else name


def _number(provider: str, options: Mapping[str, Any]) -> int:
    """The device number in the options of `provider`."""
    number = str(options.get(known(provider).device_option or "", 0))
    return int(number) if number.isdecimal() else 0


def _facts(
    chain: tuple[str, ...], options: Mapping[str, Any], there: Sequence[Any]
) -> ProviderFacts:
    first = chain[0]
    found = list(there) or [d for d in _all_devices() if d.ep_name == first]
    number = _number(first, options)
    device = found[number if number < len(found) else 0] if found else None
    version = device.ep_metadata.get("version") if device is not None else None
    return ProviderFacts(
        provider=label_of(chain, options),
        chain=chain,
        version=version or onnxruntime.__version__,
        device=None if device is None else device_facts(device.device),
        options={k: str(v) for k, v in sorted(options.items()) if k in NUMERIC_OPTIONS},
    )


def _all_devices() -> Iterable[Any]:
    devices: Iterable[Any] = onnxruntime.get_ep_devices()
    return devices


def _input_devices(session: onnxruntime.InferenceSession) -> list[Any]:
    """The devices of the session's inputs; empty if onnxruntime does not report them."""
    devices = getattr(session, "get_input_epdevices", list)  # onnxruntime 1.24 or later
    try:
        return [device for device in devices() if device is not None]
    except Exception:  # onnxruntime's errors have no common base; the device is optional
        return []


def device_facts(hardware: Any) -> Device:
    """The device described by onnxruntime's `OrtHardwareDevice`."""
    kind = hardware.type.name
    return Device(
        kind=kind,
        vendor=hardware.vendor,
        vendor_id=hardware.vendor_id,
        device_id=hardware.device_id,
        name=_name(kind, hardware.vendor_id, dict(hardware.metadata)),
    )


def _name(kind: str, vendor: int, metadata: Mapping[str, str]) -> str | None:
    """The device's model name, from Windows, /proc/cpuinfo, or NVIDIA's driver."""
    if described := metadata.get("Description"):
        return described
    if kind == "CPU":
        return processor()
    return _nvidia_name(metadata.get("pci_bus_id")) if vendor == _NVIDIA_ID else None


def _nvidia_name(bus: str | None) -> str | None:
    """The name of the GPU at the PCI address `bus`; without an address, if all have one name."""
    names = {}
    for file in _NVIDIA.glob("*/information"):
        for line in _lines(file):
            if line.startswith("Model:"):
                names[file.parent.name.lower()] = line.partition(":")[2].strip()
    if bus is not None:
        return next((name for place, name in names.items() if place.endswith(bus.lower())), None)
    return names.popitem()[1] if len(set(names.values())) == 1 else None


def processor() -> str:
    """The processor's model name, on Linux from /proc/cpuinfo."""
    for line in _lines(_PROCESSORS):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or "unknown"


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
