"""
The one reader of tables: questions, rows to score, confidences.

It imports nothing of `first_trl`, so that the metric's Space can carry a copy.

What a cell means is the same for every format and every command:

- **Text stays text.** `None`, `NA`, `null` and `nan` are words. A cell of a CSV, TSV or Excel file is missing when it is
  empty or holds nothing but white space; elsewhere only a null is missing.
- **Types stay.** JSON, Parquet, Arrow and Excel keep integers, floats and booleans. A float32 is, as a text,
  the shortest decimal that means it (1.1, not 1.100000023841858). Cells of a CSV or TSV file are
  texts. Class labels of `datasets` are read by name, and -1, which marks a row without a label there, as missing.
- **Rows that are all empty** are left out and counted.
- **The delimiter** is the one of comma, semicolon, tab and bar that stands in the header. Where several do, it is the
  one that cuts all rows into as many cells as the header. A first line `sep=;`, as Excel writes it, has the last word.
- **The encoding** is that of the byte order mark; without one UTF-16 where every second byte of the beginning is zero,
  else UTF-8, else Windows-1252, with a warning.
"""

from .cells import as_number, as_text, is_nan
from .load import Table, label_name, listed, load_columns, load_table
from .names import ENDINGS, file_kind


__all__ = [
    "ENDINGS",
    "Table",
    "as_number",
    "as_text",
    "file_kind",
    "is_nan",
    "label_name",
    "listed",
    "load_columns",
    "load_table",
]
