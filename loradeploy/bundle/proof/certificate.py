"""The certificate of a bundle: the result of the last parity check, and whether it still applies.

`loradeploy parity` writes its report into the bundle as parity.json. This module reads it without
the dependencies of the check, so that a serving machine can verify it before it serves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Final

from loradeploy.adapter.files.digest import file_digest, short
from loradeploy.bundle.manifest import Manifest, read_manifest
from loradeploy.bundle.names import (
    ADAPTERS_DIRECTORY,
    BASE_NAME,
    CERTIFICATE_NAME,
    CONFIG_NAME,
    DEFAULTS_NAME,
    ENCODER_NAME,
    GENAI_AUDIO_NAME,
    GENAI_CONFIG_NAME,
    GRAPH_DATA_NAME,
    GRAPH_NAME,
    MANIFEST_NAME,
    PREPROCESSOR_NAME,
    PROCESSOR_NAME,
    REQUIRED_NAME,
    REQUIRED_VALUES_NAME,
    SIGNATURE_NAME,
)
from loradeploy.bundle.proof.provider import CAPTURED, OPERATOR, ProviderFacts
from loradeploy.bundle.proof.record import Certificate, certificate_of
from loradeploy.bundle.proof.requirement import CertificateMinimum
from loradeploy.bundle.text.beside import TEXT_NAMES
from loradeploy.errors import BundleError, listed_names, shortened, shown
from loradeploy.files import MAX_JSON_BYTES, inside, json_object, read_bytes
from loradeploy.names import MODULES_NAME

FORMAT: Final = "loradeploy-parity"
SCHEMA_VERSION: Final = 3
# Files that readers of a bundle use whether or not the export wrote them: a file that is added
# later can change results like a modified one.
_READ: Final = (
    *(MANIFEST_NAME, BASE_NAME, DEFAULTS_NAME, GENAI_CONFIG_NAME),
    *(CONFIG_NAME, MODULES_NAME, PREPROCESSOR_NAME, PROCESSOR_NAME, GENAI_AUDIO_NAME),
    *(ENCODER_NAME, REQUIRED_NAME, REQUIRED_VALUES_NAME),
    *TEXT_NAMES,
)
# A provider's name, or its name and options.
_Provider = str | tuple[str, dict[str, str]]


def read_certificate(bundle: Path) -> Certificate:
    """The certificate in the directory `bundle`.

    Raises:
        BundleError: there is none, it cannot be read, or it has another schema version.
    """
    return _read(bundle, _content(bundle))


def check_certificate(
    bundle: Path, manifest: Manifest, minimum: CertificateMinimum | None
) -> Certificate:
    """The certificate of `bundle`, if it passed and applies to the present files.

    All covered files are read. `minimum`: further requirements.

    Raises:
        BundleError: there is no certificate; the check failed; a file has changed since; or the
            certificate does not meet the `minimum`, or is not signed with its key.
        UsageError: the key of the minimum is invalid.
    """
    content = _content(bundle)
    if minimum is not None and minimum.public_key is not None:
        from loradeploy.bundle.proof.signature import check_signature, public_key

        check_signature(bundle, content, public_key(minimum.public_key))
    certificate = _read(bundle, content)
    why = fault(certificate, manifest, digests(bundle, covered(bundle, manifest)))
    if why is None and minimum is not None:
        why = minimum.lacking(certificate.coverage, certificate.precision)
    if why is not None:
        raise BundleError(f"{bundle} is not certified: {why}; run {parity_command(bundle)} again")
    return certificate


def check_provider(
    bundle: Path,
    manifest: Manifest,
    certificate: Certificate,
    running: ProviderFacts,
    minimum: CertificateMinimum | None,
) -> frozenset[str]:
    """The digests of the adapters that the certificate covers on the provider `running`.

    If `minimum` names providers, the certificate must cover these instead.

    Raises:
        BundleError: on that provider, the check did not run, or does not meet the `minimum`.
    """
    checked = certificate.coverage.providers
    names = () if minimum is None else minimum.providers
    if names:
        sets = [[p.provider for p in checked if p.is_named(name)] for name in names]
    else:
        sets = [[p.provider for p in checked if p.difference(running) is None]]
    certified: list[frozenset[str]] = []
    for providers in sets:
        part = certificate.on(providers)
        why = _not_covered(checked, running) if not providers else _unchecked(part, manifest)
        if why is None and minimum is not None:
            least = dataclasses.replace(minimum, providers=())
            why = least.lacking(part.coverage, part.precision)
        if why is not None:
            each = (*checked, running)
            command = parity_command(
                bundle,
                providers=_providers_to_check(checked, running),
                captured=any(p.captured for p in each),
                operator=any(p.operator for p in each),
            )
            raise BundleError(
                f"{bundle} is not certified for {running.provider} ({running}): {why}; run"
                f" {command}"
            )
        certified.append(part.certified)
    return frozenset.intersection(*certified)


def _without_ending(checked: ProviderFacts) -> str:
    """The provider's name without `CAPTURED` or `OPERATOR`."""
    return checked.provider.removesuffix(CAPTURED).removesuffix(OPERATOR)


