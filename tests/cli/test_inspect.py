"""`first-trl inspect` shows what a teacher reads and what is supervised."""

import io
import json

import pytest

from first_trl.cli.inspect import has_colour, show_row
from first_trl.cli.main import main
from tests.support.families import THINKING, family_tokenizer


@pytest.fixture
def files(tmp_path):
    family_tokenizer(front=True, template="{{ bos_token }}" + THINKING).save_pretrained(tmp_path / "tokenizer")
    rows = [
        {
            "prompt": [{"role": "user", "content": f"Which {name}?"}],
            "completion": [{"role": "assistant", "content": "A"}],
        }
        for name in ("river", "mill", "metal")
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(tmp_path / "rows.jsonl"), str(tmp_path / "tokenizer")


def test_rows_are_printed_token_by_token(files, capsys):
    data, tokenizer = files
    assert main(["inspect", data, "--tokenizer", tokenizer]) == 0
    printed = capsys.readouterr().out
    assert "\033" not in printed  # no terminal
    rows = printed.split("row ")[1:]
    assert len(rows) == 2
    lines = rows[0].splitlines()[1:]
    assert lines[0].endswith("'<|begin|>'  special") and lines[0][6] == " "
    supervised = [line.split()[3] for line in lines if line[6] == ">"]
    # The answer, not what stands in the empty thinking block
    assert supervised[:2] == ["'A'", "'<|im_end|>'"]
    assert any("</think>" in line and line[6] == " " for line in lines)
    assert main(["inspect", data, "--tokenizer", tokenizer, "--rows", "0"]) == 2
    with pytest.raises(SystemExit):
        main(["inspect", data, "--tokenizer", tokenizer, "--chat-template-kwargs", "[1]"])


def test_colour_where_the_terminal_can(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert has_colour(Terminal()) and not has_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not has_colour(Terminal())
    ids = family_tokenizer()("A B")["input_ids"]
    plain = show_row(family_tokenizer(), 0, ids, ids, False)
    assert plain.count(">") == len(ids)  # the heading has one, the first token none
    assert show_row(family_tokenizer(), 0, ids, ids, True).count("\033[0m") == len(ids)
