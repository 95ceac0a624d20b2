"""A checkpoint's fc6 and fc7 factored on a folder's training photographs, for compress and export."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Final

from commands.photographs import decode
from commands.terminal import progress

if TYPE_CHECKING:
    from export.forms import Form
    from export.publish import Validation
    from model.checkpoint import Checkpoint
    from model.evaluate import Accuracy

ACCURACY_DROP: Final = 0.005
"""Most that the factors may cost on validation photographs, as a fraction: INT8's own bound."""


def factored(full: Checkpoint, data: Path | None, rank: int) -> Checkpoint:
    """A copy of `full` at `rank`, along the outputs' principal components over DATA/train.

    Its accuracy is not measured: that of `full` is no fact of it. Raises ArchitectureError or
    ExportError before a photograph is decoded where the rank or the checkpoint is none to factor.
    """
    from export.to_onnx import ExportError
    from model.checkpoint import Checkpoint
    from model.compress import check_rank, low_rank, output_components
    from model.images import has_split

    check_rank(full.net, rank)
    if data is None or not has_split(data, "train"):
        where = "--data" if data is None else f"{data}: no train/ in it"
        raise ExportError(f"a low rank is found on training photographs, DATA/train/<class>/*: {where}")
    decoded = decode(data, [label.wnid for label in full.labels], "train")
    with progress("principal components", len(decoded.targets)) as advance:
        components = output_components(full.net, decoded, advance)
    net = low_rank(full.net, components, rank)
    kept = {name: fact for name, fact in full.facts.items() if name != "accuracy"}
    found = {"low_rank": {"rank": rank, "photographs": len(decoded.targets)}}
    return Checkpoint(net, full.labels, kept | found)


def check_drop(full: Form, small: Checkpoint, validation: Validation) -> None:
    """Measure what the factors cost on `validation`, keep it in `small`'s facts; ExportError if too much.

    `full`: the network they were found in, in FP32. `validation.reference` is the small network's accuracy.
    """
    from export.gate import FP32_BOUNDS, check_accuracy
    from export.to_onnx import ExportError

    reference = form_accuracy(full, validation, "full rank: accuracy")
    facts = small.facts["low_rank"]
    try:
        check_accuracy(validation.reference, reference, replace(FP32_BOUNDS, accuracy_drop=ACCURACY_DROP))
    except ExportError as error:
        raise ExportError(f"rank {facts['rank']}: {error}; a larger --low-rank keeps more") from error
    facts["accuracy_full_rank"] = reference
    small.facts["accuracy"] = validation.reference


def onnx_accuracy(checkpoint: Checkpoint, validation: Validation, words: str) -> Accuracy:
    """Of the FP32 network, by ONNX Runtime."""
    from export.forms import fp32

    return form_accuracy(fp32(checkpoint.net), validation, words)


def form_accuracy(form: Form, validation: Validation, words: str) -> Accuracy:
    """Of the file that the form writes, as it is served."""
    from model.evaluate import accuracy

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / form.target.file
        form.write(file)
        with progress(words, 2 * len(validation.data.targets)) as advance:
            return accuracy(form.target.predictor(file), validation.data, advance)
