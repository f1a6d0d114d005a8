# ruff: noqa: E501
"""Untrusted chat templates are limited in time and memory."""

from __future__ import annotations

import time

import pytest

from loradeploy.bundle.text.chat import MAX_TEMPLATE_BYTES, ChatTemplate
from loradeploy.errors import BundleError, UsageError

resource = pytest.importorskip("resource")  # missing on Windows

CHAT = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
DOUBLED = "{% set ns = namespace(x='ab') %}{% for i in range(60) %}"
BOMBS = {
    "a power": "{{ 9**(9**9) }}",
    "a power that is not asked for": "{% if 0 %}{{ 9**(9**9) }}{% endif %}",
    "factors": "{% set ns = namespace(x=9) %}{% for i in range(99) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "a width": "{{ '%999999999d' % 1 }}",
    "a width given": "{{ '%*d' % (999999999, 1) }}",
    "a width in a filter": "{{ '%999999999d'|format(1) }}",
    "a field": "{{ '{:999999999}'.format(1) }}",
    "a field given": "{{ '{:{}}'.format(1, 999999999) }}",
    "a time": "{{ strftime_now('%999999999d') }}",
    "repetition": "{{ 'a' * 10**9 }}",
    "repetition of a list": "{{ ([0] * 10**9)|length }}",
    "repetition of repetitions": "{% set a = 'a' * 1000000 %}{% set b = [a] * 1000000 %}{{ b|join }}",
    "padding": "{{ 'a'.center(10**9) }}{{ 'a'.ljust(10**9) }}{{ 'a'.zfill(10**9) }}",
    "padding by a filter": "{{ 'a'|center(10**9) }}",
    "an indent": "{{ [1]|tojson(indent=10**9) }}",
    "an indent of text": "{{ 'a\nb'|indent(10**9) }}",
    "tabs": "{{ ('\t' * 9999).expandtabs(10**9) }}",
    "replacement": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replacement by a filter": "{{ ('a' * 100000)|replace('', 'b' * 100000) }}",
    "joining": "{{ ('b' * 100000).join('a' * 100000) }}",
    "joining by a filter": "{{ ('a' * 100000)|join('b' * 100000) }}",
    "a batch": "{{ [1]|batch(10**9, 0)|list }}",
    "slices": "{{ [1]|slice(10**9)|list|length }}",
    "bytes": "{{ (1).to_bytes(10**9, 'big') }}",
    "a loop in loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}"
    "{% endfor %}{% endfor %}{% endfor %}",
    "a loop of nothing": "{% for i in range(99999) %}{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "a loop of text": "{% for i in range(99999) %}" + "x" * 1000 + "{% endfor %}",
    "an unread loop": "{% set x %}{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}{% endset %}",
    "doubling": DOUBLED + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "doubling by ~": DOUBLED + "{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "doubling of a list": DOUBLED + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "doubling of a list to compare": "{% set n = namespace(x=[], y=[]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
    "doubling of a list to find": "{% set n = namespace(x=[], y=[]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x in [n.y] }}{{ n.x is eq n.y }}",
    "doubling as JSON": DOUBLED + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x|tojson }}",
    "a sum of lists": "{% set a = [0] * 10000 %}{{ ([a] * 10000)|sum(start=[])|length }}",
    "copies": "{% set a = [0] * 99999 %}{% for i in range(9999) %}{% set b = a[:] %}{% endfor %}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "a macro of itself twice": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(90) }}",
    "a recursive loop": "{% for x in [1] recursive %}{{ loop([1, 2]) }}{% endfor %}",
    "a block of itself": "{% block a %}{{ self.a() }}{{ self.a() }}{% endblock %}",
    "brackets": "{{ " + "[" * 250 + "]" * 250 + " }}",
    "brackets without end": "{{ " + "[" * 50_000,
    "minus": "{{ " + "-" * 50_000 + "1 }}",
    "a chain of sums": "{{ 1" + "+1" * 30_000 + " }}",
    "blocks": "{% if 1 %}" * 2_000 + "{% endif %}" * 2_000,
    "loops": "{% for a in 'a' %}" * 2_000 + "{% endfor %}" * 2_000,
    "many texts": "{{ a }}" * 9_000,
    "links": "{{ ('<' * 99999)|striptags }}",
    "filler": "{{ lipsum(n=10**9) }}",
}


@pytest.mark.parametrize("what", BOMBS)
def test_a_template_that_takes_too_long_or_grows_is_stopped(what: str) -> None:
    template = ChatTemplate(BOMBS[what], {})  # does not run the template
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    started = time.process_time()
    try:
        text = template.render(CHAT)
    except (UsageError, BundleError) as problem:
        text = ""
        assert "chat template" in str(problem)
        assert len(str(problem)) < 400
    # Far above the usual time, far below that of any of the templates without limits.
    assert time.process_time() - started < 60
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 500e3  # kB
    assert len(text) < 2e6


def test_limits_do_not_change_the_output_of_templates() -> None:
    import jinja2

    sources = [
        "{% for m in messages %}{{ '<' ~ m.role ~ '>' + m['content'][1:]|upper }}{% endfor %}",
        "{{ messages|map(attribute='content')|join(', ') }}{{ messages|length * 3 - 1 }}",
        "{{ '%s-%02d' % ('a', 7) }}{{ '%s'|format(3) }}{{ '{:>4}'.format(1) }}{{ 2 ** 10 }}",
        "{{ 'a-b'.replace('-', '+').split('+')[::-1] }}{{ ' x '.strip().center(9) }}",
        "{% macro f(n) %}{{ n }}{% if n %}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(3) }}",
        "{% set ns = namespace(n=0) %}{% for i in range(9) %}{% set ns.n = ns.n + i %}{% endfor %}{{ ns.n }}",
        "{{ [3, 1, 2]|sort|list }}{{ [1, 2]|sum }}{{ 'x' in 'xyz' }}{{ 1 < 2 <= 2 }}{{ {'a': 1}|tojson }}",
        "{% for a in [1, 2] if a > 1 %}{{ loop.last }}{{ loop.length }}{% else %}none{% endfor %}",
        "{{ undefined }}{{ none }}{{ undefined is defined }}{{ [1,2,3]|batch(2)|list }}",
        "{% set t %}a{{ 1 }}{% endset %}{{ t|trim }}{% filter upper %}b{% endfilter %}",
        "{{ messages|selectattr('role', 'eq', 'user')|list|length }}{{ ','.join(['a', 'b']) }}",
    ]
    plain = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    for source in sources:
        wanted = plain.from_string(source).render(messages=CHAT)
        assert ChatTemplate(source, {}).render(CHAT) == wanted, source


def test_long_conversations_are_rendered() -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'user' and '</think>' not in m.content %}"
        "{{ '<|' + m['role'] + '|>' + m.content | trim + '\n' }}{% endif %}{% endfor %}"
    )
    long = ChatTemplate(source, {}).render([{"role": "user", "content": "x" * 1000}] * 3000)
    assert len(long) > 3_000_000
    large = ChatTemplate(source, {}).render([{"role": "user", "content": "x" * 5_000_000}])
    assert len(large) > 5_000_000


def test_a_template_that_is_too_long_is_refused() -> None:
    with pytest.raises(BundleError, match="131,073 characters"):
        ChatTemplate("x" * (MAX_TEMPLATE_BYTES + 1), {})
