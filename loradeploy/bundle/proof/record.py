"""Read a parity report as the certificate of a bundle."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from loradeploy.bundle.proof.provider import Device, ProviderFacts
from loradeploy.bundle.proof.requirement import Coverage

ONNX_MERGED: Final = "onnx-merged"
ONNX_SIDE_INPUTS: Final = "onnx-side-inputs"
ONNX_NATIVE: Final = "onnx-native"
ONNX_MIXED: Final = "onnx-mixed"
# The backends that run the bundle. Comparisons within PyTorch prove nothing about it.
RUN_THE_BUNDLE: Final[Mapping[str, tuple[str, ...]]] = {
    "merged": (ONNX_MERGED,),
    "side-inputs": (ONNX_SIDE_INPUTS, ONNX_NATIVE, ONNX_MIXED),
}


@dataclass(frozen=True)
class CertifiedAdapter:
    """A checked adapter: its effect, and the largest error of the bundle with it.

    `error` is None if no backend ran the bundle with it.
    """

    name: str
    digest: str
    effect: float | None
    error: float | None


@dataclass(frozen=True)
class Certificate:
    """The contents of parity.json.

    `files`: digests of files other than the graph's, by name. `coverage`: the scope of the runs.
    `failures`: why the check failed, from its list of failures or else from its entries; empty if
    it passed. `base_ran`: whether the base was run without an adapter. `providers`: the providers
    of the check.
    """

    created: str
    task: str
    mode: str
    precision: str
    base_digest: str | None
    graph_digest: str | None
    data_digest: str | None
    files: Mapping[str, str]
    adapters: tuple[CertifiedAdapter, ...]
    base_ran: bool
    failures: tuple[str, ...]
    versions: Mapping[str, str]
    platform: Mapping[str, str]
    providers: tuple[ProviderFacts, ...]
    coverage: Coverage
    _values: Mapping[str, Any] = field(repr=False, compare=False)

    @property
    def passed(self) -> bool:
        """Whether the check passed, according to its verdict and to all of its entries."""
        return not self.failures

    @property
    def certified(self) -> frozenset[str]:
        """The digests of the adapters that the bundle was run with."""
        return frozenset(own.digest for own in self.adapters if own.error is not None)

    def on(self, providers: Collection[str]) -> Certificate:
        """The certificate of the runs on `providers` only (names as `ProviderFacts.provider`)."""
        return certificate_of(self._values, frozenset(providers))


def _coverage(
    values: Mapping[str, Any],
    ran: list[Mapping[str, Any]],
    providers: tuple[ProviderFacts, ...],
) -> Coverage:
    inputs = _object(values, "inputs")
    variants = [_object(result, "variant") for result in ran]
    return Coverage(
        phases=frozenset(_text(result, "phase") for result in ran) - {""},
        providers=tuple(p for p in providers if p.provider in _providers(ran)),
        optimization=frozenset(_text(v, "optimization") for v in variants) - {""},
        prompts=sum(_integer(inputs, name) for name in ("prompts", "fuzz", "edges")),
        prompt_tokens=_integer(inputs, "prompt_tokens"),
        generated=_integer(inputs, "generated"),
    )


def certificate_of(values: Mapping[str, Any], on: frozenset[str] | None = None) -> Certificate:
    """The certificate in a report's JSON. Values of unexpected types are treated as missing.

    `on`: the providers whose runs are included; None for all.
    """
    results = _objects(values, "results")
    mode = _text(values, "mode")
    ran = [
        result
        for result in results
        if result.get("outcome") == "passed"
        and result.get("backend") in RUN_THE_BUNDLE.get(mode, ())
        and (on is None or _text(_object(result, "variant"), "provider") in on)
    ]
    environment = _object(values, "environment")
    providers = tuple(map(_provider, _objects(environment, "providers")))
    return Certificate(
        created=_text(values, "created"),
        task=_text(values, "task"),
        mode=mode,
        precision=_text(values, "precision"),
        base_digest=_text(values, "base_digest") or None,
        graph_digest=_text(values, "graph_digest") or None,
        data_digest=_text(values, "data_digest") or None,
        files=_texts(values, "files"),
        adapters=tuple(
            CertifiedAdapter(
                _text(facts, "name"),
                _text(facts, "digest"),
                _number(facts, "effect"),
                _error(ran, facts.get("name")),
            )
            for facts in _objects(values, "adapters")
        ),
        base_ran=any(result.get("adapter") is None for result in ran),
        failures=tuple(_failures(values, results)),
        versions=_texts(environment, "versions"),
        platform=_texts(environment, "platform"),
        providers=providers,
        coverage=_coverage(values, ran, providers),
        _values=values,
    )


def _providers(ran: Iterable[Mapping[str, Any]]) -> frozenset[str]:
    return frozenset(_text(_object(result, "variant"), "provider") for result in ran)


def _provider(values: Mapping[str, Any]) -> ProviderFacts:
    chain, device = values.get("chain"), values.get("device")
    return ProviderFacts(
        provider=_text(values, "provider"),
        chain=tuple(map(str, chain)) if isinstance(chain, list) else (),
        version=_text(values, "version"),
        device=None
        if not isinstance(device, Mapping)
        else Device(
            kind=_text(device, "kind"),
            vendor=_text(device, "vendor"),
            vendor_id=_integer(device, "vendor_id"),
            device_id=_integer(device, "device_id"),
            name=_text(device, "name") or None,
        ),
        options=_texts(values, "options"),
        captured=values.get("captured") is True,
        operator=values.get("operator") is True,
    )


def _failures(values: Mapping[str, Any], results: list[Mapping[str, Any]]) -> list[str]:
    """The failures that the report lists, or else those in its entries."""
    listed = values.get("failures")
    if isinstance(listed, list) and listed:
        return [str(line) for line in listed]
    found = [
        f"{result.get('title')}: {result.get('message')}"
        for result in results
        if result.get("outcome") not in ("passed", "not run")
        or any(check.get("passed") is not True for check in _objects(result, "checks"))
    ]
    bad: Mapping[str, Callable[[Mapping[str, Any]], bool]] = {
        "adapters": lambda facts: facts.get("failed") is not False,
        "controls": lambda control: control.get("caught") is not True,
        "scores": lambda score: score.get("passed") is not True,
        "regressions": lambda _: True,
    }
    for name, is_bad in bad.items():
        found += [
            f"an entry of {name} is a failure" for entry in _objects(values, name) if is_bad(entry)
        ]
    if found or values.get("passed") is True:
        return found
    return ["its verdict is not `passed`"]


def _error(ran: list[Mapping[str, Any]], name: object) -> float | None:
    errors = [
        _number(_object(result, "figures"), "max_abs")
        for result in ran
        if result.get("adapter") == name
    ]
    return max((error for error in errors if error is not None), default=None)


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = values.get(name)
    return value if isinstance(value, Mapping) else {}


def _objects(values: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    listed = values.get(name)
    return [row for row in listed if isinstance(row, Mapping)] if isinstance(listed, list) else []


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values.get(name)
    return value if isinstance(value, str) else ""


def _texts(values: Mapping[str, Any], name: str) -> dict[str, str]:
    return {key: str(value) for key, value in _object(values, name).items()}


def _number(values: Mapping[str, Any], name: str) -> float | None:
    value = values.get(name)
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value)


def _integer(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    return value if isinstance(value, int) and not isinstance(value, bool) else 0
