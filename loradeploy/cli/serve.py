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
    GivenPath,
    capture_option,
    certificate_option,
    flag_of,
    json_option,
    operator_option,
    print_json,
    progress,
    provider_option,
    say,
)
from loradeploy.errors import UsageError
from loradeploy.serve.settings import HOST, ServeLimits

if TYPE_CHECKING:
    from loradeploy.serve.opening import ServiceSpec

# The bundle that `make demo` writes.
_DEMO: Final = Path("build/demo/bundle")
_MIB: Final = 1 << 20
_LIMITS: Final = {
    "max_rows": "Maximum number of texts that are generated or encoded in one batch.",
    "max_waiting": "Maximum number of waiting requests; further ones are answered with 429.",
    "max_tokens": "Maximum number of generated tokens of a text.",
    "max_n": "Maximum number of generated texts of a request, over all of its prompts.",
    "max_inputs": "Maximum number of prompts, texts or documents in a request.",
    "max_images": "With --vision, maximum number of images in a request.",
    "max_image_pixels": "With --vision, maximum number of pixels of an image.",
    "max_request_bytes": "Maximum size of a request in bytes.",
    "max_adapter_bytes": "Maximum size in bytes of an adapter of the adapter root.",
    "max_cache_bytes": "Maximum size in bytes of the disk cache for an object store's adapters.",
    "request_timeout": "Seconds after which an unanswered request fails.",
    "send_timeout": "Seconds that a client may take to accept a part of its answer.",
    "drain_timeout": "Seconds that running requests get to complete after SIGTERM.",
    "batch_delay": "Seconds that an encoder waits for further requests to share a run.",
}
_Command = TypeVar("_Command", bound=Callable[..., Any])


def _limits(command: _Command) -> _Command:
    for field in reversed(fields(ServeLimits)):
        command = click.option(
            flag_of(field.name),
            type=type(field.default),
            default=field.default,
            show_default=True,
            help=_LIMITS[field.name],
        )(command)
    return command


@click.command(
    name="serve",
    short_help="Serve a bundle over HTTP with an OpenAI-compatible API.",
    epilog="Example: loradeploy serve bundle --adapter-root adapters --api-keys keys.json",
)
@click.argument("bundle", type=GivenPath(), required=False)
@click.option(
    "--vision",
    type=GivenPath(),
    help="The bundle of the vision tower of a vision-language model, whose decoder BUNDLE is: chat"
    " requests may have images.",
)
@click.option("--host", default=HOST, show_default=True, help="Listen on this address.")
@click.option(
    "--port", type=int, default=8000, show_default=True, help="Listen on this port; 0: any."
)
@click.option(
    "--adapter",
    "adapters",
    multiple=True,
    metavar="[NAME=]DIR",
    help="Serve this adapter too. Repeat for more.",
)
@click.option(
    "--adapter-root",
    metavar="DIR|URL",
    help="Also serve the adapters in this directory. Each subdirectory is an adapter of that name,"
    " which is loaded when a request first names it, and again when its files change. A URL names"
    " an object store, such as s3://bucket/adapters.",
)
@click.option(
    "--adapter-cache",
    metavar="DIR",
    help="Cache adapters of an object store in this directory [default: a temporary one].",
)
@click.option(
    "--allow-adapter-updates",
    is_flag=True,
    help="Allow requests to load and unload adapters of the adapter root.",
)
@click.option(
    "--adapter-memory",
    type=int,
    metavar="MIB",
    help="Limit the memory of adapters; others are read again when used [default: no limit].",
)
@click.option(
    "--api-keys",
    metavar="FILE",
    help="Require one of the API keys in this JSON file, on every route except health checks.",
)
@_limits
@provider_option
@capture_option
@operator_option
@certificate_option
@click.option(
    "--threads",
    type=int,
    metavar="N",
    help="Number of compute threads [default: the number of processors of the container; with --ray"
    " 1 per replica].",
)
@click.option(
    "--ray",
    "on_ray",
    is_flag=True,
    help="Run replicas on a Ray cluster: the one at RAY_ADDRESS, or one on this machine.",
)
@click.option(
    "--replicas",
    metavar="N|LEAST-MOST",
    help="With --ray, the number of replicas, or a range for autoscaling [default: 1].",
)
@click.option(
    "--demo",
    is_flag=True,
    help=f"Open the web page in a browser. BUNDLE defaults to {_DEMO}, which `make demo` writes.",
)
@json_option
def command(
    bundle: str | None,
    port: int,
    adapters: tuple[str, ...],
    allow_adapter_updates: bool,
    adapter_memory: int | None,
    on_ray: bool,
    replicas: str | None,
    demo: bool,
    as_json: bool,
    **options: Any,
) -> None:
    """Serve BUNDLE over HTTP until SIGTERM or Ctrl-C.

    The model of a request is the name of an adapter, or that of the bundle for the base. Decoders
    answer /v1/chat/completions and /v1/completions; encoders answer /v1/embeddings, or /v1/classify
    and /v1/rerank, and the Open Inference Protocol at /v2. The web page at / lets you try it.
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
    limits = {field.name: options.pop(field.name) for field in fields(ServeLimits)}
    spec = ServiceSpec(
        bundle,
        limits=ServeLimits(**limits),
        adapters=dict(map(_named, adapters)),
        adapter_memory=None if adapter_memory is None else adapter_memory * _MIB,
        updates=allow_adapter_updates,
        **options,
    )
    if spec.vision is not None and on_ray:
        raise UsageError("--vision: not supported with --ray, start a service on each machine")

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
    keys = None if spec.api_keys is None else KeyRing.read(spec.api_keys)
    with listen(spec.host, port) as listening, progress("loradeploy.serve"):
        service = open_service(spec, keys)
        url = url_of(listening)
        Server(service).serve_on(listening, lambda: ready(url, service.session.adapters))


def _named(given: str) -> tuple[str, str]:
    """Return the name and the path of an adapter."""
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
