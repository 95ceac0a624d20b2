"""Scoring on a real Ray cluster of two nodes: the table of a run in one process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fake_triton import fake_triton
from support import QUIET, encoded, picture, run_alexnet

CLUSTER = """
import sys
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
cluster.add_node(num_cpus=2)
cluster.wait_for_nodes()
print(cluster.address, flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@contextmanager
def two_nodes(folder: Path) -> Iterator[str]:
    """The address of a cluster of two nodes on this machine."""
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", "-c", CLUSTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=QUIET | {"RAY_TMPDIR": str(folder), "RAY_USAGE_STATS_ENABLED": "0"},
    )
    assert process.stdout is not None and process.stdin is not None
    try:
        yield process.stdout.readline().strip()
    finally:
        process.communicate(timeout=60)


@pytest.mark.timeout(240)
def test_the_table_of_a_cluster_is_that_of_one_process(tmp_path: Path) -> None:
    photographs = tmp_path / "photographs"
    photographs.mkdir()
    for index in range(30):
        (photographs / f"{index:02}.jpg").write_bytes(encoded(picture(index, 60, 50)))
    (photographs / "07.jpg").write_bytes(b"")
    (photographs / "11.jpg").write_bytes(b"no picture")
    with fake_triton() as server, two_nodes(tmp_path) as cluster:
        arguments = ("score", photographs, "--triton", server.address, "--out")
        alone = run_alexnet(*arguments, tmp_path / "alone.parquet")
        assert alone.returncode == 0, alone.stderr
        together = run_alexnet(*arguments, tmp_path / "together.parquet", "--ray", cluster)
        assert together.returncode == 0, together.stderr
    tables = [(tmp_path / f"{name}.parquet").read_bytes() for name in ("alone", "together")]
    assert tables[0] == tables[1]
    assert "30 rows" in together.stdout and "2 without an answer" in together.stdout


def test_a_cluster_that_is_not_there_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(picture(1, 60, 50)))
    for address in ("127.0.0.1:9", "nonsense"):
        done = run_alexnet("score", tmp_path, "--out", tmp_path / "t.csv", "--ray", address)
        assert done.returncode == 1
        assert f"no Ray cluster at {address}" in done.stderr and done.stderr.count("\n") == 1
