"""The page of a merged report: one template, all kinds of parts."""

import base64
from html.parser import HTMLParser

from first_trl.experiments.report.document import Fold, Heading, Items, Paragraph, Picture, Table, Value
from first_trl.experiments.report.html import to_html


class Balance(HTMLParser):
    """Open tags and all text."""

    def __init__(self):
        super().__init__()
        self.open, self.text, self.tags = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_every_part_is_written_and_nothing_of_it_is_markup(tmp_path):
    (tmp_path / "a.png").write_bytes(b"picture")
    parts = [
        Heading(1, "Title <b>"),
        Heading(2, "First `x`"),
        Paragraph("1 < 2 & **bold** {{ braces }}"),
        Items(["one", "two"]),
        Table("Caption", ["arm", "ECE"], [["<i>", Value("3", bold=True, mark="†")]]),
        Fold("More", [Paragraph("hidden"), Fold("Inner", [Items(["deep"])])]),
        Picture("a.png", 'A "caption"'),
        Heading(2, "Second"),
    ]
    page = Balance()
    text = to_html(parts, "Title <b>", tmp_path)
    page.feed(text)
    assert page.open == []
    assert {"1 < 2 & ", "bold", " {{ braces }}", "one", "two", "<i>", "3", "†", "hidden", "deep"} <= set(page.text)
    assert not {"b", "i"} & {tag for tag, _ in page.tags}
    anchors = [attrs["id"] for tag, attrs in page.tags if tag == "h2"]
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{anchor}" for anchor in anchors]
    source = next(attrs["src"] for tag, attrs in page.tags if tag == "img")
    assert base64.b64decode(source.split(",")[1]) == b"picture"
    assert "<strong>3</strong>†" in text
