"""Result folders into frames: typed, and only the newest valid row of each cell and round."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from analysis.errors import AnalysisError, NoRows
from tasks.row import CORE, Outcome
from tasks.uri import is_uri, local_folder

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Reuse = Literal["exact", "versions", "all"]
Directories = str | Path | Sequence[str | Path]

_DTYPES = {"string": "string", "int": "Int64", "float": "float64", "bool": "boolean", "strings": "object"}
_READ_ATTEMPTS = 3
NOT_PLANNED = "not_planned"


def load(directories: Directories, reuse: Reuse = "exact") -> pd.DataFrame:
    """Rows of one or several result folders, paths or URIs (`s3://`, `gs://`), with a column `result_dir`.

    Integers are Int64, flags boolean, lists are lists (empty when null), other nulls are missing values; every core
    column is there. One row per (result_dir, cell_id, round): the newest. Rows that a changed sweep no longer matches
    are left out by `result_key`; `reuse="versions"` keeps those measured with other library versions, `"all"` keeps
    every key. Where there is a plan, `planned_rounds` says how many rounds each cell should have, `plan_order` where
    in the plan it stands, `rung` where among its group's stacks as the sweep names them, and `baseline_id` is the
    plan's: a row may have been measured under another baseline. Rows of cells that the plan no longer has are left out
    too unless `reuse` says otherwise; `frame.attrs["not_planned"]` is their number.

    Raises:
        NoRows: a folder holds no rows, or none of the plan's.
        AnalysisError: a folder is missing, or a part cannot be read.
        UriError: an object store cannot be reached.
    """
    import pandas as pd

    frames = [_load_one(name, folder, reuse) for name, folder in _folders(directories).items()]
    frame = pd.concat(frames, ignore_index=True) if len(frames) > 1 else frames[0]
    frame.attrs = {NOT_PLANNED: sum(part.attrs[NOT_PLANNED] for part in frames)}
    return frame


def load_samples(directory: str | Path) -> pd.DataFrame:
    """Raw samples of a result folder: one line per cell, round, pass and label, series as arrays of milliseconds.

    Empty when none were kept.
    """
    import pandas as pd

    folder = local_folder(directory, "samples") / "samples"
    if not folder.is_dir() or not _parts(folder):
        names = ("cell_id", "round", "result_key", "measured_in", "label", "values_ms", "ended_s")
        return pd.DataFrame({name: pd.Series(dtype="object") for name in names})
    frame = _typed(_read(folder))
    return frame.drop_duplicates(["cell_id", "round", "result_key", "measured_in", "label"], keep="last")


def load_plan(directory: str | Path) -> pd.DataFrame | None:
    """The cells that were planned, None where the folder has no plan."""
    path = local_folder(directory, "plan.parquet") / "plan.parquet"
    if not path.is_file():
        return None
    try:
        return _typed(_read_part(path))
    except OSError as error:
        raise _unreadable(path, error) from error


def _folders(directories: Directories) -> dict[str, Path]:
    """Each folder's name as it was given, and where it can be read."""
    given = [directories] if isinstance(directories, str | Path) else directories
    folders = {str(item): local_folder(item, "rows") for item in given}
    if not folders:
        raise AnalysisError("no result folder was given")
    for name, folder in folders.items():
        if is_uri(name):
            if not _parts(folder / "rows"):
                raise NoRows(f"{name} holds no results: there is no Parquet file in its rows (has a run begun?)")
            continue
        if not folder.is_dir():
            raise AnalysisError(f"{folder} is not a folder; give the --out folder of a run, such as results/quickstart")
        if not (folder / "rows").is_dir() or not _parts(folder / "rows"):
            raise NoRows(f"{folder} holds no results: {folder / 'rows'} has no Parquet file (has a run begun?)")
    return folders


def _load_one(name: str, folder: Path, reuse: Reuse) -> pd.DataFrame:
    import pandas as pd

    frame = _typed(_read(folder / "rows"))
    if frame.empty:
        raise NoRows(f"{name} holds no results: the Parquet files of its rows are empty")
    plan = load_plan(name)
    frame, not_planned = _as_planned(_complete(frame), plan, reuse)
    if frame.empty:
        raise NoRows(f"{name} holds no row of its plan: {not_planned} rows are of cells that the sweep had before")
    order = ["started_at", "attempt"]
    frame = frame.sort_values(order, kind="stable", na_position="first")
    frame = frame.drop_duplicates(["cell_id", "round", "result_key"], keep="last")
    frame = _without_stale(frame, plan, reuse)
    frame = frame.drop_duplicates(["cell_id", "round"], keep="last")
    frame = frame.sort_values("started_at", kind="stable").reset_index(drop=True)
    added = pd.DataFrame({"result_dir": pd.Series(name, index=frame.index, dtype="string")})
    if plan is not None and "rounds" in plan:
        rounds = plan.drop_duplicates("cell_id").set_index("cell_id")["rounds"]
        added["planned_rounds"] = frame["cell_id"].map(rounds).astype("Int64")
        positions = {cell_id: position for position, cell_id in enumerate(rounds.index)}
        added["plan_order"] = frame["cell_id"].map(positions).astype("Int64")
        if "rung" in plan:  # older ones have none
            rungs = plan.drop_duplicates("cell_id").set_index("cell_id")["rung"]
            added["rung"] = frame["cell_id"].map(rungs).astype("Int64")
    frame = pd.concat([frame, added], axis=1)  # at once: pandas warns of single insertions into a wide frame
    frame.attrs = {NOT_PLANNED: not_planned}
    return frame


def _parts(folder: Path) -> list[Path]:
    return sorted(path for path in folder.glob("*.parquet") if not path.name.startswith((".", "_")))


