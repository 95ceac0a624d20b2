"""`make bench-gpu` but for the card: what it counts, times, concludes, and says where something lacks.

No test here says anything about a GPU. Engines run through the same functions on the CPU, with events that
read the host's clock.
"""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gpu_training
import numpy as np
import onnxruntime
import pytest
import torch
from bench_gpu import rows
from fake_tensorrt import GPU, Machine, fake_tensorrt
from gpu_card import AbsentError, arithmetic, card_rates, driver, need_precision
from gpu_engines import (
    CUDA,
    Files,
    HalfAlexNet,
    cuda_provider,
    cuda_session,
    session_engine,
    tensorrt_engine,
    torch_engine,
)
from gpu_events import LEAST, WARM_UP, Stream, Times, timed
from gpu_report import HEAD, Row, as_json, cells, page, rates_cells, text
from gpu_rows import (
    ENGINES,
    Job,
    differing,
    engine_rows,
    random_net,
    without,
)
from gpu_work import WIDTH, Achieved, Layer, Rates, Work, achieved, floor_s, inference, layers, training
from support import QUIET, ROOT
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from export.gate import generated_crops
from export.to_tensorrt import NoTensorRTError
from model.net import AlexNet, Architecture, parameter_count

CPU = torch.device("cpu")
RATES = {name: Rates(1e12, 1e11) for name in WIDTH}


class HostEvent:
    """Of work that is done when it returns."""

    def record(self) -> None:
        self.at = time.perf_counter()

    def elapsed_time(self, end_event: HostEvent) -> float:
        return 1000 * (end_event.at - self.at)


