"""What the machines can do: the live nodes, this machine's report, and the catalogue of what can be measured."""

from __future__ import annotations

import json
import os
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tasks.cell import NO_MODEL, Cell, ModelSpec, Stack, Technique, WorkloadPoint
from tasks.device import DeviceInfo
from tasks.flags import FLAGS
from tasks.models.architectures import ARCHITECTURES
from tasks.probe import NodeReport, probe
from tasks.quality_tasks import INSTALL, PACKAGE
from tasks.registry import metric_classes, optimizations, workloads

GIB = 2**30


def local_report() -> NodeReport:
    """What this machine is, without Ray."""
    return probe()


def print_nodes(address: str | None, *, as_json: bool) -> None:
    """The nodes of a cluster, or this machine; nodes that are left out are named with the reason."""
    reports, messages, left_out = [("local", local_report())], list[str](), dict[str, str]()
    if address is not None:
        reports, messages, left_out = _cluster(address)
    if as_json:
        found: list[dict[str, Any]] = [{"node": name, **report.to_dict()} for name, report in reports]
        found += [
            {"node": name, "left_out": text, "devices": [], "disagreements": [text]} for name, text in left_out.items()
        ]
        print(json.dumps(found))
        return
    from rich.table import Table

    from orchestrator.quiet import console_for

    console = console_for(sys.stdout)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("node", "tag", "device", "memory", "free", "driver", "python", "ray", "torch"):
        table.add_column(heading, overflow="fold")
    for name, report in reports:
        versions = report.python, report.packages.get("ray", "-"), report.packages.get("torch", "-")
        for device, free in zip(report.devices, report.free_bytes, strict=True):
            simulated = " (simulated)" if device.simulated else ""
            table.add_row(
                f"{report.hostname} {name}", device.tag, f"{device.name}{simulated}", _gib(device.memory_bytes),
                _gib(free), device.driver or "-", *versions,
            )  # fmt: skip
    console.print(table)
    for message in messages or [text for _, report in reports for text in report.disagreements]:
        print(message)


def _cluster(address: str) -> tuple[list[tuple[str, NodeReport]], list[str], dict[str, str]]:
    """Reports by short node id, messages for the person, and the nodes that are left out."""
    from orchestrator.connection import connect
    from orchestrator.inventory import Inventory
    from orchestrator.quiet import quiet

    with quiet(Path(os.devnull)), connect(address):
        inventory = Inventory()
        messages = inventory.settle().messages
        reports = [(node.short_id, node.report) for node in inventory.nodes.values()]
        return reports, messages, {node_id[:6]: text for node_id, text in inventory.left_out.items()}


def print_catalogue() -> None:
    """Everything discovered, with what it needs, and what rows may say."""
    from rich.markup import escape
    from rich.table import Table

    from orchestrator.quiet import console_for
    from orchestrator.sweep import shipped

    console = console_for(sys.stdout)

    def section(title: str, headings: Iterable[str], rows: Iterable[Iterable[str]]) -> None:
        table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
        for heading in headings:
            table.add_column(heading, overflow="fold")
        for row in rows:
            table.add_row(*map(escape, row))
        console.print(table)
        console.print()

    section(
        "optimizations", ("name", "family", "options", "needs", "what it does"),
        [(item.name, item.family, _options(item.options), _needs(item), item.summary)
         for item in optimizations().values()],
    )  # fmt: skip
    section(
        "workloads", ("kind", "axes", "what is timed"),
        [(item.kind, _options(item.axes), item.summary) for item in workloads().values()],
    )  # fmt: skip
    section(
        "metrics", ("name", "columns"),
        [(name, ", ".join(column.name for column in cls.columns)) for name, cls in metric_classes().items()],
    )  # fmt: skip
    section(
        "models", ("name", "kind", "weights"),
        [("pocket", "language", "trained, shipped with the project"),
         *((f"random:{name}", item.kind, f"random, {item.dtype}") for name, item in ARCHITECTURES.items())],
    )  # fmt: skip
    section("flags", ("name", "what a row with it had"), FLAGS.items())
    section("shipped sweeps", ("name", "file"), [(name, str(path)) for name, path in shipped().items()])


def print_doctor() -> int:
    """Ceilings of every device here, then each technique with the reason why not; exit status 1 if a device fails."""
    status = 0
    for device in local_report().devices:
        print(f"{device.tag}: {device.name}, {_gib(device.memory_bytes)}")
        facts = _facts(device)
        if "error" in facts:
            print(f"  cannot measure here: {facts['error']}")
            status = 1
        for name, value in facts.get("ceilings", {}).items():
            print(f"  {_rate(name, value)}")
        if facts.get("idle_power_w") is not None:
            print(f"  idle_power_w {facts['idle_power_w']:.1f}")
        for name in optimizations():
            reason = why_not(name, device)
            print(f"  {'yes' if reason is None else 'no ':<3} {name}{'' if reason is None else f': {reason}'}")
        lacking = "" if PACKAGE in device.packages else f": needs {PACKAGE}: {INSTALL}"
        print(f"  {'no ' if lacking else 'yes'} quality.tasks (lm-evaluation-harness){lacking}")
    return status


def _facts(device: DeviceInfo) -> dict[str, Any]:
    from tasks.supervisor import Supervisor

    with tempfile.TemporaryDirectory(prefix="benchmatrix-doctor-") as folder:
        work = Path(folder)
        cpus = tuple(sorted(os.sched_getaffinity(0)))
        supervisor = Supervisor(device, cpus=cpus, log_path=work / "doctor.log", work_dir=work)
        try:
            supervisor.start()
            return supervisor.facts()
        except RuntimeError as error:
            return {"error": str(error)}
        finally:
            supervisor.close()


def why_not(name: str, device: DeviceInfo) -> str | None:
    """Why this technique works with no workload at all on `device`; None when it works with one."""
    technique, reason = optimizations()[name], None
    for workload in workloads().values():
        model = ModelSpec(id="any", source="random") if workload.needs_model else NO_MODEL
        point = WorkloadPoint(kind=workload.kind, parameters=tuple(sorted(workload.axes.items())))
        stack = Stack(techniques=(Technique(name=name),))
        found = technique.unsupported(Cell(model=model, workload=point, stack=stack, hardware=device.tag), device)
        if found is None:
            return None
        applies = not technique.needs.workloads or workload.kind in technique.needs.workloads
        reason = found if applies or reason is None else reason
    return reason


def _gib(value: int | None) -> str:
    return "-" if value is None else f"{value / GIB:.1f} GiB"


def _options(options: dict[str, Any]) -> str:
    return ", ".join(
        f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in options.items()
    )


def _rate(name: str, value: float) -> str:
    """A ceiling for people."""
    if name.endswith("_flop_per_s"):
        return f"{name.removesuffix('_flop_per_s')} products: {value / 1e12:.4g} TFLOP/s"
    return f"{name.removesuffix('_bytes_per_s')} bandwidth: {value / 1e9:.4g} GB/s"


def _needs(technique: Any) -> str:
    needs = technique.needs
    parts = [*needs.devices, *needs.packages, *needs.workloads]
    if needs.compute_capability:
        on_cuda = "" if needs.devices == ("cuda",) else " on cuda"
        parts.append(f"compute capability {needs.compute_capability[0]}.{needs.compute_capability[1]}{on_cuda}")
    return ", ".join(parts) or "-"
