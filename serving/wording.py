"""What a person outside may read of an error of ours."""

from __future__ import annotations

from typing import Final

INSIDE: Final = "the model cannot be used as it is stored; the log has the reason under the request id"


def for_outside(text: str) -> str:
    """The text, unless it tells where things lie on this machine: a sentence in its place then.

    Paths are not cut out of it: of `/srv/my models/alexnet/1/model.onnx`, or of what a library says of it,
    too much would stay.
    """
    return INSIDE if "/" in text or "\\" in text else text
