"""Public name of `digests`, of the files that a certificate covers (`loradeploy.bundle.proof`)."""

from loradeploy.bundle.proof.certificate import digests

__all__ = ["digests"]