STREAM = Stream(CPU, 0, HostEvent, lambda: None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for each other at every operator."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def net() -> AlexNet:
    return random_net(Architecture("2012", 7, low_rank=16))


@pytest.fixture(scope="module")
def files(net: AlexNet, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files.written(net, tmp_path_factory.mktemp("files"))


@pytest.fixture
def job(net: AlexNet, tmp_path: Path) -> Job:
    return Job(net, generated_crops(3), STREAM, RATES, {}, tmp_path, seconds=0.01)


# --- work --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "architecture",
    [Architecture("2012", 1000), Architecture("owt", 13), Architecture("2012", 17, low_rank=31)],
)
def test_operations_are_those_that_torch_counts_for_the_network_s_layers(architecture: Architecture) -> None:
    with torch.device("meta"):
        net = AlexNet(architecture).eval()
        pixels = torch.zeros(3, 224, 224, 3, dtype=torch.uint8)
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(pixels)
    counted = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    network = layers(architecture)
    assert [layer.name for layer in network][:5] == [f"conv{number}" for number in range(1, 6)]
    for layer in network:
        assert 3 * layer.flop == counted[layer.name], layer.name
    assert sum(layer.weights for layer in network) == parameter_count(net)


def test_the_2012_network_s_figures_are_those_of_its_tables() -> None:
    network = {layer.name: layer for layer in layers(Architecture("2012", 1000))}
    assert sum(layer.weights for layer in network.values()) == 60_965_224
    # a map's pixels x maps x kernel x channels of one group
    assert network["conv1"].flop == 2 * 55 * 55 * 96 * 11 * 11 * 3
    assert network["conv2"].flop == 2 * 27 * 27 * 256 * 5 * 5 * 48
    assert network["conv4"].flop == 2 * 13 * 13 * 384 * 3 * 3 * 192
    assert network["fc6"].flop == 2 * 9216 * 4096
    assert (network["conv1"].inputs, network["conv1"].outputs) == (224 * 224 * 3, 96 * 27 * 27)
    assert (network["conv5"].inputs, network["conv5"].outputs) == (384 * 13 * 13, 256 * 6 * 6)
    assert (network["fc8"].inputs, network["fc8"].outputs) == (4096, 1000)


def test_a_training_step_s_operations_are_those_that_torch_counts() -> None:
    """But for LRN's, which are ours to choose and not counted."""
    architecture = Architecture("owt", 11, low_rank=16)  # without LRN
    net = AlexNet(architecture)
    with FlopCounterMode(display=False) as counter:
        x = net.normalise(torch.randint(0, 256, (2, 224, 224, 3), dtype=torch.uint8))
        nn.functional.cross_entropy(net.logits(x), torch.tensor([3, 5])).backward()  # type: ignore[no-untyped-call]
    work = training(layers(architecture), 2, WIDTH["fp32"])
    assert sum(each.flop for each in work) == counter.get_total_flops()


def test_bytes_grow_with_the_batch_but_for_the_weights() -> None:
    network = [Layer("a", 10, 1000, 300, 50), Layer("b", 20, 2000, 50, 7)]
    for batch in (1, 64):
        first, last = inference(network, batch, WIDTH["fp16"])
        assert first.bytes == 2 * 1000 + batch * (300 + 2 * 50), "pixels are bytes"
        assert last.bytes == 2 * 2000 + batch * (2 * 50 + 4 * 7), "probabilities are FP32"
        assert (first.flop, last.flop) == (10 * batch, 20 * batch)


def test_a_step_s_bytes_are_written_out() -> None:
    step = training([Layer("a", 10, 1000, 300, 50), Layer("b", 20, 2000, 50, 7)], 3, WIDTH["bf16"])
    assert [each.bytes for each in step[2:]] == [
        3 * (300 + 2 * 50) + 4 * 1000,              # gradient of a's weights
        3 * 2 * (50 + 7) + 4 * 2000,                # of b's
        3 * 2 * (50 + 7) + 2 * 2000,                # of b's inputs; the pixels need none
        4 * 3000 * 5,                               # SGD
    ]  # fmt: skip
    assert [each.flop for each in step] == [30, 60, 30, 60, 60, 0]


def test_the_floor_takes_the_longer_of_computing_and_moving_for_each_layer() -> None:
    rates = Rates(flop_s=100, bytes_s=10)
    work = [Work(flop=500, bytes=10), Work(flop=100, bytes=40)]
    assert floor_s(work, rates) == 5 + 4
    done = achieved(work, rates, seconds=20)
    assert done == Achieved(flop_s=30, of_matrix=0.3, of_bandwidth=0.25, of_floor=0.45)
    assert floor_s(work, rates) >= max(600 / 100, 50 / 10), "not below either bound of the whole"


# --- time --------------------------------------------------------------------------------------------


class Timeline:
    """A card that takes as long as it is told for each run, and a host that waits for it."""

    def __init__(self, seconds: Iterator[float]) -> None:
        self.seconds, self.host, self.card, self.waits = seconds, 0.0, 0.0, 0

    def run(self) -> None:
        self.host += 1e-6
        self.card = max(self.card, self.host) + next(self.seconds)

    def wait(self) -> None:
        self.host, self.waits = max(self.host, self.card), self.waits + 1

    def event(self) -> Any:
        event = SimpleNamespace()
        event.record = lambda: setattr(event, "at", max(self.card, self.host))
        event.elapsed_time = lambda end: 1000 * (end.at - event.at)
        return event

    def stream(self) -> Stream:
        return Stream(CPU, 1, self.event, self.wait)


def test_times_are_of_the_card_s_work_and_not_of_its_warm_up() -> None:
    compiling = [7.0] * WARM_UP
    line = Timeline(itertools.chain(compiling, itertools.cycle([0.010, 0.011, 0.012])))
    found = timed(line.run, line.stream(), seconds=3, clock=lambda: line.host)
    assert [found.p10_s, found.median_s, found.p90_s] == pytest.approx([0.010, 0.011, 0.012], rel=1e-3)
    assert 3 <= line.host - sum(compiling) < 3.1


def test_quick_runs_are_put_on_the_stream_many_at_a_time_and_slow_ones_end_soon() -> None:
    quick = Timeline(itertools.repeat(1e-3))
    found = timed(quick.run, quick.stream(), seconds=1, clock=lambda: quick.host)
    assert 1000 <= found.runs <= 1050
    assert quick.waits < WARM_UP + 25
    slow = Timeline(itertools.repeat(5.0))
    assert timed(slow.run, slow.stream(), seconds=1, clock=lambda: slow.host).runs == LEAST


# --- card --------------------------------------------------------------------------------------------


def test_the_card_s_rates_are_measured_and_what_it_lacks_is_named() -> None:
    rates, absent = card_rates(STREAM, 0.001, (7, 5), has_bf16=False, side=64, copied_bytes=2**16)
    assert list(rates) == ["fp32", "fp16"]
    assert all(each.flop_s > 0 and each.bytes_s == rates["fp32"].bytes_s > 0 for each in rates.values())
    assert absent == {
        "tf32": "no TF32 on a card of compute capability 7.5; 8.0 and later have it",
        "bf16": "no bf16 on a card of compute capability 7.5",
    }
    need_precision("tf32", (8, 9), has_bf16=True)
    need_precision("bf16", (9, 0), has_bf16=True)


def test_fp32_numbers_are_multiplied_exactly_but_for_tf32_and_switches_go_back() -> None:
    def switches() -> tuple[bool, bool, bool]:
        cudnn = torch.backends.cudnn
        return torch.backends.cuda.matmul.allow_tf32, cudnn.allow_tf32, cudnn.benchmark

    before = switches()
    for precision in WIDTH:
        with arithmetic(precision, search=True):
            assert switches() == (precision == "tf32", precision == "tf32", True)
            torch.get_float32_matmul_precision()  # raises where the switches contradict each other
    assert switches() == before


def test_a_driver_that_is_not_told_is_said_to_be_unknown(tmp_path: Path) -> None:
    assert driver(str(tmp_path / "nvidia-smi")) == "unknown (no nvidia-smi)"
    told = tmp_path / "told"
    told.write_text("#!/bin/sh\necho 580.159.03\necho 580.159.03\n")
    told.chmod(0o755)
    assert driver(str(told)) == "580.159.03"


# --- engines -----------------------------------------------------------------------------------------


def answered(bind: Callable[[Tensor, Tensor], Callable[[], object]], crops: Any, classes: int) -> Any:
    """What an engine writes over NaN, twice with other pictures in the same place."""
    images, answers = torch.from_numpy(crops[::-1].copy()), torch.full((len(crops), classes), torch.nan)
    run = bind(images, answers)
    run()
    images.copy_(torch.from_numpy(crops))
    answers.fill_(torch.nan)
    run()
    return answers.numpy()


@pytest.mark.parametrize(("precision", "bound"), [("fp32", 1e-5), ("fp16", 5e-3)])
@pytest.mark.parametrize("engine", ["torch", "onnxruntime"])
def test_an_engine_answers_as_the_network(
    engine: str, precision: str, bound: float, job: Job, files: Files
) -> None:
    if engine == "torch":
        bind = torch_engine(job.net, precision, CPU)
    else:
        path = files.fp16 if precision == "fp16" else files.fp32
        bind = session_engine(onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]))
    answers = answered(bind, job.crops, 7)
    assert differing(answers, job.reference) < bound
    assert np.abs(job.reference[0] - job.reference[1]).max() > 0.1, "pictures are told apart"
    assert next(job.net.parameters()).dtype == torch.float32, "the network itself stays"


