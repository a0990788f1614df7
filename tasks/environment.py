"""The fingerprint of a row: machine, software and settings as they are now, and a key that only the machine changes."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict
from functools import cache
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from typing import Any

from tasks import host
from tasks.cell import digest
from tasks.gpu import Gpu, GpuFacts
from tasks.metric import Missing
from tasks.nvml import gpus
from tasks.secrets import is_secret_name

REVISION_VARIABLE = "BENCHMATRIX_GIT_REVISION"  # for nodes that get the code without its repository
_PROJECT = Path(__file__).resolve().parents[1]
_VARIABLES = ("CUDA_", "TORCH", "PYTORCH_", "OMP_", "MKL_", "NCCL_")


def fingerprint(gpu: Gpu) -> dict[str, Any]:
    """Environment columns of a row measured on `gpu`, or on the CPU when there is none: value or `Missing`.

    Settings of torch are read from the live process and only if it has imported torch, so a runner can ask too.
    """
    facts = gpu.facts()
    torch = sys.modules.get("torch")
    on_cpu = gpu.unavailable is not None
    cuda = getattr(getattr(torch, "version", None), "cuda", None)
    not_a_gpu = Missing(reason="cpu" if on_cpu else "not_supported")
    affinity = os.sched_getaffinity(0)
    return {
        "device_name": host.cpu_info()["model"] if on_cpu else _or(facts.name, not_a_gpu),
        "device_uuid": _or(facts.uuid, not_a_gpu),
        "driver": _or(facts.driver, not_a_gpu),
        "power_limit_w": _or(gpu.power_limit_w(), not_a_gpu),
        "machine_key": this_machine_key(),
        "hostname": host.static_facts()["hostname"],
        "affinity": host.ranges(affinity),
        "python": platform.python_version(),
        **{name: _or(version(name), Missing(reason="not_installed")) for name in ("torch", "transformers", "ray")},
        "cuda": _or(cuda, Missing(reason="torch_without_cuda" if torch else "torch_not_imported")),
        "threads": torch.get_num_threads() if torch else Missing(reason="torch_not_imported"),
        "git_revision": _or(git_revision(), Missing(reason="no_repository")),
        "environment": json.dumps(_rest(gpu, facts, torch), sort_keys=True, default=str),
    }


def _rest(gpu: Gpu, facts: GpuFacts, torch: Any) -> dict[str, Any]:
    card = None
    if gpu.unavailable is None:
        card = {key: value for key, value in asdict(facts).items() if key not in ("name", "uuid", "driver")}
        card["clocks_locked"] = gpu.clocks_locked()
        card["sm_clock_mhz"], card["memory_clock_mhz"] = gpu.sm_clock_mhz(), gpu.memory_clock_mhz()
        card["memory_used_bytes"] = gpu.memory_used_bytes()
    return {
        "host": {**host.static_facts(), **host.changing_facts()},
        "gpu": card,
        "packages_hash": packages_hash(),
        "variables": public_variables(os.environ),
        "torch": _torch_settings(torch) if torch else None,
    }


def machine_key(*, cpu_model: str, physical_cores: int, memory_bytes: int, gpus: Iterable[GpuFacts]) -> str:
    """Hash of what stays the same after a reboot: CPU model, cores, and the GPUs by UUID, name and memory.

    Memory, rounded to GiB, counts only without a GPU: a UUID says it all, and virtual machines that grow their memory
    on use would change their key in mid-sweep. The host name does not count: containers and DHCP change it, and two
    CPU nodes alike in everything else are one kind of machine; the row has the name. Neither do clocks, load,
    temperature, kernel, driver or affinity.
    """
    cards = sorted([card.uuid or "", card.name or "", str(card.memory_bytes)] for card in gpus)
    return digest(
        {
            "cpu": cpu_model,
            "cores": physical_cores,
            "gpus": cards,
            "memory_gib": None if cards else round(memory_bytes / 2**30),
        }
    )


@cache
def this_machine_key() -> str:
    cpu = host.cpu_info()
    return machine_key(
        cpu_model=cpu["model"],
        physical_cores=cpu["physical_cores"],
        memory_bytes=host.meminfo().get("MemTotal", 0),
        gpus=[gpu.facts() for gpu in gpus()],
    )


@cache
def version(distribution: str) -> str | None:
    """Installed version of a distribution, found without importing it."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@cache
