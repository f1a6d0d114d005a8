"""What a running server answers, in one line of a test."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

from tests.serve.conftest import Running


def text(running: Running, model: str) -> str:
    answer = running.client().completions.create(
        model=model, prompt="Shares rose", temperature=0, max_tokens=6
    )
    return answer.choices[0].text


def names(running: Running) -> set[str]:
    return {model.id for model in running.client().models.list()} - {"bundle-llama"}


def figure(running: Running, name: str) -> float:
    http = running.http()
    lines = http.get("/metrics").text.splitlines()
    return float(next(line for line in lines if line.startswith(f"loradeploy:{name} ")).split()[1])


def until(condition: Any, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def connection(
    running: Running, body: dict[str, Any], path: str = "/v1/completions"
) -> socket.socket:
    """Send a request and return the socket, without reading."""
    host, _, port = running.url.removeprefix("http://").partition(":")
    made = socket.create_connection((host, int(port)), timeout=20)
    content = json.dumps(body).encode()
    head = f"Host: {host}\r\nContent-Type: application/json\r\nContent-Length: {len(content)}"
    made.sendall(f"POST {path} HTTP/1.1\r\n{head}\r\n\r\n".encode() + content)
    return made