def test_fp16_keeps_lrn_in_fp32_where_squares_overflow(net: AlexNet) -> None:
    half = HalfAlexNet(net)
    types = {name: p.dtype for name, p in half.named_parameters()}
    assert set(types.values()) == {torch.float16}, types
    x = 300 + 700 * torch.rand(2, 96, 5, 5)
    y = half.net.get_submodule("lrn1")(x.half())
    assert y.dtype == torch.float16
    expected = net.get_submodule("lrn1")(x.half().float())
    torch.testing.assert_close(y.float(), expected, rtol=1e-3, atol=0)
    assert (expected > 0.1).all(), "and not x / infinity"


def test_tensorrt_is_built_by_the_product_for_the_largest_batch(
    job: Job, files: Files, tmp_path: Path
) -> None:
    machine = Machine(largest=300)
    model = tmp_path / "net.onnx"
    model.write_bytes(files.fp16.read_bytes())
    bind = tensorrt_engine(lambda: model, 256, lambda: (fake_tensorrt(machine), GPU))
    assert [shape[0] for shape in machine.asked["profile"][1]] == [1, 10, 256]
    assert differing(answered(bind, job.crops, 7), job.reference) < 5e-3


def test_without_tensorrt_nothing_is_exported_for_it() -> None:
    def find() -> Any:
        raise NoTensorRTError("no bindings; no GPU")

    def model() -> Path:
        raise AssertionError("exported in vain")

    with pytest.raises(AbsentError, match="no bindings; no GPU"):
        tensorrt_engine(model, 1, find)


