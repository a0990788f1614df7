"""A Ray cluster of several raylets on this machine for benchmarks: own folder, own ports, every process marked."""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

from orchestrator.guard import MARK, marked

STORE_BYTES = 80 * 2**20
ROOT = Path(__file__).resolve().parents[1]


class Raylets:
    """A head that measures nothing, and nodes with one pretended accelerator each. Other clusters are left alone."""

    def __init__(self) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="bmr", dir="/tmp"))  # a socket's path has at most 107 characters
        os.environ |= {
            MARK: str(self.folder), "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0", "RAY_enable_metrics_collection": "0",
            "RAY_raylet_start_wait_time_s": "120",
            # where Ray notes the address of the cluster that was started last: not beside other clusters, and not in a
            # folder that a machine has only once Ray has run there
            "RAY_TMPDIR": str(self.folder),
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        (self.folder / "ray").mkdir()
        from ray.cluster_utils import Cluster

        self._cluster = Cluster(
            initialize_head=True, head_node_args={**_arguments("cpu", 0), "temp_dir": str(self.folder)}
        )
        self.address: str = self._cluster.address
        self.nodes: list[tuple[str, Any]] = []

    def add(self, tag: str) -> None:
        for attempt in range(5):
            try:
                self.nodes.append((tag, self._cluster.add_node(wait=False, **_arguments(tag, 1))))
                return
            except Exception:  # Ray gives a raylet 30 s to start, which a loaded machine may not keep
                if attempt == 4:
                    raise

    def kill(self, index: int) -> str:
        """SIGKILL for every process of a node, its raylet first; returns its tag."""
        tag, node = self.nodes.pop(index)
        self._cluster.remove_node(node, allow_graceful=False)
        return tag

    def processes(self) -> list[int]:
        """Whatever carries this cluster's mark or holds its files, apart from this process."""
        return marked(self.folder, os.getpid())

    def close(self, patience_s: float = 30.0) -> int:
        """End the cluster; returns how many of its processes are still there after `patience_s`."""
        self._cluster.shutdown()
        deadline = time.monotonic() + patience_s
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.2)
        left = len(self.processes())
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def _arguments(tag: str, accelerators: int) -> dict[str, Any]:
    return {
        "num_cpus": 1, "num_gpus": accelerators, "labels": {"bench/hw": tag}, "object_store_memory": STORE_BYTES,
        "include_dashboard": False,
    }  # fmt: skip
