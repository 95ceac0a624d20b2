"""What the gateway answers, as the OpenAPI document states it."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from serving.backends import Backend
from serving.contract import Crops
from serving.errors import ModelNotReady
from serving.pipeline import Answer, View
from serving.postprocess import Prediction


class _Body(BaseModel):
    model_config = ConfigDict(protected_namespaces=())


class PredictionBody(_Body):
    index: int
    wnid: str
    label: str
    probability: float = Field(ge=0, le=1.000001)

    @classmethod
    def of(cls, prediction: Prediction) -> PredictionBody:
        return cls.model_construct(
            index=prediction.index,
            wnid=prediction.wnid,
            label=prediction.label,
            probability=prediction.probability,
        )


class ViewBody(_Body):
    """One crop on its own; the mean's first label is always among its predictions."""

    position: str
    mirrored: bool
    predictions: list[PredictionBody]

    @classmethod
    def of(cls, view: View) -> ViewBody:
        return cls.model_construct(
            position=view.position,
            mirrored=view.mirrored,
            predictions=[PredictionBody.of(p) for p in view.predictions],
        )


class ModelInfoBody(_Body):
    name: str
    version: str
    precision: str
    backend: str


class AnswerBody(_Body):
    predictions: list[PredictionBody]
    model: ModelInfoBody
    crops: int = Field(description="crops whose probabilities were averaged")
    degraded: bool = Field(description="fewer crops than asked for, because the server was busy")
    timing_ms: dict[str, float] = Field(description="read, decode, queue, infer, post, total")
    request_id: str
    views: list[ViewBody] | None = Field(None, description="with detail=true: each crop on its own")

    @classmethod
    def of(cls, answer: Answer, timing: dict[str, float], request_id: str, *, detail: bool) -> AnswerBody:
        info = answer.model
        return cls.model_construct(
            predictions=[PredictionBody.of(p) for p in answer.predictions],
            model=ModelInfoBody.model_construct(
                name=info.name, version=info.version, precision=info.precision, backend=info.backend
            ),
            crops=answer.crops,
            degraded=answer.degraded,
            timing_ms={stage: round(ms, 3) for stage, ms in timing.items()},
            request_id=request_id,
            views=[ViewBody.of(view) for view in answer.views] if detail else None,
        )


class LabelBody(_Body):
    index: int
    wnid: str
    label: str


class ModelBody(ModelInfoBody):
    classes: int
    default_crops: Crops
    max_upload_bytes: int
    max_pixels: int
    accepted_formats: list[str]
    ready: bool
    provenance: dict[str, Any] | None


class ModelChoiceBody(_Body):
    name: str
    default: bool
    loaded: bool = Field(description="the others are loaded when they are first asked for")
    version: str | None
    precision: str | None

    @classmethod
    def of(cls, name: str, backend: Backend | None, *, default: bool) -> ModelChoiceBody:
        try:
            info = backend.model.info if backend else None
        except ModelNotReady:
            info = None
        version, precision = (info.version, info.precision) if info else (None, None)
        return cls(name=name, default=default, loaded=info is not None, version=version, precision=precision)


class ReadyBody(_Body):
    status: str
    model: str | None = None


class ProblemBody(_Body):
    """RFC 9457 problem details."""

    type: str
    title: str
    status: int
    detail: str
    request_id: str
