"""Where time goes: the engine's by layer, the gateway's by thread and place."""

from __future__ import annotations

import os
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from profile_engine import layers, parts, profiled, rows
from profile_gateway import DECODERS, ENGINE, LOOP, by_place, spent
from torch.utils.flop_counter import FlopCounterMode

from model.checkpoint import load

ROOT = Path(__file__).parent.parent
VERSION = ROOT / "model_repository" / "alexnet" / "1"


def test_the_engine_s_operations_are_the_network_s_and_lrn_s() -> None:
    _, events = profiled(VERSION / "model.onnx", runs=2)
    found = parts(events, layers(VERSION / "model.onnx"))
    net = load(ROOT / "checkpoints" / "imagenette.safetensors").net
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        net(torch.zeros(10, 224, 224, 3, dtype=torch.uint8))
    counted = {name.partition(".")[2]: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    named = [name for name in found if name.startswith(("conv", "fc"))]
    convolutions = [f"conv{number}" for number in range(1, 6)]
    assert sorted(named) == [*convolutions, "fc6.0", "fc6.1 fc7.1", "fc7.0", "fc8"]
    for name in named:
        alike = name.split()
        assert found[name].flop == 2 * sum(counted[each] for each in alike), name  # two runs
        assert found[name].calls == 2 * len(alike) and found[name].ms > 0
    assert found["lrn1"].flop == 2 * 2 * 10 * 55 * 55 * 96 * 96


def test_a_square_needs_fewer_operations_in_its_first_layers_alone() -> None:
    known = layers(VERSION / "model.onnx")
    ten, square = (
        parts(profiled(VERSION / name, runs=1)[1], known) for name in ("model.onnx", "square.onnx")
    )
    assert "If" not in square
    for name, part in ten.items():
        if name in ("conv1", "conv2", "lrn1", "lrn2"):
            assert square[name].flop < part.flop, name
        elif part.flop:
            assert square[name].flop == part.flop, name


def test_the_rows_add_up_to_the_whole() -> None:
    found = parts(profiled(VERSION / "model.onnx", runs=1)[1], layers(VERSION / "model.onnx"))
    _, *body, whole = rows(found, runs=1)
    assert sum(float(row[2]) for row in body) == pytest.approx(float(whole[2]), abs=0.01 * len(body))
    assert sum(float(row[3]) for row in body) == pytest.approx(100, abs=0.1 * len(body))


def test_samples_are_counted_by_the_kind_of_thread_and_the_innermost_file() -> None:
    lines = [
        "thread (17): MainThread;main (alexnet.py:41);run (runners.py:190);select (selectors.py:468) 30",
        "thread (18): infer_0;run (threading.py:982);run (onnxruntime/capi/session.py:303) 100",
        "thread (19): infer_1;run (threading.py:982);run (/a/b/onnxruntime/capi/session.py:287) 20",
        "thread (20): decode_3;_worker (concurrent/futures/thread.py:83) 5",
    ]
    assert by_place(lines) == {
        ("MainThread", "selectors.py"): 30,
        ("infer", "capi/session.py"): 120,
        ("decode", "futures/thread.py"): 5,
    }


def test_the_main_thread_s_work_is_told_from_the_others() -> None:
    def work(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    def more(since: Counter[str], name: str) -> float:
        return spent(os.getpid())[name] - since[name]

    before = spent(os.getpid())
    other = threading.Thread(target=work, args=(0.3,))
    other.start()
    other.join()
    assert more(before, ENGINE) == 0 or more(before, LOOP) < 0.2  # an ended thread's time is gone
    before = spent(os.getpid())
    work(0.3)
    assert more(before, LOOP) >= 0.25
    assert more(before, DECODERS) == 0
