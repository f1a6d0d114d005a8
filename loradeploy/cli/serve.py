"""`loradeploy serve`."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import click

from loradeploy.adapter.files.named import named_directory
from loradeploy.cli.console import (
    capture_option,
    json_option,
    print_json,
    progress,
    provider_option,
    say,
)
from loradeploy.errors import UsageError
from loradeploy.serve.settings import ServeLimits

if TYPE_CHECKING:
    from loradeploy.serve.opening import ServiceSpec

# What `make demo` writes.
_DEMO: Final = Path("build/demo/bundle")
_MIB: Final = 1 << 20
_LIMITS: Final = {
    "max_rows": "Generate, or encode, this many texts together.",
    "max_waiting": "Let this many requests wait; answer one more with 429.",
    "max_tokens": "Let a text have this many tokens.",
    "max_n": "Generate this many texts for one request, over all of its prompts.",
    "max_inputs": "Take this many prompts, texts or documents in one request.",
    "max_request_bytes": "Take requests of this many bytes.",
    "max_adapter_bytes": "Take adapters of this many bytes from the adapter root.",
    "max_cache_bytes": "Keep this many bytes of adapters of an object store on the disk.",
    "request_timeout": "Seconds until a request has to be answered.",
    "send_timeout": "Seconds that a client may take to accept a part of its answer.",
    "drain_timeout": "Seconds in which requests may end after SIGTERM.",
    "batch_delay": "Seconds that an encoder waits for further requests to share a run.",
}
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _limits(command: _Command) -> _Command:
    for field in reversed(fields(ServeLimits)):
        command = click.option(
            f"--{field.name.replace('_', '-')}",
            type=type(field.default),
            default=field.default,
            show_default=True,
            help=_LIMITS[field.name],
        )(command)
    return command


@click.command(
    name="serve",
    short_help="Serve a bundle over HTTP, in the interface of OpenAI's API.",
    epilog="Example: loradeploy serve bundle --adapter-root adapters --api-keys keys.json",
)
@click.argument("bundle", type=click.Path(), required=False)
@click.option("--host", default="127.0.0.1", show_default=True, help="Listen on this address.")
@click.option(
    "--port", type=int, default=8000, show_default=True, help="Listen on this port; 0 is any."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Serve this adapter too; may be given several times.",
)
@click.option(
    "--adapter-root",
    metavar="DIR|URL",
    help="Serve the adapters in this directory too, one in each subdirectory, named by it. They are"
    " loaded when a request names them, and again when their files have changed. A URL is that of"
    " an object store, such as s3://bucket/adapters.",
)
@click.option(
    "--adapter-cache",
    metavar="DIR",
    help="Keep adapters of an object store in this directory [default: a temporary one].",
)
@click.option(
    "--allow-adapter-updates",
    is_flag=True,
    help="Let requests load and unload adapters of the adapter root.",
)
@click.option(
    "--adapter-memory",
    type=int,
    metavar="MIB",
    help="Hold this much of adapters in memory, and read others again [default: all].",
)
@click.option(
    "--api-keys",
    metavar="FILE",
    help="Ask for one of the API keys in this JSON file, on every route but /health and /ready.",
)
@_limits
@provider_option
@capture_option
@click.option(
    "--require-certificate",
    is_flag=True,
    help="Serve only what `loradeploy parity` has passed: the bundle and the adapters as they are.",
)
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Compute with this many threads [default: the processors that the container allows; with"
    " --ray 1, for each replica].",
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Serve by replicas on a Ray cluster: that of RAY_ADDRESS, or one on this machine.",
)
@click.option(
    "--replicas",
    metavar="N|LEAST-MOST",
    help="With --ray, run this many replicas, or as many as the load needs [default: 1].",
)
@click.option(
    "--demo",
    is_flag=True,
    help=f"Open a page to try it in; without BUNDLE, of {_DEMO}, which `make demo` writes.",
)
@json_option
def command(
    bundle: str | None,
    host: str,
    port: int,
    adapters: tuple[str, ...],
    adapter_root: str | None,
    adapter_cache: str | None,
    allow_adapter_updates: bool,
    adapter_memory: int | None,
    api_keys: str | None,
    provider: str,
    capture_graphs: bool,
    require_certificate: bool,
    threads: int | None,
    on_ray: bool,
    replicas: str | None,
    demo: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Serve BUNDLE over HTTP until SIGTERM or Ctrl-C.

    A request's model is an adapter's name, or the bundle's for the base. Decoders answer
    /v1/chat/completions and /v1/completions, encoders /v1/embeddings, or /v1/classify and
    /v1/rerank, and tensors of the Open Inference Protocol at /v2. There is a page to try it at /.
    """
    from loradeploy.serve.http.server import Server, listen, url_of
    from loradeploy.serve.keys import KeyRing
    from loradeploy.serve.opening import ServiceSpec, open_service

    if bundle is None:
        if not demo:
            raise UsageError("give the BUNDLE to serve, or --demo")
        if not _DEMO.is_dir():
            raise UsageError(f"there is no {_DEMO} here: run `make demo`, or give a BUNDLE")
        bundle = str(_DEMO)
    if adapter_memory is not None and adapter_memory < 1:
        raise UsageError(f"--adapter-memory is {adapter_memory} MiB: give 1 or more")
    if replicas is not None and not on_ray:
        raise UsageError("--replicas: give --ray, which runs them")
    spec = ServiceSpec(
        bundle,
        limits=ServeLimits(**limits),
        adapters=dict(map(_named, adapters)),
        adapter_root=adapter_root,
        adapter_cache=adapter_cache,
        adapter_memory=None if adapter_memory is None else adapter_memory * _MIB,
        api_keys=api_keys,
        updates=allow_adapter_updates,
        provider=provider,
        capture_graphs=capture_graphs,
        require_certificate=require_certificate,
        host=host,
        threads=threads,
    )

    def ready(url: str, loaded: Mapping[str, str | None] | None) -> None:
        if as_json:
            known = {} if loaded is None else {"adapters": loaded}
            print_json({"bundle": bundle, "url": url, **known})
        else:
            say(f"serving {bundle} on {url}")
        if demo:
            webbrowser.open(url)

    if on_ray:
        _serve_on_ray(spec, replicas or "1", port, ready)
        return
    keys = None if api_keys is None else KeyRing.read(api_keys)
    with listen(host, port) as listening, progress("loradeploy.serve"):
        service = open_service(spec, keys)
        url = url_of(listening)
        Server(service).serve_on(listening, lambda: ready(url, service.session.adapters))


def _named(given: str) -> tuple[str, str]:
    """The name and the path of an adapter."""
    name, path = named_directory(given)
    return name, str(path)


def _serve_on_ray(
    spec: ServiceSpec, replicas: str, port: int, ready: Callable[[str, None], None]
) -> None:
    try:
        from loradeploy.serve.replicas import Scale, run, wait_for_signal
    except ImportError as problem:
        raise UsageError(f"--ray: pip install 'loradeploy[ray]' ({problem})") from None
    with progress("loradeploy.serve"):
        url = run(spec, Scale.of(replicas, float(spec.threads or 1)), port)
        ready(url, None)
        wait_for_signal()
