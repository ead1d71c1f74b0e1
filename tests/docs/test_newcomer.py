"""The README's page for newcomers, command for command: own questions in a CSV file, a local teacher, a shared student."""

import csv
import json
import random
import re
from pathlib import Path

from tests.support.hub_server import HubServer, run_client
from tests.support.readme import block
from tests.support.tiny import tiny_llama


HEADING = "Your own questions, from a file to a shared student"
COLOURS = ("red", "green", "blue", "yellow", "white")


def write_questions(path: Path, rows: int = 60) -> None:
    chance = random.Random(0)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["question", "A", "B", "C", "D", "answer"])
        for number in range(rows):
            choices = chance.sample(COLOURS, 4)
            gold = chance.randrange(4)
            writer.writerow([f"Box {number} is {choices[gold]}. Which colour is it?", *choices, "ABCD"[gold]])


def write_models(folder: Path) -> None:
    from transformers import AutoTokenizer

    from first_trl.experiments.smoke.tokenizer import smoke_tokenizer

    tokenizer = AutoTokenizer.from_pretrained(smoke_tokenizer(folder / "tokenizer"))
    for name, layers in (("my-teacher", 2), ("my-student", 1)):
        model = tiny_llama(
            seed=layers, vocab_size=len(tokenizer), num_hidden_layers=layers, hidden_size=32, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id,
        )  # fmt: skip
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def test_every_command_works(tmp_path):
    write_questions(tmp_path / "questions.csv")
    write_models(tmp_path)
    commands = [line for line in block(HEADING, "bash").replace("\\\n", " ").splitlines() if line.strip()]
    commands = [re.sub(r"\s+#.*", "", line) for line in commands if not line.startswith("pip install")]
    assert [line.split()[:2] for line in commands] == [
        ["first-trl", "run"],
        ["first-trl", "run"],
        ["first-trl", "push"],
    ]
    code = "import os, shlex\nfrom first_trl.cli import main\n" + f"os.chdir({str(tmp_path)!r})\n"
    for command in commands:
        code += f"assert main(shlex.split({command!r})[1:]) == 0\n".replace("USER", "alice")
    with HubServer(tmp_path / "hub") as hub:
        done = run_client(code, hub)
        # Nothing was made twice: the first command only told the plan
        assert "to do" in done.stdout and "teacher's validation ECE" in done.stdout
        assert "Nothing was loaded or downloaded" in done.stdout
        python = block(HEADING).replace("USER", "alice") + "\nimport json\nprint('ANSWER', json.dumps(answer))\n"
        used = run_client(python, hub)
        answer = json.loads(used.stdout.split("ANSWER ")[1].splitlines()[0])
        assert 0 < answer["confidence"] <= 1 and len(answer["choices"]) == 2
        assert answer["abstained"] == (answer["confidence"] < 0.5)
        assert hub.foreign_requests == [] and hub.internal_errors == []
    run = tmp_path / "outputs" / "my_questions" / "seed-0"
    assert (run / "report" / "report.md").is_file()
    assert (run / "students" / "first_t" / "model" / "adapter_config.json").is_file()
    counts = json.loads((run / "data" / "counts.json").read_text())
    assert [counts[role]["rows"] for role in ("train", "validation", "test")] == [42, 9, 9]
