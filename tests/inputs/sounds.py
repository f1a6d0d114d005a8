"""Sounds for tests: tones, and WAV files of any encoding."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

RATE = 16_000


def tone(hertz: float, seconds: float, *, noise: float = 0.0, seed: int = 0) -> NDArray[Any]:
    """Return float32 samples of a tone that rises slightly, plus noise."""
    times = np.arange(round(RATE * seconds)) / RATE
    random = np.random.default_rng(seed)
    sound = 0.4 * np.sin(2 * np.pi * hertz * times * (1 + 0.3 * times))
    return (sound + noise * random.standard_normal(len(times))).astype(np.float32)


def wav(
    file: Path,
    data: bytes,
    *,
    code: int = 1,
    bits: int = 16,
    channels: int = 1,
    rate: int = RATE,
    extensible: bool = False,
    frame: int | None = None,
) -> Path:
    """Write a WAV file of the samples `data`. `code`: 1 PCM, 3 float. `frame`: nBlockAlign."""
    size = bits // 8 * channels if frame is None else frame
    form = struct.pack(
        "<HHIIHH", 0xFFFE if extensible else code, channels, rate, rate * size, size, bits
    )
    if extensible:
        rest = bytes.fromhex("000000001000800000aa00389b71")
        form += struct.pack("<HHI", 22, bits, 0) + struct.pack("<H", code) + rest
    chunks = b"fmt " + struct.pack("<I", len(form)) + form
    chunks += b"data" + struct.pack("<I", len(data)) + data
    file.write_bytes(b"RIFF" + struct.pack("<I", len(chunks) + 4) + b"WAVE" + chunks)
    return file


def save(file: Path, samples: NDArray[Any]) -> Path:
    """Write float32 samples to a WAV file."""
    return wav(file, samples.astype("<f4").tobytes(), code=3, bits=32)
