"""CPU energy from RAPL: package and DRAM counters in /sys/class/powercap, which wrap and count the whole package."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tasks.metric import Missing

POWERCAP = Path("/sys/class/powercap")


@dataclass(frozen=True, kw_only=True)
class Domain:
    """One counter: `package-0` or `dram@package-0`; it starts again at zero after `range_uj`."""

    name: str
    path: Path
    range_uj: int

    def read_uj(self) -> int:
        return int((self.path / "energy_uj").read_text())


class Rapl:
    """Joules of all packages and their DRAM since `open`, with wraps undone.

    A counter wraps after minutes to an hour (262 kJ is usual): `joules` must be called more often than that.
    """

    def __init__(self, domains: tuple[Domain, ...]) -> None:
        self.domains = domains
        self._last = [domain.read_uj() for domain in domains]
        self._total_uj = [0] * len(domains)

    @classmethod
    def open(cls, root: Path = POWERCAP) -> Rapl | Missing:
        """`rapl_absent` without counters (most virtual machines), `rapl_permission` when only root may read them."""
        try:
            domains = _domains(root)
            return cls(domains) if domains else Missing(reason="rapl_absent")
        except PermissionError:
            return Missing(reason="rapl_permission")
        except (OSError, ValueError):
            return Missing(reason="rapl_absent")

    def joules_by_domain(self) -> dict[str, float]:
        """Joules since `open`, per domain: `package-0`, `dram@package-0`, ...."""
        for index, domain in enumerate(self.domains):
            now = domain.read_uj()
            gained = now - self._last[index]
            self._total_uj[index] += gained if gained >= 0 else gained + domain.range_uj
            self._last[index] = now
        return {domain.name: total / 1e6 for domain, total in zip(self.domains, self._total_uj, strict=True)}

    def joules(self) -> float:
        return sum(self.joules_by_domain().values())


def _domains(root: Path) -> tuple[Domain, ...]:
    """Packages and their DRAM. Core and uncore are inside the package, psys spans it, intel-rapl-mmio repeats it."""
    found: list[Domain] = []
    for package in sorted(root.glob("intel-rapl:*")):
        if package.name.count(":") != 1:
            continue
        name = (package / "name").read_text().strip()
        if not name.startswith("package"):
            continue
        found.append(_domain(package, name))
        for part in sorted(package.glob(f"{package.name}:*")) or sorted(root.glob(f"{package.name}:*")):
            if (part / "name").read_text().strip() == "dram":
                found.append(_domain(part, f"dram@{name}"))
    return tuple(found)


def _domain(path: Path, name: str) -> Domain:
    return Domain(name=name, path=path, range_uj=int((path / "max_energy_range_uj").read_text()))
