"""Every knob of the gateway, with its unit and default; set by flag or by ALEXNET_<NAME>."""

from __future__ import annotations

import os
import re
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Final, Self

from pydantic import Field, SecretStr, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.admission import Limits
from serving.contract import Crops
from serving.decoder import Bounds
from serving.logs import Format, Level
from serving.pictures import DEFAULT_MAX_PIXELS
from serving.triton_target import grpc_target

_ORIGIN: Final = re.compile(r"https?://[A-Za-z0-9.-]+(:[0-9]{1,5})?|https?://\[[0-9a-f:]+\](:[0-9]{1,5})?")


def split(names: str) -> list[str]:
    """`a, b` -> the names of a setting with commas."""
    return [name.strip() for name in names.split(",") if name.strip()]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _share_of_cores(before: dict[str, Any]) -> int:
    """Of one worker; `before`: the settings above."""
    workers: int = before.get("workers", 1)  # absent where it was refused
    return max(1, _cores() // workers)


class Settings(BaseSettings):
    """Built in an entry point, never at import."""

    model_config = SettingsConfigDict(env_prefix="ALEXNET_", frozen=True, protected_namespaces=())

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    model_repository: Path = Path("model_repository")
    model: str = "alexnet"
    models: str = Field("*", description="names with commas that model= may ask for; *: each that is there")
    watch_s: float = Field(2.0, ge=0, description="look for a new version so often; 0: never")
    default_crops: Crops = Crops.TEN
    auto_margin: float | None = Field(None, ge=0, le=1, description="default: the model's own, or 0.5")
    max_upload_bytes: int = Field(20_000_000, gt=0)
    max_pixels: int = Field(DEFAULT_MAX_PIXELS, gt=0)
    max_waiting_crops: int = Field(Limits.max_waiting_crops, gt=0)
    max_wait_s: float = Field(Limits.max_wait_s, gt=0, description="estimated, of what waits at most")
    pulse_s: float = Field(5.0, ge=0, description="an idle engine is asked so often; /readyz; 0: never")
    brownout: bool = Field(False, description="fewer crops when busy, before requests are refused")
    brownout_wait_ms: float = Field(500.0, gt=0, description="estimated wait at which crops are left out")
    request_timeout_s: float = Field(30.0, gt=0)
    head_timeout_s: float = Field(10.0, gt=0, description="for a request's headers")
    body_timeout_s: float = Field(20.0, gt=0, description="for an upload to arrive")
    max_held_bytes: int = Field(512_000_000, gt=0, description="of all uploads in memory at once")
    workers: int = Field(1, gt=0, description="gateways on the port, each a process")
    decode_workers: int = Field(default_factory=_share_of_cores, gt=0, description="processes of about 30 MB")
    decode_memory_bytes: int | None = Field(
        None, gt=0, description="of each, more than idle; then 422; default: enough for what is accepted"
    )
    decode_timeout_s: float = Field(10.0, gt=0, description="for a photograph; then 422, and a new worker")
    infer_threads: int = Field(default_factory=_share_of_cores, gt=0)
    log_format: Format = "text"
    log_level: Level = Field("info", description="info: a line a request; warning: what went wrong alone")

    triton: str = ""
    """HOST:PORT[,HOST:PORT...] of Triton's gRPC; empty: ONNX Runtime in this process."""
    triton_concurrency: int = Field(32, gt=0)
    """Inferences at Triton at the same time: enough for its batcher to fill batches from, and fewer
    than its queue holds, so that a full queue is told here, with the time after which to retry."""
    triton_keepalive_s: float = Field(2.0, ge=1)
    """A server that does not answer a ping in this time is given up, with what was asked of it."""

    triton_admin_key: SecretStr = SecretStr("")
    """What `alexnet export --triton` shows to servers that restrict who may load a model."""

    # Who comes in, and from where: SECURITY.md.
    api_keys_file: Path | None = Field(None, description="of alexnet key new; none: no key is asked for")
    ops_port: int | None = Field(None, ge=0, le=65535, description="/metrics and /docs there and not on port")
    ops_host: str = "127.0.0.1"
    tls_cert: Path | None = Field(None, description="PEM, with its chain; a renewed one is taken up")
    tls_key: Path | None = None
    hsts_max_age_s: int = Field(31_536_000, ge=0, description="over TLS, for browsers; 0: none")
    cors_origins: str = Field("", description="https://HOST[:PORT],...: whose pages may ask")
    trusted_proxies: str = Field("", description="addresses, networks: X-Forwarded-* counts")
    drain_delay_s: float = Field(0.0, ge=0, description="after SIGTERM: /readyz 503, and serving on so long")

    @property
    def decode_bounds(self) -> Bounds:
        """Of one upload's decoding."""
        return Bounds(
            self.decode_timeout_s, self.max_upload_bytes, self.max_pixels, self.decode_memory_bytes
        )

    @field_validator("cors_origins")
    @classmethod
    def _origins(cls, origins: str) -> str:
        for origin in split(origins):
            if not _ORIGIN.fullmatch(origin):
                raise ValueError(f"{origin!r} is no origin, https://HOST or https://HOST:PORT")
        return origins

    @field_validator("trusted_proxies")
    @classmethod
    def _proxies(cls, proxies: str) -> str:
        # uvicorn takes what is no address for a name that never matches, and "*" for everybody: then any
        # client says itself what its address is.
        for proxy in split(proxies):
            ip_network(proxy)
        return proxies

    @model_validator(mode="after")
    def _go_together(self) -> Self:
        if (self.tls_cert is None) != (self.tls_key is None):
            raise ValueError("tls_cert and tls_key go together")
        if self.ops_port and self.ops_port == self.port:
            raise ValueError("ops_port is port: they must differ")
        return self

    @field_validator("triton")
    @classmethod
    def _servers(cls, servers: str) -> str:
        if servers:
            grpc_target(servers)
        return servers
