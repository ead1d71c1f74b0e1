"""Things that are found by name: built-in ones, and those that a user's module adds."""

import ast
import hashlib
import importlib
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any, TypeVar

from .names import nearest


ENTRY_POINTS = "first_trl.plugins"

T = TypeVar("T")
_installed: list[str] = []


class Registry(Mapping[str, Any]):
    """
    Name -> object. Built-in objects are imported on first use, so that one of them does not load what others need.

    Names come from three places: the package, modules that call [`~Registry.register`], and installed distributions
    that name such a module as an entry point of the group `first_trl.plugins`; those are imported when a name is not
    found among the others.

    Args:
        kind (`str`):
            What messages call one of them, e.g. `"task"`.
        builtin (`dict[str, str]`):
            Name -> `"module:attribute"`.
    """

    def __init__(self, kind: str, builtin: Mapping[str, str]) -> None:
        self.kind = kind
        self.builtin = tuple(builtin)
        self._places = dict(builtin)
        self._objects: dict[str, Any] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """
        Decorator that adds an object under a name.

        Raises:
            `ValueError`: The name is taken, by another object than the same one of a module that is imported again.
        """
        if not isinstance(name, str) or not name:
            raise ValueError(f"The name of a {self.kind} must be a text that is not empty, got {name!r}.")

        def add(thing: T) -> T:
            known = self._objects.get(name)
            if name in self._places or (known is not None and _place(known) != _place(thing)):
                where = self._places.get(name) or ":".join(_place(known))
                raise ValueError(
                    f"The {self.kind} {name!r} is there already ({where}). Register yours under another name."
                )
            self._objects[name] = thing
            return thing

        return add

    def __getitem__(self, name: str) -> Any:
        if name in self._objects:
            return self._objects[name]
        if name in self._places:
            module, attribute = self._places[name].split(":")
            self._objects[name] = getattr(importlib.import_module(module), attribute)
            return self._objects[name]
        load_installed()
        if name in self._objects:
            return self._objects[name]
        raise KeyError(name)

    def find(self, name: str, where: str = "") -> Any:
        """
        The object of a name.

        Raises:
            `ValueError`: There is none; the message starts with `where` and names the nearest known one.
        """
        self.check(name, where)
        return self[name]

    def check(self, name: str, where: str = "") -> None:
        """Raises the `ValueError` of [`~Registry.find`] without importing the object."""
        if not isinstance(name, str) or name not in self:
            raise ValueError(f"{where}There is no {self.kind} {name!r}.{nearest(str(name), self)}")

    def code(self, name: str) -> str | None:
        """
        Digest of the source that an added object comes from: its module, with the others of its package and the files
        beside it that these import. `None` for a built-in one, which the version of this package stands for, and where
        there is no source.
        """
        if name in self.builtin:
            return None
        module = sys.modules.get(_place(self.find(name))[0])
        file = Path(getattr(module, "__file__", None) or "")
        if file.suffix != ".py" or not file.is_file():
            return None
        digest = hashlib.sha256()
        for path in sorted(_sources(file, getattr(module, "__package__", None))):
            digest.update(path.name.encode() + path.read_bytes())
        return digest.hexdigest()[:12]

    def __contains__(self, name: object) -> bool:
        if name in self._places or name in self._objects:
            return True
        load_installed()
        return name in self._objects

    def __iter__(self) -> Iterator[str]:
        load_installed()
        return iter([*self.builtin, *(name for name in self._objects if name not in self._places)])

    def __len__(self) -> int:
        return sum(1 for _ in self)


def load_installed() -> None:
    """Import the modules that installed distributions name under the entry points `first_trl.plugins`, once."""
    if _installed:
        return
    _installed.append(ENTRY_POINTS)
    for point in entry_points(group=ENTRY_POINTS):
        try:
            point.load()
        except Exception as error:
            raise ValueError(
                f"The plugin {point.value!r} of the installed distribution "
                f"{point.dist.name if point.dist else point.name!r} cannot be loaded ({type(error).__name__}: {error}). "
                "Mend it or uninstall it."
            ) from error


def _place(thing: Any) -> tuple[str, str]:
    named = thing if hasattr(thing, "__qualname__") else type(thing)
    return named.__module__, named.__qualname__


def _sources(file: Path, package: str | None) -> set[Path]:
    root = file.parents[len(package.split(".")) if package else 0]
    todo = list(file.parent.glob("*.py")) if package else [file]
    found: set[Path] = set()
    while todo:
        path = todo.pop()
        if path in found or not path.is_file():
            continue
        found.add(path)
        for base, *parts in _imports(path, root):
            # Of `a.b.c` the packages on the way too; what is no file beside it is another library, or a name in a module
            places = [Path(base, *parts[:end]) for end in range(1, len(parts) + 1)]
            todo += [file for place in places for file in (place.with_name(f"{place.name}.py"), place / "__init__.py")]
    return found


def _imports(path: Path, root: Path) -> Iterator[list[Any]]:
    """Folder and dotted parts of what a file imports, but for what is installed with the file and has versions."""
    installed = root.name in ("site-packages", "dist-packages")
    for level, name in _imported_names(path.read_bytes()):
        parts = name.split(".")
        if level or not (installed or parts[0] == __name__.split(".")[0]):
            yield [path.parents[level - 1] if level else root, *parts]


@cache  # A run asks several times for every arm, and a large package takes a second to parse
def _imported_names(source: bytes) -> list[tuple[int, str]]:
    """Number of leading dots and dotted name of each import."""
    try:
        nodes = list(ast.walk(ast.parse(source)))
    except SyntaxError:  # a file of a package that nobody imports
        return []
    found = []
    for node in nodes:
        level = node.level if isinstance(node, ast.ImportFrom) else 0
        within = f"{node.module}." if isinstance(node, ast.ImportFrom) and node.module else ""
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            found.append((level, within + alias.name))
    return found