def git_revision() -> str | None:
    """Revision of this project, `+dirty` when changed: from the environment, its repository, or how pip got it."""
    given = os.environ.get(REVISION_VARIABLE)
    if given:
        return given
    if (_PROJECT / ".git").exists():
        # Not another repository around an installed copy, and no lock taken from a user's own git.
        command = ["git", "--no-optional-locks", "-C", str(_PROJECT), "status", "--porcelain=v2", "--branch"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
        except (OSError, subprocess.SubprocessError):
            return None
        lines = done.stdout.splitlines()
        commit = next((line.split()[-1] for line in lines if line.startswith("# branch.oid")), None)
        dirty = any(not line.startswith("#") for line in lines)
        return f"{commit}+dirty" if commit and dirty else commit
    try:
        origin = json.loads(metadata.distribution("benchmatrix").read_text("direct_url.json") or "{}")
    except (metadata.PackageNotFoundError, ValueError):
        return None
    revision: str | None = origin.get("vcs_info", {}).get("commit_id")
    return revision


@cache
def packages_hash() -> str:
    """Hash over names and versions of everything installed on `sys.path`, as `pip freeze` would list it."""
    names: set[str] = set()
    for folder in map(Path, sys.path):
        if folder.is_dir():
            names.update(entry.stem for entry in folder.iterdir() if entry.suffix in (".dist-info", ".egg-info"))
    return digest(sorted(names))


def public_variables(environment: Any) -> dict[str, str]:
    """The variables that change what torch and CUDA do; never one that could hold a secret."""
    chosen: dict[str, str] = {}
    for name, value in sorted(environment.items()):
        secret = is_secret_name(name) or "://" in value
        if name == "TOKENIZERS_PARALLELISM" or (name.startswith(_VARIABLES) and not secret):
            chosen[name] = value
    return chosen


def _torch_settings(torch: Any) -> dict[str, Any]:
    """As read back from the live process; a setting that this torch has not, or refuses to tell, is None."""
    backends = torch.backends
    read: dict[str, Callable[[], Any]] = {
        "build_hash": lambda: _build_hash(torch),
        "cudnn": lambda: backends.cudnn.version(),
        "cudnn_benchmark": lambda: backends.cudnn.benchmark,
        "cudnn_allow_tf32": lambda: backends.cudnn.allow_tf32,
        "matmul_allow_tf32": lambda: backends.cuda.matmul.allow_tf32,
        "matmul_fp32_precision": lambda: backends.cuda.matmul.fp32_precision,
        "matmul_precision": lambda: torch.get_float32_matmul_precision(),
        "bf16_reduced_precision_reduction": lambda: backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        "fp16_reduced_precision_reduction": lambda: backends.cuda.matmul.allow_fp16_reduced_precision_reduction,
        "deterministic": lambda: torch.are_deterministic_algorithms_enabled(),
        "sdpa_flash": lambda: backends.cuda.flash_sdp_enabled(),
        "sdpa_memory_efficient": lambda: backends.cuda.mem_efficient_sdp_enabled(),
        "sdpa_math": lambda: backends.cuda.math_sdp_enabled(),
        "sdpa_cudnn": lambda: backends.cuda.cudnn_sdp_enabled(),
        "default_dtype": lambda: str(torch.get_default_dtype()),
        "interop_threads": lambda: torch.get_num_interop_threads(),
        "allocator": lambda: torch.cuda.memory.get_allocator_backend(),
        "nccl": lambda: ".".join(map(str, torch.cuda.nccl.version())) if torch.version.cuda else None,
    }
    return {name: _attempt(question) for name, question in read.items()}


@cache
def _build_hash(torch: Any) -> str:
    return sha256(torch.__config__.show().encode()).hexdigest()[:16]


def _attempt(question: Callable[[], Any]) -> Any:
    # Mixing the old and new TF32 switches makes some getters raise; no setting is worth a row.
    try:
        return question()
    except Exception:
        return None


def _or(value: Any, missing: Missing) -> Any:
    return missing if value is None else value
