"""TensorRT engines: every refusal is told, what was built is read back, and every name used exists.

No engine is built here: that takes an NVIDIA GPU. A fake builder shows the flow, and the bindings'
own wheels, imported over empty libraries, show that the calls are theirs.
"""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from fake_tensorrt import GOOD_LAYERS, GPU, PLAN, Machine, fake_tensorrt, layer
from support import ALEXNET, QUIET, ROOT, encoded, picture

import export.to_tensorrt
from export.config import CAPABILITIES, check_config, parse_config, tensorrt_config_text
from export.container import CONTAINERS, build_command
from export.forms import Form, fp16
from export.gate import generated_crops
from export.publish import publish
from export.to_fp16 import to_fp16, write_checked
from export.to_onnx import ExportError
from export.to_tensorrt import (
    PROFILE,
    NoTensorRTError,
    build_engine,
    check_layers,
    check_plan,
    engine_predictor,
    find_gpu,
    load_tensorrt,
)
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from model.evaluate import torch_predictor
from model.net import AlexNet, Architecture, initialise_kaiming
from serving.backends import open_session
from serving.contract import INPUT_NAME, MAX_BATCH
from serving.errors import ModelNotReady
from serving.golden import Golden
from serving.postprocess import Label
from serving.repository import latest_version

LABELS = [Label("n01440764", "tench"), Label("n03028079", "church"), Label("n03888257", "parachute")]


@pytest.fixture(scope="module")
def net() -> AlexNet:
    torch.manual_seed(5)
    net = AlexNet(Architecture("2012", 3, low_rank=16)).eval()
    initialise_kaiming(net)
    torch.nn.init.normal_(net.fc8.weight, std=0.1)
    return net


