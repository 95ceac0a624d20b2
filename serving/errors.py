"""Everything that can go wrong while a photograph is answered, as one tree.

    ServingError
    ├── RequestError                  the client's side; the text says what to change
    │   ├── MalformedRequest          400  a field is missing, a parameter has no such value
    │   ├── Unauthorized              401  no API key was shown, or none that is known here
    │   ├── SlowUpload                408  the body did not arrive in time
    │   ├── UnknownModel              404  no model of that name is served here
    │   ├── TooManyBytes              413  the body is larger than the limit
    │   ├── TooManyPixels             413  the header announces more pixels than the limit
    │   ├── UnsupportedFormat         415  not an accepted image format
    │   ├── UndecodableImage          422  an accepted format, but damaged or empty
    │   ├── DecodeTimeout             422  decoding was given up after its time
    │   ├── DecoderCrashed            422  the decoder's process broke on it
    │   ├── DecoderOutOfMemory        422  decoding would have taken more memory than it may
    │   └── RateLimited               429  the key asks more often than it may
    └── ServerError                   our side; trying again may help
        ├── Overloaded                503  more work waits than the limit allows
        ├── Stopping                  503  this server is being stopped; others, or the next, answer
        ├── ModelNotReady             503  the model is missing, damaged or not loaded yet
        ├── EngineFailed              502  the model server's answer is an error or no probabilities
        └── DeadlineExceeded          504  no answer within the request's time

`PROBLEMS` maps each leaf to its HTTP status and RFC 9457 title; a test fails on a leaf it lacks.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Final, NamedTuple


class ServingError(Exception):
    """Base of the tree; `str(error)` is one sentence fit for the person who asked."""


class RequestError(ServingError):
    """The request cannot be answered as it stands."""


class MalformedRequest(RequestError):
    """A field is missing or a parameter has a value that does not exist."""


class Unauthorized(RequestError):
    """There is no key in the request, or (`presented`) one that is not known."""

    def __init__(self, detail: str, *, presented: bool = False) -> None:
        super().__init__(detail)
        self.presented = presented


class UnknownModel(RequestError):
    """The request names a model that is not served here."""


class SlowUpload(RequestError):
    """The body did not arrive in time."""


class TooManyBytes(RequestError):
    """The upload is larger than the byte limit."""


class TooManyPixels(RequestError):
    """The image's header announces more pixels than the limit."""


class UnsupportedFormat(RequestError):
    """The bytes are not an image of an accepted format."""


class UndecodableImage(RequestError):
    """The bytes claim an accepted format but cannot be decoded."""


class DecodeTimeout(RequestError):
    """The image was not decoded in the time that one may take."""


class DecoderCrashed(RequestError):
    """The process that decoded the image died of it, or met an error that it does not know."""


class DecoderOutOfMemory(RequestError):
    """The image would have taken more memory than decoding one may."""


class RateLimited(RequestError):
    """The key's photographs a second are used up; there will be one in `retry_after_s`."""

    def __init__(self, detail: str, *, retry_after_s: float = 1.0) -> None:
        super().__init__(detail)
        self.retry_after_s = retry_after_s


class ServerError(ServingError):
    """The request is fine; the server could not answer it now."""


class Overloaded(ServerError):
    """The queue is full."""


class Stopping(ServerError):
    """The process was asked to end: it answers what it has begun, and should be given nothing new."""


class ModelNotReady(ServerError):
    """The model's files are missing, damaged, or the backend has not loaded them."""


class EngineFailed(ServerError):
    """The model server answered with an error of its own, or with what cannot be probabilities."""


class DeadlineExceeded(ServerError):
    """The answer did not come in time."""


class Problem(NamedTuple):
    """Status and title of one problem type (RFC 9457)."""

    status: HTTPStatus
    title: str


PROBLEMS: Final[dict[type[ServingError], Problem]] = {
    MalformedRequest: Problem(HTTPStatus.BAD_REQUEST, "Malformed request"),
    Unauthorized: Problem(HTTPStatus.UNAUTHORIZED, "Unauthorized"),
    UnknownModel: Problem(HTTPStatus.NOT_FOUND, "Unknown model"),
    SlowUpload: Problem(HTTPStatus.REQUEST_TIMEOUT, "Upload too slow"),
    TooManyBytes: Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Too many bytes"),
    TooManyPixels: Problem(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "Too many pixels"),
    UnsupportedFormat: Problem(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Not an accepted image format"),
    UndecodableImage: Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "Image cannot be decoded"),
    DecodeTimeout: Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "Image takes too long to decode"),
    DecoderCrashed: Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "Image breaks its decoder"),
    DecoderOutOfMemory: Problem(HTTPStatus.UNPROCESSABLE_ENTITY, "Image takes too much memory to decode"),
    RateLimited: Problem(HTTPStatus.TOO_MANY_REQUESTS, "Too many requests"),
    Overloaded: Problem(HTTPStatus.SERVICE_UNAVAILABLE, "Overloaded"),
    Stopping: Problem(HTTPStatus.SERVICE_UNAVAILABLE, "Stopping"),
    ModelNotReady: Problem(HTTPStatus.SERVICE_UNAVAILABLE, "Model not ready"),
    EngineFailed: Problem(HTTPStatus.BAD_GATEWAY, "Engine failed"),
    DeadlineExceeded: Problem(HTTPStatus.GATEWAY_TIMEOUT, "Deadline exceeded"),
}
