"""Rows of a data set, by place: JSON lines, a JSON list, parquet, or a saved Hugging Face data set.

A row is decoded when it is asked for. Of JSON lines only the places of the lines are held, and lines are read from
disk; saved Hugging Face data sets are mapped into memory; parquet is held as Arrow columns; a JSON list is held whole.
So a shuffled epoch over JSON lines or a saved data set needs 8 bytes a row, whatever its size.
"""

import json
import os
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from megatron_sdpo.config import ConfigError

if TYPE_CHECKING:
    import pyarrow

SUFFIXES = (".json", ".jsonl", ".parquet")


class RowError(ValueError):
    """A row cannot be used; the message says why, whoever catches it says where."""


class Rows(Protocol):
    """Rows of one source. ``rows[3]`` decodes the fourth (RowError when it is damaged), ``rows.where(3)`` names it."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: int) -> dict[str, Any]: ...

    def where(self, place: int) -> str: ...


class JsonLines:
    """One JSON object a line. Safe to read from several threads."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("rb")  # kept open: what was counted is what is read, also when the path is replaced
        self._starts = array("Q", [0])
        for line in self._file:
            self._starts.append(self._starts[-1] + len(line))

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, place: int) -> dict[str, Any]:
        start, end = self._starts[place], self._starts[place + 1]
        line = os.pread(self._file.fileno(), end - start, start)
        if not line.strip():
            raise RowError("the line is empty; write one JSON object a line")
        try:
            row = msgspec.json.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise RowError(f"not JSON: {error}") from error
        return as_object(row)

    def where(self, place: int) -> str:
        return f"{self._path}, line {place + 1}"


class JsonList:
    """One JSON list of objects."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            rows = msgspec.json.decode(path.read_bytes())
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            raise ConfigError(f"{path} begins as a JSON list and is none: {error}") from error
        assert isinstance(rows, list)
        self._rows: list[Any] = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return as_object(self._rows[place])

    def where(self, place: int) -> str:
        return f"{self._path}, item {place + 1}"


class ArrowRows:
    """Parquet files, or the ``*.arrow`` files of a saved Hugging Face data set, one after the other."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self._tables = [_table(path) for path in paths]
        self._ends = array("Q")
        for table in self._tables:
            self._ends.append((self._ends[-1] if self._ends else 0) + table.num_rows)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, place: int) -> dict[str, Any]:
        file, row = self._place(place)
        return self._tables[file].slice(row, 1).to_pylist()[0]

    def where(self, place: int) -> str:
        file, row = self._place(place)
        return f"{self._paths[file]}, row {row + 1}"

    def _place(self, place: int) -> tuple[int, int]:
        file = next(i for i, end in enumerate(self._ends) if place < end)
        return file, place - (self._ends[file - 1] if file else 0)


def as_object(row: Any) -> dict[str, Any]:
    """The row itself, when it is a JSON object."""
    if not isinstance(row, dict):
        raise RowError(f"not an object but {json.dumps(row)[:80]}")
    return row


def find_rows(folder: Path, split: str) -> Rows | None:
    """The rows of a split: ``train.json``, ``train.jsonl``, ``train.parquet``, ``train-*.parquet`` (also in ``data/``)
    or a folder ``train/`` of arrow or parquet files. None when there are none; ConfigError when there are several.
    """
    if not folder.is_dir():
        raise ConfigError(f"the data folder {folder} does not exist; set task.options.data to one with {split}.json")
    found: list[Sequence[Path]] = [[p] for p in (folder / f"{split}{s}" for s in SUFFIXES) if p.is_file()]
    parts = (
        sorted(folder.glob(f"{split}-*.parquet")),
        sorted((folder / "data").glob(f"{split}-*.parquet")),
        sorted((folder / split).glob("*.arrow")),
        sorted((folder / split).glob("*.parquet")),
    )
    found += [paths for paths in parts if paths]
    if len(found) > 1:
        raise ConfigError(f"{folder} has {found[0][0].name} and {found[1][0].name} for {split}; remove one of them")
    return read_rows(found[0]) if found else None


def read_rows(paths: Sequence[Path]) -> Rows:
    """The rows of a file, or of several files of one kind that follow one another."""
    if paths[0].suffix in (".parquet", ".arrow"):
        return ArrowRows(paths)
    path = paths[0]
    try:
        with path.open("rb") as file:
            begin = next((line.lstrip()[:1] for line in file if line.strip()), b"")
        return JsonList(path) if begin == b"[" and _is_list(path) else JsonLines(path)
    except OSError as error:
        raise ConfigError(f"cannot read the data file {path}: {error.strerror}") from error


def _is_list(path: Path) -> bool:
    """A list over the whole file; lines that each hold a list are (bad) JSON lines."""
    with path.open("rb") as file:
        file.seek(0, os.SEEK_END)
        file.seek(max(0, file.tell() - 64))
        ends = file.read().rstrip().endswith(b"]")
    return ends and path.suffix == ".json"


def _table(path: Path) -> "pyarrow.Table":
    try:
        import pyarrow  # not needed for JSON
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError(
            f"reading {path} needs pyarrow, which is not installed; install megatron-sdpo[tasks], or give JSON lines"
        ) from error
    try:
        if path.suffix == ".parquet":
            return pyarrow.parquet.read_table(path)
        return _mapped(path)
    except (pyarrow.ArrowException, OSError) as error:
        words = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ConfigError(f"{path} cannot be read as a table: {words}") from error


def _mapped(path: Path) -> "pyarrow.Table":
    """An arrow file without a copy of its data; the ``datasets`` library writes streams, other writers files."""
    import pyarrow
    import pyarrow.ipc

    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source).read_all()
    except pyarrow.ArrowInvalid:
        source.seek(0)
        return pyarrow.ipc.open_file(source).read_all()
