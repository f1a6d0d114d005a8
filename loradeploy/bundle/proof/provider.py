"""The execution provider that runs a graph, and whether a check on one covers another.

Numbers depend on more than the graph. Each provider has its own kernels: products of int8 and int4
weights round activations in one and not in the other, and what a provider has no kernel for runs on
the next in the chain. So a verdict names the provider, the kind of device, and the options that
change numbers, and it covers a session that agrees in these. Runs that are captured and replayed
have the same kernels, and read buffers and sizes of the run that was recorded: where one of these
is another one's, numbers are wrong that were right without. So a verdict is about the one or the
other. The device's number and model are
facts about one machine; they are recorded and not compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from loradeploy.errors import listed_names

SUFFIX: Final = "ExecutionProvider"
CPU: Final = f"CPU{SUFFIX}"
# Behind the provider's name where a check captured its runs.
CAPTURED: Final = " captured"


@dataclass(frozen=True)
class Device:
    """A device, as ONNX Runtime reports it.

    `kind`: "CPU", "GPU" or "NPU". `vendor_id`, `device_id`: the PCI numbers of the vendor and of
    the model, 0 where there are none. `name`: the model's name, None where the system has none.
    """

    kind: str
    vendor: str
    vendor_id: int
    device_id: int
    name: str | None = None

    def __str__(self) -> str:
        return f"{self.kind} {self.name or self.vendor}".rstrip()


@dataclass(frozen=True)
class ProviderFacts:
    """An execution provider as it runs a graph.

    `provider`: its name on the command line, with the device's number: "cuda:1"; of a check that
    was given options, these too, and `CAPTURED` where it captured runs. `chain`: ONNX Runtime's
    names of the providers that nodes are assigned to, in order. `version`: ONNX Runtime's, or of
    the plugin that the provider is in. `device`: None where ONNX Runtime reports
    none. `options`: those of its options that change numbers. `captured`: whether it records runs
    and replays them (`capture_graphs`).
    """

    provider: str
    chain: tuple[str, ...]
    version: str = ""
    device: Device | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    captured: bool = False

    @property
    def name(self) -> str:
        """The provider's name on the command line, without a device's number."""
        return self.provider.partition(" ")[0].partition(":")[0]

    def is_named(self, name: str) -> bool:
        """Whether `name` is this provider's on the command line or in ONNX Runtime.

        A device's number in `name` does not count.
        """
        given = name.partition(":")[0].lower()
        full = self.chain[0] if self.chain else ""
        return given in (self.name.lower(), full.lower(), full.removesuffix(SUFFIX).lower())

    def difference(self, other: ProviderFacts) -> str | None:
        """What numbers may differ by between this provider and `other`; None where nothing does."""
        ours, theirs = _without_cpu(self.chain), _without_cpu(other.chain)
        if ours != theirs:
            return f"its provider is {listed_names(theirs)}, not {listed_names(ours)}"
        if self.device and other.device and self.device.kind != other.device.kind:
            return f"its device is a {other.device.kind}, not a {self.device.kind}"
        for name in sorted({*self.options, *other.options}):
            mine, its = self.options.get(name), other.options.get(name)
            if mine != its:
                return f"its option {name} is {its or 'not set'}, not {mine or 'not set'}"
        if other.captured != self.captured:
            return "its runs are captured" if other.captured else "its runs are not captured"
        return None

    def __str__(self) -> str:
        parts = [" → ".join(name.removesuffix(SUFFIX) for name in self.chain) or self.provider]
        parts += [self.version] if self.version else []
        parts += [str(self.device)] if self.device is not None else []
        parts += [f"{name}={value}" for name, value in sorted(self.options.items())]
        parts += ["captured runs"] if self.captured else []
        return ", ".join(parts)


def _without_cpu(chain: tuple[str, ...]) -> tuple[str, ...]:
    """The chain without the CPU behind the others, which ONNX Runtime adds to every session."""
    return chain[:-1] if len(chain) > 1 and chain[-1] == CPU else chain
