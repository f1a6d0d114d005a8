"""Chat templates: convert messages to text in the format that a model was trained on.

Jinja is imported when a template is first used: most prompts of a command are no chats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final, cast

from loradeploy.errors import BundleError, UsageError, first_line, kind_and_line

if TYPE_CHECKING:
    import jinja2

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
        from loradeploy.bundle.text.template_environment import environment

        try:
            return environment().from_string(self._source)
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
        from loradeploy.bundle.text.template_environment import environment
        from loradeploy.bundle.text.template_limits import LimitError, limited

        try:
            with limited(()):
                environment().check_constants(self._source)
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
        import jinja2

        from loradeploy.bundle.text.template_environment import joined
        from loradeploy.bundle.text.template_limits import LimitError, limited

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
                return joined(pieces, most)
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
