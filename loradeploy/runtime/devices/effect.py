"""Check that a device computes the same as the CPU, adapters included, before it is used.

A provider may ignore inputs, have incorrect kernels, or compute at a lower precision than the
bundle, without an error. Therefore, a session on a provider that is not known to be correct runs
the graph with and without a random adapter, on the device and on the CPU. The error of the device
must be small relative to the adapter's effect. The random adapter changes every side input; the
input is longer than the tiles of attention kernels, and a decoder runs one step with its cache.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Final, Protocol

import numpy as np

from loradeploy.bundle.adapter_inputs.changes import change_inputs
from loradeploy.bundle.graph_form import PACKED_BITS
from loradeploy.bundle.model_config import context_length
from loradeploy.bundle.names import INPUT_IDS, PAST, PRESENT
from loradeploy.bundle.sample import Sample
from loradeploy.errors import DeviceError, LoraDeployError
from loradeploy.runtime.devices.table import KnownProvider

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from loradeploy.bundle.manifest import Manifest

PROBE: Final = "the probe of a device"  # its name in the bank, while the session is opened
_RANK: Final = 2
_TOKENS: Final = 40
# Standard deviation of B: with weights of 1 / √in, it changes a layer's output by about a tenth.
_SIZE: Final = 0.05
# The maximum error of the device relative to the adapter's effect. fp32 kernels differ by 1e-5 of
# it, a device that computes in bf16 by 0.05 and more. With packed weights, the CPU rounds
# activations to 8 bits and other providers do not, which is a fifth of the effect. If the adapter
# is ignored, the error is 1.
_LIMIT, _FP16_LIMIT, _PACKED_LIMIT = 0.02, 0.1, 0.5


class Runs(Protocol):
    """The methods of a session that are used here."""

    def hold(self, adapters: Any) -> AbstractContextManager[Any]:
        """See `AdapterSession.hold`."""

    def empty_cache(self, batch: int) -> Any:
        """See `AdapterSession.empty_cache`."""


def probe(
    manifest: Manifest, defaults: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.floating[Any]]]:
    """A random adapter [1, …] that changes every layer that an adapter can change.

    `defaults`: the base's values of parameters that adapters replace, by side input.
    """
    random = np.random.default_rng(0)
    dtype = np.dtype(manifest.factor_dtype)
    arrays: dict[str, NDArray[np.floating[Any]]] = {}
    for target in manifest.targets:
        width = 1 if target.kind == "embedding" else target.in_features
        rank = _RANK * target.experts
        A = random.standard_normal((1, target.in_features, rank)) / np.sqrt(width)
        B = random.standard_normal((1, rank, target.out_features)) * _SIZE
        arrays[target.lora_A], arrays[target.lora_B] = A.astype(dtype), B.astype(dtype)
    for name, values in defaults.items():
        noise = random.standard_normal(values.shape) * (_SIZE + 0.1 * np.std(values))
        arrays[name] = (values + noise).astype(dtype)
    for name, neutral in change_inputs(manifest).items():
        noise = random.standard_normal((1, len(neutral))) * _SIZE
        arrays[name] = (neutral + noise).astype(dtype)
    return arrays


def check_effect(
    device: Runs,
    host: Runs,
    manifest: Manifest,
    config: Mapping[str, Any],
    row: KnownProvider,
) -> None:
    """Compare `device` with `host`, two sessions on one bundle that have the adapter `PROBE`.

    `config`: the model's, for the sizes of its inputs. `row`: the known properties of the provider.

    Raises:
        DeviceError: the device computes something else, or cannot run the graph.
    """
    try:
        ours, theirs = _outputs(device, manifest, config), _outputs(host, manifest, config)
    except LoraDeployError as problem:
        raise DeviceError(
            f"{row.full} cannot run this graph: {str(problem).rstrip('.')}{_advice(row)}"
        ) from None
    limit = _limit(manifest)
    effect = _distance(theirs["base"][0], theirs["adapter"][0])
    scale = "an adapter changes" if manifest.side_inputs() else "its outputs are of"
    for name, values in theirs.items():
        for step, (there, here) in enumerate(zip(values, ours[name], strict=True)):
            error = _distance(there, here)
            if error <= limit * effect:
                continue
            what = "with the cache" if step else "with an adapter" if name != "base" else "the base"
            raise DeviceError(
                f"{row.full} computes something else than the CPU ({what}): it is off by"
                f" {error:.3g}, and {scale} {effect:.3g} (root mean squares;"
                f" {limit:g} of it is allowed){_advice(row)}"
            )


def _outputs(
    session: Runs, manifest: Manifest, config: Mapping[str, Any]
) -> dict[str, list[NDArray[Any]]]:
    """The outputs of the base and of the probe: of a prefill, for decoders also of one step."""
    sample = Sample(manifest.inputs, config)
    longest = context_length(config) or _TOKENS + 1
    feeds = sample.feeds(sequence=min(_TOKENS, longest - 1))
    batch = len(next(iter(feeds.values())))
    decodes = _cache_grows(manifest)
    wanted = [spec.name for spec in manifest.outputs if not spec.name.startswith(PRESENT)]
    sides: dict[str, Any] = {"base": None}
    if manifest.side_inputs():
        # The first row is the base, if the probe has another row.
        sides["adapter"] = [PROBE] if batch == 1 else [None] + [PROBE] * (batch - 1)
    found = {}
    for name, adapters in sides.items():
        with session.hold(adapters) as held:
            found[name] = _steps(session, held, sample, feeds, wanted, decodes)
    found.setdefault("adapter", [np.zeros_like(found["base"][0])])
    return found


def _cache_grows(manifest: Manifest) -> bool:
    """Whether the graph is a decoder with dynamic shapes."""
    shapes = [s.shape for s in manifest.inputs if s.name.startswith(PAST)]
    ids = [s.shape for s in manifest.inputs if s.name == INPUT_IDS]
    return bool(shapes and ids) and not any(
        isinstance(size, int) for shape in (*ids, *(s[2:3] for s in shapes)) for size in shape
    )


def _steps(
    session: Runs,
    held: Any,
    sample: Sample,
    feeds: Mapping[str, NDArray[Any]],
    wanted: list[str],
    decodes: bool,
) -> list[NDArray[Any]]:
    """The outputs `wanted` of `feeds`, and of one more token if a decoder's cache can grow."""
    if not decodes:
        return [_joined(held.run(wanted, feeds))]
    ids = feeds[INPUT_IDS]
    batch, length = ids.shape
    cache = session.empty_cache(batch)
    cache.make_room(length + 1)
    found = []
    for new in (feeds, sample.feeds(batch, 1, length)):
        names = [*wanted, *cache.outputs]
        values = held.run_with_ort_values(names, {**new, **cache.inputs}, buffers=cache.buffers)
        cache.keep(values[len(wanted) :])
        found.append(_joined([value.numpy() for value in values[: len(wanted)]]))
    return found


def _joined(values: list[NDArray[Any]]) -> NDArray[Any]:
    return np.concatenate([np.asarray(array, np.float64).ravel() for array in values])


def _distance(a: NDArray[Any], b: NDArray[Any]) -> float:
    return float(np.sqrt(np.mean(np.square(a - b))))


def _limit(manifest: Manifest) -> float:
    if manifest.precision in PACKED_BITS:
        return _PACKED_LIMIT
    return _FP16_LIMIT if manifest.precision == "fp16" else _LIMIT


def _advice(row: KnownProvider) -> str:
    known = "; ".join(f"{fault.what} ({fault.versions})" for fault in row.faults)
    known = f" Known of it: {known}." if known else ""
    return f".{known} Use another provider, or give `check_device=False` to run it all the same"
