"""Every knob of the gateway, with its unit and default; set by flag or by ALEXNET_<NAME>."""

from __future__ import annotations

import os
from pathlib import Path

from pydantic import Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.admission import Limits
from serving.contract import Crops
from serving.preprocess import DEFAULT_MAX_PIXELS
from serving.triton_target import grpc_target


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
    decode_threads: int = Field(default_factory=_cores, gt=0)
    infer_threads: int = Field(default_factory=_cores, gt=0)

    triton: str = ""
    """HOST:PORT[,HOST:PORT...] of Triton's gRPC; empty: ONNX Runtime in this process."""
    triton_concurrency: int = Field(32, gt=0)
    """Inferences at Triton at the same time: enough for its batcher to fill batches from, and fewer
    than its queue holds, so that a full queue is told here, with the time after which to retry."""
    triton_keepalive_s: float = Field(2.0, ge=1)
    """A server that does not answer a ping in this time is given up, with what was asked of it."""

    triton_admin_key: SecretStr = SecretStr("")
    """What `alexnet export --triton` shows to servers that restrict who may load a model."""

    @field_validator("triton")
    @classmethod
    def _servers(cls, servers: str) -> str:
        if servers:
            grpc_target(servers)
        return servers