def fake_runtime(given: list[str], wanted: dict[str, Any]) -> Any:
    """An ONNX Runtime with CUDA, whose sessions have the providers `given`."""

    class Session:
        def __init__(self, path: str, options: Any, providers: list[Any]) -> None:
            wanted.update(path=path, options=options.entries, providers=providers)

        def get_providers(self) -> list[str]:
            return given

    class Options:
        def __init__(self) -> None:
            self.entries: dict[str, str] = {}

        def add_session_config_entry(self, name: str, value: str) -> None:
            self.entries[name] = value

    return SimpleNamespace(
        __version__="1.31.1", SessionOptions=Options, InferenceSession=Session,
        get_available_providers=lambda: [CUDA, "CPUExecutionProvider"], preload_dlls=lambda: None,
    )  # fmt: skip


@pytest.mark.parametrize(("precision", "tf32"), [("fp32", "0"), ("tf32", "1"), ("fp16", "0")])
def test_onnx_runtime_works_on_our_stream_and_on_the_card_alone(precision: str, tf32: str) -> None:
    wanted: dict[str, Any] = {}
    stream = Stream(torch.device("cuda", 1), 0x7F001234, HostEvent, lambda: None)
    cuda_session(Path("net.onnx"), stream, precision, fake_runtime([CUDA, "CPUExecutionProvider"], wanted))
    options = {"device_id": "1", "user_compute_stream": str(0x7F001234), "use_tf32": tf32}
    assert wanted["providers"] == [(CUDA, options)]
    assert wanted["options"] == {"session.disable_cpu_ep_fallback": "1"}


def test_a_stream_that_onnx_runtime_would_not_take_is_refused() -> None:
    with pytest.raises(ValueError, match="the stream 0 for none"):
        cuda_provider(STREAM, "fp32")


def test_an_onnx_runtime_that_would_use_the_cpu_unsaid_is_refused() -> None:
    stream = Stream(torch.device("cuda", 0), 77, HostEvent, lambda: None)
    with pytest.raises(AbsentError, match=r"onnxruntime 1\.31\.1 could not start its CUDAExecutionProvider"):
        cuda_session(Path("net.onnx"), stream, "fp32", fake_runtime(["CPUExecutionProvider"], {}))


# --- rows --------------------------------------------------------------------------------------------


