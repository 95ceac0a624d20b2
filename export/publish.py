"""A version reaches the repository: written beside, checked by the gate, renamed into place.

    model_repository/<model>/.staging-<n>-<pid>/  ->  model_repository/<model>/<n>/

A version that can be seen is complete: a crash at any point leaves the repository as it was.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version as installed
from pathlib import Path
from typing import Any

from export.auto import choose
from export.config import check_config
from export.forms import Form, Precision, fp32
from export.gate import check_accuracy, check_parity, generated_crops
from export.golden import golden_images
from export.square import NotShareable, check_square, write_square
from export.to_onnx import ExportError
from export.versions import next_number
from model.checkpoint import Checkpoint, replace_durably, sha256
from model.data import Decoded
from model.evaluate import Accuracy, accuracy
from serving.contract import CONFIG_FILE, LABELS_FILE, MODEL_FILE, PROVENANCE_FILE, SQUARE_FILE
from serving.preprocess import Pixels

GATE_IMAGES = 64
SQUARE_IMAGES = 16


@dataclass(frozen=True)
class Validation:
    """Photographs that never trained, and how well the FP32 network does on them."""

    data: Decoded
    reference: Accuracy
    advance: Callable[[int], None] = lambda _: None


def publish(
    checkpoint: Checkpoint,
    source: Path,
    repository: Path,
    name: str,
    *,
    form: Form | None = None,
    images: Pixels | None = None,
    validation: Validation | None = None,
    training: Decoded | None = None,
) -> Path:
    """Write a form of the network, check it and publish it as the next version; returns its folder.

    `form`: default FP32. `images`: crops for the parity gate (default: 64 generated ones). With
    `validation` the file's own accuracy is measured there, bounded and kept; without it the
    checkpoint's is kept. `training`: photographs on which the margin of `crops=auto` is chosen. Raises
    ExportError, and then nothing became visible.
    """
    form = form or fp32(checkpoint.net)
    name = form.model_name(name)
    folder = repository / name
    folder.mkdir(parents=True, exist_ok=True)
    labels = "".join(f"{label.line()}\n" for label in checkpoint.labels)
    config = form.target.config_text(name, len(checkpoint.labels), form.precision)
    check_config(config, len(checkpoint.labels))
    _check_labels(checkpoint, folder, labels)
    _sweep(folder)
    staging = folder / f".staging-{next_number(folder)}-{os.getpid()}"
    staging.mkdir()
    try:
        file = staging / form.target.file
        form.write(file)
        crops = generated_crops(GATE_IMAGES) if images is None else images
        form.target.check_file(config, file)
        parity = check_parity(checkpoint.net, file, crops, form.bounds, form.target.predictor)
        provenance = {
            "precision": form.precision,
            "architecture": asdict(checkpoint.net.architecture),
            "classes": len(checkpoint.labels),
            "checkpoint": {"file": source.name, "sha256": sha256(source)},
            "model": {"file": file.name, "sha256": sha256(file), "bytes": file.stat().st_size},
            "parity": asdict(parity),
            **{name: checkpoint.facts[name] for name in ("low_rank",) if name in checkpoint.facts},
            **form.facts,
            **_square(file, crops),
            **_accuracy(checkpoint, file, form, validation),
            **({} if training is None else {"auto": asdict(choose(form.target.predictor(file), training))}),
            "exported_at": datetime.now(UTC).isoformat(timespec="seconds"),
            "tools": {tool: installed(tool) for tool in ("torch", "onnx", "onnxruntime")},
        }
        (staging / PROVENANCE_FILE).write_text(json.dumps(provenance, indent=2) + "\n")
        golden_images(form.target.predictor(file), form.bounds.golden_tolerance).write(staging)
        for path in (*staging.rglob("*"), staging):
            _sync(path)
        _replace_text(folder / LABELS_FILE, labels)
        _replace_text(folder / CONFIG_FILE, config)
        return _make_visible(staging, folder)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _square(file: Path, crops: Pixels) -> dict[str, Any]:
    """The graph for the embedded engine beside an ONNX file, checked; none where crops share nothing."""
    if file.name != MODEL_FILE:
        return {}
    path = file.with_name(SQUARE_FILE)
    try:
        write_square(file, path)
    except NotShareable:
        return {}
    same = check_square(file, path, crops[:SQUARE_IMAGES])
    facts = {"file": path.name, "sha256": sha256(path), "bytes": path.stat().st_size}
    return {"square": facts | asdict(same)}


def _accuracy(
    checkpoint: Checkpoint, file: Path, form: Form, validation: Validation | None
) -> dict[str, Any]:
    """FP32 answers as the network does, so the network's figures are its own; others are measured."""
    if validation is None:
        known = checkpoint.facts.get("accuracy") if form.precision is Precision.FP32 else None
        return {} if known is None else {"accuracy": known}
    if form.precision is Precision.FP32:
        return {"accuracy": validation.reference}
    measured = accuracy(form.target.predictor(file), validation.data, validation.advance)
    check_accuracy(measured, validation.reference, form.bounds)
    return {"accuracy": measured, "accuracy_fp32": validation.reference}


def _check_labels(checkpoint: Checkpoint, folder: Path, labels: str) -> None:
    """labels.txt is one for all versions of a model (Triton has no other), so it may not change."""
    outputs = checkpoint.net.architecture.classes
    if len(checkpoint.labels) != outputs:
        raise ExportError(f"the network has {outputs} outputs, but {len(checkpoint.labels)} labels")
    present = folder / LABELS_FILE
    if next_number(folder) > 1 and present.exists() and present.read_text(encoding="utf-8") != labels:
        raise ExportError(
            f"{present} lists other classes than this checkpoint; publish under another name (--name)"
        )


def _sweep(folder: Path) -> None:
    """Remove what a killed export left behind: staging folders of processes that are no more."""
    for staging in folder.glob(".staging-*-*"):
        owner = staging.name.rsplit("-", 1)[1]
        if owner.isdecimal() and not Path("/proc", owner).exists() and Path("/proc/self").exists():
            shutil.rmtree(staging, ignore_errors=True)


def _make_visible(staging: Path, folder: Path) -> Path:
    """Rename to the next free number; another export may have taken the one before."""
    while True:
        target = folder / str(next_number(folder))
        try:
            staging.rename(target)
        except OSError:
            if not target.exists():
                raise
            continue
        _sync(folder)
        return target


def _replace_text(path: Path, text: str) -> None:
    if path.exists() and path.read_text(encoding="utf-8") == text:
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text, encoding="utf-8")
    replace_durably(beside, path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
