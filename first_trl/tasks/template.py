"""Prompt templates: a `str.format` text with named fields, checked before the first row is read."""

import string
from collections.abc import Collection


def check_template(option: str, template: str, fields: Collection[str], required: Collection[str]) -> None:
    """
    Checks a template given by the user.

    Args:
        option (`str`): Name of the option, for the message.
        template (`str`): Text with `{field}` places.
        fields (`Collection[str]`): Fields the task can fill.
        required (`Collection[str]`): Fields without which all rows would read alike.

    Raises:
        `ValueError`: when the template has an unknown field, lacks a required one or is not a format string.
    """
    known = ", ".join("{" + field + "}" for field in fields)
    if not isinstance(template, str):
        raise ValueError(f"`{option}` must be a text, got {template!r}.")
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ValueError(
            f"`{option}` {template!r} is not a template: {error}. Double a brace that is meant as text: '{{{{'."
        ) from None
    used = [name for _, name, _, _ in parsed if name is not None]
    for _, name, spec, conversion in parsed:
        if name is None:
            continue
        if name not in fields:
            raise ValueError(f"`{option}` has the unknown field {{{name}}}; this task knows {known}.")
        if spec or conversion:
            raise ValueError(f"`{option}` formats {{{name}}} with ':' or '!'; write the bare field.")
    for name in required:
        if name not in used:
            raise ValueError(f"`{option}` lacks {{{name}}}; this task knows {known}.")
