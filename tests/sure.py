"""A network in a file, and an image folder of pictures that it is sure of: they survive rounding."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from export.gate import generated_crops
from model import checkpoint as checkpoints
from model.checkpoint import Checkpoint
from model.evaluate import torch_predictor
from model.net import AlexNet
from serving.contract import CENTRE, Crops
from serving.postprocess import Label
from serving.preprocess import cut_crops


def saved(net: AlexNet, folder: Path) -> tuple[Checkpoint, Path]:
    """FOLDER/net.safetensors, its classes n00000000, n00000001 ..."""
    labels = [Label(f"n{index:08}", f"class {index}") for index in range(net.architecture.classes)]
    checkpoint, path = Checkpoint(net, labels, {"accuracy": {"top1_ten": 0.5}}), folder / "net.safetensors"
    checkpoints.save(path, checkpoint)
    return checkpoint, path


def decided(net: AlexNet, folder: Path, each: int, pictures: int = 40) -> Path:
    """FOLDER/{train,val}/<class>/*.png, `each` of a class in either; returns FOLDER."""
    generated = generated_crops(pictures, seed=3)
    squares = np.pad(generated, ((0, 0), (16, 16), (16, 16), (0, 0)), mode="reflect")
    predict = torch_predictor(net)
    views = np.stack([predict(cut_crops(square, Crops.TEN)) for square in squares])
    said = np.stack([views[:, CENTRE], views.mean(axis=1)])  # [2, squares, classes]
    for target in range(net.architecture.classes):
        lead = said[..., target] - np.delete(said, target, axis=2).max(axis=2)
        surest = np.argsort(-lead.min(axis=0))[: 2 * each]
        for split, chosen in (("train", surest[::2]), ("val", surest[1::2])):
            place = folder / split / f"n{target:08}"
            place.mkdir(parents=True)
            for index in chosen:
                Image.fromarray(squares[index]).save(place / f"{index}.png")
    return folder
