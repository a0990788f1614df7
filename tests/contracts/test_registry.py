"""Discovery: a broken file and a name that is taken twice are errors that name the culprit."""

from __future__ import annotations

import sys
import zlib
from pathlib import Path

import pytest

from tasks.optimization import Optimization
from tasks.registry import RegistryError, _classes, metric_classes, optimizations, workloads
from tasks.row import CORE, columns

GOOD = """
from tasks.optimization import Evidence, Optimization
class {cls}(Optimization):
    name = {name!r}
    family = "attention"
    summary = "for the test"
    def evidence(self, technique, session):
        return Evidence(ok=True)
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """An empty package named after the test, importable."""
    folder = tmp_path / f"found_{zlib.crc32(request.node.name.encode())}"
    folder.mkdir()
    (folder / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    return folder


def test_finds_what_is_there_and_skips_private_files(package: Path) -> None:
    (package / "one.py").write_text(GOOD.format(cls="One", name="one"))
    (package / "two.py").write_text(GOOD.format(cls="Two", name="two"))
    (package / "_shared.py").write_text("raise RuntimeError('private files are not discovered')")
    assert sorted(cls.name for cls in _classes(package.name, Optimization)) == ["one", "two"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("import no_such_module_anywhere", "ModuleNotFoundError.*no_such_module_anywhere"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("x = 1", "defines no Optimization"),
    ],
)
def test_broken_file_is_an_error_that_names_it(package: Path, text: str, said: str) -> None:
    (package / "fine.py").write_text(GOOD.format(cls="Fine", name="fine"))
    (package / "culprit.py").write_text(text)
    with pytest.raises(RegistryError, match=rf"{package.name}\.culprit.*{said}"):
        _classes(package.name, Optimization)


def test_abstract_only_is_an_error(package: Path) -> None:
    (package / "half.py").write_text(
        "from tasks.optimization import Optimization\nclass Half(Optimization):\n    name = 'half'\n"
    )
    with pytest.raises(RegistryError, match=r"half defines no Optimization"):
        _classes(package.name, Optimization)


def test_without_a_name_is_an_error(package: Path) -> None:
    (package / "nameless.py").write_text(GOOD.format(cls="Nameless", name="x").replace("    name = 'x'\n", ""))
    with pytest.raises(RegistryError, match=r"nameless\.Nameless has no name"):
        _classes(package.name, Optimization)


def test_name_clash_is_an_error_that_names_both(package: Path) -> None:
    (package / "first.py").write_text(GOOD.format(cls="First", name="taken"))
    (package / "second.py").write_text(GOOD.format(cls="Second", name="taken"))
    with pytest.raises(RegistryError, match=r"second and .*first both define 'taken'"):
        _classes(package.name, Optimization)


def test_imported_classes_are_not_discovered_twice(package: Path) -> None:
    (package / "own.py").write_text(GOOD.format(cls="Own", name="own"))
    (package / "other.py").write_text(f"from {package.name}.own import Own\n" + GOOD.format(cls="Other", name="other"))
    assert len(_classes(package.name, Optimization)) == 2


def test_one_file_per_technique_workload_and_metric() -> None:
    """The module's file is the technique's name: it is found where it is looked for."""
    for name, technique in optimizations().items():
        if type(technique).__module__.startswith("tasks.optimizations."):
            assert type(technique).__module__ == f"tasks.optimizations.{name.replace('-', '_')}"
    for kind, workload in workloads().items():
        assert type(workload).__module__ == f"tasks.workloads.{kind.replace('-', '_')}"
    for name, metric in metric_classes().items():
        assert metric.__module__ == f"tasks.metrics.{name}"


def test_no_column_is_declared_twice() -> None:
    names = [column.name for column in CORE]
    assert len(set(names)) == len(names)
    assert set(names) < set(columns())


def test_listing_needs_no_torch() -> None:
    """`list` and `plan` are quick since discovery loads no framework."""
    import subprocess

    code = (
        "import sys; from tasks.registry import *; from tasks.row import columns; "
        "optimizations(), workloads(), metric_classes(), columns(); "
        "print([name for name in ('torch', 'transformers', 'ray', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "[]"
