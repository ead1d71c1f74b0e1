"""
Conversations -> the text that a chat template makes of them.

Whoever reads a conversation (capture, evaluation, inference) reads it through this file: roles as the template knows
them, no nulls that Arrow filled in, and no thinking block left open in front of an answer.
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError


class Rendered(str):
    """Text made by a chat template. It holds its special tokens already: a tokenizer puts nothing in front of it."""

    def __add__(self, other: str) -> "Rendered":
        return Rendered(str.__add__(self, other))


# Column of the arguments of each row
CHAT_TEMPLATE_KWARGS = "chat_template_kwargs"
_STANDARD_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# ShareGPT and its relatives
_ROLES = {
    "human": "user", "prompter": "user",
    "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant", "bot": "assistant",
    "model": "assistant",
    "observation": "tool", "function_response": "tool", "tool_response": "tool",
}  # fmt: skip
# Arguments of `apply_chat_template` that say what is done with the text, not how it is written
_RESERVED = (
    "add_generation_prompt", "continue_final_message", "tokenize", "return_dict", "return_tensors",
    "return_assistant_tokens_mask", "padding", "truncation", "max_length", "conversation",
)  # fmt: skip
# <think>, <seed:think>, <|START_THINKING|>, <|begin_of_thought|>, [THINK], and how they end
_NAME = "(?i:think|thinking|thoughts?|reasoning)"
_START = rf"(?:<\|?(?i:(?:start|begin)_(?:of_)?|\w+:)?{_NAME}\|?>|\[{_NAME}\]|◁{_NAME}▷)"
_END = rf"(?:<\|?(?i:/(?:\w+:)?|end_(?:of_)?){_NAME}\|?>|\[/{_NAME}\]|◁/{_NAME}▷)"
_OPEN = re.compile(rf"{_START}\s*\Z")
_EMPTY_BLOCK = re.compile(rf"\s*(?:{_START}\s*)?{_END}\s*")
_BLOCK_AT_END = re.compile(rf"{_START}\s*(?:{_END}\s*)?\Z")
# Arguments by which templates close the block in front of an answer
_SWITCHES = {"enable_thinking": False, "thinking": False, "reasoning": False, "thinking_budget": 0}
_PROBE = "answer"
_REASONING = ("reasoning_content", "reasoning", "thinking")
# Keys that carry nothing to read
_LABELS = {"role", "content", "name", "tool_call_id"}
# Templates that read arguments of tool calls as objects, and that look whether they are JSON text
_ARGUMENTS_AS_OBJECT = re.compile(r"arguments['\"\]]*\s*(?:\|\s*(?:tojson|items|dictsort)|\.items\b)")
_ARGUMENTS_AS_EITHER = re.compile(r"arguments['\"\]]*\s+is\s+(?:not\s+)?(?:string|mapping)")


def check_template_arguments(arguments: Mapping[str, Any] | None) -> dict[str, Any]:
    """
    A copy of chat template arguments, without those that are null.

    Raises:
        `ValueError`: for what is no mapping, cannot be stored as JSON, or says what is done with the text.
    """
    if arguments is None:
        return {}
    if not isinstance(arguments, Mapping):
        raise ValueError(
            f"`chat_template_kwargs` is a mapping such as {{'enable_thinking': False}}, got {arguments!r}."
        )
    for name in arguments:
        if name in _RESERVED:
            raise ValueError(f"`chat_template_kwargs` cannot set {name!r}, which decides what is done with the text.")
    try:
        json.dumps(dict(arguments))
    except TypeError as error:
        raise ValueError(
            f"`chat_template_kwargs` must be JSON values, to be stored with the result: {error}."
        ) from None
    return {str(name): value for name, value in arguments.items() if value is not None}


def row_arguments(arguments: Mapping[str, Any] | None, own: Any) -> dict[str, Any]:
    """
    Template arguments of one row: those of all rows, and before them its own from the column `chat_template_kwargs`,
    objects or JSON text.

    Raises:
        `ValueError`: as [`check_template_arguments`].
    """
    if isinstance(own, str):
        try:
            own = json.loads(own)
        except json.JSONDecodeError as error:
            raise ValueError(f"`chat_template_kwargs` is not the JSON text of an object: {error}.") from None
    return {**check_template_arguments(arguments), **check_template_arguments(without_nulls(own))}


def without_nulls(value: Any) -> Any:
    """
    `value` without the keys whose value is null. Arrow gives all objects of a column the same keys and fills them with
    nulls, which nobody can tell from nulls of the source.
    """
    if isinstance(value, Mapping):
        return {key: without_nulls(entry) for key, entry in value.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [without_nulls(entry) for entry in value]
    return value


def read_tools(tools: Any) -> list[Any] | None:
    """
    Tools of one row: objects, whose nulls are left out, or JSON text, which is taken as it is.

    Raises:
        `ValueError`: when they are neither a list nor the JSON text of one.
    """
    if isinstance(tools, str):
        if not tools.strip():
            return None
        try:
            read = json.loads(tools)
        except json.JSONDecodeError as error:
            raise ValueError(f"`tools` is not the JSON text of a list: {error}.") from None
    else:
        read = tools if tools is None else [json.loads(t) if isinstance(t, str) else without_nulls(t) for t in tools]
    if read is not None and not isinstance(read, list):
        raise ValueError(f"`tools` must be a list of tools, got {type(read).__name__}.")
    return read or None


def read_messages(messages: Any, template: str) -> list[dict[str, Any]]:
    """
    Messages with `role` and `content`, in the roles that `template` knows.

    Roles of ShareGPT (`human`, `gpt`, with `from` and `value`) become `user` and `assistant`, unless the template names
    them itself.

    Arguments of tool calls that are JSON text, as an API returns them, become objects where the template would write them
    as JSON once more; servers do the same.

    Raises:
        `ValueError`: for a message without a role, or with one that neither the template nor this function knows; without
            content; or with tool calls that the template does not write.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise ValueError(f"a conversation is a list of messages with `role` and `content`, got {messages!r}.")
    return [_message(message, template) for message in messages]


