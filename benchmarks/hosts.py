"""Hosts of their own on this machine: one network namespace and one raylet each, wired to the head's namespace."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

_STORE_BYTES = 80 * 2**20
_START_S = 60.0
_STARTED = "Ray runtime started"
_FASTER = {  # a host that is cut off is declared dead after some 20 s instead of a minute
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "5000",
    "RAY_health_check_failure_threshold": "4",
}


def allowed() -> bool:
    """Whether this machine lets us make network namespaces."""
    name = f"bm{os.getpid()}-try"
    if os.geteuid() != 0 or _ip("netns", "add", name, check=False) != 0:
        return False
    wired = _ip("link", "add", "v0", "netns", name, "type", "veth", "peer", "name", "v1", "netns", name, check=False)
    _ip("netns", "del", name)
    return wired == 0


def _ip(*arguments: str, check: bool = True) -> int:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return 127
    if check and done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")
    return done.returncode


class Host:
    """One host: its namespace, its wire to the head, and the raylet that runs there."""

    def __init__(self, hosts: Hosts, number: int, tag: str, accelerators: int) -> None:
        self._hosts, self._tag, self._accelerators = hosts, tag, accelerators
        self.space, self._wire = f"{hosts.prefix}-{number}", f"v{number}"
        self.address = f"10.213.{number}.2"
        _ip("netns", "add", self.space)
        _ip("link", "add", self._wire, "netns", hosts.head_space, "type", "veth",
            "peer", "name", "eth0", "netns", self.space)  # fmt: skip
        _ip("-n", hosts.head_space, "addr", "add", f"10.213.{number}.1/30", "dev", self._wire)
        _ip("-n", hosts.head_space, "link", "set", self._wire, "up")
        _ip("-n", self.space, "addr", "add", f"{self.address}/30", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", self.space, "link", "set", device, "up")
        _ip("-n", self.space, "route", "add", "default", "via", f"10.213.{number}.1")

    def start(self) -> None:
        self._hosts.ray_start(
            self.space, f"--address={self._hosts.address}", f"--node-ip-address={self.address}",
            f"--num-gpus={self._accelerators}", f"--labels=bench/hw={self._tag}",
        )  # fmt: skip

    def cut_off(self) -> None:
        """Its network is gone: what it sends is lost, and nobody is told."""
        _ip("-n", self._hosts.head_space, "link", "set", self._wire, "down")

    def come_back(self) -> None:
        _ip("-n", self._hosts.head_space, "link", "set", self._wire, "up")

    def processes(self) -> list[psutil.Process]:
        return in_namespace(self.space)

    def crash(self) -> None:
        """Every process of the host ends at once, as when its power is cut."""
        _kill(self.processes())


class Hosts:
    """A head with its GCS in one namespace, and hosts around it. The driver runs where the head is: see `inside`."""

    def __init__(self) -> None:
        self.prefix = f"bm{os.getpid()}-{secrets.token_hex(2)}"
        self.head_space = f"{self.prefix}-0"
        self.folder = Path(tempfile.mkdtemp(prefix="bmh", dir="/tmp"))
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_worker_niceness": "0",
            "RAY_DISABLE_IMPORT_WARNING": "1", "RAY_USAGE_STATS_ENABLED": "0", "RAY_raylet_start_wait_time_s": "50",
            "PYTHONPATH": str(Path(__file__).resolve().parents[1]), **_FASTER,
        }  # fmt: skip
        self.hosts: list[Host] = []
        self._started: list[subprocess.Popen[bytes]] = []
        self._heads = 0
        _ip("netns", "add", self.head_space)
        _ip("-n", self.head_space, "link", "set", "lo", "up")
        _ip("-n", self.head_space, "addr", "add", "10.213.0.1/32", "dev", "lo")
        self.inside("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward").wait()
        self.address = "10.213.0.1:6399"
        try:
            self.start_head()
        except BaseException:  # also when interrupted: namespaces and what runs in them outlive this process
            self.close()
            raise

    def start_head(self) -> None:
        # Namespaces share their processes: in a lost head's folder, Ray would read that head's address, see raylets
        # of other hosts that wait for it (for 60 s), and refuse to start. Every head has a folder of its own.
        self._heads += 1
        self.ray_start(
            self.head_space, "--head", "--port=6399", "--node-ip-address=10.213.0.1", "--num-gpus=0",
            "--labels=bench/hw=cpu", f"--temp-dir={self.folder / str(self._heads)}", "--include-dashboard=false",
        )  # fmt: skip

    def add(self, tag: str, accelerators: int = 1) -> Host:
        host = Host(self, len(self.hosts) + 1, tag, accelerators)
        self.hosts.append(host)  # so that `close` ends what did not start whole
        host.start()
        return host

    def lose_head(self) -> None:
        """The head's Ray ends at once; a driver on the same host lives on."""
        _end_ray(self.head_space)

    def inside(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command on the head's host."""
        return subprocess.Popen(["ip", "netns", "exec", self.head_space, *command], env=self.environment, **options)

    def ray_start(self, space: str, *options: str) -> None:
        """`ray start` in a namespace; returns when the raylet is up."""
        for last in (False, False, True):
            try:
                self._try_ray_start(space, options)
            except TimeoutError:  # a raylet gives up when its agents need 15 s to start, as on a loaded machine
                _end_ray(space)
                if last:
                    raise
            else:
                return

    def _try_ray_start(self, space: str, options: Sequence[str]) -> None:
        command: Sequence[str] = (
            "ip", "netns", "exec", space, sys.executable, "-m", "ray.scripts.scripts", "start", "--block",
            "--disable-usage-stats", "--num-cpus=1", f"--object-store-memory={_STORE_BYTES}", *options,
        )  # fmt: skip
        path = self.folder / f"{space}.log"
        before = path.read_text().count(_STARTED) if path.exists() else 0
        with path.open("ab") as log:
            process = subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self._started.append(process)
        deadline = time.monotonic() + _START_S
        while path.read_text().count(_STARTED) <= before:
            if time.monotonic() > deadline or process.poll() is not None:
                raise TimeoutError(f"no raylet in {space} within {_START_S:.0f} s: {path.read_text()[-2000:]}")
            time.sleep(0.2)

    def close(self) -> None:
        for space in [host.space for host in self.hosts] + [self.head_space]:
            _kill(in_namespace(space))
            _ip("netns", "del", space, check=False)
        for process in self._started:
            process.wait(30)
        shutil.rmtree(self.folder, ignore_errors=True)


def in_namespace(space: str) -> list[psutil.Process]:
    """The processes that run in a network namespace."""
    done = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True, check=False)
    found = []
    for pid in done.stdout.split():
        try:
            found.append(psutil.Process(int(pid)))
        except psutil.NoSuchProcess:
            continue
    return found


def _end_ray(space: str) -> None:
    parts = ("gcs_server", "raylet/raylet", "ray.scripts.scripts")
    _kill([process for process in in_namespace(space) if any(part in _line(process) for part in parts)])


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def _kill(processes: Sequence[psutil.Process]) -> None:
    """End them all, and return when they hold neither ports nor memory any more."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGKILL)
    _, left = psutil.wait_procs(processes, timeout=60)
    if left:
        raise TimeoutError(f"still there after SIGKILL: {left}")
