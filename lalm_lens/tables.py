"""Tidy tables that are saved whole and know their columns."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, TypeVar

import pandas as pd
import pyarrow as pa
from pyarrow import ArrowInvalid, parquet

from lalm_lens.errors import DataError

T = TypeVar("T", bound="Table")


@dataclass(frozen=True, repr=False)
class Table:
    """A result as a table; its columns and their types are `COLUMNS`."""

    COLUMNS: ClassVar[dict[str, str]]
    BY_CLIP: ClassVar[bool] = False  # whether the rows of a clip are the same whichever other clips there are
    NAME: ClassVar[str]  # as in "is not a causal trace"
    HEADLINE: ClassVar[tuple[str, str] | None] = None  # what models are compared by: a number of an overview, in words

    frame: pd.DataFrame

    @classmethod
    def concat(cls: type[T], frames: Sequence[pd.DataFrame]) -> T:
        """Of its parts, which may lack columns that are empty. Raises `DataError` for none."""
        if not frames:
            raise DataError("There is nothing to trace: give at least one sample.")
        columns = list(cls.COLUMNS)
        return cls(pd.concat(frames, ignore_index=True).reindex(columns=columns).astype(cls.COLUMNS))

    def refuse_mixed(self, settings: Sequence[str], by: Sequence[str] = ()) -> None:
        """Raise `DataError` unless settings that are not in `by` are the same in all rows: else there is no mean."""
        for name in settings:
            values = [str(value) for value in self.frame[name].unique()]
            if name not in by and len(values) > 1:
                raise DataError(f"The table has more than one {name}: {'; '.join(values)}. Choose one, or group by it.")

    def overview(self) -> pd.DataFrame:
        """What a page says of a table of one model, attribute and prompt, in a few rows: here how many there are. The
        ends of an interval stand beside their number: `x`, `x_low`, `x_high`, or `low` and `high` behind it."""
        samples = {"clips": self.frame["sample"].nunique()} if "sample" in self.frame else {}
        return pd.DataFrame([{**samples, "rows": len(self.frame)}])

    def lines(self) -> pd.DataFrame:
        """What a page draws by layer: the name of its `line`, the `layer`, a number, and its interval from `low` to
        `high` where it has one. Nothing, here."""
        return pd.DataFrame(columns=["line", "layer"])

    def to_frame(self) -> pd.DataFrame:
        """A copy of the table."""
        return self.frame.copy()

    def save(self, path: str | Path) -> Path:
        """Write a Parquet file, whole or not at all."""
        return self.write(Path(path))

    def write(self, path: Path, about: Mapping[str, str] | None = None) -> Path:
        """What no row can hold first, so that where the Parquet file is, all is."""
        self.save_beside(path)
        return write_whole(self.frame, path, about)

    def save_beside(self, path: Path) -> None:
        """What a kind of table has beside its rows."""

    @classmethod
    def load(cls: type[T], path: str | Path) -> T:
        """Read what `save` wrote; raises `DataError` for another table."""
        try:
            frame = pd.read_parquet(path)
        except ArrowInvalid as error:
            raise DataError(f"{path} is not a Parquet file ({error}).") from None
        missing = [column for column in cls.COLUMNS if column not in frame]
        if missing:
            raise DataError(f"{path} is not {cls.NAME}: it has no column {', '.join(missing)}.")
        return cls(frame[list(cls.COLUMNS)].astype(cls.COLUMNS))


def write_whole(frame: pd.DataFrame, path: Path, about: Mapping[str, str] | None = None) -> Path:
    """A Parquet file, whole or not at all, with some words `about` it among its metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.Table.from_pandas(frame, preserve_index=False)
    table = table.replace_schema_metadata({**(table.schema.metadata or {}), **(about or {})})
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with unfinished.open("wb") as file:
            parquet.write_table(table, file)
            file.flush()
            os.fsync(file.fileno())  # else a rename may outlive what it names when the power fails
        os.replace(unfinished, path)
    except OSError as error:
        raise OSError(f"{path} cannot be written ({error.strerror or error}). What was written before stays.") from None
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def write_tables(out: Path, tables: Mapping[str, pd.DataFrame]) -> list[Path]:
    """Each as Parquet, CSV and Markdown."""
    out.mkdir(parents=True, exist_ok=True)
    paths = []
    for name, frame in tables.items():
        frame.to_parquet(out / f"{name}.parquet", index=False)
        frame.to_csv(out / f"{name}.csv", index=False)
        (out / f"{name}.md").write_text(markdown(frame) + "\n", encoding="utf-8")
        paths += [out / f"{name}.{ending}" for ending in ("parquet", "csv", "md")]
    return paths


def readable(value: float) -> str:
    """With three decimals; a number that would be 0 then, as a power of ten."""
    return f"{value:.1e}" if 0 < abs(value) < 5e-4 else f"{value:.3f}"


def markdown(frame: pd.DataFrame) -> str:
    """A table for people."""

    def cell(value: object) -> object:
        if isinstance(value, float):
            return readable(value)
        return value.replace("|", "\\|") if isinstance(value, str) else value

    cells = frame.astype(object).where(frame.notna(), "-")
    return cells.map(cell).to_markdown(index=False, disable_numparse=True)
