"""Whisper's log-mel features of audio.

Computed as in transformers' WhisperFeatureExtractor: short-time Fourier transform with a Hann
window and reflection padding at both ends, Slaney's triangular mel filters up to 8 kHz, log10,
clipped at 8 below the maximum, rescaled.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from loradeploy.bundle.names import PREPROCESSOR_NAME, PROCESSOR_NAME
from loradeploy.errors import BundleError, LoraDeployError, shown
from loradeploy.files import read_json

if TYPE_CHECKING:
    from numpy.typing import NDArray

_NESTED: Final = "feature_extractor"
_EXTRACTOR: Final = "WhisperFeatureExtractor"

_HIGHEST: Final = 8000.0  # Hz, for every sampling rate
_LEAST_POWER: Final = 1e-10
_RANGE: Final = 8.0  # decades below the maximum
# The mel scale of Slaney's Auditory Toolbox: linear up to 1 kHz, logarithmic above.
_LINEAR_HZ, _LINEAR_MELS, _LOG_STEP = 1000.0, 15.0, 27.0 / np.log(6.4)
_FRAMES_AT_ONCE: Final = 4096

# Fields of preprocessor_config.json: transformers' default, minimum, maximum.
_SIZES: Final[Mapping[str, tuple[int, int, int]]] = {
    "feature_size": (80, 1, 512),
    "sampling_rate": (16_000, 1_000, 192_000),
    "hop_length": (160, 1, 8_192),
    "chunk_length": (30, 1, 120),
    "n_fft": (400, 16, 8_192),
}


@dataclass(frozen=True)
class FeatureSettings:
    """How features are computed from audio.

    `mels`: the number of mel bands. `rate`: samples per second. `hop`: samples from one frame to
    the next. `chunk`: seconds of audio that the model takes at once. `window`: samples of a frame.
    `padding`: the sample that fills up a chunk.
    """

    mels: int
    rate: int
    hop: int
    chunk: int
    window: int
    padding: float = 0.0

    @property
    def chunk_samples(self) -> int:
        """The number of samples in a chunk."""
        return self.chunk * self.rate

    @property
    def chunk_frames(self) -> int:
        """The number of frames in a chunk."""
        return self.chunk_samples // self.hop

    @cached_property
    def filters(self) -> NDArray[np.float64]:
        """The weight of each frequency in each mel band: [mels, frequencies]."""
        edges = _hertz(np.linspace(0.0, _mels(_HIGHEST), self.mels + 2))
        frequencies = np.linspace(0, self.rate // 2, 1 + self.window // 2)
        widths = np.diff(edges)
        slopes = edges[:, np.newaxis] - frequencies  # [mels + 2, frequencies]
        rising, falling = (
            -slopes[:-2] / widths[:-1, np.newaxis],
            slopes[2:] / widths[1:, np.newaxis],
        )
        triangles = np.maximum(0.0, np.minimum(rising, falling))
        areas: NDArray[np.float64] = 2.0 / (edges[2:] - edges[:-2])
        scaled: NDArray[np.float64] = triangles * areas[:, np.newaxis]
        return scaled

    def of(self, samples: NDArray[np.float32]) -> NDArray[np.float32]:
        """The features [mels, frames] of `samples`, which are padded to at least one chunk.

        Longer audio is not split: the clipping uses the maximum over all frames.
        """
        if len(samples) < self.chunk_samples:
            filler = np.full(self.chunk_samples - len(samples), self.padding, np.float32)
            samples = np.concatenate([samples, filler])
        around = np.pad(samples.astype(np.float64), self.window // 2, mode="reflect")
        frames = np.lib.stride_tricks.sliding_window_view(around, self.window)[:: self.hop]
        shape = np.hanning(self.window + 1)[:-1]  # periodic
        count = len(frames) - 1  # the last one is left out
        logarithms = np.empty((self.mels, count), np.float32)
        for start in range(0, count, _FRAMES_AT_ONCE):
            end = min(start + _FRAMES_AT_ONCE, count)
            power = np.abs(np.fft.rfft(frames[start:end] * shape, axis=1)) ** 2
            bands = np.maximum(_LEAST_POWER, self.filters @ power.T)
            logarithms[:, start:end] = np.log10(bands)
        least = logarithms.max() - np.float32(_RANGE)
        found: NDArray[np.float32] = (np.maximum(logarithms, least) + 4) / 4
        return found


def feature_settings(directory: Path) -> FeatureSettings | None:
    """The settings in a checkpoint's or a bundle's directory; None if it has none.

    Raises:
        BundleError: a value is out of range, or the feature extractor is not Whisper's.
    """
    values = feature_values(directory)
    return None if values is None else _settings(values, PREPROCESSOR_NAME)


def feature_values(
    directory: Path, *, error: type[LoraDeployError] = BundleError
) -> dict[str, Any] | None:
    """The contents of preprocessor_config.json, or of `feature_extractor` in processor_config.json.

    Raises:
        `error`: a file cannot be read.
    """
    file = directory / PREPROCESSOR_NAME
    if file.is_file():
        return read_json(file, error=error)
    file = directory / PROCESSOR_NAME
    nested = read_json(file, error=error).get(_NESTED) if file.is_file() else None
    return dict(nested) if isinstance(nested, Mapping) else None


def _settings(values: Mapping[str, Any], where: str) -> FeatureSettings:
    kind = values.get("feature_extractor_type", _EXTRACTOR)
    if kind != _EXTRACTOR:
        raise BundleError(f"{where}: the features are those of {shown(kind)}, not of {_EXTRACTOR}")
    sizes = {}
    for name, (default, least, most) in _SIZES.items():
        value = values.get(name, default)
        whole = isinstance(value, int | float) and not isinstance(value, bool)
        if not whole or value != int(value) or not least <= value <= most:
            raise BundleError(f"{where}: {name} is {shown(value)}, expected {least} to {most}")
        sizes[name] = int(value)
    padding, dither = values.get("padding_value", 0.0), values.get("dither", 0.0)
    if dither not in (None, 0):
        raise BundleError(
            f"{where}: dither is {shown(dither)}, which adds random noise: set it to 0.0"
        )
    if not isinstance(padding, int | float) or not abs(padding) <= 1:
        raise BundleError(f"{where}: padding_value is {shown(padding)}, expected a sample")
    return FeatureSettings(
        mels=sizes["feature_size"],
        rate=sizes["sampling_rate"],
        hop=sizes["hop_length"],
        chunk=sizes["chunk_length"],
        window=sizes["n_fft"],
        padding=float(padding),
    )


def _mels(hertz: float) -> float:
    return float(_LINEAR_MELS + np.log(hertz / _LINEAR_HZ) * _LOG_STEP)


def _hertz(mels: NDArray[np.float64]) -> NDArray[np.float64]:
    linear = mels * (_LINEAR_HZ / _LINEAR_MELS)
    found: NDArray[np.float64] = np.where(
        mels >= _LINEAR_MELS, _LINEAR_HZ * np.exp((mels - _LINEAR_MELS) / _LOG_STEP), linear
    )
    return found