def _read(folder: Path) -> pa.Table:
    """All parts as one table. A run may replace parts by a compacted one meanwhile: then list them again."""
    import pyarrow as pa

    for attempt in range(_READ_ATTEMPTS):
        path = folder
        try:
            tables = []
            for path in _parts(folder):
                tables.append(_read_part(path))
            path = folder
            return pa.concat_tables(tables, promote_options="permissive")
        except FileNotFoundError:
            if attempt + 1 == _READ_ATTEMPTS:
                raise AnalysisError(f"{path} vanished while it was read; is the folder being moved?") from None
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error
    raise AssertionError("unreachable")


def _read_part(path: Path) -> pa.Table:
    """One Parquet file; a flipped byte raises instead of becoming a number."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(path, partitioning=None, page_checksum_verification=True)
        table.validate(full=True)  # text that is none: a file without checksums, or a damaged footer
        return table
    except (pa.ArrowException, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: Exception) -> AnalysisError:
    return AnalysisError(f"{path} cannot be read as Parquet: {error}")


def _typed(table: pa.Table) -> pd.DataFrame:
    import pandas as pd
    import pyarrow as pa

    data: dict[str, Any] = {}
    for name, column in zip(table.column_names, table.columns, strict=True):
        kind = column.type
        if pa.types.is_list(kind) or pa.types.is_large_list(kind):
            text = pa.types.is_string(kind.value_type) or pa.types.is_null(kind.value_type)
            values = column.to_pylist() if text else list(column.to_pandas())
            data[name] = pd.Series([[] if value is None else value for value in values], dtype="object")
        elif pa.types.is_integer(kind):
            data[name] = column.to_pandas(types_mapper=lambda _: pd.Int64Dtype())
        elif pa.types.is_boolean(kind):
            data[name] = column.to_pandas(types_mapper=lambda _: pd.BooleanDtype())
        elif pa.types.is_floating(kind) or pa.types.is_null(kind):
            data[name] = column.to_pandas().astype("float64")
        else:
            data[name] = column.to_pandas().astype("string")
    return pd.DataFrame(data)


def _complete(frame: pd.DataFrame) -> pd.DataFrame:
    """With every core column, in its declared type: parts of an older version may lack some."""
    import pandas as pd

    added: dict[str, Any] = {}
    for column in CORE:
        dtype = _DTYPES[column.type]
        if column.name in frame and frame[column.name].dtype == dtype:
            continue
        if column.type == "strings":
            added[column.name] = pd.Series([[] for _ in range(len(frame))], index=frame.index, dtype="object")
        elif column.name in frame:
            added[column.name] = frame[column.name].astype(dtype)  # type: ignore[call-overload]
        else:
            added[column.name] = pd.Series(pd.NA if dtype != "float64" else float("nan"), frame.index, dtype=dtype)
    rest = frame.drop(columns=[name for name in added if name in frame])
    return pd.concat([rest, pd.DataFrame(added, index=frame.index)], axis=1)


def _as_planned(frame: pd.DataFrame, plan: pd.DataFrame | None, reuse: Reuse) -> tuple[pd.DataFrame, int]:
    """Rows with the baseline that the plan compares them with, and how many were left out: their cell is not in it."""
    if plan is None or "baseline_id" not in plan:
        return frame, 0
    baselines = plan.drop_duplicates("cell_id").set_index("cell_id")["baseline_id"]
    known = frame["cell_id"].isin(baselines.index)
    if reuse == "exact":
        frame = frame[known]
    planned = frame["cell_id"].map(baselines).astype("string").fillna(frame["baseline_id"])
    return frame.assign(baseline_id=planned), int((~known).sum()) if reuse == "exact" else 0


def _without_stale(frame: pd.DataFrame, plan: pd.DataFrame | None, reuse: Reuse) -> pd.DataFrame:
    """Rows that belong to one generation of each cell; `frame` is sorted from old to new.

    The reference is the plan's key where a row has it, else the newest row's. A row fits when it has the same key, or
    comes from another machine with the same profile and versions (a key is `<identity>-<versions>`, the machine part of
    the identity). A row without a key was never run: it is kept unless the cell has a row that was.
    """
    if reuse == "all":
        return frame
    planned: dict[str, str] = {}
    if plan is not None and "result_key" in plan:
        planned = dict(zip(plan["cell_id"].tolist(), plan["result_key"].fillna("").tolist(), strict=True))
    by_cell: dict[str, list[_Identity]] = {}
    columns = ("cell_id", "result_key", "machine_key", "profile", "outcome")
    for position, (cell_id, *rest) in enumerate(
        zip(*(frame[name].fillna("").tolist() for name in columns), strict=True)
    ):
        by_cell.setdefault(cell_id, []).append(_Identity(position, *rest))
    keep = []
    for cell_id, rows in by_cell.items():
        ran = [row for row in rows if row.key and row.outcome != Outcome.UNPLACED]
        newest = next((row for row in reversed(ran) if row.key == planned.get(cell_id)), ran[-1] if ran else rows[-1])
        keep += [row.position for row in ran if row.fits(newest, reuse)] if ran else [newest.position]
    return frame.iloc[sorted(keep)]


class _Identity(NamedTuple):
    """What decides whether a row belongs with another of its cell."""

    position: int
    key: str
    machine: str
    profile: str
    outcome: str

    def fits(self, newest: _Identity, reuse: Reuse) -> bool:
        identity, _, versions = self.key.partition("-")
        wanted_identity, _, wanted_versions = newest.key.partition("-")
        if reuse == "exact" and versions != wanted_versions:
            return False
        elsewhere = self.machine != newest.machine and self.profile == newest.profile
        return identity == wanted_identity or elsewhere
