"""
A recipe from a mapping. What pydantic finds wrong becomes one sentence a problem: where it is, what is wrong, and the
nearest name that is right.
"""

import copy
import dataclasses
import types
import typing
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import TypeAdapter, ValidationError

from ...training.options import limits_text, marks_of
from ...utils.names import nearest
from .models import Recipe


_TYPES = {
    "int_type": "of type int", "int_from_float": "of type int", "float_type": "of type float",
    "string_type": "of type str", "bool_type": "of type bool", "list_type": "a list", "dict_type": "a mapping",
    "dataclass_type": "a mapping",
}  # fmt: skip


def parse(data: dict[str, Any], where: str) -> Recipe:
    """A recipe with keys and values of the right types. Raises `ValueError` with all that are not; `where` names the file."""
    try:
        return TypeAdapter(Recipe).validate_python(copy.deepcopy(data))
    except ValidationError as error:
        found = error
    refuse([_sentence(each, Recipe) for each in found.errors(include_url=False)], where)
    raise found


def refuse(problems: Iterable[str], where: str) -> None:
    """Raises `ValueError` with all problems, each behind the file that it is in."""
    found = list(problems)
    if len(found) == 1:
        raise ValueError(f"{where}: {found[0]}")
    if found:
        raise ValueError(f"{where}: {len(found)} problems.\n" + "\n".join(f"- {problem}" for problem in found))


def _sentence(found: Any, cls: type) -> str:
    *parents, last = found["loc"] or ("",)
    place = ".".join(map(str, found["loc"]))
    value, kind = found["input"], found["type"]
    if kind in ("unexpected_keyword_argument", "missing"):
        inside, outer = _type_at(cls, parents), ".".join(map(str, parents))
        lead = f"{outer}: " if outer else ""
        if kind == "missing":
            return f"{lead}missing key {last!r}. Required here: {', '.join(_required(inside))}."
        return f"{lead}unknown key {str(last)!r}.{nearest(str(last), [f.name for f in dataclasses.fields(inside)])}"
    if kind == "literal_error":
        known = typing.get_args(_type_at(cls, found["loc"]))
        return f"{place} must be {_either(known)}, got {value!r}.{nearest(str(value), known, list_known=False)}"
    if kind.startswith(("greater_than", "less_than")):
        return f"{place} must be {limits_text(marks_of(_hint_at(cls, found['loc'])))}, got {value!r}."
    if kind == "value_error":
        return f"{place}: {found['ctx']['error']}"
    if kind in _TYPES:
        return f"{place} must be {_TYPES[kind]}, got {value!r}."
    return f"{place}: {found['msg']}, got {value!r}."


def _either(known: Iterable[Any]) -> str:
    *most, last = known
    return f"{', '.join(most)} or {last}" if most else str(last)


def _required(cls: type) -> list[str]:
    missing = dataclasses.MISSING
    return [f.name for f in dataclasses.fields(cls) if f.default is missing and f.default_factory is missing]


def _hint_at(cls: Any, loc: Iterable[Any]) -> Any:
    """The type of the key at this place."""
    hint = cls
    for part in loc:
        hint = _bare(hint)
        if dataclasses.is_dataclass(hint):
            hint = typing.get_type_hints(hint, include_extras=True)[str(part)]
        else:
            hint = typing.get_args(hint)[-1]
    return hint


def _type_at(cls: Any, loc: Iterable[Any]) -> Any:
    return _bare(_hint_at(cls, loc))


def _bare(hint: Any) -> Any:
    """A type without `Annotated` and without `None`."""
    while typing.get_origin(hint) in (Annotated, types.UnionType, typing.Union):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    return hint
