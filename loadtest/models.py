"""The models under test, full width: the stock export for the peers, FP32 and INT8 for the gateway.

    python loadtest/models.py CHECKPOINT STOCK.onnx REPOSITORY stock fp32 int8 [--data DATA]

`make bench` calls it, once for each checkpoint and DATA. INT8 is calibrated on DATA/train; without
DATA on generated photographs, which is good for its speed alone: what such a version answers is
worth nothing, and so is the speed of `crops=auto`, which asks how sure it is.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "alexnet"
CALIBRATION = 192
VALIDATION = 128
"""Photographs for the parity gate. The accuracy gate is `alexnet export`'s; it takes minutes."""


@dataclass(frozen=True)
class Models:
    """`repository` holds NAME and NAME_int8, `stock` is what peers serve."""

    repository: Path
    stock: Path


def models(
    checkpoint: Path, folder: Path, data: Path | None, repository: Path | None, say: Callable[[str], None]
) -> Models:
    """Those of the checkpoint, made if need be; `repository`: the gateway's are there already.

    In a child process, so that torch's memory is gone before anything is measured.
    """
    key = hashlib.sha256(checkpoint.read_bytes()).hexdigest()[:8]
    on = hashlib.sha256(str(data.resolve()).encode()).hexdigest()[:8] if data else "generated"
    made = Models(repository or folder / f"models-{key}-{on}", folder / f"stock-{key}.onnx")
    lacking = [] if made.stock.exists() else ["stock"]
    if repository is None:
        names = {"fp32": NAME, "int8": f"{NAME}_int8"}
        lacking += [form for form, name in names.items() if not (made.repository / name / "1").exists()]
    if lacking:
        say(f"exporting at full width: {', '.join(lacking)}")
        command = [sys.executable, __file__, str(checkpoint), str(made.stock), str(made.repository), *lacking]
        command += ["--data", str(data)] if data else []
        quiet = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
        if quiet.returncode:
            raise RuntimeError(f"{' '.join(command)} failed:\n{quiet.stderr[-2000:]}")
    return made


def make(checkpoint: Path, stock: Path, repository: Path, lacking: list[str], data: Path | None) -> None:
    """Write what is lacking."""
    sys.path.insert(0, str(ROOT))
    import numpy as np
    from photographs import generated
    from stock import export_stock

    from commands.photographs import crops_of
    from export.forms import int8
    from export.publish import publish
    from model.checkpoint import load
    from model.fold import expand
    from serving.contract import Crops
    from serving.preprocess import prepare

    source = load(checkpoint)
    source.net = expand(source.net)
    if "stock" in lacking:
        part = stock.with_suffix(".part")
        export_stock(source.net, part)
        part.rename(stock)
    if "fp32" in lacking:
        publish(source, checkpoint, repository, NAME)
    if "int8" in lacking:
        if data is None:
            crops = np.concatenate([prepare(file, Crops.CENTER) for file in generated(CALIBRATION // 2)])
            checked = None
        else:
            crops = crops_of(data, "train", source, CALIBRATION)
            checked = crops_of(data, "val", source, VALIDATION)
        used, held_out = np.concatenate([crops[0::3], crops[1::3]]), crops[2::3]
        publish(source, checkpoint, repository, NAME, form=int8(source.net, used, held_out), images=checked)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("stock", type=Path)
    parser.add_argument("repository", type=Path)
    parser.add_argument("lacking", nargs="+", choices=["stock", "fp32", "int8"])
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    make(given.checkpoint, given.stock, given.repository, given.lacking, given.data)


if __name__ == "__main__":
    main()
