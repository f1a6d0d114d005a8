"""Key pairs that sign certificates, in the files that openssl writes."""

from __future__ import annotations

from pathlib import Path


def key_pair(folder: Path, name: str) -> tuple[Path, Path]:
    """Create a key pair and return the files of the private and of the public key."""
    from cryptography.hazmat.primitives import serialization as form
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub.pem"
    pem, no_password = form.Encoding.PEM, form.NoEncryption()
    private.write_bytes(key.private_bytes(pem, form.PrivateFormat.PKCS8, no_password))
    public.write_bytes(key.public_key().public_bytes(pem, form.PublicFormat.SubjectPublicKeyInfo))
    return private, public
