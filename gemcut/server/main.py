"""A server's life: start the engine, listen, serve, drain, end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import resource
import signal
import socket
from collections.abc import Callable, Iterator

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gemcut.config import EngineConfig
from gemcut.engine.model_files import ModelFiles
from gemcut.errors import ConfigError
from gemcut.server import logs
from gemcut.server.answerer import Answerer
from gemcut.server.app import App
from gemcut.server.connection import limited
from gemcut.server.door import Door
from gemcut.server.engine_client import MODULE, EngineClient, Watch
from gemcut.server.metrics import Metrics
from gemcut.server.settings import ServerConfig
from gemcut.server.traces import Traces

log = logging.getLogger("gemcut.server")

GAVE_UP = 1


class HttpServer(uvicorn.Server):
    """uvicorn without its own signals: ours drain first."""

    def drop_stuck(self) -> None:
        """Close the connections whose clients take nothing; uvicorn would wait for them."""
        for connection in list(self.server_state.connections):
            if isinstance(connection, HttpToolsProtocol) and connection.flow.write_paused:
                connection.transport.abort()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave the signals alone."""
        yield


def serve(
    engine: EngineConfig,
    config: ServerConfig,
    files: ModelFiles,
    *,
    watch: Watch | None = None,
    module: str = MODULE,
) -> int:
    """Serve until a signal or until the engine is given up. Returns the exit status.

    files: of the checkpoint that `engine.model` names. module: what the engine's process runs. Raises
    GemcutError if the server cannot start.
    """
    logs.configure()
    logging.getLogger("uvicorn").setLevel(logging.ERROR)
    raise_descriptor_limit()
    client = EngineClient(
        engine,
        max_waiting=config.max_waiting + engine.max_num_seqs,
        watch=watch,
        module=module,
    )
    metrics = Metrics(client, config.served_model_names[0])
    traces = None if config.otlp_endpoint is None else Traces.to(config.otlp_endpoint)
    most = engine.max_num_seqs + config.max_waiting
    with bind(config) as listener, asyncio.Runner(loop_factory=loop_factory()) as runner:
        app = App(Answerer(files, client, config, metrics), Door(most, config.max_per_key), traces)
        try:
            return runner.run(_serve(app, listener))
        finally:
            if traces is not None:
                traces.close()


async def _serve(app: App, listener: socket.socket) -> int:
    client, answerer, door, config = app.client, app.answerer, app.door, app.config
    stop, hurry = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for sign in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(sign, lambda: (hurry if stop.is_set() else stop).set())
    server = HttpServer(_uvicorn_config(app, config))
    try:
        if not await _first_of(stop, starting := asyncio.create_task(client.start())):
            starting.cancel()
            await asyncio.gather(starting, return_exceptions=True)
            return 0
        await starting  # raises what kept it from starting
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        while not server.started and not serving.done():
            await asyncio.sleep(0.005)
        host, port = listener.getsockname()[:2]
        if not config.api_keys and not config.is_loopback:
            log.warning("anyone who reaches this server may use it: no --api-key is set")
        log.info("listening", extra={"fields": {"host": host, "port": port}})
        await _any(stop, client.gave_up)
        status = GAVE_UP if client.gave_up.is_set() else 0
        door.is_draining = True
        log.info("draining", extra={"fields": {"requests": door.num_inside, "status": status}})
        await _drain(door, hurry, 0.0 if status else config.drain_s)
        await client.close()  # what is still open gets an error event
        server.drop_stuck()
        server.should_exit = True
        await serving
        return status
    finally:
        await client.close()
        answerer.close()


async def _drain(door: Door, hurry: asyncio.Event, limit_s: float) -> None:
    """Until nobody is inside, the time is up, or a second signal comes."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while door.num_inside and not hurry.is_set():
                await asyncio.sleep(0.02)
    if door.num_inside:
        log.warning("requests are broken off", extra={"fields": {"requests": door.num_inside}})


async def _any(*events: asyncio.Event) -> None:
    tasks = [asyncio.create_task(event.wait()) for event in events]
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    for task in tasks:
        task.cancel()


async def _first_of(stop: asyncio.Event, work: asyncio.Task[None]) -> bool:
    """Wait for the work or a stop. Whether it was the work."""
    waiting = asyncio.create_task(stop.wait())
    await asyncio.wait({waiting, work}, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return work.done()


def bind(config: ServerConfig) -> socket.socket:
    """The address, taken before anything slow is done; nobody can connect until the engine is ready."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(
            config.host, config.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ConfigError(f"Cannot listen on {config.host} port {config.port}: {error.strerror}.") from error
    return listener


def raise_descriptor_limit() -> None:
    """Each connection takes a descriptor; the usual soft limit is 1,024."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 65536 if hard == resource.RLIM_INFINITY else min(hard, 65536)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def _uvicorn_config(app: App, config: ServerConfig) -> uvicorn.Config:
    return uvicorn.Config(
        app,  # type: ignore[arg-type]
        http=limited(config),
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        backlog=2048,
        timeout_keep_alive=round(config.keep_alive_s),
        timeout_graceful_shutdown=5,
    )


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Of uvloop's event loop, None where there is none."""
    try:
        import uvloop
    except ImportError:
        return None
    return uvloop.new_event_loop
