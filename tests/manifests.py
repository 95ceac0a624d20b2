"""What deploy/ holds, read: manifests, pods, the flags that they start things with."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

import typer.main
import yaml
from support import ROOT

import alexnet
from serving.settings import Settings

DEPLOY = ROOT / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
SINCE = "1.30"
"""The oldest Kubernetes that the README promises: preStop's `sleep` is on by default from there."""

Document = dict[str, Any]

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
SETTINGS = Settings()
PORTS = {
    "gateway": SETTINGS.port,
    **{
        option.name.removesuffix("_port"): option.default
        for option in typer.main.get_command(alexnet.app).commands["triton"].params  # type: ignore[attr-defined]
        if option.name.endswith("_port")
    },
}
"""The code's own: of the gateway, and of `alexnet triton`."""


OPS = 8004
"""Of the gateway, for operators; the code has none by itself. Beside Triton's three."""


def documents(path: Path) -> list[Document]:
    return [document for document in yaml.safe_load_all(path.read_text()) if document]


def _resource_files() -> list[Path]:
    """What kustomizations list as resources: everything that goes to a cluster."""
    return sorted(
        path.parent / name
        for path in KUBERNETES.rglob("kustomization.yaml")
        for name in documents(path)[0].get("resources", [])
        if name.endswith(".yaml")
    )


RESOURCES = [(path.relative_to(KUBERNETES), each) for path in _resource_files() for each in documents(path)]


def pods() -> dict[str, Document]:
    """Pod templates of base and Job by the name of what makes them."""
    return {
        document["metadata"]["name"]: document["spec"]["template"]
        for _, document in RESOURCES
        if "template" in document.get("spec", {})
    }


def container(name: str) -> Document:
    (only,) = pods()[name]["spec"]["containers"]
    return dict(only)


def of_kind(kind: str) -> list[Document]:
    return [document for _, document in RESOURCES if document["kind"] == kind]


def named(documents: list[Document], kind: str, name: str) -> Document:
    (only,) = (
        each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name
    )
    return only


def flags(args: list[str]) -> dict[str, str]:
    """--name=value -> {name: value}; of a repeated name the last."""
    return dict(arg.removeprefix("--").split("=", 1) for arg in args if arg.startswith("--"))
