"""A model repository read as Triton reads it: <model>/<version>/model.onnx, labels, provenance."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving.contract import LABELS_FILE, MODEL_FILE, PLAN_SUFFIX, PROVENANCE_FILE, SQUARE_FILE
from serving.errors import ModelNotReady, UnknownModel
from serving.golden import Golden
from serving.postprocess import Label, read_labels

EXPORT_HINT = "make one with: alexnet export CHECKPOINT"


@dataclass(frozen=True)
class Version:
    """One version of one model; `number` is its folder's name."""

    model: str
    number: str
    path: Path
    labels: tuple[Label, ...]
    provenance: dict[str, Any]
    golden: Golden | None = None

    @property
    def square(self) -> Path | None:
        """The graph that takes squares as well as crops, where there is one beside the model's file."""
        path = self.path.with_name(SQUARE_FILE)
        return path if path.is_file() else None

    @property
    def precision(self) -> str:
        return str(self.provenance.get("precision", "fp32"))


def version_numbers(model_folder: Path) -> list[int]:
    """Versions in ascending order; names that are not numbers or start with 0 are not versions."""
    if not model_folder.is_dir():
        return []
    names = (folder.name for folder in model_folder.iterdir() if folder.is_dir())
    return sorted(int(name) for name in names if name.isdecimal() and not name.startswith("0"))


def model_names(repository: Path) -> list[str]:
    """The models of which there is a version."""
    if not repository.is_dir():
        return []
    folders = (folder for folder in repository.iterdir() if not folder.name.startswith("."))
    return sorted(folder.name for folder in folders if version_numbers(folder))


def latest_version(repository: Path, model: str) -> Version:
    """The version that is served; raises ModelNotReady with the file that is missing or damaged."""
    folder = repository / model
    numbers = version_numbers(folder)
    if not numbers:
        raise ModelNotReady(f"{folder}: no version of this model; {EXPORT_HINT}")
    return _read(folder, str(numbers[-1]))


def find_version(repository: Path, model: str, number: str) -> Version:
    """One version by its number; raises UnknownModel if this repository has no such version."""
    folder = repository / model
    if number not in map(str, version_numbers(folder)):
        raise UnknownModel(f"{repository} has no version {number} of the model {model!r}")
    return _read(folder, number)


def _read(folder: Path, number: str) -> Version:
    path = _model_file(folder / number)
    return Version(
        folder.name,
        number,
        path,
        _labels(folder),
        _provenance(path.with_name(PROVENANCE_FILE)),
        _golden(path.parent),
    )


def _model_file(version: Path) -> Path:
    """model.onnx, or the TensorRT engine for one kind of GPU."""
    path = version / MODEL_FILE
    plans = [] if path.is_file() else sorted(version.glob(f"*{PLAN_SUFFIX}"))
    if not path.is_file() and not plans:
        raise ModelNotReady(f"{path}: no such file; {EXPORT_HINT}")
    return plans[0] if plans else path


def newest_state(repository: Path, model: str) -> object:
    """A value that changes when the newest version, or what is read beside it, does; cheap to ask."""
    folder = repository / model
    try:
        numbers = version_numbers(folder)[-1:]
        paths = (folder / LABELS_FILE, *(folder / str(number) for number in numbers))
        return numbers, [path.stat().st_mtime_ns for path in paths]
    except OSError as error:  # a name that went away between two looks, or a folder that cannot be read
        return str(error)


def labels_beside(model_file: Path) -> tuple[Label, ...]:
    """The labels of <model>/<version>/model.onnx; raises ModelNotReady if there are none."""
    return _labels(model_file.resolve().parent.parent)


def _labels(folder: Path) -> tuple[Label, ...]:
    path = folder / LABELS_FILE
    try:
        return read_labels(path)
    except (OSError, UnicodeDecodeError) as error:
        raise ModelNotReady(f"{path}: cannot be read ({error}); {EXPORT_HINT}") from error


def _provenance(path: Path) -> dict[str, Any]:
    try:
        provenance: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        return provenance
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"{path}: cannot be read ({error}); {EXPORT_HINT}") from error


def _golden(version: Path) -> Golden | None:
    try:
        return Golden.read(version)
    except (OSError, ValueError) as error:
        raise ModelNotReady(f"{version}: golden images cannot be read ({error}); {EXPORT_HINT}") from error
