"""A checkpoint is a safetensors file: weights, and plain facts as JSON in its header.

No pickled classes, so no module path is frozen into files and a checkpoint from a stranger runs
no code. Written beside and renamed, so that a reader sees the old file or the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from model.net import AlexNet, Architecture
from serving.postprocess import Label

FORMAT = "alexnet-checkpoint-1"


class CheckpointError(Exception):
    """The file is missing, damaged, or not a checkpoint of this project."""


@dataclass
class Checkpoint:
    """A network with the names of its classes and where it came from."""

    net: AlexNet
    labels: list[Label]
    facts: dict[str, Any] = field(default_factory=dict)


def save(path: Path, checkpoint: Checkpoint, dtype: torch.dtype = torch.float32) -> None:
    """Write atomically; `dtype` float16 halves the file (weights are widened again on load).

    Raises CheckpointError where the disk is full or the folder cannot be written.
    """
    tensors = {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else None).contiguous()
        for name, tensor in checkpoint.net.state_dict().items()
    }
    header = {
        "format": FORMAT,
        "architecture": json.dumps(asdict(checkpoint.net.architecture)),
        "labels": json.dumps([asdict(label) for label in checkpoint.labels]),
        "facts": json.dumps(checkpoint.facts),
    }
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            save_file(tensors, beside, metadata=header)
            beside.chmod(0o644)  # safetensors makes it private
            replace_durably(beside, path)
        finally:
            beside.unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be written ({error}); what stood there stands") from error


def load(path: Path) -> Checkpoint:
    """Read a checkpoint; raises CheckpointError with what is wrong and with which file."""
    header, tensors = _read(path)
    try:
        architecture = Architecture(**json.loads(header["architecture"]))
        labels = [Label(**entry) for entry in json.loads(header["labels"])]
        facts = json.loads(header["facts"])
        with torch.device("meta"):  # shapes without memory: a header may claim any number of classes
            expected = AlexNet(architecture).state_dict()
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{path}: the header is damaged: {error}") from error
    unfit = [
        name
        for name in expected.keys() | tensors.keys()
        if name not in expected or name not in tensors or expected[name].shape != tensors[name].shape
    ]
    if unfit:
        raise CheckpointError(f"{path}: weights do not fit {architecture}: {', '.join(sorted(unfit)[:5])}")
    if len(labels) != architecture.classes:
        raise CheckpointError(f"{path}: {len(labels)} labels for {architecture.classes} classes")
    net = AlexNet(architecture)
    net.load_state_dict(tensors)
    return Checkpoint(net.eval(), labels, facts)


def _read(path: Path) -> tuple[Mapping[str, str], dict[str, torch.Tensor]]:
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: not a readable safetensors file: {error}") from error
    if header.get("format") != FORMAT:
        raise CheckpointError(f"{path}: not a checkpoint of this project (format {header.get('format')!r})")
    return header, tensors


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def replace_durably(beside: Path, path: Path) -> None:
    """Rename `beside` to `path` so that after a crash either the old or the whole new file stands."""
    with beside.open("rb") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
