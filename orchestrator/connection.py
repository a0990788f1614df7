"""Starts a private Ray instance on this machine, or attaches to a running cluster; silent either way."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import secrets
import socket
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.guard import MARK, Guard

_PREFIX = "bench-ray-"
_LONGEST_BASE = 20
_REACH_S = 5.0
_OBJECT_STORE_BYTES = 128 * 2**20


class ConnectionProblem(RuntimeError):
    """Ray cannot be started or reached; the message is one sentence that says what to do."""


@dataclass(frozen=True, kw_only=True)
class Connection:
    """A live Ray session of this process. `local` means that it is ours alone and ends with us.

    `head` is where the head's control service (GCS) listens, `host:port`.
    """

    local: bool
    address: str
    head: str
    ray_version: str


def check_imports() -> None:
    """Refuse to start when `tasks` or `analysis` would not be the ones beside this package."""
    here = Path(__file__).resolve().parent.parent
    for name in ("tasks", "analysis"):
        spec = importlib.util.find_spec(name)
        origin = Path(spec.origin).resolve().parent.parent if spec and spec.origin else None
        if origin != here:
            raise ConnectionProblem(
                f"the package {name!r} is imported from {origin}, not from {here}: start from another folder "
                "or remove what shadows it"
            )


@contextlib.contextmanager
def connect(address: str | None = None) -> Iterator[Connection]:
    """Attach to `address` (or to RAY_ADDRESS, which a Ray job sets), else start a local instance; always shuts down.

    The local instance and its files are gone when this ends, and also when this process is killed: see `guard`.
    """
    check_imports()
    check_reachable(address)
    address = address or os.environ.get("RAY_ADDRESS") or None
    local = address in (None, "local")
    folder = _private_folder() if local else None
    guard = Guard(folder) if folder else None
    _set_environment(local=local)
    import ray

    common: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False, "include_dashboard": None}
    try:
        if local:
            # num_cpus=1: Ray starts that many idle workers ahead of time; our actors ask for no CPU.
            os.environ[MARK] = str(folder)
            ray.init(
                **{**common, "include_dashboard": False}, address="local", num_cpus=1, _node_ip_address="127.0.0.1",
                object_store_memory=_OBJECT_STORE_BYTES, _temp_dir=str(folder),
            )  # fmt: skip
        else:
            ray.init(**common, address=address)
    except Exception as error:
        if guard:
            guard.close()
        raise ConnectionProblem(_why(address, error)) from error
    finally:
        os.environ.pop(MARK, None)  # Ray's processes have it; what this process starts later shall not
    try:
        head = ray.get_runtime_context().gcs_address
        yield Connection(local=local, address=address or "local", head=head, ray_version=str(ray.__version__))
    finally:
        ray.shutdown()
        if guard:
            guard.close()


def _private_folder() -> Path:
    """Ray's sockets lie 66 characters below it, and a socket's path has at most 107."""
    base = tempfile.gettempdir()
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=base if len(base) <= _LONGEST_BASE else "/tmp"))


def check_reachable(address: str | None) -> None:
    """Raise `ConnectionProblem` where nobody listens; Ray itself tries for two minutes before it says so."""
    address = address or os.environ.get("RAY_ADDRESS") or ""
    host, colon, port = address.rpartition(":")
    if not colon or "/" in host or not port.isdigit():
        return  # `auto`, `ray://...`: Ray's to resolve
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_REACH_S).close()
    except OSError as error:
        raise ConnectionProblem(f"no Ray cluster can be reached at {address}: {error.strerror or error}") from error


def _set_environment(*, local: bool) -> None:
    """What Ray reads before it is imported. Workers and their children inherit it from a local instance."""
    if local:
        # Ray reads the mode when it is imported: where a program has done so before, Ray's own default applies, which
        # is to ask for a token too. Set now, the mode would reach only Ray's other processes, which then refuse ours.
        if "ray" not in sys.modules:
            os.environ.setdefault("RAY_AUTH_MODE", "token")
        # once per process: Ray keeps the first token that it has seen, also for a second instance
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
        os.environ["RAY_worker_niceness"] = "0"  # noqa: SIM112 - Ray spells its settings so
        os.environ["RAY_enable_metrics_collection"] = "0"  # noqa: SIM112
    os.environ.setdefault("RAY_SCHEDULER_EVENTS", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_DEDUP_LOGS", "0")


def _why(address: str | None, error: Exception) -> str:
    text = " ".join(str(error).split())
    if "ersion mismatch" in text:
        return f"Ray or Python here differs from the cluster at {address}, both must be equal: {text[:300]}"
    if address is None:
        return f"Ray cannot start on this machine: {type(error).__name__}: {text[:300]}"
    return (
        f"no Ray cluster can be reached at {address}: {type(error).__name__}: {text[:200]} "
        "(is it running, and is RAY_AUTH_TOKEN the cluster's?)"
    )
