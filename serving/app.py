"""The gateway: routes over the pipeline, problem+json errors, one request id for each answer."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict
from http import HTTPStatus
from pathlib import Path
from typing import Annotated, Any, Final

from fastapi import FastAPI, Header, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, HTMLResponse, JSONResponse
from fastapi.staticfiles import StaticFiles
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp

from serving.access import AccessLog, note
from serving.backends import Backend
from serving.body import FIELD, Uploads, read_image
from serving.brownout import Brownout
from serving.clients import client_of
from serving.contract import Crops
from serving.decoders import Decoders
from serving.door import KEY_HEADER, Door, describe_keys
from serving.drain import ClosingConnections, Drain
from serving.errors import (
    PROBLEMS,
    DeadlineExceeded,
    MalformedRequest,
    ModelNotReady,
    Overloaded,
    Problem,
    RateLimited,
    ServerError,
    ServingError,
    SlowUpload,
    Unauthorized,
)
from serving.headers import RequestHeaders
from serving.keys import KeyFile
from serving.leaving import unless_client_leaves
from serving.metrics import Metrics, Shared, spelled
from serving.models import Models, Others
from serving.pictures import ACCEPTED_FORMATS
from serving.pipeline import Answer, Asker, Pipeline
from serving.pulse import Pulse
from serving.schemas import AnswerBody, LabelBody, ModelBody, ModelChoiceBody, ProblemBody, ReadyBody
from serving.settings import Settings, split
from serving.sides import Sides, without_ops_links
from serving.trail import passed
from serving.wording import for_outside

PAGE: Final = Path(__file__).with_name("page")
PROBLEM_JSON: Final = "application/problem+json"
TIMEOUT_HEADER: Final = "X-Request-Timeout-Ms"
RETRY_MODEL_S: Final = 2
logger = logging.getLogger("alexnet.gateway")
CHALLENGE: Final = ('Bearer realm="alexnet"', 'Bearer realm="alexnet", error="invalid_token"')
"""RFC 6750: without a key, and with one that is not known."""
CORS: Final[dict[str, Any]] = {
    "allow_methods": ("GET", "POST"),
    "allow_headers": ("Authorization", KEY_HEADER, "Content-Type", "X-Request-ID", TIMEOUT_HEADER),
    "expose_headers": ("X-Request-ID", "Retry-After"),
    "max_age": 600,
}
"""No credentials: there are no cookies here, and a key is a header that the page sets itself."""
UNREAD: Final = (HTTPStatus.REQUEST_ENTITY_TOO_LARGE, HTTPStatus.REQUEST_TIMEOUT)
"""After these the rest of the body is still to come."""
CLIENT_LEFT: Final = 499
"""nginx's number for it, in the metrics: HTTP has none for an answer that nobody waits for."""

_UPLOAD: Final = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": [FIELD],
                    "properties": {FIELD: {"type": "string", "format": "binary"}},
                }
            },
            "image/*": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}
_PROBLEMS: Final[dict[int | str, dict[str, Any]]] = {
    status: {"model": ProblemBody, "content": {PROBLEM_JSON: {}}, "description": title}
    for status, title in (
        (400, "Malformed request"),
        (401, "An API key is needed, or this one is not known"),
        (404, "Unknown model"),
        (408, "The upload did not arrive in time"),
        (413, "Too many bytes or pixels"),
        (415, "Not an accepted image format"),
        (422, "Image cannot be decoded"),
        (429, "The key asks more often than it may"),
        (502, "The model server failed"),
        (503, "Overloaded, or model not ready"),
        (504, "Deadline exceeded"),
    )
}


_KEY_PROBLEM: Final[dict[int | str, dict[str, Any]]] = {401: _PROBLEMS[401]}
_FACT_PROBLEMS: Final = _KEY_PROBLEM | {status: _PROBLEMS[status] for status in (404, 503)}
ModelName = Annotated[str | None, Query(description="one of /models; default: the gateway's own")]


