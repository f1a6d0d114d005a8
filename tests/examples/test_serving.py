"""The container files of examples/serving use valid flags, routes and shutdown times."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from loradeploy.serve.http.gate import OPEN_PATHS
from tests.cli.calling import command
from tests.conftest import ROOT

PLACE = ROOT / "examples" / "serving"
DOCKERFILE = (PLACE / "Dockerfile").read_text()
COMPOSE = yaml.safe_load((PLACE / "compose.yaml").read_text())["services"]["loradeploy"]
MANIFEST = list(yaml.safe_load_all((PLACE / "kubernetes.yaml").read_text()))
BY_KIND = {one["kind"]: one for one in MANIFEST}
POD = BY_KIND["Deployment"]["spec"]["template"]["spec"]
(CONTAINER,) = POD["containers"]


def instructions() -> Iterator[tuple[str, str]]:
    """Yield the instructions of the Dockerfile with their arguments."""
    text = re.sub(r"^#.*\n", "", DOCKERFILE, flags=re.MULTILINE).replace("\\\n", " ")
    for line in filter(None, text.splitlines()):
        word, _, rest = line.partition(" ")
        yield word, rest.strip()


LAST = dict(
    list(instructions())[[i for i, (w, _) in enumerate(instructions()) if w == "FROM"][-1] :]
)
COMMANDS = {
    "Dockerfile": json.loads(LAST["CMD"]),
    "compose": COMPOSE["command"],
    "kubernetes": CONTAINER["args"],
}


def parsed(arguments: list[str]) -> dict[str, Any]:
    """Parse the flags like the command; unknown ones raise."""
    context = click.Context(command("serve"), info_name="serve")
    command("serve").parse_args(context, list(arguments))
    return context.params


@pytest.mark.parametrize("name", COMMANDS)
def test_the_command_is_valid_for_the_server(name: str) -> None:
    flags = parsed(COMMANDS[name])
    assert (flags["bundle"], flags["host"], flags["port"]) == ("/bundle", "0.0.0.0", 8000)
    assert flags["adapter_root"] == "/adapters"
    assert flags["api_keys"]  # required: others can reach the port


def test_the_image_is_slim_runs_without_root_and_uses_existing_files() -> None:
    assert all(
        rest.startswith("python:3.12-slim") for word, rest in instructions() if word == "FROM"
    )
    assert re.fullmatch(r"[1-9]\d{4,}:[1-9]\d{4,}", LAST["USER"])
    assert json.loads(LAST["ENTRYPOINT"]) == ["loradeploy", "serve"]
    assert LAST["EXPOSE"] == "8000"
    assert LAST["STOPSIGNAL"] == "SIGTERM"
    assert "loradeploy.*" not in DOCKERFILE
    assert "[serve,store]" in LAST["RUN"]
    taken = (ROOT / ".dockerignore").read_text().splitlines()
    for word, rest in instructions():
        if word == "COPY":
            *sources, _ = shlex.split(rest)
            for source in sources:
                assert (ROOT / source).exists()
                assert f"!{source}" in taken


def test_the_health_check_queries_the_server(
    llama_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = json.loads(LAST["HEALTHCHECK"].partition("CMD ")[2])
    assert words[:2] == ["python", "-c"]
    program = words[2]
    assert "http://127.0.0.1:8000/health" in program
    exec(program.replace("http://127.0.0.1:8000", llama_url), {})
    with pytest.raises(OSError, match="404"):  # any status but 200 fails
        exec(program.replace("http://127.0.0.1:8000/health", f"{llama_url}/nothing"), {})


@pytest.fixture
def llama_url(tiny_llama_bundle: Path) -> Iterator[str]:
    from tests.serve.conftest import serving

    with serving(tiny_llama_bundle) as running:
        yield running.url


@pytest.mark.parametrize(
    ("probe", "path"),
    [("startupProbe", "/health"), ("livenessProbe", "/health"), ("readinessProbe", "/ready")],
)
def test_probes_need_no_key(probe: str, path: str) -> None:
    asked = CONTAINER[probe]["httpGet"]
    (port,) = CONTAINER["ports"]
    assert asked == {"path": path, "port": port["name"]}
    assert port["containerPort"] == 8000
    assert path in OPEN_PATHS


def test_the_shutdown_waits_for_requests_in_progress() -> None:
    drain = parsed(CONTAINER["args"])["drain_timeout"]
    word, before = CONTAINER["lifecycle"]["preStop"]["exec"]["command"]
    assert word == "sleep"
    assert POD["terminationGracePeriodSeconds"] >= int(before) + drain + 5
    grace = int(COMPOSE["stop_grace_period"].removesuffix("s"))
    assert grace >= parsed(COMPOSE["command"])["drain_timeout"] + 5


def test_the_pod_has_minimal_privileges() -> None:
    assert POD["securityContext"]["runAsNonRoot"] is True
    user = int(LAST["USER"].partition(":")[0])
    assert POD["securityContext"]["runAsUser"] == user
    assert POD["automountServiceAccountToken"] is False
    own = CONTAINER["securityContext"]
    assert own["allowPrivilegeEscalation"] is False
    assert own["readOnlyRootFilesystem"] is True
    assert own["capabilities"] == {"drop": ["ALL"]}
    assert COMPOSE["read_only"] is True
    assert COMPOSE["cap_drop"] == ["ALL"]
    assert all(port.startswith("127.0.0.1:") for port in COMPOSE["ports"])
    mounted = {one["mountPath"]: one for one in CONTAINER["volumeMounts"]}
    assert all(one.get("readOnly") for path, one in mounted.items() if path != "/tmp")
    assert all(one["read_only"] for one in COMPOSE["volumes"])
    for part in ("requests", "limits"):
        assert {"cpu", "memory"} <= set(CONTAINER["resources"][part])
    # Every referenced name exists.
    volumes = {volume["name"] for volume in POD["volumes"]}
    assert {one["name"] for one in CONTAINER["volumeMounts"]} == volumes
    flags = parsed(CONTAINER["args"])
    for path in (flags["bundle"], flags["adapter_root"], str(Path(flags["api_keys"]).parent)):
        assert path in mounted


def test_the_service_and_the_disruption_budget_select_the_pods_of_the_deployment() -> None:
    labels = BY_KIND["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert BY_KIND["Deployment"]["spec"]["selector"]["matchLabels"] == labels
    assert BY_KIND["Service"]["spec"]["selector"] == labels
    assert BY_KIND["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    assert (
        BY_KIND["Deployment"]["spec"]["replicas"]
        > BY_KIND["PodDisruptionBudget"]["spec"]["minAvailable"]
    )
    (port,) = BY_KIND["Service"]["spec"]["ports"]
    assert port["targetPort"] == CONTAINER["ports"][0]["name"]
