"""`gemcut serve`: the HTTP server."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from gemcut.cli import options
from gemcut.errors import ConfigError

SERVER, LIMITS = "The server", "Limits"
# most flags change nothing that a default does not say already; the values stand in `ServerConfig`
MODEL_HELP = "Checkpoint folder or hub id; by default the demo."


def serve(
    model: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help=MODEL_HELP, envvar="GEMCUT_MODEL", show_default=False),
    ] = None,
    host: Annotated[
        str, options.flag("--host", help="Address to listen on; by default 127.0.0.1.", panel=SERVER)
    ] = "127.0.0.1",
    port: Annotated[
        int, options.flag("--port", help="By default 8000; 0 takes a free one.", panel=SERVER)
    ] = 8000,
    api_key: Annotated[
        list[str] | None,
        options.flag("--api-key", help="A key that clients must show; may be given often.", panel=SERVER),
    ] = None,
    api_key_file: Annotated[
        Path | None,
        options.flag("--api-key-file", help="A file with a key on each line.", panel=SERVER),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        options.flag(
            "--served-model-name", help="What clients call the model; may be given often.", panel=SERVER
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        options.flag(
            "--allowed-host", help="Another host name of a local server without keys.", panel=SERVER
        ),
    ] = None,
    allowed_origin: Annotated[
        list[str] | None,
        options.flag("--allowed-origin", help="A web origin that may call the server (CORS).", panel=SERVER),
    ] = None,
    allow_image_domain: Annotated[
        list[str] | None,
        options.flag(
            "--allow-image-domain",
            help="A host whose pictures are fetched by URL, *.example.com for those below; none by default.",
            panel=SERVER,
        ),
    ] = None,
    otlp_traces_endpoint: Annotated[
        str | None,
        options.flag(
            "--otlp-traces-endpoint",
            help="Send a trace of each request there: http://localhost:4318/v1/traces.",
            panel=SERVER,
        ),
    ] = None,
    drain_seconds: Annotated[
        float,
        options.flag("--drain-seconds", help="Time for those in flight after SIGTERM; 60.", panel=SERVER),
    ] = 60.0,
    max_waiting: Annotated[
        int, options.flag("--max-waiting", help="Requests that may wait before 503; 256.", panel=LIMITS)
    ] = 256,
    max_per_key: Annotated[
        int | None,
        options.flag("--max-per-key", help="Requests of one key at a time before 429.", panel=LIMITS),
    ] = None,
    max_images: Annotated[
        int, options.flag("--max-images", help="Pictures of a request; 16.", panel=LIMITS)
    ] = 16,
    max_body: Annotated[
        int | None,
        options.flag(
            "--max-body",
            help="Size of a request; 64MiB.",
            panel=LIMITS,
            parser=options.parse_bytes,
            metavar="BYTES",
        ),
    ] = None,
    request_seconds: Annotated[
        float, options.flag("--request-seconds", help="Time for a whole answer; 600.", panel=LIMITS)
    ] = 600.0,
    step_seconds: Annotated[
        float,
        options.flag(
            "--step-seconds",
            help="A step that takes longer has hung, and the engine is restarted; 120, 0 for no limit.",
            panel=LIMITS,
        ),
    ] = 120.0,
    max_num_seqs: Annotated[
        int, options.flag("--max-num-seqs", help="Sequences that run at once; 64.", panel=options.ENGINE)
    ] = 64,
    max_num_batched_tokens: Annotated[
        int,
        options.flag("--max-num-batched-tokens", help="Tokens of a step; 2048.", panel=options.ENGINE),
    ] = 2048,
    prefix_caching: Annotated[
        bool,
        typer.Option(
            "--enable-prefix-caching/--no-enable-prefix-caching",
            help="Keep KV of prompts for those that begin alike.",
            envvar="GEMCUT_ENABLE_PREFIX_CACHING",
            rich_help_panel=options.ENGINE,
            show_default=False,
        ),
    ] = True,
    deterministic: Annotated[
        bool,
        options.flag(
            "--deterministic", help="Bit-equal answers whatever else runs; slower.", panel=options.ENGINE
        ),
    ] = False,
    revision: options.Revision = None,
    device: options.Device = "auto",
    dtype: options.DType = "auto",
    kernels: options.Kernels = "auto",
    numerics: options.Numerics = "auto",
    graphs: options.Graphs = "auto",
    max_model_len: options.MaxModelLen = None,
    kv_bytes: options.KVBytes = None,
    gpu_memory_utilization: options.GpuMemoryUtilization = 0.9,
    allow_unknown_config: options.AllowUnknownConfig = False,
) -> None:
    """Answer over HTTP: OpenAI's interface, and a page to talk to at /.

    gemcut serve google/gemma-4-E4B-it --api-key-file keys.txt --host 0.0.0.0

    Logs go to stderr, one JSON object a line. SIGTERM or Ctrl-C lets those in flight finish; a second one
    ends at once.
    """
    settings = options.engine_settings(
        model=model,
        revision=revision,
        device=device,
        dtype=dtype,
        kernels=kernels,
        numerics=numerics,
        graphs=graphs,
        max_model_len=max_model_len,
        kv_bytes=kv_bytes,
        gpu_memory_utilization=gpu_memory_utilization,
        allow_unknown_config=allow_unknown_config,
    )
    from gemcut.cli import answer
    from gemcut.config import EngineConfig
    from gemcut.server import main
    from gemcut.server.engine_client import Watch
    from gemcut.server.settings import ServerConfig

    with options.usage():
        engine = EngineConfig(
            **{
                **settings,
                "max_num_seqs": max_num_seqs,
                "max_num_batched_tokens": max_num_batched_tokens,
                "enable_prefix_caching": prefix_caching,
                "deterministic": deterministic,
            }
        )
        config = ServerConfig(
            host=host,
            port=port,
            api_keys=(*(api_key or ()), *read_keys(api_key_file)),
            served_model_names=tuple(served_model_name or (model or "gemcut-demo",)),
            allowed_hosts=tuple(name.lower() for name in allowed_host or ()),
            allowed_origins=tuple(allowed_origin or ()),
            image_domains=tuple(allow_image_domain or ()),
            otlp_endpoint=otlp_traces_endpoint,
            drain_s=drain_seconds,
            max_waiting=max_waiting,
            max_per_key=max_per_key,
            max_images=max_images,
            max_body_bytes=max_body or 64 << 20,
            request_s=request_seconds,
        )
        watch = Watch(step_s=step_seconds)
    files = answer.open_files(settings)
    engine = replace(engine, model=str(files.folder))
    raise typer.Exit(main.serve(engine, config, files, watch=watch))


def read_keys(path: Path | None) -> list[str]:
    """The keys of a file, one a line. Raises ConfigError if there are none."""
    if path is None:
        return []
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"api_key_file {path} cannot be read: {reason}.") from error
    keys = [line.strip() for line in lines if line.strip() and not line.startswith("#")]
    if not keys:
        raise ConfigError(f"api_key_file {path} holds no key.")
    return keys