def test_every_row_that_cannot_run_here_is_named_with_its_reason(job: Job) -> None:
    """The whole table on a machine without a card, torch's rows on the CPU."""
    quick = replace(job, absent={"tf32": "no TF32 here", "bf16": "no bf16 here"}, seconds=1e-3)
    found = list(rows(quick, [1], training_batch=1))
    assert [(row.engine, row.precision, row.batch) for row in found] == [
        *((engine, precision, 1) for engine, precision in ENGINES),
        ("upload", "fp32", 1), *(("train", kind, 1) for kind in gpu_training.KINDS),
    ]  # fmt: skip
    measured = {(row.engine, row.precision) for row in found if row.times}
    assert measured == {("torch", "fp32"), ("torch", "fp16"), ("upload", "fp32"), ("train", "fp32")}
    reason = {(row.engine, row.precision): row.reason for row in found if not row.times}
    assert reason["torch", "tf32"] == "no TF32 here"
    assert reason["train", "bf16"] == reason["train", "bf16 compiled"] == "no bf16 here"
    assert f"onnxruntime {onnxruntime.__version__} has no {CUDA}" in reason["onnxruntime", "fp16"]
    assert reason["tensorrt", "fp32"] == "the product builds TensorRT engines in FP16 alone"
    assert "there is no GPU to build for" in reason["tensorrt", "fp16"]
    assert not any(row.failed for row in found)
    for row in found:
        if row.times and row.engine != "upload":
            assert row.achieved is not None and row.achieved.of_floor > 0
        if row.times and row.engine == "torch":
            assert row.difference is not None and row.difference < 5e-3


def test_a_batch_that_memory_is_too_small_for_leaves_the_others(job: Job) -> None:
    def bind(images: Tensor, answers: Tensor) -> Callable[[], object]:
        if len(images) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 TiB")
        return torch_engine(job.net, "fp32", CPU)(images, answers)

    empty = [Row("torch", "fp32", batch) for batch in (3, 1)]
    large, small = engine_rows(job, empty, lambda: bind)
    assert (large.times, large.reason, large.failed) == (None, "out of the card's memory", False)
    assert small.times is not None


@pytest.mark.parametrize("wrong", ["reversed", "unwritten", "nan"])
def test_an_engine_that_answers_otherwise_has_no_time(wrong: str, job: Job) -> None:
    def bind(images: Tensor, answers: Tensor) -> Callable[[], object]:
        right = torch_engine(job.net, "fp32", CPU)(images, answers)

        def run() -> None:
            right()
            answers.copy_(answers.flip(1))
            if wrong == "nan":
                answers[-1, 0] = torch.nan

        return (lambda: None) if wrong == "unwritten" else run

    (row,) = engine_rows(job, [Row("torch", "fp32", 2)], lambda: bind)
    assert row.times is None and row.failed
    assert row.reason.startswith("failed: WrongAnswersError: probabilities differ by")


def test_no_row_is_begun_after_the_limit(job: Job) -> None:
    now = itertools.count()
    late = replace(job, clock=lambda: next(now), until=3)
    empty = [Row("torch", "fp32", batch) for batch in (1, 2, 3)]
    first, second, third = engine_rows(late, empty, lambda: torch_engine(job.net, "fp32", CPU))
    assert first.times and second.times
    assert third.reason == "the time for all rows was up; --limit gives more"


def test_a_fault_is_told_from_what_is_lacking() -> None:
    row = Row("train", "bf16 compiled", 8)
    assert without(row, ImportError("No module named 'x'")) == replace(row, reason="No module named 'x'")
    fault = without(row, RuntimeError("\nCUDA error: misaligned address\nmore"))
    assert fault == replace(row, reason="failed: RuntimeError: CUDA error: misaligned address", failed=True)
    assert without(row, KeyError()).reason == "failed: KeyError: KeyError"
    with pytest.raises(AbsentError, match=r"torch\.compile needs the package triton"):
        gpu_training.need_triton(lambda _: None)
    gpu_training.need_triton(lambda _: object())


@pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated")  # torch's compiler itself
def test_a_training_row_is_the_trainer_s_own_step(job: Job) -> None:
    made = gpu_training.learner("fp32", 7, 2, CPU, low_rank=16)
    assert (made.config.recipe, made.config.compile, made.config.precision) == ("paper", False, "fp32")
    before = {name: p.detach().clone() for name, p in made.net.named_parameters()}
    gpu_training.step(made, gpu_training.random_batch(2, 7))()
    assert all(not torch.equal(p, before[name]) for name, p in made.net.named_parameters())
    compiled = gpu_training.learner("bf16 compiled", 7, 2, CPU, low_rank=16)
    assert compiled.config.compile and compiled.config.precision == "bf16"
    assert gpu_training.KINDS == ("fp32", "tf32", "bf16", "bf16 compiled") and gpu_training.BATCH == 128