def _message(message: Any, template: str) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is {message!r}, not an object with `role` and `content`.")
    # A content of null is what a message that only calls tools has
    read = {key: without_nulls(value) for key, value in message.items() if value is not None or key == "content"}
    for name, other in (("role", "from"), ("content", "value")):
        if read.get(name) is None and other in read:
            read[name] = read.pop(other)
    role = read.get("role")
    if not isinstance(role, str) or not role.strip():
        raise ValueError(f"a message has no `role` (it has {', '.join(read) or 'nothing'}).")
    read["role"] = _role(role, template)
    if read.get("content") is None and not read.keys() - _LABELS:
        raise ValueError(f"a message of the role {role!r} has no content. Fill it in or remove the row.")
    if read.get("tool_calls"):
        if "tool_calls" not in template:
            raise ValueError(
                "a message has `tool_calls`, and the chat template does not write them. Use a template that does, or write "
                "the calls into the content."
            )
        whole_call = "tojson" in template and "arguments" not in template
        if whole_call or (_ARGUMENTS_AS_OBJECT.search(template) and not _ARGUMENTS_AS_EITHER.search(template)):
            read["tool_calls"] = [_with_object(call) for call in read["tool_calls"]]
    if isinstance(read.get("content"), list):
        read["content"] = _content(read["content"], template)
    return read


def _with_object(call: Any) -> Any:
    """A tool call with its arguments as an object."""
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _with_object(call["function"])}
    if not isinstance(call.get("arguments"), str):
        return call
    try:
        return {**call, "arguments": json.loads(call["arguments"])}
    except json.JSONDecodeError as error:
        raise ValueError(f"the arguments of a tool call are no JSON text: {error}.") from None


def _content(parts: list[Any], template: str) -> Any:
    """Content in parts, as a text for templates that do not look into them: they would write the list itself."""
    if re.search(r"""['".]text\b""", template):
        return parts
    texts = [part.get("text") if isinstance(part, Mapping) else part for part in parts]
    known = [text for text in texts if isinstance(text, str)]
    if len(known) < len(texts):
        raise ValueError(
            "a message has content in parts, not all of them texts, and the chat template does not look into parts. Give "
            "the content as one text, or use a template that reads parts."
        )
    return "".join(known)


def _role(role: str, template: str) -> str:
    if role in _STANDARD_ROLES or f"'{role}'" in template or f'"{role}"' in template:
        return role
    plain = role.strip().lower()
    if plain in _STANDARD_ROLES:
        return plain
    if plain in _ROLES:
        return _ROLES[plain]
    raise ValueError(
        f"the role {role!r} is none that the chat template names. Rename it to one of {', '.join(_STANDARD_ROLES)} (a "
        "function call is an `assistant` message with `tool_calls`), or use a template that knows it."
    )


