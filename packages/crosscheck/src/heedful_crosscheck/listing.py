"""The cases, listed for people: `heedful cases`."""

from collections.abc import Sequence
from itertools import groupby

from rich.table import Table
from rich.text import Text

from heedful_crosscheck.cases import Case


def listing(cases: Sequence[Case]) -> Table:
    """By group: each case, the dtypes in which it is asked, and why it is there, or what it combines."""
    table = Table(box=None, padding=(0, 2, 0, 0))
    for heading in ("case", "dtypes", "why"):
        table.add_column(heading, overflow="fold")
    for group, of_group in groupby(cases, key=lambda case: case.group):
        table.add_row(Text(group, style="bold"))
        for case in of_group:
            dtypes = case.usual if case.dtype is None else (case.dtype,)
            table.add_row(f"  {case.name}", ", ".join(dtypes), case.description)
    return table
