"""Every table of a study's README is what the command above it prints."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

from first_trl.cli import main
from first_trl.experiments.report.results import read_results, results_table


ROOT = Path(__file__).resolve().parents[2]
STUDIES = sorted(path for path in (ROOT / "model_cards" / "studies").iterdir() if path.is_dir())


def printed_tables(text: str, capsys) -> int:
    """How many tables stand under the command that prints them, each exactly as it prints it."""
    found = re.findall(r"```bash\n(first-trl report --from [^`]*)```\n\n((?:\|.*\n)+)", text)
    for command, table in found:
        assert main(shlex.split(command.replace("\\\n", " "))[1:]) == 0
        assert capsys.readouterr().out == table
    return len(found)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_tables_are_recomputed(study, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (study / "README.md").read_text(encoding="utf-8")
    assert printed_tables(text, capsys) == text.count("first-trl report --from") >= 3
    # Every further figure with a decimal point would be one that nothing recomputes
    prose = re.sub(r"```.*?```|`[^`]*`", "", text.replace("0.15", ""), flags=re.DOTALL)
    prose = "\n".join(line for line in prose.splitlines() if not re.match(r"\|.*\d\.\d.*\|", line))
    assert set(re.findall(r"\d+\.\d+", prose)) <= {"1.2"}


def test_the_first_table_of_the_front_page_is_recomputed(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert printed_tables((ROOT / "README.md").read_text(encoding="utf-8"), capsys) == 1


def test_the_shift_table_of_the_front_page_is_that_of_the_study():
    scores = read_results(ROOT / "model_cards" / "studies" / "shift" / "results.csv.gz")
    page = (ROOT / "README.md").read_text(encoding="utf-8")
    head, *rows = re.findall(r"^\|.*\|$", page[page.index("| ECE %, `test` → `ood` |") :], re.MULTILINE)[:6]
    cells = [cell.strip() for cell in head.strip("|").split("|")][1:]
    for row in rows[1:]:
        arm, *shown = (cell.strip() for cell in row.strip("|").split("|"))
        for cell, text in zip(cells, shown, strict=True):
            found = [
                [
                    100 * score.values["ece"]
                    for score in scores
                    if (score.cell, score.arm, score.role) == (cell, arm, role)
                ]
                for role in ("test", "ood")
            ]
            assert text == " → ".join(f"{sum(values) / 5:.1f}" for values in found)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_studies_are_small(study):
    assert len((study / "README.md").read_text(encoding="utf-8").splitlines()) <= 200
    assert len(list(study.glob("*.png"))) <= 4
    assert {path.suffix for path in study.iterdir()} <= {".md", ".png", ".gz"}


def test_no_file_is_large():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    paths = [ROOT / name for name in listed.stdout.decode().split("\0") if name]
    assert {path.name: path.stat().st_size for path in paths if path.is_file() and path.stat().st_size > 300_000} == {}


def test_links_of_the_front_pages_lead_somewhere():
    pages = [ROOT / "README.md", *ROOT.glob("recipes/*.md"), *ROOT.glob("model_cards/**/*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_bad_results_are_told(tmp_path):
    results = read_results(STUDIES[0] / "results.csv.gz")
    with pytest.raises(ValueError, match=r"There is no arm 'SFTT'\. Did you mean 'SFT'"):
        results_table(results, arms=["SFTT"])
    with pytest.raises(ValueError, match=r"no role 'tset'\. Did you mean 'test'"):
        results_table(results, roles=["tset"])
    with pytest.raises(ValueError, match="name a baseline too"):
        results_table(results, intervals=True)
    (tmp_path / "results.csv.gz").write_text("cell,run\n")
    with pytest.raises(ValueError, match="no gzipped CSV"):
        read_results(tmp_path / "results.csv.gz")


def test_statistics_are_those_of_the_rows():
    scores = read_results(ROOT / "model_cards" / "studies" / "quickstart" / "results.csv.gz")
    seeds = [score.values["nll"] for score in scores if (score.role, score.arm) == ("test", "SFT")]
    mean = sum(seeds) / 5
    sd = (sum((value - mean) ** 2 for value in seeds) / 4) ** 0.5
    table = results_table(scores, roles=["test"], metrics=["nll"], arms=["SFT"])
    assert table.splitlines()[2] == f"| SFT | {mean:.3f} ± {sd:.3f} |"
    # The difference's 95 % interval: 2.776 is the quantile of Student's t with four degrees of freedom
    others = [score.values["nll"] for score in scores if (score.role, score.arm) == ("test", "Direct distillation")]
    differences = [a - b for a, b in zip(seeds, others, strict=True)]
    mean = sum(differences) / 5
    half = 2.776445 * (sum((value - mean) ** 2 for value in differences) / 4) ** 0.5 / 5**0.5
    table = results_table(
        scores, roles=["test"], metrics=["nll"], arms=["SFT"], baselines=["Direct distillation"], intervals=True
    )
    assert f"| {mean:+.3f} [{mean - half:+.3f}, {mean + half:+.3f}] 0/5 |" in table
