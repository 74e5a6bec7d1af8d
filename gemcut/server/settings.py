"""What a server is started with, beside its engine's settings."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

from gemcut.errors import ConfigError
from gemcut.media.fetch import Domain
from gemcut.media.image import MAX_PIXELS


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Names, doors and limits.

    served_model_names: what clients call the model; the first is the one that answers bear.
    api_keys: any of them opens the doors that are not public; none leaves all open.
    allowed_hosts: names by which browsers may reach a server without keys, beside loopback ones.
    allowed_origins: web pages of other origins that may call this server (CORS).
    image_domains: from where pictures are fetched by URL (`media.fetch.Domain`); from nowhere by default.
    max_waiting: requests beyond those that run; more are turned away with 503. max_per_key: requests of
    one key at a time; more get 429. max_images, max_pixels, max_body_bytes, max_head_bytes: of one request.
    max_answer_tokens: n x prompts x max_tokens, where a request names max_tokens.
    head_s, body_s: for the head of a request to arrive, and for each piece of its body; send_s: for a client
    to take what was sent. request_s: for a whole answer. drain_s: for those in flight after SIGTERM.
    otlp_endpoint: where traces go, by OTLP over HTTP; none are made without.
    ping_s: an idle stream gets a comment after so long.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    served_model_names: tuple[str, ...]
    api_keys: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    image_domains: tuple[str, ...] = ()
    max_waiting: int = 256
    max_per_key: int | None = None
    max_images: int = 16
    max_pixels: int = MAX_PIXELS
    max_body_bytes: int = 64 << 20
    max_head_bytes: int = 32 << 10
    max_answer_tokens: int = 1 << 20
    head_s: float = 10.0
    body_s: float = 20.0
    send_s: float = 60.0
    request_s: float = 600.0
    drain_s: float = 60.0
    keep_alive_s: float = 75.0
    ping_s: float = 10.0
    media_workers: int | None = None
    otlp_endpoint: str | None = None

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise ConfigError("served_model_name is empty; clients need a name to call the model by.")
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must lie between 0 and 65535, got {self.port}.")
        if not all(len(key) >= 8 and key.isascii() and key.isprintable() for key in self.api_keys):
            raise ConfigError("api_key must have 8 or more printable ASCII characters.")
        for domain in self.image_domains:
            Domain.parse(domain)
        whole = ("max_images", "max_pixels", "max_body_bytes", "max_head_bytes", "max_answer_tokens")
        for name in ("max_waiting", *whole):
            if getattr(self, name) < (0 if name in ("max_waiting", "max_images") else 1):
                raise ConfigError(f"{name} is too small: {getattr(self, name)}.")
        for name in ("head_s", "body_s", "send_s", "request_s", "keep_alive_s", "ping_s"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name} must be above 0, got {getattr(self, name)}.")
        if self.otlp_endpoint is not None and not self.otlp_endpoint.startswith(("http://", "https://")):
            raise ConfigError(
                "otlp_traces_endpoint must be a URL such as http://localhost:4318/v1/traces, "
                f"got {self.otlp_endpoint!r}."
            )
        if self.drain_s < 0:
            raise ConfigError(f"drain_s must not be negative, got {self.drain_s}.")

    @property
    def is_loopback(self) -> bool:
        """Only programs of this machine can connect."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"
