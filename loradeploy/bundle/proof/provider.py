"""The execution provider that runs a graph, and whether a check on one covers another.

Results depend on more than the graph. Each provider has its own kernels: for int8 and int4 weights,
one provider rounds activations and another does not, and nodes without a kernel run on the next
provider in the chain. So a verdict names the provider, the kind of device, and the options that
affect results, and it covers sessions with the same ones. Runs that are captured and replayed use
the same kernels, but read the buffers and sizes of the recorded run: if one of these belongs to
another run, results are wrong that are right without capture. So a verdict covers either captured
runs or other runs. In the same way it covers runs either with or without the operators' library,
which has kernels of its own. The device's number and model are recorded, but not
compared, because they are facts about one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from loradeploy.errors import listed_names

SUFFIX: Final = "ExecutionProvider"
CPU: Final = f"CPU{SUFFIX}"
# The end of a provider's name if a check captured its runs.
CAPTURED: Final = " captured"
# The end of a provider's name if the session has the operators' library.
OPERATOR: Final = " operator"
# The entry of onnxruntime's session options that computes products of unsigned and signed 8-bit
# integers exactly ("1"). On x86 processors without VNNI, sums of two products are otherwise cut
# to 16 bits, and a layer's output can be wrong by half of its size.
EXACT_INTEGERS: Final = "session.x64quantprecision"
# The entry with the directory of the weights; onnxruntime ignores it unless the graph is in memory.
WEIGHTS_AT: Final = "session.model_external_initializers_file_folder_path"


@dataclass(frozen=True)
class Device:
    """A device, as ONNX Runtime reports it.

    `kind`: "CPU", "GPU" or "NPU". `vendor_id`, `device_id`: the PCI numbers of the vendor and of
    the model, 0 if there are none. `name`: the model's name, None if the system reports none.
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
    """An execution provider and its settings.

    `provider`: its name on the command line, with the device's number: "cuda:1"; for a check, also
    the given options, and `CAPTURED` if it captured runs or `OPERATOR` if it used the library.
    `chain`: ONNX Runtime's names of the providers that nodes are assigned to, in order. `version`:
    the version of ONNX Runtime, or of the provider's plugin. `device`: None if ONNX Runtime reports
    none. `options`: its options that affect results. `captured`: whether runs are recorded and
    replayed (`capture_graphs`).
    `operator`: whether the session has the operators' library.
    """

    provider: str
    chain: tuple[str, ...]
    version: str = ""
    device: Device | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    captured: bool = False
    operator: bool = False

    @property
    def name(self) -> str:
        """The provider's name on the command line, without a device's number."""
        return self.provider.partition(" ")[0].partition(":")[0]

    def is_named(self, name: str) -> bool:
        """Whether `name` is this provider's name on the command line or in ONNX Runtime.

        A device's number in `name` is ignored.
        """
        given = name.partition(":")[0].lower()
        full = self.chain[0] if self.chain else ""
        return given in (self.name.lower(), full.lower(), full.removesuffix(SUFFIX).lower())

    def difference(self, other: ProviderFacts) -> str | None:
        """Why results may differ between this provider and `other`; None if there is no reason."""
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
        if other.operator != self.operator:
            return f"it runs {'with' if other.operator else 'without'} the operators' library"
        return None

    def __str__(self) -> str:
        parts = [" → ".join(name.removesuffix(SUFFIX) for name in self.chain) or self.provider]
        parts += [f"version {self.version}"] if self.version else []
        parts += [str(self.device)] if self.device is not None else []
        parts += [f"{name}={value}" for name, value in sorted(self.options.items())]
        parts += ["captured runs"] if self.captured else []
        parts += ["with the operators"] if self.operator else []
        return ", ".join(parts)


def _without_cpu(chain: tuple[str, ...]) -> tuple[str, ...]:
    """The chain without the CPU provider at its end, which ONNX Runtime adds to every session."""
    return chain[:-1] if len(chain) > 1 and chain[-1] == CPU else chain
