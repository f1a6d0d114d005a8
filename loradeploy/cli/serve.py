"""`loradeploy serve`."""

from __future__ import annotations

import webbrowser
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any, Final, TypeVar

import click

from loradeploy.cli.console import json_option, print_json, progress, provider_option, say
from loradeploy.errors import UsageError
from loradeploy.serve.settings import ServeLimits

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
@click.option(
    "--require-certificate",
    is_flag=True,
    help="Serve only what `loradeploy parity` has passed: the bundle and the adapters as they are.",
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
    require_certificate: bool,
    demo: bool,
    as_json: bool,
    **limits: Any,
) -> None:
    """Serve BUNDLE over HTTP until SIGTERM or Ctrl-C.

    A request's model is an adapter's name, or the bundle's for the base. Decoders answer
    /v1/chat/completions and /v1/completions, encoders /v1/embeddings, or /v1/classify and
    /v1/rerank, and tensors of the Open Inference Protocol at /v2. There is a page to try it at /.
    """
    from loradeploy.runtime.session import AdapterSession
    from loradeploy.serve.keys import KeyRing
    from loradeploy.serve.roots import AdapterRoot, DirectoryRoot, StoreRoot
    from loradeploy.serve.server import Server, listen, url_of
    from loradeploy.serve.service import Service

    if bundle is None:
        if not demo:
            raise UsageError("give the BUNDLE to serve, or --demo")
        if not _DEMO.is_dir():
            raise UsageError(f"there is no {_DEMO} here: run `make demo`, or give a BUNDLE")
        bundle = str(_DEMO)
    bounds = ServeLimits(**limits)
    if adapter_memory is not None and adapter_memory < 1:
        raise UsageError(f"--adapter-memory is {adapter_memory} MiB: give 1 or more")
    if allow_adapter_updates and adapter_root is None:
        raise UsageError("--allow-adapter-updates: give --adapter-root, where adapters are found")
    stored = adapter_root is not None and "://" in adapter_root
    if adapter_cache is not None and not stored:
        raise UsageError("--adapter-cache: give --adapter-root the URL of an object store")
    root: AdapterRoot | None = None
    if adapter_root is not None and stored:
        cache = None if adapter_cache is None else Path(adapter_cache)
        root = StoreRoot(adapter_root, cache=cache, max_bytes=bounds.max_cache_bytes)
    elif adapter_root is not None:
        root = DirectoryRoot(Path(adapter_root))
    keys = None if api_keys is None else KeyRing.read(api_keys)
    listening = listen(host, port)
    with progress("loradeploy.serve"):
        session = AdapterSession(
            bundle,
            [provider],
            host_budget=None if adapter_memory is None else adapter_memory * _MIB,
            require_certificate=require_certificate,
        )
        for given in adapters:
            name, _, path = given.rpartition("=")
            session.load(name or Path(path).resolve().name, path)
        service = Service(
            session,
            limits=bounds,
            keys=keys,
            root=root,
            updates=allow_adapter_updates,
            host=host,
        )
        url = url_of(listening)

        def ready() -> None:
            if as_json:
                print_json({"bundle": bundle, "url": url, "adapters": session.adapters})
            else:
                say(f"serving {bundle} on {url}")
            if demo:
                webbrowser.open(url)

        Server(service).serve_on(listening, ready)
