"""The tables of a merged report as LaTeX."""

import re
from collections.abc import Sequence

from .document import Part, Table, Value, value


_SIGNS = {
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}", ">": r"\textgreater{}",
    "|": r"\textbar{}", "±": r"$\pm$", "−": "$-$", "†": r"$^\dagger$", "→": r"$\to$", "≤": r"$\leq$", "≥": r"$\geq$",
    "×": r"$\times$", "·": r"$\cdot$", "…": r"\ldots{}", "δ": r"$\delta$", "τ": r"$\tau$", "λ": r"$\lambda$",
    "α": r"$\alpha$", "β": r"$\beta$", "γ": r"$\gamma$", "ε": r"$\varepsilon$", "²": r"$^2$",
}  # fmt: skip
_HEAD = r"""% Tables of a merged report. In the preamble: \usepackage{booktabs,adjustbox}
"""


def escape(text: str) -> str:
    """Text for LaTeX: nothing in it is a command; `code` and **bold** become commands."""
    parts = re.split(r"(`[^`]*`|\*\*[^*]+\*\*)", text)
    return "".join(_emphasis(part) if index % 2 else _plain(part) for index, part in enumerate(parts))


def to_latex(parts: Sequence[Part], title: str) -> str:
    """One `table` environment a table, to be read in with `\\input`."""
    tables = [part for part in parts if isinstance(part, Table)]
    return _HEAD + f"% {' '.join(title.split())}\n" + "".join(f"\n{_table(table)}" for table in tables)


def _plain(text: str) -> str:
    return "".join(_SIGNS.get(character, character) for character in text)


def _emphasis(text: str) -> str:
    return rf"\texttt{{{_plain(text[1:-1])}}}" if text[0] == "`" else rf"\textbf{{{_plain(text[2:-2])}}}"


def _table(table: Table) -> str:
    lines = [
        r"\begin{table}[htbp]",
        r"\centering",
        rf"\caption{{{escape(table.caption)}}}",
        r"\begin{adjustbox}{max width=\linewidth}",
        rf"\begin{{tabular}}{{l{'r' * (len(table.header) - 1)}}}",
        r"\toprule",
        _row([escape(cell) for cell in table.header]),
        r"\midrule",
        *(_row([_cell(value(cell)) for cell in row]) for row in table.rows),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{adjustbox}",
        r"\end{table}",
    ]
    return "\n".join(lines) + "\n"


def _row(cells: Sequence[str]) -> str:
    # A bracket at the start of a row would be read as the option of the row end before it
    return " & ".join(f"{{}}{cell}" if cell.startswith("[") else cell for cell in cells) + r" \\"


def _cell(cell: Value) -> str:
    text = escape(cell.text)
    return (rf"\textbf{{{text}}}" if cell.bold else text) + escape(cell.mark)
