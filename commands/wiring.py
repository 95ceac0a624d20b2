"""Settings and backends as the commands make them."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

from serving.errors import MalformedRequest, ModelNotReady

if TYPE_CHECKING:
    from serving.backends import Backend
    from serving.models import Others
    from serving.settings import Settings

def settings_of(given: dict[str, Any]) -> Settings:
    from pydantic import ValidationError

    from serving.settings import Settings

    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        faults = "; ".join(": ".join((*map(str, fault["loc"][:1]), fault["msg"])) for fault in error.errors())
        raise MalformedRequest(faults) from error


@contextmanager
def extra(name: str) -> Iterator[None]:
    """Say which extra a missing package belongs to."""
    try:
        yield
    except ModuleNotFoundError as error:
        package = (error.name or "").split(".")[0]
        raise ModelNotReady(f"this needs the package {package}: pip install '.[{name}]'") from error


def api_key() -> str:
    """What is shown to a gateway that wants a key; from the environment, because options are seen by all."""
    return os.environ.get("ALEXNET_API_KEY", "")


def backend_of(settings: Settings, name: str = "") -> Backend:
    """Of the model `name`; without one, of the setting's."""
    from serving.backends import OnnxRuntimeBackend

    name = name or settings.model
    if settings.triton:
        return triton_backend(settings, name)()
    return OnnxRuntimeBackend(settings.model_repository, name, settings.infer_threads, settings.watch_s)


def others_of(settings: Settings) -> Others:
    """What `model=` may name beside the default: the setting's names, or each model that is there."""
    from serving.models import Others
    from serving.repository import model_names

    async def names() -> Collection[str]:
        if settings.models != "*":
            return [name.strip() for name in settings.models.split(",") if name.strip()]
        if settings.triton:
            from serving.triton_backend import ready_models

            return await ready_models(settings.triton)
        return model_names(settings.model_repository)

    return Others(names, partial(backend_of, settings))


def triton_backend(settings: Settings, name: str = "") -> Callable[[], Backend]:
    with extra("triton"):
        from serving.triton_backend import TritonBackend
    return partial(
        TritonBackend,
        settings.triton,
        name or settings.model,
        concurrency=settings.triton_concurrency,
        keepalive_s=settings.triton_keepalive_s,
    )
