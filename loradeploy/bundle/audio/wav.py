"""WAV files as samples: PCM of 8 to 32 bits and floats, channels mixed down to one.

The standard library's `wave` reads no floats, and WAVE_FORMAT_EXTENSIBLE only from Python 3.12 on.
The layout is that of Microsoft's "Multiple channel audio data and WAVE files": chunks of a name, a
size and as many bytes, of which `fmt ` says what `data` holds.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from loradeploy.errors import DataError, shown
from loradeploy.files import read_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

# 4.6 hours of 16 kHz in 16 bits.
MAX_WAV_BYTES: Final = 512 << 20
_PCM, _FLOAT, _EXTENSIBLE = 1, 3, 0xFFFE
_NAMES: Final = {6: "A-law", 7: "mu-law", 17: "IMA ADPCM", 80: "MPEG", 85: "MP3"}
_MOST_CHANNELS: Final = 64
# What other files begin with, by what they are called.
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
    """`samples` float32 [samples], from -1 to 1, so many a second."""

    samples: NDArray[np.float32]
    rate: int


@dataclass(frozen=True)
class _Format:
    code: int
    channels: int
    rate: int
    bits: int


def read_wav(path: str | os.PathLike[str], rate: int) -> Sound:
    """The samples of a WAV file of `rate` samples a second; several channels are averaged.

    Raises:
        DataError: no such file, no WAV file, one of another rate, encoding or of no samples, one
            that ends early, or one of samples that are not finite.
    """
    file = Path(path)
    content = read_bytes(file, error=DataError, limit=MAX_WAV_BYTES)
    form, data = _chunks(file, content, rate)
    if form.rate != rate:
        raise DataError(
            f"{file} has {form.rate} samples a second, the model takes {rate}:"
            f" {_CONVERT.format(rate=rate)}"
        )
    samples = _decoded(file, form, data, rate)
    if not len(samples):
        raise DataError(f"{file} has no samples")
    if not np.isfinite(samples).all():
        raise DataError(f"{file} has samples that are not finite (NaN or infinite)")
    mixed = samples.mean(axis=1) if form.channels > 1 else samples[:, 0]
    return Sound(mixed.astype(np.float32), form.rate)


def _chunks(file: Path, content: bytes, rate: int) -> tuple[_Format, memoryview]:
    """What the file says of its samples, and their bytes."""
    if content[:4] != b"RIFF" or content[8:12] != b"WAVE":
        known = next((name for start, name in _OTHERS.items() if content.startswith(start)), None)
        what = f"{known}, " if known else ""
        raise DataError(f"{file} is {what}no WAV file: {_CONVERT.format(rate=rate)}")
    form, at, view = None, 12, memoryview(content)
    while at + 8 <= len(content):
        name, size = struct.unpack_from("<4sI", content, at)
        body = view[at + 8 : at + 8 + size]
        if name == b"fmt ":
            form = _format(file, body)
        elif name == b"data":
            if form is None:
                break
            if len(body) < size:
                raise DataError(
                    f"{file} ends early: {size:,} bytes of samples are announced, {len(body):,} are"
                    " there"
                )
            return form, body
        at += 8 + size + size % 2
    raise DataError(
        f"{file} is a broken WAV file: its {'data' if form else 'fmt'} chunk is missing"
    )


def _format(file: Path, body: memoryview) -> _Format:
    if len(body) < 16:
        raise DataError(f"{file} is a broken WAV file: its fmt chunk has {len(body)} bytes")
    code, channels, rate, _, _, bits = struct.unpack_from("<HHIIHH", body)
    if code == _EXTENSIBLE and len(body) >= 26:
        (code,) = struct.unpack_from("<H", body, 24)
    if not 1 <= channels <= _MOST_CHANNELS:
        raise DataError(f"{file} has {channels} channels: give 1 to {_MOST_CHANNELS}")
    return _Format(code, channels, rate, bits)


def _decoded(file: Path, form: _Format, data: memoryview, rate: int) -> NDArray[np.float64]:
    """The samples [samples, channels] from -1 to 1."""
    known = {(_PCM, 8), (_PCM, 16), (_PCM, 24), (_PCM, 32), (_FLOAT, 32), (_FLOAT, 64)}
    if (form.code, form.bits) not in known:
        name = {_PCM: "PCM", _FLOAT: "floats"}.get(form.code, _NAMES.get(form.code))
        raise DataError(
            f"{file} holds {name or f'the encoding {form.code}'} of {form.bits} bits, expected PCM"
            f" of 8, 16, 24 or 32 bits or floats: {_CONVERT.format(rate=rate)}"
        )
    size = form.bits // 8 * form.channels
    if len(data) % size:
        raise DataError(f"{file}: {len(data):,} bytes are no whole number of samples of {size}")
    if form.code == _FLOAT:
        values = np.frombuffer(data, f"<f{form.bits // 8}").astype(np.float64)
    elif form.bits == 8:  # alone without a sign
        values = (np.frombuffer(data, np.uint8).astype(np.float64) - 128) / 128
    elif form.bits == 24:
        triples = np.frombuffer(data, np.uint8).reshape(-1, 3)
        padded = np.zeros((len(triples), 4), np.uint8)
        padded[:, 1:] = triples
        values = padded.reshape(-1).view("<i4").astype(np.float64) / 2**31
    else:
        values = np.frombuffer(data, f"<i{form.bits // 8}") / 2.0 ** (form.bits - 1)
    return values.reshape(-1, form.channels)


def checked_samples(samples: object, what: str) -> NDArray[np.float32]:
    """Samples that were given as an array, as float32 [samples].

    Raises:
        DataError: they are no floats, of several channels, none, or not finite.
    """
    values = np.asarray(samples)
    if values.dtype.kind != "f" or values.ndim != 1:
        raise DataError(
            f"{what} is {shown(values.dtype.name)} {list(values.shape)}: give the samples of one"
            " channel as floats from -1 to 1, or a WAV file"
        )
    if not len(values):
        raise DataError(f"{what} has no samples")
    if not np.isfinite(values).all():
        raise DataError(f"{what} has samples that are not finite (NaN or infinite)")
    return values.astype(np.float32)
