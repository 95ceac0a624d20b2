"""A trained network as the start of another: every layer, and fc8's rows of the classes both know."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch

from model.checkpoint import Checkpoint
from model.net import AlexNet
from serving.postprocess import Label


@torch.no_grad()
def take_over(net: AlexNet, labels: Sequence[Label], source: Checkpoint) -> int:
    """Copy `source` into `net`, whose classes are `labels`; how many of them `source` knew already.

    A class that `source` does not know keeps the fresh row of fc8 that `net` came with.
    """
    state = source.net.state_dict()
    weight, bias = state.pop("fc8.weight"), state.pop("fc8.bias")
    net.load_state_dict(state, strict=False)
    rows = {row: known for row, known in enumerate(rows_of(labels, source.labels)) if known is not None}
    kept, known = list(rows), list(rows.values())
    net.fc8.weight[kept] = weight[known].to(net.fc8.weight.device)
    net.fc8.bias[kept] = bias[known].to(net.fc8.bias.device)
    return len(rows)


def rows_of(labels: Sequence[Label], known: Sequence[Label]) -> list[int | None]:
    """For each label its place in `known`: by WordNet id (or folder name), else by an unambiguous name."""
    by_id = {label.wnid: row for row, label in enumerate(known)}
    names = [_plain(label.name) for label in known]
    once = {name for name, count in Counter(names).items() if count == 1}  # ILSVRC has two cranes
    by_name = {name: row for row, name in enumerate(names) if name in once}
    return [by_id.get(label.wnid, by_name.get(_plain(label.name))) for label in labels]


def _plain(name: str) -> str:
    """`Golf_Ball`, a folder, and `golf ball`, a label, are the same name."""
    return " ".join(name.replace("_", " ").replace("-", " ").casefold().split())