def _providers_to_check(
    checked: Collection[ProviderFacts], running: ProviderFacts
) -> list[_Provider]:
    """The providers for a new check: the `checked` ones and `running`, with options if needed."""
    found: list[_Provider] = []
    for one in (*checked, running):
        name, _, given = _without_ending(one).partition(" ")
        others = (p.options for p in checked if " " not in _without_ending(p))
        # The name of a session's provider lacks its options, which are the difference here.
        known = one.chain[:1] in {p.chain[:1] for p in checked}
        differs = one is running and known and one.options not in others
        provider: _Provider = (
            (name, dict(one.options)) if one.options and (given or differs) else name
        )
        if provider not in found:
            found.append(provider)
    return found


def _not_covered(checked: Collection[ProviderFacts], running: ProviderFacts) -> str:
    """Why none of the `checked` providers covers `running`, from the one that is closest to it."""
    for one in checked:
        if one.chain[:1] == running.chain[:1]:
            return f"it was checked on {one.provider} ({one}), and {one.difference(running)}"
    names = listed_names([p.provider for p in checked])
    return f"it was checked on {names} only, and each provider rounds in its own way"


def covered(bundle: Path, manifest: Manifest) -> tuple[str, ...]:
    """The files of `bundle` that can affect results with any client, in name order.

    These are the files that the export wrote, those that readers look for by name, and all files
    of the adapters. Other files in the directory, such as notes, are not included.

    Raises:
        BundleError: a name leads out of the bundle.
    """
    names = {GRAPH_NAME, GRAPH_DATA_NAME, *_READ, *manifest.files}
    for path in (bundle / ADAPTERS_DIRECTORY).rglob("*"):
        names.add(path.relative_to(bundle).as_posix())
    names -= {CERTIFICATE_NAME, SIGNATURE_NAME}
    return tuple(sorted(name for name in names if inside(bundle, name).is_file()))


def is_covered(name: str, manifest: Manifest) -> bool:
    """Whether `name` is a file that `covered` lists, or the certificate or its signature."""
    return (
        name in (GRAPH_NAME, GRAPH_DATA_NAME, CERTIFICATE_NAME, SIGNATURE_NAME, *_READ)
        or name in manifest.files
        or name.startswith(f"{ADAPTERS_DIRECTORY}/")
    )


