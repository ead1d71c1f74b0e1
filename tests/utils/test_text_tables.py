"""The one writer of tables: Markdown and aligned text."""

from first_trl.utils.text_tables import markdown_table, text_table


def test_markdown_cells_stay_in_their_cell():
    text = markdown_table(["arm", "ECE"], [["a|b", "1.0"], ["two\nlines", ""]], right=(1,))
    assert text.split("\n") == ["| arm | ECE |", "| --- | ---: |", "| a\\|b | 1.0 |", "| two lines |  |"]


def test_text_columns_are_aligned():
    assert text_table(["name", "n"], [["a", "10"], ["longer", "9"]], right=(1,), indent="  ") == [
        "  name     n",
        "  a       10",
        "  longer   9",
    ]
    assert text_table(["name", ""], [["a", ""]]) == ["name", "a"]
