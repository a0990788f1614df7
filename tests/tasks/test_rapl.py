from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.metric import Missing
from tasks.rapl import Domain, Rapl

RANGE = 262_143_328_850


def write(root: Path, where: str, name: str, energy_uj: int, range_uj: int = RANGE) -> Path:
    folder = root / where
    folder.mkdir(parents=True, exist_ok=True)
    for file, value in {"name": name, "energy_uj": energy_uj, "max_energy_range_uj": range_uj}.items():
        (folder / file).write_text(f"{value}\n")
    return folder


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for socket in (0, 1):
        write(tmp_path, f"intel-rapl:{socket}", f"package-{socket}", 1000)
        write(tmp_path, f"intel-rapl:{socket}/intel-rapl:{socket}:0", "core", 1000)
        write(tmp_path, f"intel-rapl:{socket}/intel-rapl:{socket}:1", "dram", 1000)
    write(tmp_path, "intel-rapl:2", "psys", 1000)
    write(tmp_path, "intel-rapl-mmio:0", "package-0", 1000)
    return tmp_path


def opened(root: Path) -> Rapl:
    rapl = Rapl.open(root)
    assert isinstance(rapl, Rapl), rapl
    return rapl


def test_packages_and_their_dram_are_summed_once(tree: Path) -> None:
    rapl = opened(tree)
    write(tree, "intel-rapl:0", "package-0", 5_001_000)
    write(tree, "intel-rapl:1/intel-rapl:1:1", "dram", 2_001_000)
    write(tree, "intel-rapl:0/intel-rapl:0:0", "core", 9_001_000)  # inside the package
    write(tree, "intel-rapl:2", "psys", 9_001_000)
    assert rapl.joules_by_domain() == {"package-0": 5.0, "dram@package-0": 0.0, "package-1": 0.0, "dram@package-1": 2.0}
    assert rapl.joules() == 7.0


def test_a_wrap_is_undone(tree: Path) -> None:
    write(tree, "intel-rapl:0", "package-0", RANGE - 1_000_000)
    rapl = opened(tree)
    write(tree, "intel-rapl:0", "package-0", 2_000_000)
    assert rapl.joules() == 3.0
    write(tree, "intel-rapl:0", "package-0", 3_000_000)
    assert rapl.joules() == 4.0


class Counter(Domain):
    """A counter in memory."""

    value = 0

    def read_uj(self) -> int:
        return Counter.value % self.range_uj


@given(st.lists(st.integers(0, 999_999), max_size=30), st.integers(0, 10**7))
def test_any_number_of_wraps_is_undone(gains: list[int], start: int) -> None:
    Counter.value = start
    rapl = Rapl((Counter(name="package-0", path=Path(), range_uj=1_000_000),))
    for gain in gains:
        Counter.value += gain
        rapl.joules()
    assert rapl.joules() == pytest.approx(sum(gains) / 1e6)


def test_absent_counters_have_a_reason(tmp_path: Path) -> None:
    assert Rapl.open(tmp_path / "none") == Missing(reason="rapl_absent")
    write(tmp_path, "intel-rapl:0", "psys", 0)
    assert Rapl.open(tmp_path) == Missing(reason="rapl_absent")
    (write(tmp_path, "intel-rapl:1", "package-1", 0) / "energy_uj").unlink()
    assert Rapl.open(tmp_path) == Missing(reason="rapl_absent")


def test_counters_of_root_have_a_reason(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = Path.read_text

    def guarded(self: Path, *arguments: str) -> str:
        if self.name == "energy_uj":
            raise PermissionError(self)
        return read(self, *arguments)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert Rapl.open(tree) == Missing(reason="rapl_permission")
