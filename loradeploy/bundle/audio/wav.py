"""Read WAV files (PCM of 8 to 32 bits, floats) as samples of one channel.

The standard library's `wave` reads no floats, and WAVE_FORMAT_EXTENSIBLE only from Python 3.12 on.
The layout is that of Microsoft's "Multiple channel audio data and WAVE files": each chunk has a
name, a size and that many bytes; the chunk `fmt ` describes the samples in the chunk `data`.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, Final

import numpy as np

from loradeploy.errors import DataError, shown
from loradeploy.files import open_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

MAX_WAV_BYTES: Final = 512 << 20
# For each channel: 4.6 hours at 16 kHz.
MAX_WAV_SAMPLES: Final = 256 << 20
# Floats are from -1 to 1, or a little more in loud mixes. Larger ones are unscaled integers.
_LARGEST: Final = 8.0
_FRAMES_AT_ONCE: Final = 1 << 16
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_NAMES: Final = {6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 80: "MPEG", 85: "MP3"}
_MOST_CHANNELS: Final = 64
_LONGEST_FORMAT: Final = 40  # bytes, of WAVE_FORMAT_EXTENSIBLE
# The first bytes of other audio formats, and their names.
_OTHERS: Final = {
    b"fLaC": "FLAC",
    b"OggS": "Ogg",
    b"ID3": "MP3",
    b"\xff\xfb": "MP3",
    b"RF64": "RF64",
    b"FORM": "AIFF",
    b"caff": "CAF",
}
_CONVERT: Final = "convert it, such as with `ffmpeg -i FILE -ac 1 -ar {rate} OUT.wav`"


@dataclass(frozen=True, eq=False)
class Sound:
    """Audio: `samples` float32 [samples], from -1 to 1, at `rate` samples per second."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class _Format:
    """The contents of a `fmt ` chunk. `frame`: the bytes of one sample of all channels."""

    code: int
    channels: int
    rate: int
    frame: int
    bits: int


def read_wav(path: str | os.PathLike[str], rate: int) -> Sound:
    """The samples of a WAV file with `rate` samples per second; several channels are averaged.

    Raises:
        DataError: the file does not exist, is not a WAV file, or is truncated or too long; its rate
            or encoding is not supported; or it has no samples, or samples that are not finite or
            not from -1 to 1.
    """
    path = Path(path)
    with open_file(path, error=DataError, limit=MAX_WAV_BYTES) as file:
        try:
            form, size = _header(path, file, rate)
            _check_format(path, form, rate)
            samples = _samples(path, file, form, size)
        except OSError as problem:
            raise DataError(f"{path} cannot be read: {problem.strerror}") from None
    _check_values(samples, str(path))
    return Sound(samples, rate)


def _header(path: Path, file: BinaryIO, rate: int) -> tuple[_Format, int]:
    """The format of the samples, and their size in bytes. `file` is then at the first sample."""
    start = file.read(12)
    if start[:4] != b"RIFF" or start[8:12] != b"WAVE":
        known = next((name for begin, name in _OTHERS.items() if start.startswith(begin)), None)
        what = f"{known}, " if known else ""
        raise DataError(f"{path} is {what}not a WAV file: {_CONVERT.format(rate=rate)}")
    form, at, end = None, 12, os.fstat(file.fileno()).st_size
    while at + 8 <= end:
        file.seek(at)
        if len(head := file.read(8)) < 8:  # the file became shorter
            break
        name, size = struct.unpack("<4sI", head)
        if name == b"fmt ":
            form = _format(path, file.read(min(size, _LONGEST_FORMAT)))
        elif name == b"data":
            if form is None:
                break
            if (actual := end - at - 8) < size:
                raise DataError(
                    f"{path} ends early: it has {actual:,} of {size:,} bytes of samples"
                )
            return form, size
        at += 8 + size + size % 2
    raise DataError(
        f"{path} is a malformed WAV file: its {'data' if form else 'fmt'} chunk is missing"
    )


def _format(path: Path, body: bytes) -> _Format:
    if len(body) < 16:
        raise DataError(f"{path} is a malformed WAV file: its fmt chunk has {len(body)} bytes")
    code, channels, rate, _, frame, bits = struct.unpack_from("<HHIIHH", body)
    if code == _EXTENSIBLE and len(body) >= 26:
        (code,) = struct.unpack_from("<H", body, 24)
    if not 1 <= channels <= _MOST_CHANNELS:
        raise DataError(f"{path} has {channels} channels: give 1 to {_MOST_CHANNELS}")
    return _Format(code, channels, rate, frame, bits)


