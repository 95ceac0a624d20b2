"""alexnet compress and import: checkpoints made from others."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, Progress

from commands.low_rank import factored
from commands.photographs import decode
from commands.terminal import columns, err, out, progress


def compress(
    checkpoint: Annotated[Path, typer.Argument(help="a full-width checkpoint")],
    data: Annotated[Path, typer.Argument(help="folder with train/<class>/* and val/<class>/*")],
    destination: Annotated[Path, typer.Option("--out", help="the small checkpoint")],
    rank: Annotated[int, typer.Option(min=1, max=4096, help="rank of fc6 and fc7")] = 128,
) -> None:
    """Make fc6 and fc7 low rank, and every weight FP16; the accuracy left is measured and kept."""
    from model import checkpoint as checkpoints
    from model.compress import round_to_half
    from model.evaluate import accuracy, torch_predictor

    full = checkpoints.load(checkpoint)
    factors = factored(full, data, rank)
    small = round_to_half(factors.net)
    validation = decode(data, [label.wnid for label in full.labels])
    with progress("accuracy", 2 * len(validation.targets)) as advance:
        left = accuracy(torch_predictor(small), validation, advance)
    facts = factors.facts | {"accuracy": left}
    import torch

    checkpoints.save(
        destination, checkpoints.Checkpoint(small, full.labels, facts), dtype=torch.float16
    )
    out.print_json(data={f"rank {rank}, FP16": left, "full width": full.facts.get("last_epoch")})


def torchvision(
    file: Annotated[Path | None, typer.Option(help="the published .pth [default: download it]")] = None,
    destination: Annotated[Path, typer.Option("--out", help="the checkpoint")] = Path(
        "runs/torchvision/checkpoint.safetensors"
    ),
) -> None:
    """torchvision's AlexNet: the owt variant, the 1000 classes of ILSVRC 2012."""
    from model.checkpoint import save
    from model.torchvision_weights import download, read_torchvision

    if file is None:
        with Progress(*columns(), DownloadColumn(), console=err, transient=True) as bar:
            task = bar.add_task("download", total=None)
            file = download(
                destination.parent, lambda done, total: bar.update(task, completed=done, total=total or None)
            )
    save(destination, read_torchvision(file))
    out.print(f"{destination}\nnext: alexnet export {destination} --name alexnet_imagenet", highlight=False)
