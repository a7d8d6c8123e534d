"""A template of others ends within seconds and without gigabytes, and prints what transformers prints."""

import resource
import threading
import time
from datetime import datetime

import pytest

from fuserl_megatron.records import template_account
from fuserl_megatron.records.templates import BadPrompt, ChatTemplate
from fuserl_megatron.util.errors import UserError

CHAT = (
    ("system", "be  brief"),
    ("user", " x\n\ty'\"<&> \u4e16 "),
    ("assistant", "a<think>b</think>c"),
    ("user", "1|2|3"),
)
# each of these wants more than a machine has, in one operation or in a loop
GREEDY = {
    "text times number": "{{ 'a' * 4000000000 }}",
    "number times text": "{{ 4000000000 * 'a' }}",
    "list times number": "{{ [1] * 4000000000 }}",
    "center": "{{ 'a'.center(3000000000) }}",
    "center, when compiled": "{{ 'a' | center(3000000000) }}",
    "zfill": "{{ 'a'.zfill(3000000000) }}",
    "bytes": "{{ 'a'.encode().ljust(3000000000) }}",
    "to_bytes": "{{ (1).to_bytes(3000000000, 'big') }}",
    "expandtabs": "{{ ('\t' * 10000).expandtabs(1000000) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000) | replace('a', 'b' * 100000) }}",
    "translate": "{{ ('a' * 100000).translate({97: 'b' * 100000}) }}",
    "join": "{{ ''.join(['x' * 1000000] * 100000) }}",
    "join filter": "{{ (['x' * 1000000] * 100000) | join }}",
    "join of a map": "{{ (['x' * 1000000] * 100000) | map('upper') | join }}",
    "format": "{{ '{:>3000000000}'.format('a') }}",
    "format, another way": "{{ '{:>3000000000}'['format']('a') }}",
    "format, width as field": "{{ '{:>{}}'.format('a', 3000000000) }}",
    "format_map": "{{ '{a:>3000000000}'.format_map({'a': 1}) }}",
    "percent": "{{ '%3000000000d' % 1 }}",
    "percent, width as value": "{{ '%*d' % (3000000000, 1) }}",
    "percent, precision": "{{ '%.3000000000d' % 1 }}",
    "format filter": "{{ '%3000000000d' | format(1) }}",
    "indent": "{{ ('\n' * 100000) | indent('x' * 100000) }}",
    "tojson": "{{ [1, 2] | tojson(indent=3000000000) }}",
    "batch": "{{ [1] | batch(3000000000, 'x') | list }}",
    "slice": "{{ [1] | slice(3000000000) | list }}",
    "round": "{{ 1.5 | round(900000000, 'ceil') }}",
    "lipsum": "{{ lipsum(n=10000000) }}",
    "power": "{{ 9 ** (9 ** 9) }}",
    "squares": "{% set ns = namespace(x=9) %}{% for i in range(60) %}{% set ns.x = ns.x * ns.x %}{% endfor %}",
    "text doubled": "{% set ns = namespace(s='aa') %}{% for i in range(60) %}{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "list doubled": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "text kept": "{% set s = 'a' * 9000000 %}{% set ns = namespace(l=[]) %}"
    "{% for i in range(99999) %}{% set ns.l = ns.l + [s[1:]] %}{% endfor %}",
    "block in a loop": "{% set x %}{% for i in range(99999) %}{{ messages[0].content * 999 }}{% endfor %}{% endset %}",
    "literal in a loop": "{% set x %}{% for i in range(99999) %}" + "x" * 5000 + "{% endfor %}{% endset %}",
    "constant in a loop": "{% set x %}{% for i in range(99999) %}{{ '" + "x" * 5000 + "' }}{% endfor %}{% endset %}",
    "date": "{{ strftime_now('%9999999d' * 100000) }}",
    "recursion": "{% macro f(n) %}{{ f(n + 1) }}{% endmacro %}{{ f(1) }}",
}
ENDLESS = {
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops that print": "{% for i in range(99999) %}{% for j in range(99999) %}abc{% endfor %}{% endfor %}",
    "macros": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "lists in lists": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = [ns.s, ns.s] %}{% endfor %}"
    "{{ ns.s | tojson }}",
    "arguments": "{% set ns = namespace(s=[1]) %}{% macro m() %}{% set ns.s = varargs %}{% endmacro %}"
    "{% for i in range(60) %}{% set _ = m(ns.s, ns.s) %}{% endfor %}{{ ns.s }}",
    "batches": "{% set ns = namespace(s=[1]) %}{% for i in range(60) %}{% set ns.s = (ns.s * 2) | batch(2) | list %}"
    "{% endfor %}{{ ns.s }}",
    "dictionaries": "{% set ns = namespace(s=1) %}{% for i in range(60) %}{% set ns.s = dict(a=ns.s, b=ns.s) %}"
    "{% endfor %}{{ ns.s }}",
    "sum of lists": "{{ ([['a'] * 1000] * 1000000) | sum(start=[]) }}",
}  # fmt: skip


