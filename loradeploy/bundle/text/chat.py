"""Chat templates: convert messages to text in the format that a model was trained on."""

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

# Real templates have some kilobytes, at most some tens of kilobytes.
MAX_TEMPLATE_BYTES: Final = 128 << 10

# The text of a test message, to find whether and in which form a template reads a message's text.
_PROBE: Final = "probe"

TEXT: Final = "text"
PARTS: Final = "parts"

# {"role": "user", "content": "…"}, and any other keys that the template reads.
Message = Mapping[str, Any]


class ChatTemplate:
    """A Jinja template with the names and filters of transformers' chat templates.

    Templates come with checkpoints and are untrusted code: they run in Jinja's immutable sandbox,
    with limits on computation and output. They are compiled on first use.

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
        """The compiled template."""
        try:
            return _environment().from_string(self._source)
        except Exception as problem:  # deep nesting raises other exceptions than Jinja's
            raise BundleError(
                f"the chat template is not a valid template: {first_line(problem)}"
            ) from None

    def check_constants(self) -> None:
        """Check that a Jinja environment without limits can compile the template in bounded time.

        Raises:
            UsageError: its constants exceed a limit of computation.
            BundleError: it is not a valid template.
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
            UsageError: there are no messages, or the template refuses them or exceeds a limit.
            BundleError: it is not a valid template.
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
        """The form of message contents that the template reads: TEXT, or PARTS, a list of parts.

        Templates of vision-language models iterate over parts and omit plain texts. None if the
        template omits the text in both forms.
        """
        for form, content in ((TEXT, _PROBE), (PARTS, [{"type": "text", "text": _PROBE}])):
            try:
                shown = self._rendered(self._template, [{"role": "user", "content": content}], True)
            except UsageError:  # the template does not accept this conversation
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
                    # Templates test `tools is not none`, which is true for an undefined name.
                    tools=None,
                    documents=None,
                    add_generation_prompt=add_generation_prompt,
                    **self._special_tokens,
                )
                return _joined(pieces, most)
        except LimitError as problem:
            raise UsageError(f"the chat template exceeds a limit: {problem}") from None
        except jinja2.TemplateError as problem:  # raised by the template itself
            raise UsageError(
                f"the chat template refuses the messages: {first_line(problem)}"
            ) from None
        except Exception as problem:  # untrusted code can fail in any way
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
    """`{% generation %}…{% endgeneration %}`, used to mark answers: renders its body."""

    tags = {"generation"}  # noqa: RUF012 - declared so by jinja2

    def parse(self, parser: jinja2.parser.Parser) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body, lineno=line)


class _Namespace(jinja2.utils.Namespace):
    """Jinja's namespace without names with a leading underscore, which could expose internals."""

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
    if re.search(r"\d{4}", form):  # a field width, to which the C library would pad
        raise LimitError("it pads the time to a width that is too large")
    return datetime.now().strftime(form)


def template_source(value: object) -> str | None:
    """The template in `chat_template` of a tokenizer_config.json: a text, or the default of a list.

    Raises:
        BundleError: it is neither a text nor a list.
    """
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(entry, Mapping) for entry in value):
        named = {entry.get("name"): entry.get("template") for entry in value}
        if isinstance(named.get("default"), str):
            return cast(str, named["default"])
        return None
    raise BundleError("tokenizer_config.json: chat_template is neither a text nor a list of them")
