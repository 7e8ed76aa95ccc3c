"""Commands of several steps: each writes tables and figures, a page shows all, and one that fails stops no other."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

import typer

from lalm_lens.attributes import Attribute
from lalm_lens.errors import InputError, LensError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

LONG = 40  # rows: more are not printed


@runtime_checkable
class About(Protocol):
    """What all steps are about."""

    @property
    def attribute(self) -> Attribute: ...

    @property
    def out(self) -> Path: ...


A = TypeVar("A", bound=About)
Shown = tuple["dict[str, pd.DataFrame]", "dict[str, Figure]"]
Steps = Mapping[str, Callable[[Any], Shown]]


def steps_named(only: str | None, steps: Steps) -> Steps:
    """Those of `--only`, or all."""
    if only is None:
        return steps
    names = [each.strip() for each in only.split(",")]
    for name in names:
        if name not in steps:
            raise InputError(f"--only is {name!r}. Choose some of {', '.join(steps)}.")
    return {name: steps[name] for name in names}


def run_steps(steps: Steps, about: Iterable[A], title: str, page: Path) -> None:
    """Take every step about each, write the page, and say what is left out: exit code 1 if anything is."""
    left_out: list[str] = []
    told = [f"# {title}"]
    try:
        for its in about:
            told.append(f"## {its.attribute.name}")
            for name, step in steps.items():
                try:
                    told += written(its, *step(its), f"{step.__doc__}")
                except LensError as error:
                    left_out.append(f"{name} of {its.attribute.name}: {error}")
    finally:  # what is done has its page, however the rest ends
        told += [f"Left out: {line}" for line in left_out]
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("\n\n".join(told) + "\n", encoding="utf-8")
    for line in left_out:
        print(f"Left out: {line}")
    print(page)
    raise typer.Exit(1 if left_out else 0)


def written(its: About, tables: "dict[str, pd.DataFrame]", figures: "dict[str, Figure]", title: str) -> list[str]:
    """Write a step's tables and figures, print the tables, and return what the page says of it."""
    from lalm_lens.tables import markdown, readable, write_tables

    write_tables(its.out / "tables", tables)
    told = [f"### {title}"]
    print(f"{its.attribute.name}. {title}")
    for name, table in tables.items():
        if len(table) > LONG:
            told.append(f"{name}: [{len(table)} rows]({its.out.name}/tables/{name}.csv)")
            continue
        told.append(f"{name}:\n\n{markdown(table)}")
        print(f"{name}\n{table.to_string(index=False, float_format=readable, na_rep='-')}\n")
    for name, figure in figures.items():
        figure.savefig(its.out / f"{name}.png", dpi=150)
        told.append(f"{name}:\n\n![{name}]({its.out.name}/{name}.png)")
    return told
