"""Signatures of certificates: ed25519 over the bytes of parity.json, in parity.json.sig.

The certificate has the digests of all files that affect results, so its signature covers the
bundle. Keys are PEM files, as `openssl genpkey -algorithm ed25519` writes them. Only signatures
need the package `cryptography` (the extra `sign`).
"""

from __future__ import annotations

import base64
import binascii
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from loradeploy.bundle.names import CERTIFICATE_NAME, SIGNATURE_NAME
from loradeploy.errors import BundleError, UsageError
from loradeploy.files import atomic_file, read_bytes

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import (
        Ed25519PrivateKey,
        Ed25519PublicKey,
    )

_LARGEST: Final = 1 << 16  # bytes of a key's file, or a signature's


def sign(bundle: Path, key: Ed25519PrivateKey) -> None:
    """Sign the present certificate of `bundle`."""
    signature = base64.b64encode(key.sign(read_bytes(bundle / CERTIFICATE_NAME, error=BundleError)))
    with atomic_file(bundle / SIGNATURE_NAME) as temporary:
        temporary.write_bytes(signature + b"\n")


def check_signature(bundle: Path, content: bytes, key: Ed25519PublicKey) -> None:
    """Raise BundleError unless the owner of `key` signed `content`, the bundle's certificate."""
    from cryptography.exceptions import InvalidSignature

    file = bundle / SIGNATURE_NAME
    if not file.is_file():
        raise BundleError(
            f"{bundle} has no signature ({SIGNATURE_NAME}): sign its certificate with"
            " `loradeploy parity --sign KEY.pem`"
        )
    try:
        signature = base64.b64decode(_content(file, BundleError).strip(), validate=True)
        key.verify(signature, content)
    except (InvalidSignature, binascii.Error, ValueError):
        raise BundleError(
            f"{file} is not a signature of {CERTIFICATE_NAME} by the key that is required: the"
            " certificate has changed, or someone else signed it"
        ) from None


def private_key(file: str | os.PathLike[str]) -> Ed25519PrivateKey:
    """The private ed25519 key in the PEM file `file`.

    Raises:
        UsageError: it is not such a key, it needs a password, or `cryptography` is not installed.
    """
    _check_installed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    key = _loaded(file, lambda content: load_pem_private_key(content, None))
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(_invalid_key(file, "private"))
    return key


def public_key(file: str | os.PathLike[str]) -> Ed25519PublicKey:
    """The public ed25519 key in the PEM file `file`.

    Raises:
        UsageError: it is not such a key, or `cryptography` is not installed.
    """
    _check_installed()
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    key = _loaded(file, load_pem_public_key)
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(_invalid_key(file, "public"))
    return key


def _loaded(file: str | os.PathLike[str], load: Any) -> object:
    from cryptography.exceptions import UnsupportedAlgorithm

    try:
        return load(_content(Path(file), UsageError))
    except (UnsupportedAlgorithm, ValueError, TypeError):  # TypeError: it has a password
        return None


def _content(file: Path, error: type[BundleError] | type[UsageError]) -> bytes:
    try:
        return read_bytes(file, error=error, limit=_LARGEST)
    except error:
        raise error(
            f"{file} cannot be read as a key or a signature: give a small PEM file"
        ) from None


def _invalid_key(file: str | os.PathLike[str], kind: str) -> str:
    return (
        f"{os.fspath(file)} is not a {kind} ed25519 key in PEM without a password: openssl genpkey"
        " -algorithm ed25519 writes one, openssl pkey -pubout its public half"
    )


def _check_installed() -> None:
    try:
        import cryptography  # noqa: F401
    except ImportError:
        raise UsageError(
            "signatures need the package cryptography: pip install 'loradeploy[sign]'"
        ) from None
