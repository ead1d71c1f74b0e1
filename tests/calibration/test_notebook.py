"""A report at the prompt and in a notebook is still the dictionary it was."""

import copy
import json
import pickle
from html.parser import HTMLParser

import numpy as np
import pytest

from first_trl.calibration import calibration_report


pytestmark = pytest.mark.filterwarnings("ignore::first_trl.calibration.CalibrationWarning")


@pytest.fixture
def report():
    rng = np.random.default_rng(0)
    confidence = rng.uniform(0.3, 1, 400)
    return calibration_report(confidence, rng.random(400) < confidence, confidence_interval=0.95, null_test=True)


def test_one_line_at_the_prompt(report):
    text = repr(report)
    assert "\n" not in text and len(text) < 500
    assert f"ece={report['ece']:.4f} [{report['ci_low']:.4f}, {report['ci_high']:.4f}]" in text and "n=400" in text


def test_a_page_in_a_notebook(report):
    class Page(HTMLParser):
        def __init__(self):
            super().__init__()
            self.open, self.text, self.images = [], [], 0

        def handle_starttag(self, tag, attrs):
            self.images += tag == "img"
            if tag != "img":
                self.open.append(tag)

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

        def handle_data(self, data):
            self.text.append(data)

    report["warnings"].append("<script>1 < 2</script>")
    page = Page()
    page.feed(report._repr_html_())
    assert page.open == [] and page.images == 1
    assert f"{report['ece']:.4f}" in page.text and "0.9 to 1" in page.text and "<script>1 < 2</script>" in page.text
    without = calibration_report([0.5, 0.75], [0, 1], return_bins=False)
    assert "<img" not in without._repr_html_() and f"{without['ece']:.4f}" in without._repr_html_()


def test_it_is_a_dictionary(report):
    plain = dict(report)
    assert report == plain and json.loads(json.dumps(report)) == json.loads(json.dumps(plain))
    assert pickle.loads(pickle.dumps(report)) == plain and copy.deepcopy(report) == plain
    assert {**report} == plain and (report | {"a": 1})["a"] == 1
    classes = calibration_report(np.eye(3)[[0, 1, 2]] * 0.7 + 0.1, [0, 1, 1], mode="classwise")
    assert "keys: ece" in repr(classes) and "<table>" in classes._repr_html_()
