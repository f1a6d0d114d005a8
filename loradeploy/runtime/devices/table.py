"""Known properties of ONNX Runtime's execution providers, one row for each.

The command line, sessions, parity, doctor and docs/devices.md use this table. Properties of a row
were tested where `tried` says so. Other rows assume the least: every side input is fed with a rank
above 0, and a session compares the provider's results with the CPU's before it is used.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from loradeploy.bundle.proof.provider import CPU as CPU
from loradeploy.bundle.proof.provider import SUFFIX

CUDA: Final = f"CUDA{SUFFIX}"
# Option of plugins: the number of a device, in the order of `onnxruntime.get_ep_devices`.
DEVICE_NUMBER: Final = "device_number"
SOFTWARE_ADAPTER: Final = "ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER"
# OpenVINO's configuration for each device, as JSON.
_OPENVINO_FP32: Final = (
    '{"CPU":{"INFERENCE_PRECISION_HINT":"f32"},"GPU":{"INFERENCE_PRECISION_HINT":"f32"}}'
)


@dataclass(frozen=True)
class Plugin:
    """A provider's library that is in a separate package, not in ONNX Runtime.

    `package`: the distribution. `module`: its Python module, whose get_library_path() returns the
    path of the library.
    """

    package: str
    module: str


@dataclass(frozen=True)
class Fault:
    """A fault of a provider in these `versions` of its package or of ONNX Runtime."""

    versions: str
    what: str


@dataclass(frozen=True)
class KnownProvider:
    """An execution provider.

    `name`: its name on the command line. `full`: ONNX Runtime's name.
    `builds`: distributions of ONNX Runtime that contain it. `plugin`: its package otherwise.
    `needs`: the device that it runs on, and what must be installed for it.
    `device`: the memory in which it keeps tensors, in ONNX Runtime's terms; factors and caches are
    placed there.
    `device_option`: its option for a device number; None if it has none.
    `options`: default options, which the user may override.
    `before`: fallback providers, by name, for operators that it has no kernels for.
    `takes_defaults`: whether it runs graphs whose inputs have defaults. Otherwise the graph is
    opened without them.
    `takes_rank_zero`: whether a product over a rank of 0 is zeros.
    `cpu_operators`: operators with incorrect kernels. They are kept on the CPU by the option
    `cpu_nodes_option`, which takes one node name per line.
    `captures`: its option that records a run and replays it on the same addresses, or None.
    `recording`: the options that `capture_graphs` sets, to record each run under its number
    `gpu_graph_id`. Empty if a session cannot record runs.
    `like_cpu`: whether its results are trusted without a comparison when a session is opened.
    `tried`: what loradeploy's tests and measurements ran it on; empty for nothing.
    """

    name: str
    full: str
    needs: str
    builds: tuple[str, ...] = ()
    plugin: Plugin | None = None
    device: str = "cpu"
    device_option: str | None = None
    options: Mapping[str, str] = field(default_factory=dict)
    before: tuple[str, ...] = ()
    takes_defaults: bool = False
    takes_rank_zero: bool = False
    cpu_operators: tuple[str, ...] = ()
    cpu_nodes_option: str = ""
    captures: str | None = None
    recording: Mapping[str, str] = field(default_factory=dict)
    like_cpu: bool = False
    tried: str = ""
    faults: tuple[Fault, ...] = ()

    @property
    def feeds_all(self) -> bool:
        """Whether every side input is fed at each run, even those that an adapter lacks."""
        return not (self.takes_defaults and self.takes_rank_zero)


KNOWN: Final = (
    KnownProvider(
        "cpu",
        CPU,
        "nothing more",
        builds=("onnxruntime",),
        takes_defaults=True,
        takes_rank_zero=True,
        like_cpu=True,
        tried="all tests",
    ),
    KnownProvider(
        "cuda",
        CUDA,
        "an NVIDIA GPU, its driver, and CUDA and cuDNN:"
        " pip install 'onnxruntime-gpu[cuda,cudnn]' installs the last two",
        builds=("onnxruntime-gpu",),
        device="cuda",
        device_option="device_id",
        options={"use_tf32": "0"},
        captures="enable_cuda_graph",
        recording={"enable_cuda_graph": "1"},
        takes_defaults=True,
        takes_rank_zero=True,
        like_cpu=True,
        faults=(
            # use_tf32=0 is set, unless the options set it.
            Fault(
                "all",
                "rounds the inputs of fp32 products to TF32, 10 bits, on GPUs since Ampere",
            ),
            # `placement` shows it.
            Fault(
                "onnxruntime < 1.24",
                "no kernel for ONNX's Attention, which runs on the CPU",
            ),
            # `placement` shows it.
            Fault(
                "onnxruntime 1.31",
                "GroupQueryAttention only has kernels for fp16 and bf16",
            ),
        ),
    ),
    KnownProvider(
        "tensorrt",
        f"Tensorrt{SUFFIX}",
        "an NVIDIA GPU, its driver, CUDA and TensorRT",
        builds=("onnxruntime-gpu",),
        device="cuda",
        device_option="device_id",
        captures="trt_cuda_graph_enable",
        before=("cuda",),
    ),
    KnownProvider(
        "nv-tensorrt-rtx",
        f"NvTensorRTRTX{SUFFIX}",
        "an NVIDIA RTX GPU of the 30 series or later, and its driver",
        plugin=Plugin("onnxruntime-ep-nv-tensorrt-rtx", "onnxruntime_ep_nv_tensorrt_rtx"),
        device_option=DEVICE_NUMBER,
        captures="enable_cuda_graph",
    ),
    KnownProvider(
        "webgpu",
        f"WebGpu{SUFFIX}",
        "a GPU with a driver for Vulkan (Linux; and libvulkan.so.1), Direct3D 12 or Metal; a"
        f" software adapter works too if {SOFTWARE_ADAPTER}=1 is set before the session is opened"
        " and a Vulkan driver such as SwiftShader is installed (VK_ICD_FILENAMES names its .json)",
        plugin=Plugin("onnxruntime-ep-webgpu", "onnxruntime_ep_webgpu"),
        device="webgpu",
        captures="enableGraphCapture",
        # Integers on the CPU would prevent a graph from being captured.
        recording={"enableGraphCapture": "1", "enableInt64": "1"},
        takes_defaults=True,
        cpu_operators=("And", "Or", "Xor"),
        cpu_nodes_option="forceCpuNodeNames",
        tried="SwiftShader, a GPU in software, fp32",
        faults=(
            # And, Or and Xor are kept on the CPU (forceCpuNodeNames).
            Fault(
                "0.4.0",
                "And with broadcasting is wrong after one with other shapes, in any session of the"
                " process: masks of a batch are wrong",
            ),
            # Side inputs that an adapter lacks are fed as zeros of rank 1.
            Fault(
                "0.4.0",
                "a product over a rank of 0 ends the process (segmentation fault)",
            ),
            # `placement` shows it; GroupQueryAttention has one.
            Fault(
                "0.4.0",
                "no kernel for ONNX's Attention, which runs on the CPU",
            ),
            # The comparison when a session is opened refuses it.
            Fault(
                "0.4.0, on SwiftShader",
                "GroupQueryAttention is wrong from 32 tokens on; unknown for a GPU",
            ),
        ),
    ),
    KnownProvider(
        "openvino",
        f"OpenVINO{SUFFIX}",
        "an x86-64 processor, or a GPU or NPU of Intel and its driver",
        builds=("onnxruntime-openvino",),
        plugin=Plugin("onnxruntime-ep-openvino", "onnxruntime_ep_openvino"),
        device_option=DEVICE_NUMBER,
        # The plugin only accepts this option, and ignores others with a line in the log.
        options={"load_config": _OPENVINO_FP32},
        tried="a CPU, by hand, fp32",
        faults=(
            # The graph is opened without defaults.
            Fault(
                "1.8.1",
                "a graph whose inputs have defaults does not open (input names mismatch)",
            ),
            # load_config requests f32, unless the options set it.
            Fault(
                "1.8.1",
                "computes in bf16 if the processor supports it, unless f32 is requested",
            ),
        ),
    ),
    KnownProvider(
        "directml",
        f"Dml{SUFFIX}",
        "Windows, and a GPU with a driver for Direct3D 12",
        builds=("onnxruntime-directml",),
        device_option="device_id",
    ),
    KnownProvider(
        "coreml",
        f"CoreML{SUFFIX}",
        "macOS",
        builds=("onnxruntime",),
    ),
    KnownProvider(
        "qnn",
        f"QNN{SUFFIX}",
        "a Qualcomm processor with an NPU, and its driver",
        plugin=Plugin("onnxruntime-qnn", "onnxruntime_qnn"),
        device_option=DEVICE_NUMBER,
    ),
    KnownProvider(
        "migraphx",
        f"MIGraphX{SUFFIX}",
        "an AMD GPU and ROCm",
        builds=("onnxruntime-migraphx",),
        device_option="device_id",
    ),
)
BY_NAME: Final = {provider.name: provider for provider in KNOWN}
BY_FULL_NAME: Final = {provider.full: provider for provider in KNOWN}
# Distributions of ONNX Runtime, which install the same files. Those for ROCm end at 1.22.
PACKAGES: Final = (
    *dict.fromkeys(build for provider in KNOWN for build in provider.builds),
    "onnxruntime-rocm",
)


def known(full: str) -> KnownProvider:
    """The row of a provider by ONNX Runtime's name; a row with the least assumptions if unknown."""
    name, _, _ = full.partition(".")  # OpenVINO's meta-devices: OpenVINOExecutionProvider.AUTO
    row = BY_FULL_NAME.get(name)
    return row or KnownProvider(full, full, "see https://onnxruntime.ai/docs/execution-providers")