def create_app(
    settings: Settings,
    backend: Backend,
    others: Others | None = None,
    drain: Drain | None = None,
    decoders: Decoders | None = None,
    shared: Shared | None = None,
    traced: Callable[[ASGIApp], ASGIApp] | None = None,
) -> FastAPI:
    """The gateway over `backend`; starts and closes it with the app's life, and the others as they come.

    `drain`: how whoever runs it says that it is about to end. `decoders`: others than the settings'.
    `shared`: where it counts together with other workers. `traced`: an outermost layer, serving.tracing's.
    """
    drain = drain or Drain()
    decoders = decoders or Decoders(settings.decode_workers, settings.decode_bounds)
    models = Models(backend, settings.model, others)
    pipeline = Pipeline(
        backend,
        decoders,
        max_waiting_crops=settings.max_waiting_crops,
        max_wait_s=settings.max_wait_s,
        auto_margin=settings.auto_margin,
        brownout=Brownout(settings.brownout_wait_ms) if settings.brownout else None,
    )

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        decoders.start()
        await models.start()
        pulse.beat()
        tasks = [asyncio.create_task(each) for each in (pulse.look(), metrics.keep_fresh())]
        yield
        for task in tasks:
            task.cancel()
        pipeline.close()
        await models.close()

    pulse = Pulse(backend, settings.pulse_s)
    app = FastAPI(
        title="alexnet-serving",
        description="A photograph in, five labels out: AlexNet (Krizhevsky, Sutskever, Hinton 2012).",
        version="0.1.0",
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    metrics = Metrics(pipeline.admission, shared, lambda: pipeline.inferences)
    _add_classify(app, settings, models, pipeline, metrics, pulse)
    _add_facts(app, settings, models)
    _add_health(app, backend, metrics, pulse, drain)
    _add_page(app, two_sides=settings.ops_port is not None)
    _add_errors(app, settings, pipeline, metrics, drain)
    if traced:
        app.add_middleware(traced)
    return app


def _add_classify(
    app: FastAPI, settings: Settings, models: Models, pipeline: Pipeline, metrics: Metrics, pulse: Pulse
) -> None:
    uploads = Uploads(settings.max_held_bytes)
    longest_ms = math.ceil(1000 * settings.request_timeout_s)

    async def read(request: Request, take: Callable[[int], None]) -> bytes:
        try:
            async with asyncio.timeout(settings.body_timeout_s):
                return await read_image(request, settings.max_upload_bytes, take)
        except TimeoutError as error:
            raise SlowUpload(f"the upload did not arrive within {settings.body_timeout_s:g} s") from error

    @app.post("/classify", responses=_PROBLEMS, openapi_extra=_UPLOAD, summary="Classify a photograph")
    async def classify(
        request: Request,
        top: Annotated[int, Query(ge=1, le=1000, description="how many labels to return")] = 5,
        crops: Annotated[Crops | None, Query(description="views of the photograph")] = None,
        model: ModelName = None,
        detail: Annotated[bool, Query(description="also what each crop said on its own")] = False,
        degrade: Annotated[bool, Query(description="fewer crops are fine when the server is busy")] = True,
        timeout_ms: Annotated[int, Header(alias=TIMEOUT_HEADER, ge=1)] = longest_ms,
    ) -> AnswerBody:
        """Top labels with probabilities, from the multipart field `file` or a raw image/* body."""
        started = time.perf_counter()
        crops = crops or settings.default_crops
        timeout_s = min(settings.request_timeout_s, timeout_ms / 1000)
        metrics.in_flight.inc()
        try:
            async with asyncio.timeout(timeout_s) as limit, uploads.one() as take:
                backend = await models.get(model)
                asker = Asker(_client(request), degrade, limit.when())
                pipeline.check(crops, backend, asker)
                data = await read(request, take)
                read_s = time.perf_counter() - started
                passed("read", started, started + read_s)
                work = pipeline.classify(data, crops, top, backend, detail=detail, asker=asker)
                answer = await unless_client_leaves(request, work)
        except TimeoutError as error:
            raise DeadlineExceeded(f"no answer within {timeout_s:g} s") from error
        finally:
            metrics.in_flight.dec()
        if backend is models.default:
            pulse.beat()
        timing = {"read": 1000 * read_s, **answer.timing_ms, "total": 1000 * (time.perf_counter() - started)}
        metrics.answered(answer.model, answer.crops, timing, len(data), degraded=answer.degraded)
        _note_answer(request, answer, timing)
        return AnswerBody.of(answer, timing, request.state.request_id, detail=detail)


def _note_answer(request: Request, answer: Answer, timing_ms: dict[str, float]) -> None:
    info = answer.model
    told = {"model": info.name, "version": info.version, "crops": answer.crops, "degraded": answer.degraded}
    note(request, **told, ms=timing_ms)


def _client(request: Request) -> str:
    """Who shares fairly with others: the name of the key that was shown, or whom the address stands for."""
    named = getattr(request.state, "client", None)
    return str(named) if named else client_of(request.client.host) if request.client else ""


def _add_facts(app: FastAPI, settings: Settings, models: Models) -> None:
    @app.get(
        "/labels", responses=_FACT_PROBLEMS, summary="The classes in the order of the network's outputs"
    )
    async def labels(model: ModelName = None) -> list[LabelBody]:
        backend = await models.get(model)
        return [
            LabelBody(index=index, wnid=label.wnid, label=label.name)
            for index, label in enumerate(backend.model.labels)
        ]

    @app.get("/models", responses=_KEY_PROBLEM, summary="The models that model= may name; the default first")
    async def choices() -> list[ModelChoiceBody]:
        return [
            ModelChoiceBody.of(name, models.opened(name), default=name == models.default_name)
            for name in await models.names()
        ]

    @app.get(
        "/model",
        responses=_FACT_PROBLEMS,
        summary="Which model answers, its provenance, and the limits on uploads",
    )
    async def facts(model: ModelName = None) -> ModelBody:
        loaded = (await models.get(model)).model
        return ModelBody(
            **asdict(loaded.info),
            classes=len(loaded.labels),
            default_crops=settings.default_crops,
            max_upload_bytes=settings.max_upload_bytes,
            max_pixels=settings.max_pixels,
            accepted_formats=list(ACCEPTED_FORMATS),
            ready=True,
            provenance=loaded.provenance or None,
        )


def _add_health(app: FastAPI, backend: Backend, metrics: Metrics, pulse: Pulse, drain: Drain) -> None:
    @app.head("/livez", include_in_schema=False)
    @app.get("/livez", summary="The process alone: never fails for load or a missing model")
    async def livez() -> ReadyBody:
        return ReadyBody(status="alive")

    @app.head("/readyz", include_in_schema=False)
    @app.get(
        "/readyz",
        summary="A model is loaded, and has answered a moment ago",
        responses={503: _PROBLEMS[503]},
    )
    async def readyz() -> ReadyBody:
        drain.check()
        pulse.check()
        return ReadyBody(status="ready", model=backend.model.info.name)

    @app.get("/metrics", include_in_schema=False)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)