def fault(
    certificate: Certificate, manifest: Manifest, found: Mapping[str, str], *, verdict: bool = True
) -> str | None:
    """Why `certificate` does not apply to the bundle of `manifest`; None if it does.

    `found`: the present digests of the bundle's `covered` files, by name. `verdict`: whether a
    failed check is a reason, too.
    """
    recorded = {**certificate.files, GRAPH_NAME: certificate.graph_digest}
    if certificate.data_digest is not None:
        recorded[GRAPH_DATA_NAME] = certificate.data_digest
    first = (GRAPH_NAME, GRAPH_DATA_NAME, MANIFEST_NAME)
    for name in (*first, *sorted({*recorded, *found} - {*first})):
        if found.get(name) != recorded.get(name):
            return f"{shortened(name)} has changed since it was checked"
    for name, digest in (
        (GRAPH_NAME, manifest.graph_digest),
        (GRAPH_DATA_NAME, manifest.data_digest),
    ):
        if digest not in (None, found.get(name)):
            return f"{name} is not the one that {MANIFEST_NAME} declares"
    for name in ("task", "mode", "precision"):
        if getattr(certificate, name) != getattr(manifest, name):
            return f"the {name} is not the one that was checked"
    base = manifest.base
    if base.kind == "checkpoint" and base.digest not in (None, certificate.base_digest):
        return (
            f"it was checked against another base (digest {short(certificate.base_digest)}, the"
            f" bundle's is {short(base.digest)})"
        )
    if verdict and certificate.failures:
        return f"the check failed: {certificate.failures[0]}"
    return _unchecked(certificate, manifest)


def digests(bundle: Path, names: Iterable[str] | None = None) -> dict[str, str]:
    """The digests of the files `names` of `bundle` that exist, by name.

    By default of all files that a certificate covers.
    """
    if names is None:
        names = covered(bundle, read_manifest(bundle))
    return {name: file_digest(bundle / name) for name in names if (bundle / name).is_file()}


def parity_command(
    bundle: Path,
    *,
    adapter: bool = False,
    providers: Iterable[_Provider] = (),
    captured: bool = False,
    operator: bool = False,
) -> str:
    """The command that writes a certificate, for use in messages.

    `adapter`: whether it includes an adapter that is not in the bundle. `operator`: whether it
    needs the operators' library. The command is in Python if
    `providers` have options, because the command line does not accept them.
    """
    providers = list(providers)
    if not all(isinstance(provider, str) for provider in providers):
        more = ", capture_graphs=True" if captured else ""
        more += ', operator="FILE"' if operator else ""
        given = f'"{bundle}", model="MODEL", providers={providers!r}{more}'
        return f"`loradeploy.parity({given})`"
    on = "".join(f" --provider {name}" for name in providers)
    on += " --capture-graphs" if captured else ""
    on += " --operator FILE" if operator else ""
    return f"`loradeploy parity {bundle} --model MODEL{' --adapter DIR' if adapter else ''}{on}`"


def _unchecked(certificate: Certificate, manifest: Manifest) -> str | None:
    """Which part of the bundle the check did not run; None if it ran all parts."""
    own = {f"the adapter {name!r}": entry.digest for name, entry in manifest.adapters.items()}
    if manifest.merged_adapter is not None:
        own["the merged adapter"] = manifest.merged_adapter.digest
    for name, digest in own.items():
        if digest not in certificate.certified:
            return f"{name} ({short(digest)}) was not checked"
    if manifest.mode == "merged" and not certificate.certified:
        return "its graph was not run"
    if manifest.mode != "merged" and not (certificate.base_ran or certificate.certified):
        return "its graph was not run"
    return None


def _content(bundle: Path) -> bytes:
    file = bundle / CERTIFICATE_NAME
    if not file.is_file():
        raise BundleError(
            f"{bundle} has no certificate ({CERTIFICATE_NAME}): run {parity_command(bundle)}"
        )
    return read_bytes(file, error=BundleError, limit=MAX_JSON_BYTES)


def _read(bundle: Path, content: bytes) -> Certificate:
    file = bundle / CERTIFICATE_NAME
    values = json_object(content, file, error=BundleError)
    if values.get("format") != FORMAT:
        raise BundleError(f"{file} is not a certificate: run {parity_command(bundle)}")
    version = values.get("schema_version")
    if version != SCHEMA_VERSION:
        newer = isinstance(version, int) and version > SCHEMA_VERSION
        raise BundleError(
            f"{file} has schema version {shown(version)}, this loradeploy reads {SCHEMA_VERSION}:"
            f" {'upgrade loradeploy, or ' if newer else ''}run {parity_command(bundle)} again"
        )
    return certificate_of(values)
