"""Units of work: what they note beside their files, and what is said when one is made again."""

import json

from first_trl.experiments.report.run_content import mixed_units
from first_trl.experiments.run_folder import RunFolder
from first_trl.experiments.stages.units import Unit, Workspace, changed_inputs


def run(folder, inputs):
    workspace = Workspace(RunFolder(folder))
    workspace.run("teacher", Unit("teacher", inputs, lambda path: None))
    return workspace


def test_a_unit_notes_what_made_it_outside_its_key(tmp_path, capsys):
    run(tmp_path, {"seed": 0})
    path = tmp_path / "teacher" / "unit.json"
    marker = json.loads(path.read_text())
    assert marker["made_with"]["processes"] == 1 and marker["made_with"]["device"]
    assert {"torch", "transformers", "trl", "first_trl", "python"} <= marker["made_with"].keys()
    marker["made_with"] |= {"transformers": "5.0.0", "processes": 2}
    path.write_text(json.dumps(marker))
    capsys.readouterr()
    kept = run(tmp_path, {"seed": 0})
    assert "kept" in capsys.readouterr().out
    line = mixed_units([*kept.log, *run(tmp_path / "other", {"seed": 0}).log])
    assert "transformers 5.0.0 and" in line and "processes 2 and 1" in line and "torch" not in line
    assert mixed_units(kept.log) is None


def test_a_unit_that_is_made_again_says_which_input_changed(tmp_path, capsys):
    run(tmp_path, {"sft": {"learning_rate": 1e-4, "num_train_epochs": 3}, "teacher": "0" * 16, "seed": 0})
    capsys.readouterr()
    run(tmp_path, {"sft": {"learning_rate": 2e-4, "num_train_epochs": 3}, "teacher": "1" * 16, "seed": 0})
    said = capsys.readouterr().out
    assert "changed: sft.learning_rate (0.0001 -> 0.0002), teacher\n" in said and "epochs" not in said
    assert changed_inputs({"a": 1}, {"a": 1}) == ["the version of first_trl"]
    assert changed_inputs({"a": {"b": None}}, {"a": {"c": 2}}) == ["a.c (null -> 2)"]