def _add_page(app: FastAPI, two_sides: bool) -> None:
    """`two_sides`: the docs are on another port, so that the page may not point there."""
    page = (PAGE / "index.html").read_text(encoding="utf-8")
    if two_sides:
        page = without_ops_links(page)

    @app.head("/", include_in_schema=False)
    @app.get("/", include_in_schema=False)
    async def index() -> HTMLResponse:
        return HTMLResponse(page)

    @app.head("/docs", include_in_schema=False)
    @app.get("/docs", include_in_schema=False)
    async def docs() -> FileResponse:
        return FileResponse(PAGE / "docs.html")

    app.mount("/docs/assets", StaticFiles(packages=[("fastapi_swagger", "resources")]), name="docs")
    app.mount("/page", StaticFiles(directory=PAGE), name="page")


def _add_errors(
    app: FastAPI, settings: Settings, pipeline: Pipeline, metrics: Metrics, drain: Drain
) -> None:
    """Every error leaves as application/problem+json; none shows a path, a class or a trace."""

    def answer(
        request_id: str, status: int, title: str, detail: str, reason: str, **headers: str
    ) -> Response:
        metrics.refused(status, reason)
        body = ProblemBody(
            type="about:blank", title=title, status=status, detail=detail, request_id=request_id
        )
        return JSONResponse(body.model_dump(), status, headers=headers, media_type=PROBLEM_JSON)

    async def known(request: Request, error: Exception) -> Response:
        problem: Problem = PROBLEMS[type(error)]  # type: ignore[index]
        headers = {"Connection": "close"} if problem.status in UNREAD else {}
        if isinstance(error, Overloaded):
            headers["Retry-After"] = str(pipeline.admission.retry_after_s())
        if isinstance(error, ModelNotReady):
            headers["Retry-After"] = str(RETRY_MODEL_S)
        if isinstance(error, RateLimited):
            headers["Retry-After"] = str(math.ceil(error.retry_after_s))
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = CHALLENGE[error.presented]
        detail = str(error)
        if isinstance(error, ServerError):
            detail = for_outside(detail)
            if detail != str(error):
                logger.warning("request %s: %s", request.state.request_id, error)
        reason = type(error).__name__
        note(request, reason=spelled(reason))
        return answer(request.state.request_id, problem.status, problem.title, detail, reason, **headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        detail = "; ".join(f"{fault['loc'][-1]}: {fault['msg']}" for fault in error.errors())
        problem = PROBLEMS[MalformedRequest]
        reason = MalformedRequest.__name__
        note(request, reason=spelled(reason))
        return answer(request.state.request_id, problem.status, problem.title, detail, reason)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        title = str(error.detail)
        reason = "http"  # no such path, no such method
        headers = error.headers or {}
        return answer(request.state.request_id, error.status_code, title, title, reason, **headers)

    def failed(request_id: str) -> Response:
        detail = "the server failed on this request; its log has the reason under the request id"
        return answer(request_id, HTTPStatus.INTERNAL_SERVER_ERROR, "Internal error", detail, "InternalError")

    async def left(request: Request, error: Exception) -> Response:
        metrics.refused(CLIENT_LEFT, "ClientLeft")
        note(request, reason=spelled("ClientLeft"))
        return Response(status_code=CLIENT_LEFT)  # nobody reads it

    app.add_exception_handler(ClientDisconnect, left)
    app.add_exception_handler(ServingError, known)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
    # From the inside out.
    if settings.api_keys_file:
        app.add_middleware(Door, keys=KeyFile(settings.api_keys_file), refuse=known)
        describe_keys(app)
    if settings.ops_port is not None:
        app.add_middleware(Sides, refuse=http)
    if settings.cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=split(settings.cors_origins), **CORS)
    app.add_middleware(ClosingConnections, drain=drain)
    app.add_middleware(RequestHeaders, failed=failed, hsts_max_age_s=settings.hsts_max_age_s)
    app.add_middleware(AccessLog)
