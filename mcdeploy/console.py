"""What the commands print that is more than a line: tables, and a bar while something long works."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

    from mcdeploy.package import Shipped
    from mcdeploy.targets import Inspection


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[str, float], None]]:
    """A bar on a terminal, and nothing elsewhere: for work that reports which share of it is done."""
    from rich.console import Console
    from rich.progress import Progress

    bar = Progress(transient=True, disable=not Console().is_terminal)
    with bar:
        task = bar.add_task(what, total=1.0, visible=False)
        yield lambda words, share: bar.update(task, description=words, completed=share, visible=share < 1)


def print_table(table: Table) -> None:
    """As wide as the terminal; 140 columns where the output goes elsewhere."""
    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 140).print(table)


def print_models(shipped: Shipped) -> None:
    """What really came out, as read back from the files, and how exact each is."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title="What was written, read back from the files", title_style="bold", title_justify="left")
    for head in ("model", "file", "types", "top-1", "agrees", "largest difference"):
        table.add_column(Text(head), overflow="fold")
    for key, model in shipped.bundle.manifest.models.items():
        agreement = shipped.agreements[key]
        worst = [row.max_abs for row in shipped.parity if row.hop == ("onnx" if key == "fp32" else key)]
        table.add_row(
            Text(key),
            Text(model.file),
            Text(_types_in_words(model.nodes)),
            f"{agreement.accuracy_before:.2%} -> {agreement.accuracy_after:.2%}",
            f"{agreement.top1_agreement:.2%}",
            f"{max(worst):.1e}",
        )
    print_table(table)


def _types_in_words(nodes: dict[str, dict[str, int]]) -> str:
    """The operators that do the work, such as "Conv: 52 int8, 2 fp32"."""
    heavy = [op for op in ("Conv", "Gemm", "MatMul") if op in nodes]
    return "; ".join(f"{op}: {', '.join(f'{n} {kind}' for kind, n in nodes[op].items())}" for op in heavy)


def print_side_by_side(found: list[Inspection]) -> None:
    """A row for each target, and what of it cannot be compared."""
    from rich.table import Table
    from rich.text import Text

    from mcdeploy.targets import compare_costs, notes_on

    heads, rows = compare_costs(found)
    table = Table()
    for i, head in enumerate(heads):
        table.add_column(Text(head), justify="right" if i else "left", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    print_table(table)
    for note in notes_on(found):
        print(note)