@pytest.fixture(scope="module")
def model(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("onnx") / "net.fp16.onnx"
    to_fp16(net, path)
    return path


@pytest.fixture(scope="module")
def source(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "net.safetensors"
    checkpoints.save(path, Checkpoint(net, LABELS))
    return path


def test_the_network_is_strongly_typed_for_batches_of_one_to_the_largest(model: Path, tmp_path: Path) -> None:
    machine = Machine()
    built = build_engine(fake_tensorrt(machine), GPU, model, tmp_path / "cache")
    assert built.plan == PLAN + model.read_bytes()
    assert machine.asked["flags"] == 1 << 1
    assert machine.asked["profile"] == (INPUT_NAME, tuple((n, 224, 224, 3) for n in (1, 10, MAX_BATCH)))
    assert machine.asked["memory"] == ("workspace", 2**31)
    assert machine.asked["verbosity"] == "detailed", "or the inspector tells no types"
    assert built.facts["engine"] == {
        "tensorrt": "10.16.1.11",
        "gpu": "H200",
        "compute_capability": "9.0",
        "batches": list(PROFILE),
        "layers": {"kgen": 2, "CaskConvolution": 2, "LRN": 1, "Reformat": 1, "gemm": 1},
    }


def test_measured_kernels_are_kept_for_the_next_build_on_the_same_gpu(model: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    for gpu, expected in (("H200", b""), ("H200", b"H200"), ("L4", b"")):
        machine = Machine(gpu=gpu)
        build_engine(fake_tensorrt(machine), GPU, model, cache)
        assert machine.asked["cache"] == expected
        assert cache.read_bytes() == gpu.encode()
    assert [path.name for path in tmp_path.iterdir()] == ["cache"], "written beside and renamed"


@pytest.mark.parametrize(
    ("machine", "message"),
    [
        (Machine(parser_faults=("no", "bad weights")), r"node 7 \(LRN\): no; node 8 \(LRN\): bad weights"),
        (Machine(profile_index=-1), r"refuses batches of \(1, 10, 80\) of images as a profile"),
        (Machine(shape_error="min > max"), r"refuses batches of \(1, 10, 80\) of images: min > max"),
        (Machine(builds=False), "built no engine of net.fp16.onnx; its own messages above say why"),
        (Machine(loads=False), "cannot read the engine that it built"),
        (Machine(largest=64), "takes no batch of 80"),
        (Machine(layers="[]"), "answer cannot be read"),
        (Machine(layers={"Layers": ["conv1", "lrn1"]}), "precision is unknown: none with its types"),
        (Machine(layers={"Layers": [layer("kgen", "all")]}), "precision is unknown: kgen"),
    ],
)  # fmt: skip
def test_what_tensorrt_refuses_is_told(machine: Machine, message: str, model: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=message):
        build_engine(fake_tensorrt(machine), GPU, model, tmp_path / "cache")


@pytest.mark.parametrize(
    "wrong",
    [
        layer("CaskConvolution", "conv3", reads="Float"),
        layer("CaskConvolution", "conv3", reads="Row major linear FP32"),
        layer("CaskConvolution", "conv3", Weights={"Type": "Float", "Count": 884736}),
        layer("CaskGemmMatrixMultiply", "conv3", reads="Float"),
        layer("Myelin", "conv3", reads="Float", ParameterType="Convolution"),
        layer("gemm", "conv3", reads="N/A due to dynamic shapes"),
        {"Name": "conv3", "LayerType": "Convolution"},
        # TensorRT 11
        {"Name": "conv3", "LayerType": "Convolution", "Inputs": [{"Format": "Linear", "DataType": "Float"}]},
    ],
)
def test_a_convolution_or_product_in_fp32_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ExportError, match="conv3 of the engine is not FP16"):
        check_layers(json.dumps({"Layers": [*GOOD_LAYERS, wrong]}))


def test_the_inspector_of_tensorrt_11_is_understood() -> None:
    typed = {"Format": "Row major linear format", "DataType": "Half"}
    conv = {"Name": "conv1", "LayerType": "Convolution", "Inputs": [typed], "Weights": {"DataType": "Half"}}
    assert check_layers(json.dumps({"Layers": [conv], "I/O Tensors": []})) == {"Convolution": 1}


def test_the_bindings_are_found_under_either_name() -> None:
    def load(name: str) -> Any:
        if name == "tensorrt":
            raise ImportError("libnvinfer.so.11: cannot open shared object file")
        return SimpleNamespace(__version__="11.4.0.106", name=name)

    assert load_tensorrt(load).name == "tensorrt_bindings"


@pytest.mark.parametrize("version", ["10.11.0.33", "8.6.1"])
def test_a_tensorrt_that_would_choose_types_itself_is_refused(version: str) -> None:
    with pytest.raises(NoTensorRTError, match=rf"TensorRT {version} is too old.* 10\.12 or newer"):
        load_tensorrt(lambda _: SimpleNamespace(__version__=version))
    load_tensorrt(lambda _: SimpleNamespace(__version__="10.12.0.36"))


def test_missing_bindings_are_named() -> None:
    def load(name: str) -> Any:
        raise ImportError(f"No module named {name!r}")

    with pytest.raises(NoTensorRTError, match="No module named 'tensorrt'; No module named 'tensorrt_b"):
        load_tensorrt(load)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_gpu_is_told() -> None:
    with pytest.raises(NoTensorRTError, match="no GPU to build for: torch 2"):
        find_gpu()


def test_an_engine_answers_as_its_network_and_refuses_batches_out_of_its_profile(
    net: AlexNet, model: Path, tmp_path: Path
) -> None:
    plan = tmp_path / GPU.plan
    plan.write_bytes(PLAN + model.read_bytes())
    predict = engine_predictor(fake_tensorrt(Machine(largest=3)), GPU, plan)
    crops = generated_crops(3, seed=4)
    np.testing.assert_allclose(predict(crops), torch_predictor(net)(crops), atol=5e-3)
    np.testing.assert_allclose(predict(crops[::2]), torch_predictor(net)(crops)[::2], atol=5e-3)
    with pytest.raises(ExportError, match="a batch of 4 is outside its profile"):
        predict(generated_crops(4))
    with pytest.raises(ExportError, match=r"model_cc90\.plan: TensorRT 10\.16\.1\.11 cannot load it on H200"):
        engine_predictor(fake_tensorrt(Machine(loads=False)), GPU, plan)


def test_a_plan_that_does_not_fit_its_configuration_is_refused(model: Path, tmp_path: Path) -> None:
    plan, trt = tmp_path / GPU.plan, fake_tensorrt(Machine())
    plan.write_bytes(PLAN + model.read_bytes())
    check_plan(trt, GPU, tensorrt_config_text("a", 3), plan)
    with pytest.raises(ExportError, match=r"config\.pbtxt declares"):
        check_plan(trt, GPU, tensorrt_config_text("a", 4), plan)
    with pytest.raises(ExportError, match=r"batches of 1 to 79, but config\.pbtxt allows 1 to 80"):
        check_plan(fake_tensorrt(Machine(largest=79)), GPU, tensorrt_config_text("a", 3), plan)


def engine_form(machine: Machine, net: AlexNet, folder: Path) -> Form:
    file = folder / "net.fp16.onnx"
    facts = write_checked(net, file, generated_crops(2))
    return fp16(file, facts, fake_tensorrt(machine), GPU)


def test_a_published_engine_is_complete(net: AlexNet, source: Path, tmp_path: Path) -> None:
    form = engine_form(Machine(), net, tmp_path)
    images = generated_crops(2, seed=3)
    version = publish(checkpoints.load(source), source, tmp_path, "birds", form=form, images=images)
    assert version == tmp_path / "birds_fp16" / "1"
    assert sorted(path.name for path in version.iterdir()) == [
        "golden", "model_cc90.layers.json", "model_cc90.plan", "provenance.json",
    ]  # fmt: skip
    provenance = json.loads((version / "provenance.json").read_text())
    assert provenance["precision"] == "fp16"
    assert provenance["model"]["file"] == "model_cc90.plan"
    assert provenance["engine"]["tensorrt"] == "10.16.1.11"
    assert provenance["onnx"]["reference"]["largest"] < 65504 / 4
    assert provenance["parity"]["bounds"]["max_abs_difference"] == 5e-3
    golden = Golden.read(version)
    assert golden is not None and golden.tolerance == 1e-2
    config = parse_config((version.parent / "config.pbtxt").read_text())
    assert (config.name, config.backend) == ("birds_fp16", "tensorrt")
    assert config.cc_model_filenames[GPU.capability] == "model_cc90.plan"
    assert (tmp_path / "net.fp16.model_cc90.plan.timing").is_file()
    read = latest_version(tmp_path, "birds_fp16")
    assert (read.path.name, read.precision, read.labels) == ("model_cc90.plan", "fp16", tuple(LABELS))
    with pytest.raises(ModelNotReady, match=r"model_cc90\.plan: a TensorRT engine.* serve --triton"):
        open_session(read, 1)


def test_an_engine_that_answers_otherwise_is_refused(net: AlexNet, source: Path, tmp_path: Path) -> None:
    form = engine_form(Machine(answers_backwards=True), net, tmp_path)
    images = generated_crops(2, seed=3)
    with pytest.raises(ExportError, match=r"max \|dp\| .* is over the bound 5e-03"):
        publish(checkpoints.load(source), source, tmp_path, "birds", form=form, images=images)
    assert list((tmp_path / "birds_fp16").iterdir()) == []


def test_the_configuration_names_an_engine_for_each_kind_of_gpu() -> None:
    text = tensorrt_config_text("birds_fp16", 10)
    check_config(text, 10)
    config = parse_config(text)
    assert dict(config.cc_model_filenames) == {c: f"model_cc{c.replace('.', '')}.plan" for c in CAPABILITIES}
    assert config.max_batch_size == PROFILE[-1]
    assert config.optimization.cuda.graphs
    assert config.instance_group[0].kind == config.instance_group[0].KIND_GPU
    assert config.parameters["precision"].string_value == "fp16"


def script(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


def test_the_command_for_the_container_installs_the_version_that_it_finds_there(tmp_path: Path) -> None:
    """The command itself, with a `docker` that runs what the container would, and its tools faked."""
    tools, here = tmp_path / "bin", tmp_path / "my project"
    tools.mkdir()
    here.mkdir()
    library = tmp_path / "libnvinfer.so.11.2.1"
    library.touch()
    (tmp_path / "libnvinfer.so.11").symlink_to(library)
    names = ("libnvinfer_plugin.so.11", "libnvinfer.so.11")
    listed = [f"\t{name} (libc6,x86-64) => {tmp_path}/{name}" for name in names]
    script(tools, "ldconfig", f"cat <<end\n{chr(10).join(listed)}\nend")
    keep = 'printf "%s\\n" "$@" >'
    script(tools, "docker", f'{keep} docker.txt; while [ "$1" != sh ]; do shift; done; exec "$@"')
    script(tools, "pip", f"{keep} pip.txt")
    script(tools, "python3", f"{keep} python.txt")
    data = tmp_path / "photo's"
    data.mkdir()
    arguments = ["runs/a b.safetensors", "--precision", "fp16", "--data", str(data)]
    command = ["sh", "-c", build_command(arguments, here=here)]
    env = os.environ | {"PATH": f"{tools}:{os.environ['PATH']}"}
    subprocess.run(command, cwd=here, env=env, check=True, timeout=30)
    assert "tensorrt-cu13-bindings==11.2.1.*" in (here / "pip.txt").read_text().splitlines()
    assert (here / "python.txt").read_text().splitlines() == ["alexnet.py", "export", *arguments]
    docker = (here / "docker.txt").read_text().splitlines()
    assert f"{here}:{here}" in docker and f"{data}:{data}" in docker
    assert f"nvcr.io/nvidia/tritonserver:{next(iter(CONTAINERS))}-py3" in docker
    script(tools, "ldconfig", "true")
    done = subprocess.run(command, cwd=here, env=env, timeout=30, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, "no TensorRT in this container\n")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine may be able to build engines")
def test_without_tensorrt_the_others_are_published_and_the_command_says_how_to_go_on(
    source: Path, tmp_path: Path
) -> None:
    checkpoint = tmp_path / "net.safetensors"
    checkpoint.write_bytes(source.read_bytes())
    for index, label in enumerate(LABELS):
        folder = tmp_path / "data" / "val" / label.wnid
        folder.mkdir(parents=True)
        (folder / "0.jpg").write_bytes(encoded(picture(index)))
    options = ["--repository", str(tmp_path / "models"), "--data", str(tmp_path / "data")]
    done = subprocess.run(
        [*ALEXNET, "export", str(checkpoint), "--precision", "fp16,fp32", *options],
        cwd=ROOT, env=QUIET | {"COLUMNS": "300"}, capture_output=True, text=True, timeout=110, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert (tmp_path / "models" / "alexnet" / "1" / "model.onnx").is_file()
    assert not (tmp_path / "models" / "alexnet_fp16").exists()
    file = tmp_path / "net.fp16.onnx"
    rows = done.stdout.splitlines()
    assert rows[0].split()[0] == "MB"
    assert rows[1].rstrip().endswith("alexnet/1") and rows[2].rstrip().endswith(str(file))
    assert file.is_file() and [path.name for path in tmp_path.glob(".*onnx")] == []
    assert f"{file} is written and checked, but no engine was built" in done.stderr
    assert "No module named 'tensorrt'" in done.stderr and "no GPU to build for" in done.stderr
    assert re.search(
        rf"^docker run .*tritonserver:.*alexnet\.py export {checkpoint} --precision fp16 --repository",
        done.stderr,
        re.MULTILINE,
    )


# --- the bindings themselves -------------------------------------------------------------------------

TYPES = {
    "builder": "Builder", "network": "INetworkDefinition", "parser": "OnnxParser", "config": "IBuilderConfig",
    "profile": "IOptimizationProfile", "cache": "ITimingCache", "runtime": "Runtime", "engine": "ICudaEngine",
    "context": "IExecutionContext", "inspector": "EngineInspector", "error": "ParserError",
}  # fmt: skip
"""What the module calls its TensorRT objects."""

OTHERS = {
    "torch", "np", "importlib", "json", "os", "re", "path", "plan", "model", "beside", "timing_cache", "self",
    "gpu", "built", "declared", "tensor", "images", "answers", "crops", "layer", "text", "faults", "found",
    "model_config_pb2", "stored", "name", "weights", "_MATRIX_LAYER", "_SINGLE", "_HALF", "Crops", "loaded",
}  # fmt: skip


def names_used() -> dict[str, set[str]]:
    """Class of the bindings (or "" for the module itself) -> attributes and keywords that are used."""
    tree = ast.parse(Path(export.to_tensorrt.__file__).read_text())
    used: dict[str, set[str]] = {}
    unknown = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        parts = [node.attr]
        base: ast.expr = node.value
        while isinstance(base, ast.Attribute):
            parts.insert(0, base.attr)
            base = base.value
        if not isinstance(base, ast.Name):
            continue
        if base.id == "trt":
            used.setdefault("", set()).add(".".join(parts))
        elif base.id in TYPES:
            used.setdefault(TYPES[base.id], set()).add(parts[0])
        elif base.id not in OTHERS:
            unknown.add(base.id)
    assert not unknown, f"objects of TensorRT's belong into TYPES, others into OTHERS: {unknown}"
    assert set(used) == {"", *TYPES.values()}
    return used


def test_the_fake_has_nothing_that_the_module_does_not_use() -> None:
    used = names_used()
    fake = fake_tensorrt(Machine())
    assert {name for name in vars(fake) if name != "__version__"} == {
        name.split(".")[0] for name in used[""] if name != "__version__"
    }


STUBS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL", "createNvOnnxParser_INTERNAL", "getBuilderPluginRegistry",
    "getNvOnnxParserVersion", "getPluginRegistry", "initLibNvInferPlugins",
)  # fmt: skip
"""What the bindings import of TensorRT's libraries. Nothing here calls them."""

LOOK = """
import json, sys
import tensorrt_bindings as trt
missing = []
for owner, names in json.loads(sys.argv[1]).items():
    for name in names:
        found = getattr(trt, owner) if owner else trt
        for part in name.split("."):
            found = getattr(found, part, None)
        if found is None:
            missing.append(f"{owner}.{name}")
assert "ignore_mismatch" in trt.IBuilderConfig.set_timing_cache.__doc__
print(json.dumps([trt.__version__, missing]))
"""


@pytest.fixture(scope="session")
def wheels(request: pytest.FixtureRequest) -> Path:
    """A folder that stays between runs: each wheel is one megabyte."""
    assert request.config.cache is not None
    return request.config.cache.mkdir("tensorrt-bindings")


@pytest.mark.parametrize("version", ["10.13.2.6", "10.16.1.11", "11.4.0.106"])
def test_every_name_that_is_used_exists_in_the_bindings(version: str, wheels: Path, tmp_path: Path) -> None:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("a C compiler makes the empty libraries that the bindings are imported over")
    with zipfile.ZipFile(bindings(version, wheels)) as wheel:
        wheel.extractall(tmp_path)
    source = tmp_path / "stubs.c"
    source.write_text("".join(f"void *{name}(void) {{ return 0; }}\n" for name in STUBS))
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        target = tmp_path / f"lib{library}.so.{version.split('.')[0]}"
        subprocess.run([compiler, "-shared", "-fPIC", "-o", str(target), str(source)], check=True, timeout=60)
    used = {owner: sorted(names) for owner, names in names_used().items()}
    done = subprocess.run(
        [sys.executable, "-c", LOOK, json.dumps(used)],
        env=os.environ | {"LD_LIBRARY_PATH": str(tmp_path), "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [version, []]


def bindings(version: str, wheels: Path) -> Path:
    pattern = f"tensorrt_cu13_bindings-{version}-cp{sys.version_info.major}{sys.version_info.minor}-*.whl"
    if not list(wheels.glob(pattern)):
        done = subprocess.run(
            [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:",
             "--dest", str(wheels), f"tensorrt-cu13-bindings=={version}"],
            capture_output=True, text=True, timeout=100, check=False,
        )  # fmt: skip
        if done.returncode:
            pytest.skip(f"no wheel of the bindings here: {done.stderr.strip().splitlines()[-1]}")
    return next(wheels.glob(pattern))
