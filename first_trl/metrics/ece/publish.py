"""The Space folder of the metric: self-contained, built from the one copy of the calibration core."""

import ast
import re
import shutil
from pathlib import Path


_HERE = Path(__file__).resolve().parent
_CORE = _HERE.parents[1] / "calibration"
_TABLES = _HERE.parents[1] / "utils" / "tables"
_IMPORT = re.compile(r"^from first_trl\.calibration\.(\w+) import ", flags=re.MULTILINE)
_LOCAL_NAME = "first_trl/metrics/ece"


def build_space_folder(destination: str | Path, *, repo_id: str | None = None) -> Path:
    """
    Write the metric as a Space folder that runs without `first_trl`.

    The modules of the calibration core that `ece.py` needs are copied beside it, unchanged: they import each other
    relatively and need numpy only; so is the reader of tables, for the page. `evaluate` fetches exactly the modules which the main script itself imports, so
    the copy of `ece.py` names them all.

    Args:
        destination (`str` or `Path`):
            Folder to create; it must not exist or be empty.
        repo_id (`str`, *optional*):
            Where the Space will live, for example `"user/ece"`. The script takes the name of the Space, and the card
            and the examples load it from there.

    Returns:
        `Path`: the folder, ready for `HfApi.upload_folder(repo_type="space")` into a Space with the gradio SDK.

    Raises:
        `ValueError`: if the folder is not empty or the Space's name cannot name a module.
    """
    destination = Path(destination)
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise ValueError(f"{destination} is not an empty folder: name a new one.")
    modules = _needed_modules()
    name = "ece" if repo_id is None else repo_id.split("/")[-1]
    if repo_id is not None and not re.fullmatch(r"[\w.-]+/[A-Za-z_]\w*", repo_id):
        raise ValueError(f"repo_id={repo_id!r}: use USER/NAME where NAME is a Python identifier, such as user/ece.")
    if name in {*modules, "app", "table_reader", "tests"}:
        raise ValueError(f"repo_id={repo_id!r}: {name}.py is a file of the metric itself, choose another name.")

    destination.mkdir(parents=True, exist_ok=True)
    for module in modules:
        shutil.copyfile(_CORE / f"{module}.py", destination / f"{module}.py")
    # The page reads files as the commands do
    shutil.copytree(_TABLES, destination / "table_reader", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("requirements.txt", "tests.py"):
        shutil.copyfile(_HERE / file, destination / file)
    where = repo_id or _LOCAL_NAME
    (destination / f"{name}.py").write_text(_script(modules).replace(_LOCAL_NAME, where), encoding="utf-8")
    for file in ("README.md", "app.py"):
        text = (_HERE / file).read_text(encoding="utf-8")
        text = text.replace(_LOCAL_NAME, where).replace('with_name("ece.py")', f'with_name("{name}.py")')
        text = text.replace("from first_trl.utils.tables import", "from table_reader import")
        (destination / file).write_text(text, encoding="utf-8")
    return destination


def _script(modules: list[str]) -> str:
    """`ece.py` with the core imported from beside it."""
    text = (_HERE / "ece.py").read_text(encoding="utf-8")
    direct = _IMPORT.findall(text)
    text = _IMPORT.sub(r"from .\1 import ", text)
    last = text.index("\n\n\n")  # the end of the imports
    others = "".join(f"\nfrom .{module} import __name__ as _{module}" for module in modules if module not in direct)
    return (
        text[:last]
        + "\n\n# Imported so that `evaluate` fetches the modules which those above import."
        + others
        + text[last:]
    )


def _needed_modules() -> list[str]:
    """Names of the core's modules that `ece.py` reaches, sorted."""
    found: set[str] = set()
    open_names = _IMPORT.findall((_HERE / "ece.py").read_text(encoding="utf-8"))
    while open_names:
        name = open_names.pop()
        if name in found:
            continue
        found.add(name)
        tree = ast.parse((_CORE / f"{name}.py").read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module:
                open_names.append(node.module)
    return sorted(found)