def _check_format(path: Path, form: _Format, rate: int) -> None:
    convert = _CONVERT.format(rate=rate)
    if form.rate != rate:
        raise DataError(
            f"{path} has {form.rate} samples a second, the model takes {rate}: {convert}"
        )
    if (form.code, form.bits) not in _DECODERS:
        name = {_PCM: "PCM", _FLOAT: "floats"}.get(form.code, _NAMES.get(form.code))
        raise DataError(
            f"{path} contains {name or f'the encoding {form.code}'} of {form.bits} bits, expected"
            f" PCM of 8, 16, 24 or 32 bits or floats: {convert}"
        )
    expected = form.channels * form.bits // 8
    if form.frame != expected:
        raise DataError(
            f"{path} stores {form.frame} bytes for a sample of {form.channels} channels of"
            f" {form.bits} bits (nBlockAlign), expected {expected}: {convert}"
        )


def _samples(path: Path, file: BinaryIO, form: _Format, size: int) -> NDArray[np.float32]:
    """The samples in the next `size` bytes, with channels averaged."""
    if size % form.frame:
        raise DataError(f"{path}: {size:,} bytes is not a whole number of samples of {form.frame}")
    count = size // form.frame
    if count > MAX_WAV_SAMPLES:
        raise DataError(
            f"{path} has {count:,} samples, {MAX_WAV_SAMPLES:,} is the maximum: cut it into parts"
        )
    samples = np.empty(count, np.float32)
    decode = _DECODERS[form.code, form.bits]
    for start in range(0, count, _FRAMES_AT_ONCE):
        some = samples[start : start + _FRAMES_AT_ONCE]
        data = file.read(len(some) * form.frame)
        if len(data) < len(some) * form.frame:
            raise DataError(f"{path} became shorter while it was read")
        with np.errstate(over="ignore", invalid="ignore"):  # values that are not finite are refused
            some[:] = decode(data).reshape(-1, form.channels).mean(axis=1)
    return samples


def _of_triples(data: bytes) -> NDArray[np.float64]:
    triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
    padded = np.zeros((len(triples), 4), np.uint8)
    padded[:, 1:] = triples
    return padded.reshape(-1).view("<i4").astype(np.float64) / 2**31


# From bytes to float64, by encoding and bits.
_DECODERS: Final[Mapping[tuple[int, int], Callable[[bytes], NDArray[np.float64]]]] = {
    # The only unsigned encoding.
    (_PCM, 8): lambda data: (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128,
    (_PCM, 16): lambda data: np.frombuffer(data, "<i2") / 2.0**15,
    (_PCM, 24): _of_triples,
    (_PCM, 32): lambda data: np.frombuffer(data, "<i4") / 2.0**31,
    (_FLOAT, 32): lambda data: np.frombuffer(data, "<f4").astype(np.float64),
    (_FLOAT, 64): lambda data: np.frombuffer(data, "<f8").astype(np.float64),
}


def checked_samples(samples: object, what: str) -> NDArray[np.float32]:
    """The samples of an array, as float32 [samples].

    Raises:
        DataError: they are not floats of one channel, there are none, or some are not finite or not
            from -1 to 1.
    """
    values = np.asarray(samples)
    if values.dtype.kind != "f" or values.ndim != 1:
        raise DataError(
            f"{what} is {shown(values.dtype.name)} {list(values.shape)}: give the samples of one"
            " channel as floats from -1 to 1, or a WAV file"
        )
    with np.errstate(over="ignore"):  # infinite values are refused
        narrow = values.astype(np.float32)
    _check_values(narrow, what)
    return narrow


def _check_values(samples: NDArray[np.float32], what: str) -> None:
    if not len(samples):
        raise DataError(f"{what} has no samples")
    # Only the minimum and maximum, without a copy. Both are NaN if a sample is.
    largest = max(abs(float(samples.min())), abs(float(samples.max())))
    if not np.isfinite(largest):
        raise DataError(f"{what} has samples that are not finite (NaN or infinite)")
    if largest > _LARGEST:
        raise DataError(
            f"{what} has samples as large as {largest:g}, expected floats from -1 to 1: divide"
            " those of 16 bits by 32768"
        )