def render(
    processing_class: Any,
    messages: Any,
    *,
    tools: Any = None,
    chat_template: str | None = None,
    add_generation_prompt: bool = False,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> Rendered:
    """
    The text of a conversation.

    Args:
        processing_class ([`~transformers.PreTrainedTokenizerBase`]): The tokenizer.
        messages (`list[dict]`): See [`read_messages`].
        tools (`list[dict]` or `str`, *optional*): See [`read_tools`].
        chat_template (`str`, *optional*): Instead of the tokenizer's.
        add_generation_prompt (`bool`, *optional*, defaults to `False`): Whether the text ends where an answer begins.
        chat_template_kwargs (`dict`, *optional*): Further arguments of the template, such as `enable_thinking`.

    Raises:
        `ValueError`: The tokenizer has no template, it cannot write this conversation, or it leaves out a message or the
            tools.
    """
    options = {"tools": read_tools(tools), **check_template_arguments(chat_template_kwargs)}
    template = _template(processing_class, options.pop("chat_template", chat_template), options["tools"])
    if options["tools"] and "tools" not in template:
        raise ValueError(
            "the row has `tools`, and the chat template does not write them. Use a template that does, or remove the column."
        )
    read = read_messages(messages, template)

    def write(written: list[dict[str, Any]]) -> str:
        return str(
            processing_class.apply_chat_template(
                written,
                chat_template=template,
                add_generation_prompt=add_generation_prompt,
                tokenize=False,
                **options,
            )
        )

    try:
        text = write(read)
        at = 0
        for i, message in enumerate(read):
            content = message.get("content")
            if not isinstance(content, str):
                continue
            found = text.find(content.strip(), at)
            if found >= 0:
                at = found + len(content.strip())
                continue
            # A template may write a content in other words or places; one that it does not look at can be anything
            if write([*read[:i], {**message, "content": f"{content} {_PROBE}"}, *read[i + 1 :]]) == text:
                raise ValueError(
                    f"the chat template leaves out message {i + 1} (role {message['role']!r}). Move its content into a "
                    "message that the template writes, or use a template that knows this role there."
                )
    except TemplateError as error:
        raise ValueError(f"the chat template cannot write this conversation: {error}") from None
    return Rendered(text)


def _template(processing_class: Any, chat_template: str | None, tools: Any) -> str:
    if chat_template is None and getattr(processing_class, "chat_template", None) is None:
        raise ValueError(
            "The tokenizer has no chat template, so a conversation has no text. Set `tokenizer.chat_template`, or give "
            "texts."
        )
    return str(processing_class.get_chat_template(chat_template, tools))


def writes_the_date(processing_class: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the chat template, with these arguments, writes another text on another day."""
    options = check_template_arguments(chat_template_kwargs)
    try:
        template = _template(processing_class, options.pop("chat_template", None), None)
        if "strftime_now" not in template:
            return False
        days = ["{% macro strftime_now(form) %}" + day + "{% endmacro %}" for day in ("1", "2")]
        messages = [{"role": "user", "content": _PROBE}]
        texts = {
            processing_class.apply_chat_template(messages, chat_template=day + template, tokenize=False, **options)
            for day in days
        }
    except (TemplateError, ValueError, TypeError):  # a template need not take this conversation
        return False
    return len(texts) > 1


def reads_documents(processing_class: Any, chat_template_kwargs: Mapping[str, Any] | None = None) -> bool:
    """Whether the chat template has a place for documents, and these arguments bring none."""
    options = check_template_arguments(chat_template_kwargs)
    try:
        template = _template(processing_class, options.get("chat_template"), None)
    except ValueError:
        return False
    return re.search(r"\bdocuments\b", template) is not None and "documents" not in options


def template_starts(processing_class: Any) -> tuple[str, ...]:
    """What the tokenizer's chat template writes in front of a conversation; a text that begins so was written by it."""
    if getattr(processing_class, "chat_template", None) is None:
        return ()
    starts = []
    for first in ([], [{"role": "system"}]):
        texts = []
        for content in ("a", "b"):
            messages = [{**message, "content": content} for message in [*first, {"role": "user"}]]
            try:
                texts.append(str(render(processing_class, messages)))
            except (ValueError, TypeError, AttributeError, KeyError):  # a template need not take every conversation
                break
        start = _common_start(*texts) if len(texts) == 2 else ""
        if start.strip():
            starts.append(start)
    return tuple(dict.fromkeys(starts))


def _common_start(one: str, other: str) -> str:
    n = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:n]


def opens_thinking(text: str) -> bool:
    """Whether the text ends inside a thinking block, so that what follows is a thought and not an answer."""
    return _OPEN.search(text) is not None


def prompt_text(
    processing_class: Any, prompt: Any, *, tools: Any = None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> str:
    """
    The text of a prompt up to where its answer begins. A text is itself; a conversation ends with the generation
    prompt. Where that opens a thinking block, the template is asked to close it (`enable_thinking=False`, or the name
    that it has for that), unless `chat_template_kwargs` says otherwise. Special tokens that the template writes between
    the generation prompt and an answer, as the name of a channel, belong to the prompt, and so does an empty block.

    Raises:
        `ValueError`: as [`render`]; also when the thinking block cannot be closed.
    """
    if isinstance(prompt, str):
        return prompt
    options = check_template_arguments(chat_template_kwargs)
    text, options = _generation_prompt(processing_class, prompt, tools, None, options)
    if opens_thinking(text) and not options.keys() & _SWITCHES.keys():
        raise ValueError(
            f"the chat template ends the prompt with {text[-20:]!r}: what follows is a thought, not the answer. Turn "
            "thinking off with the template's argument in `chat_template_kwargs`, or give the prompt as a text that "
            "ends behind the closed block."
        )
    return text


def _generation_prompt(
    processing_class: Any, prompt: Any, tools: Any, chat_template: str | None, options: dict[str, Any]
) -> tuple[Rendered, dict[str, Any]]:
    """Text of the prompt with a closed thinking block where the template can close it, and the arguments it needs."""

    def write(arguments: dict[str, Any]) -> Rendered:
        return render(
            processing_class,
            prompt,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=True,
            chat_template_kwargs=arguments,
        )

    text = write(options)
    if opens_thinking(text) and not options.keys() & _SWITCHES.keys():
        for name, off in _SWITCHES.items():
            closed = write(options | {name: off})
            if not opens_thinking(closed):
                text, options = closed, options | {name: off}
                break
    if opens_thinking(text):
        return text, options
    answer = {"role": "assistant", "content": _PROBE}
    try:
        whole = render(
            processing_class,
            [*prompt, answer],
            tools=tools,
            chat_template=chat_template,
            chat_template_kwargs=options,
        )
    except ValueError:  # a prompt that ends with the assistant's own words
        return text, options
    lead, found, _ = whole[len(text) :].partition(_PROBE)
    special = _EMPTY_BLOCK.fullmatch(lead) or any(token in lead for token in _special_texts(processing_class))
    if whole.startswith(text) and found and special:
        text = text + lead
    return text, options


def _special_texts(processing_class: Any) -> set[str]:
    tokenizer = getattr(processing_class, "tokenizer", processing_class)
    return {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()}


def answered_text(
    processing_class: Any,
    prompt: Sequence[Mapping[str, Any]],
    completion: Sequence[Mapping[str, Any]] | str,
    *,
    tools: Any = None,
    chat_template: str | None = None,
    chat_template_kwargs: Mapping[str, Any] | None = None,
) -> tuple[Rendered, str, bool]:
    """
    The text of an answered conversation, cut where the answer begins.

    An empty thinking block that the template writes in front of an answer belongs to the prompt. A completion with
    reasoning of its own is supervised from there.

    Returns:
        `tuple`: the text before the answer, the answer, and whether a model that is asked the prompt reads that text.
    """
    if isinstance(completion, str):
        completion = [{"role": "assistant", "content": completion}]
    options = check_template_arguments(chat_template_kwargs)
    reasons = any(_has_reasoning(message) for message in completion)
    if reasons:
        head = render(
            processing_class,
            prompt,
            tools=tools,
            chat_template=chat_template,
            add_generation_prompt=True,
            chat_template_kwargs=options,
        )
    else:
        head, options = _generation_prompt(processing_class, prompt, tools, chat_template, options)
    whole = render(
        processing_class,
        [*prompt, *completion],
        tools=tools,
        chat_template=chat_template,
        chat_template_kwargs=options,
    )
    for name in () if options.keys() & _SWITCHES.keys() else _REASONING:
        thought = completion[-1].get(name) if completion else None
        if isinstance(thought, str) and thought.strip() not in whole:
            raise ValueError(
                f"the answer has `{name}`, and the chat template does not write it: the answer would be trained on without "
                "its thoughts. Use a template that does, or remove that key."
            )
    bare = _BLOCK_AT_END.sub("", head)
    served = True
    if whole.startswith(head):
        tail = whole[len(head) :]
    elif not reasons and bare != head and whole.startswith(bare):
        # The template leaves the block out of an answer that it writes itself
        tail = whole[len(bare) :]
        if opens_thinking(head):
            head, served = Rendered(bare), False
    else:
        head = Rendered(_common_start(head, whole))
        tail, served = whole[len(head) :], False
    block = None if reasons else _EMPTY_BLOCK.match(tail)
    if block is not None and block.group().strip():
        served = served and not opens_thinking(head)
        head, tail = head + block.group(), tail[block.end() :]
    return head, str(tail), served


def _has_reasoning(message: Mapping[str, Any]) -> bool:
    if any(message.get(name) for name in _REASONING):
        return True
    content = message.get("content", message.get("value"))
    return isinstance(content, str) and re.search(rf"{_START}|{_END}", content) is not None
