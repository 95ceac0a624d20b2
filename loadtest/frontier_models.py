"""The choices of `frontier.py` as versions: the network at full rank and factored, each in FP32 and INT8.

    python loadtest/frontier_models.py CHECKPOINT DATA FOLDER --ranks 64,128,256

FOLDER becomes a model repository of `full`, `full_int8`, `rank64`, ... What is there already is not made
anew. Nothing is refused for its accuracy here, for that is what is to be shown: `alexnet export` would
refuse to publish some of them.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from frontier import PRECISIONS, name_of, newest

from commands.low_rank import onnx_accuracy
from commands.photographs import crops_of, decode
from commands.terminal import progress
from export.forms import Form, fp32, int8
from export.publish import Validation, publish
from model.checkpoint import Checkpoint, load
from model.compress import low_rank, output_components
from model.fold import PrincipalComponents, expand

CALIBRATION = 384
PARITY = 64


def make(source: Path, data: Path, folder: Path, ranks: Sequence[int | None]) -> None:
    """Write the versions that are lacking."""
    lacking = [
        rank for rank in ranks if not all(newest(folder / name_of(rank, each)) for each in PRECISIONS)
    ]
    if not lacking:
        return
    full = load(source)
    full.net = expand(full.net)
    classes = [label.wnid for label in full.labels]
    checked = decode(data, classes)
    components = _components(full, data) if any(lacking) else {}
    for rank in lacking:
        small = full if rank is None else Checkpoint(
            low_rank(full.net, components, rank), full.labels, {"low_rank": {"rank": rank}}
        )  # fmt: skip
        name, unmeasured = name_of(rank, PRECISIONS[0]), Validation(checked, {})
        validation = replace(unmeasured, reference=onnx_accuracy(small, unmeasured, f"{name}: accuracy"))
        crops = crops_of(data, "train", small, CALIBRATION)
        held_out, used = crops[2::3], np.concatenate([crops[0::3], crops[1::3]])
        for form in (fp32(small.net), int8(small.net, used, held_out)):
            with progress(name_of(rank, form.precision), 2 * len(checked.targets)) as advance:
                publish(
                    small, source, folder, name, form=_unbounded(form), images=held_out[:PARITY],
                    validation=replace(validation, advance=advance),
                )  # fmt: skip


def _components(full: Checkpoint, data: Path) -> dict[str, PrincipalComponents]:
    """Of fc6 and fc7, over all of DATA/train."""
    trained = decode(data, [label.wnid for label in full.labels], "train")
    with progress("principal components", len(trained.targets)) as advance:
        return output_components(full.net, trained, advance)


def _unbounded(form: Form) -> Form:
    """Measured as ever, and published whatever it lost."""
    return replace(form, bounds=replace(form.bounds, accuracy_drop=1.0, top1_agreement=0.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", required=True)
    given = parser.parse_args()
    ranks = [None, *(int(each) for each in given.ranks.split(","))]
    make(given.checkpoint, given.data, given.folder, ranks)


if __name__ == "__main__":
    main()