# --- report ------------------------------------------------------------------------------------------


FOUND = [
    Row("torch", "fp16", 64, Times(0.002, 0.0019, 0.0025, 500), Achieved(46.4e12, 0.06, 0.31, 0.4), 3.2e-4),
    Row("tensorrt", "fp16", 1, reason="no | bindings"),
    Row("tensorrt", "fp16", 64, reason="no | bindings"),
    Row("upload", "fp32", 128, Times(0.004, 0.004, 0.004, 250)),
    Row("train", "bf16", 128, reason="out of the card's memory"),
]


def test_the_table_has_a_figure_or_a_reason_in_each_row() -> None:
    head, *body = cells(FOUND)
    assert {len(row) for row in (head, *body)} == {len(HEAD)}
    assert body[0][2:] == ["64", "2.000", "1.900-2.500", "32000", "46.4", "6", "31", "40", "3e-04"]
    assert body[1][3:] == body[2][3:] == ["[1]", *["-"] * 7]
    assert body[3][3:] == ["4.000", "4.000-4.000", "32000", *["-"] * 5]
    assert body[4][3] == "[2]"
    assert text(FOUND)[-2:] == ["[1] no | bindings", "[2] out of the card's memory"]


def test_the_document_s_tables_are_whole() -> None:
    own = rates_cells({"fp16": Rates(700e12, 4.2e12)}, {"bf16": "no bf16"})
    assert own[1:] == [["fp16", "700.0", "4200"], ["bf16", "no bf16", "-"]]
    lines = page({"card": "H200", "date": "2026-11-23"}, own, FOUND).splitlines()
    assert lines[:2] == ["- card: H200", "- date: 2026-11-23"]
    tables = [line.replace("\\|", "") for line in lines if line.startswith("|")]
    assert [line.count("|") for line in tables] == [4] * 4 + [len(HEAD) + 1] * 7
    assert "- [1] no | bindings" in lines


def test_the_json_holds_every_figure_unrounded() -> None:
    told = as_json({"card": "H200"}, {"fp16": Rates(7e14, 4e12)}, {"bf16": "none"}, FOUND)
    read = json.loads(json.dumps(told))
    assert read["rates"] == {"fp16": {"flop_s": 7e14, "bytes_s": 4e12}, "bf16": {"reason": "none"}}
    assert read["rows"][0]["images_s"] == 32000 and read["rows"][0]["achieved"]["of_floor"] == 0.4
    assert read["rows"][1]["times"] is None and read["rows"][1]["reason"] == "no | bindings"


# --- the command -------------------------------------------------------------------------------------


def test_without_a_card_the_command_measures_nothing_and_fails(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "loadtest/bench_gpu.py", "--json", str(tmp_path / "out.json")],
        cwd=ROOT, env=QUIET | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout == "" and list(tmp_path.iterdir()) == []
    assert "bench-gpu needs an NVIDIA GPU, its driver, and a torch built with CUDA" in done.stderr
    assert "Nothing was measured" in done.stderr and "Traceback" not in done.stderr


def test_batches_that_are_none_are_refused() -> None:
    command = [sys.executable, "loadtest/bench_gpu.py", "--batches", "0,1"]
    done = subprocess.run(
        command, cwd=ROOT, env=QUIET, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2 and "--batches" in done.stderr


def test_make_knows_it() -> None:
    told = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert "make bench-gpu" in told
    dry = subprocess.run(
        ["make", "-n", "bench-gpu", "ARGS=--seconds 2"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "loadtest/bench_gpu.py --seconds 2" in dry.stdout
