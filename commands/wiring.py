"""Settings and backends as the commands make them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from serving.errors import MalformedRequest, ModelNotReady

if TYPE_CHECKING:
    from serving.backends import Backend
    from serving.settings import Settings

def settings_of(given: dict[str, Any]) -> Settings:
    from pydantic import ValidationError

    from serving.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(f"{fault['loc'][0]}: {fault['msg']}" for fault in error.errors())
        raise MalformedRequest(faults) from error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra a missing package belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise ModelNotReady(f"this needs the package {package}: pip install '.[{name}]'") from error


def backend_of(settings: Settings) -> Backend:
    from serving.backends import OnnxRuntimeBackend

    if settings.triton:
        return triton_backend(settings)()
    return OnnxRuntimeBackend(
        settings.model_repository, settings.model, settings.infer_threads, settings.watch_s
    )


def triton_backend(settings: Settings) -> Callable[[], Backend]:
    with extra("triton"):
        from serving.triton_backend import TritonBackend
    return partial(
        TritonBackend,
        settings.triton,
        settings.model,
        concurrency=settings.triton_concurrency,
        keepalive_s=settings.triton_keepalive_s,
    )
