"""Engines on a card, as functions of tensors that lie there already: nothing is copied from the host.

    torch          the network in eager mode, channels_last; FP16 as the product's graph has it
    onnxruntime    its CUDA provider on the files that `alexnet export` publishes, inputs and outputs bound
    tensorrt       the engine of `alexnet export --precision fp16`
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
import torch
from gpu_card import AbsentError
from gpu_events import Run, Stream
from torch import Tensor, nn

from model.net import AlexNet
from serving.contract import INPUT_NAME, OUTPUT_NAME

Bind = Callable[[Tensor, Tensor], Run]
"""Images uint8 [N, 224, 224, 3] and a place for answers float32 [N, classes] -> one inference."""

CUDA: Final = "CUDAExecutionProvider"


class HalfAlexNet(nn.Module):
    """The network as `export.to_fp16` writes it: FP16 but for normalisation, LRN and softmax.

    LRN's squares overflow FP16 above 255, and silently.
    """

    def __init__(self, net: AlexNet) -> None:
        super().__init__()
        self.net = deepcopy(net)
        for name, layer in list(self.net.named_children()):
            if name.startswith("lrn"):
                self.net.add_module(name, _Wide(layer))
            else:
                layer.half()

    def forward(self, images: Tensor) -> Tensor:
        """uint8 [N, 224, 224, 3] -> float32 [N, classes]."""
        logits = self.net.logits(self.net.normalise(images).half())
        return nn.functional.softmax(logits.float(), dim=1)


class _Wide(nn.Module):
    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x.float()).half()
        return y


def torch_engine(net: AlexNet, precision: str, device: torch.device) -> Bind:
    """Eager, within `gpu_card.arithmetic` of that precision."""
    chosen = HalfAlexNet(net) if precision == "fp16" else deepcopy(net)
    there: nn.Module = chosen.eval().to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    @torch.inference_mode()
    def run(images: Tensor, answers: Tensor) -> None:
        answers.copy_(there(images))

    return lambda images, answers: partial(run, images, answers)


def cuda_provider(stream: Stream, precision: str) -> tuple[str, dict[str, str]]:
    """On torch's stream, so that our events see its work; TF32 is its default for FP32."""
    if not stream.handle:
        raise ValueError("ONNX Runtime takes the stream 0 for none, and would work on one of its own")
    options = {
        "device_id": str(stream.device.index or 0),
        "user_compute_stream": str(stream.handle),
        "use_tf32": "1" if precision == "tf32" else "0",
    }
    return CUDA, options


def need_cuda_provider(runtime: Any = onnxruntime) -> None:
    """Raises AbsentError where the installed ONNX Runtime has none."""
    if CUDA not in runtime.get_available_providers():
        raise AbsentError(
            f"onnxruntime {runtime.__version__} has no {CUDA}: install onnxruntime-gpu in its place"
        )
    runtime.preload_dlls()  # CUDA's and cuDNN's libraries, from torch's packages


def cuda_session(path: Path, stream: Stream, precision: str, runtime: Any = onnxruntime) -> Any:
    """A session with every operator on the card; raises AbsentError where it would be another's."""
    need_cuda_provider(runtime)
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    # Otherwise what the card cannot do, or all of it where its libraries lack, goes to the CPU unsaid.
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    session = runtime.InferenceSession(str(path), options, providers=[cuda_provider(stream, precision)])
    if session.get_providers()[0] != CUDA:
        raise AbsentError(
            f"onnxruntime {runtime.__version__} could not start its {CUDA}: CUDA's or cuDNN's libraries are "
            "not those it is built for"
        )
    return session


def session_engine(session: Any) -> Bind:
    """A session's inferences between bound tensors; they return when queued, as torch's do."""
    options = onnxruntime.RunOptions()
    options.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(images: Tensor, answers: Tensor) -> Run:
        bound = session.io_binding()
        for to, name, tensor, dtype in (
            (bound.bind_input, INPUT_NAME, images, np.uint8),
            (bound.bind_output, OUTPUT_NAME, answers, np.float32),
        ):
            place = (tensor.device.type, tensor.device.index or 0)
            to(name, *place, dtype, tuple(tensor.shape), tensor.data_ptr())
        # The tensors are kept by the closure: the binding knows addresses only.
        return lambda kept=(images, answers): session.run_with_iobinding(bound, options)  # type: ignore[misc]

    return bind


def tensorrt_engine(
    model: Callable[[], Path], largest: int, find: Callable[[], Any] | None = None
) -> Bind:
    """The product's engine of an FP16 ONNX file, for batches up to `largest`; built first, for minutes.

    Tuned for batches of ten, as the published one. Raises AbsentError where TensorRT is missing.
    """
    from export import to_tensorrt  # needs tritonclient's classes

    try:
        trt, gpu = (find or to_tensorrt.find_tensorrt)()
    except to_tensorrt.NoTensorRTError as error:
        raise AbsentError(str(error)) from error
    least, commonest, most = to_tensorrt.PROFILE
    file = model()
    plan = file.with_suffix(".plan")
    batches = (least, commonest, max(most, largest))
    built = to_tensorrt.build_engine(trt, gpu, file, file.with_suffix(".timing"), batches)
    to_tensorrt.write_engine(built, plan)
    engine = to_tensorrt.load_engine(trt, gpu, plan)
    return lambda images, answers: partial(engine.run, images, answers)


@dataclass(frozen=True)
class Files:
    """What `alexnet export` makes of the network, for ONNX Runtime and TensorRT."""

    fp32: Path
    fp16: Path

    @classmethod
    def written(cls, net: AlexNet, folder: Path) -> Files:
        """Full width: some ten seconds."""
        from export.to_fp16 import to_fp16
        from export.to_onnx import to_onnx

        files = cls(folder / "net.onnx", folder / "net.fp16.onnx")
        to_onnx(deepcopy(net), files.fp32)
        to_fp16(deepcopy(net), files.fp16)
        return files