def refusal(text):
    start = time.thread_time()
    with pytest.raises(BadPrompt, match="the chat template goes on without end") as error:
        ChatTemplate(text, {}).render(CHAT)
    assert error.value.kind == "template_limit" and "\n" not in str(error.value)
    return time.thread_time() - start


@pytest.mark.parametrize("name", GREEDY)
def test_no_operation_takes_gigabytes(name):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert refusal(GREEDY[name]) < 3
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


@pytest.mark.parametrize("name", ENDLESS)
def test_nothing_goes_on_without_end(name, monkeypatch):
    if name != "nested loops":  # once with the real limit; the others sooner
        monkeypatch.setattr(template_account, "WORK", 1 << 21)
    assert refusal(ENDLESS[name]) < 2 * template_account.SECONDS


def test_the_time_of_a_rendering_is_limited_in_any_thread(monkeypatch):
    """Loops whose bodies make nothing, so that only the clock stops them."""
    monkeypatch.setattr(template_account, "SECONDS", 0.2)
    text = "{% set l = range(99999) | list %}{% for i in l %}{% if 100001 is in l %}{% endif %}{% endfor %}"
    seconds = []
    thread = threading.Thread(target=lambda: seconds.append(refusal(text)))
    thread.start()
    thread.join(60)
    assert seconds and seconds[0] < 3


def test_a_limit_says_nothing_about_the_next_rendering():
    template = ChatTemplate("{% for i in range(messages[0].content | int) %}{{ 'x' * 99999 }}{% endfor %}", {})
    with pytest.raises(BadPrompt):
        template.render((("user", "99999"),))
    assert template.render((("user", "2"),)) == "x" * 199998


def test_too_large_too_deep_and_not_jinja():
    with pytest.raises(BadPrompt, match="has 1,048,577 characters, more than 1,048,576"):
        ChatTemplate("x" * ((1 << 20) + 1), {})
    for text in ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "{% for %}", "{{ 1 | nofilter }}"):
        with pytest.raises(BadPrompt) as error:
            ChatTemplate(text, {})
        assert "\n" not in str(error.value)


