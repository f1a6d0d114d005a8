"""Chat templates: messages to the text that a model was trained to answer."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, cached_property
from typing import Any, Final, NoReturn, cast

import jinja2
import jinja2.nodes
import jinja2.parser
import jinja2.utils
from jinja2.ext import Extension

from loradeploy.bundle.text.template_limits import LimitedEnvironment, LimitError, limited
from loradeploy.errors import BundleError, UsageError, first_line, kind_and_line

# Real templates have some kilobytes, the longest some tens.
MAX_TEMPLATE_BYTES: Final = 128 << 10

# What shows whether a template reads a message's text, and in which form.
_PROBE: Final = "probe"

TEXT: Final = "text"
PARTS: Final = "parts"

# {"role": "user", "content": "…"}, and whatever else the template reads.
Message = Mapping[str, Any]


class ChatTemplate:
    """A Jinja template with the names and filters that transformers gives to chat templates.

    Templates come with checkpoints and are code of others: they run in Jinja's immutable sandbox,
    with limits of what they do and write. They are compiled when they are used first.

    Raises:
        BundleError: `source` is too long.
    """

    def __init__(self, source: str, special_tokens: Mapping[str, str]) -> None:
        if len(source) > MAX_TEMPLATE_BYTES:
            raise BundleError(
                f"the chat template has {len(source):,} characters, more than the"
                f" {MAX_TEMPLATE_BYTES:,} that are read"
            )
        self._source = source
        self._special_tokens = dict(special_tokens)

    @cached_property
    def _template(self) -> jinja2.Template:
        """The template, compiled: of a bundle that is asked no chat it never is."""
        try:
            return _environment().from_string(self._source)
        except Exception as problem:  # deep nesting fails otherwise
            raise BundleError(
                f"the chat template is not a valid template: {first_line(problem)}"
            ) from None

    def check_constants(self) -> None:
        """Make sure that a Jinja without limits can compile the template, and comes back.

        Raises:
            UsageError: constants in it take too much to compute.
            BundleError: it is no valid template.
        """
        try:
            with limited(()):
                _environment().check_constants(self._source)
        except LimitError as problem:
            raise UsageError(f"the chat template exceeds a limit: {problem}") from None
        except Exception as problem:
            raise BundleError(
                f"the chat template is not a valid template: {first_line(problem)}"
            ) from None

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The text of `messages`, ending where the model's answer begins.

        Raises:
            UsageError: there are no messages, or the template refuses them or does too much.
        BundleError: it is no valid template.
        """
        if not messages:
            raise UsageError("a chat without messages: give at least one")
        for index, message in enumerate(messages):
            if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
                raise UsageError(
                    f"message {index} of the chat is not an object with a role: give"
                    ' {"role": "user", "content": "…"}'
                )
        template = self._template
        given = [{k: v for k, v in m.items() if v is not None} for m in messages]
        if self.reads == PARTS:
            given = _in_parts(given)
        return self._rendered(template, given, add_generation_prompt)

    @cached_property
    def reads(self) -> str | None:
        """What the template takes a message's content for: a text, or a list of its parts.

        Those of models of images go through parts, and show nothing of a text. None where it shows
        the text in neither form.
        """
        for form, content in ((TEXT, _PROBE), (PARTS, [{"type": "text", "text": _PROBE}])):
            try:
                shown = self._rendered(self._template, [{"role": "user", "content": content}], True)
            except UsageError:  # it wants more of a chat than this
                if form == TEXT:
                    return TEXT
                continue
            if _PROBE in shown.lower():
                return form
        return None

    def _rendered(
        self,
        template: jinja2.Template,
        given: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool,
    ) -> str:
        try:
            with limited(given) as most:
                pieces = template.generate(
                    messages=given,
                    # Templates ask `tools is not none`, which an undefined name would answer
                    # wrongly.
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
                return _joined(pieces, most)
        except LimitError as problem:
            raise UsageError(f"the chat template exceeds a limit: {problem}") from None
        except jinja2.TemplateError as problem:  # what a template says on purpose
            raise UsageError(
                f"the chat template refuses the messages: {first_line(problem)}"
            ) from None
        except Exception as problem:  # a template is code of others, which fails as it likes
            raise UsageError(
                f"the chat template fails on the messages: {kind_and_line(problem)}"
            ) from None


def _in_parts(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """`messages` with each text as a list of one part."""
    return [
        {**message, "content": [{"type": "text", "text": message["content"]}]}
        if isinstance(message.get("content"), str)
        else dict(message)
        for message in messages
    ]


@cache
def _environment() -> LimitedEnvironment:
    environment = LimitedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, "jinja2.ext.loopcontrols"],
    )
    environment.add_filter("tojson", _tojson)
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    environment.globals["namespace"] = _Namespace
    return environment


def _joined(pieces: Iterable[str], most: int) -> str:
    """`pieces` in one text of at most `most` characters."""
    found: list[str] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if size > most:
            raise LimitError(f"it writes more than {most:,} characters")
        found.append(piece)
    return "".join(found)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the model's words for training: shown as is."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without underscored names, by which templates could reach internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # namespace(self=…) is allowed
        jinja2.utils.Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _refuse_internal(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_internal(name)
        super().__setitem__(name, value)


def _refuse_internal(name: str) -> None:
    if str(name).startswith("_"):
        raise jinja2.exceptions.SecurityError(f"the name {name!r} is not allowed in a namespace")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if re.search(r"\d{4}", form):  # a width, to which it would be padded
        raise LimitError("it pads the time to a width that is too large")
    return datetime.now().strftime(form)


def template_source(value: object) -> str | None:
    """The template in `chat_template` of a tokenizer_config.json: a text, or the default of a list.

    Raises:
        BundleError: it is neither.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        if isinstance(named.get("default"), str):
            return cast(str, named["default"])
        return None
    raise BundleError("tokenizer_config.json: chat_template is neither a text nor a list of them")
