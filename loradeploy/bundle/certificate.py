"""What a certificate covers, under its public name; the certificate itself is in `proof`."""

from loradeploy.bundle.proof.certificate import digests

__all__ = ["digests"]