def test_what_a_template_says_cannot_steer_the_terminal():
    with pytest.raises(BadPrompt) as error:
        ChatTemplate(r"{{ raise_exception('\x1b[31mred\x07\u202e') }}", {}).render(CHAT)
    assert r"\x1b[31mred\x07\u202e" in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "text",
    [
        "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }}"
        "{{ loop.nextitem.role if not loop.last }}{{ loop.cycle('a', 'b') }}{% else %}none{% endfor %}",
        "{% for m in messages if m.role == 'user' %}{{ loop.revindex0 }}{{ m.content | trim }}{% else %}-{% endfor %}",
        "{% for m in nothing %}x{% else %}empty{% endfor %}{{ nothing }}{{ nothing is defined }}{{ none }}",
        "{% for k, v in messages[0].items() %}{{ k }}={{ v }};{% endfor %}{% for c in 'abc' %}{{ c }}{% endfor %}",
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% elif loop.index0 == 3 %}{% break %}"
        "{% endif %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
        "{% for x in [[1, [2]], [3]] recursive %}{{ loop.depth }}{% if x is iterable %}{{ loop(x) }}{% else %}{{ x }}"
        "{% endif %}{% endfor %}",
        "{{ messages | tojson }}{{ messages | tojson(indent=2, sort_keys=True) }}{{ tools | tojson }}",
        "{{ messages[1].content.split('\\n')[-1] }}{{ messages[-1].content.split('|') | join('+') }}",
        "{{ messages[::-1][0] }}{{ messages[1:] }}{{ 'abc'[1:] }}",
        "{{ '%-5s|%05.1f' % ('a', 1.25) }}{{ '{:>6}|{}'.format('a', 2) }}{{ '%s!' | format(3) }}",
        "{{ 'x' * 3 }}{{ 1 + 2 ** 3 % 5 }}{{ 'a' ~ 1 ~ none }}",
        "{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='content') | list }}",
        "{{ [1, 2, 3] | batch(2, 'x') | list }}{{ [1, 2, 3] | slice(2) | list }}{{ messages | groupby('role') }}",
        "{{ [[1], [2]] | sum(start=[]) }}{{ [1, 2] | sum }}{{ (1, 2) }}{{ {'a': [1]} }}{{ 'a' in ['a'] }}",
        "{% macro m(a, b=[1]) %}{{ a }}{{ b }}{{ varargs }}{{ kwargs }}{{ caller() if caller }}{% endmacro %}"
        "{{ m(1) }}{{ m(1, 2, 3, c=4) }}{% call m('x') %}inside{% endcall %}",
        "{% set ns = namespace(n=0, l=[]) %}"
        "{% for m in messages %}{% set ns.n = ns.n + 1 %}{% set ns.l = ns.l + [m.role] %}{% endfor %}"
        "{{ ns.n }}{{ ns.l }}{% set b %} {{ ns.n }} {% endset %}[{{ b }}]{% filter upper %}abc{% endfilter %}",
        "  {%- if true %}\n  kept \n{%- endif %}\n    {% if true %}\n trimmed\n    {% endif %}\n{{ bos_token }}\n",
        "{{ messages[0].content | indent(4) | replace('b', 'B') | title | wordwrap(3) | center(30) }}",
        "{{ 1.5 | round(1) }}{{ 7 | default(3) }}{{ x | default(3) }}{{ '5' | int + 1 }}",
        "{{ messages[1].content | e }}{{ messages[1].content | string | length }}{{ messages[0] is mapping }}",
    ],
)  # fmt: skip
def test_the_limits_change_no_character(text):
    from transformers.utils.chat_template_utils import _compile_jinja_template

    from fuserl_megatron.records.messages import as_dicts

    given = {"bos_token": "<s>", "add_generation_prompt": False, "tools": None, "documents": None}
    expected = _compile_jinja_template(text).render(messages=as_dicts(CHAT), **given)
    assert ChatTemplate(text, {"bos_token": "<s>"}).render(CHAT) == expected != ""


def test_one_date_for_one_build():
    template = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", {}, datetime(2026, 1, 2, 3, 4, 5, 6))
    assert template.render(CHAT) == template.render(CHAT) == "2026-01-02 03:04:05.000006" and template.date_asked
    now = ChatTemplate("{{ strftime_now('%Y-%m-%d %H:%M:%S.%f') }}", {})
    assert now.render(CHAT) == now.render(CHAT) and now.render(CHAT).startswith("20")


def test_an_argument_that_the_template_does_not_read_is_refused():
    template = ChatTemplate("{% if enable_thinking %}x{% endif %}", {})
    template.check_kwargs({"enable_thinking": False})
    with pytest.raises(UserError, match=r"chat_template_kwargs.enable_thinkin: .* did you mean enable_thinking\?"):
        template.check_kwargs({"enable_thinkin": False})
