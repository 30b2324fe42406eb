"""The chat format as a Jinja template, for transformers and vLLM: it writes what `corpus.conversation` writes.

A template writes text, and the tokenizer takes every special token that it finds spelled in a text for that token. So
that no message can spell one, the template parts the first two characters of each by a mark, which the exported
tokenizer takes out again once it has looked for special tokens. Two characters, not whole names: of names that overlap
some could be left.
"""

from __future__ import annotations

from collections.abc import Iterable

CALCULATORS = ("python", "calculator", "calculate")  # the names of the one tool, in data and in OpenAI's API
MARK = "\ufdd0"  # a noncharacter, free for such use; a message that has it keeps it


def escapes(special: Iterable[str]) -> list[tuple[str, str]]:
    """What to replace by what, in this order, so that a text spells none of the tokens `special`.

    A mark that stands before a second character already becomes two, as `unescapes` takes away one.
    """
    heads = sorted({name[:2] for name in special})
    again = [head for head in heads if head[0] == head[-1]]  # one pass finds but one "aa" in "aaa"
    doubled = [(marked, MARK + marked) for marked, _ in unescapes(special)]
    return doubled + [(head, head[0] + MARK + head[1:]) for head in heads + again]


def unescapes(special: Iterable[str]) -> list[tuple[str, str]]:
    """What to replace by what to undo `escapes(special)`."""
    return [(MARK + second, second) for second in sorted({name[1:2] for name in special})]


def chat_template(special: Iterable[str]) -> str:
    """The template for a tokenizer that has the tokens `special`.

    It refuses what `corpus.conversation` refuses, and the arguments of a call as JSON text, which no template can read:
    vLLM makes them an object. vLLM knows by the name `content` that parts may be given.
    """
    pairs = ascii([list(pair) for pair in escapes(special)])
    return _TEMPLATE.replace("ESCAPES", pairs).replace("CALCULATORS", ascii([*CALCULATORS]))


_TEMPLATE = """\
{%- macro text(content) -%}
  {%- set safe = namespace(text=content) -%}
  {%- for old, new in ESCAPES -%}{%- set safe.text = safe.text | replace(old, new) -%}{%- endfor -%}
  {{- safe.text -}}
{%- endmacro -%}
{%- set roles = ['system', 'user', 'assistant', 'tool'] -%}
{%- set calculators = CALCULATORS -%}
{%- set types = ['text', 'python', 'python_output'] -%}
{%- set no_parts = "a message's content is neither text nor parts of " ~ types | join(', ') -%}
{%- set state = namespace(system='', previous='', text='') -%}
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message is not mapping -%}
    {{- raise_exception('a message must be an object with role and content') -}}
  {%- endif -%}
  {%- set role = message.role | string | truncate(40) -%}
  {%- set calls = message.tool_calls or [] -%}
  {%- set one = 1 if message.role == 'assistant' else 0 -%}
  {%- if calls is string or calls is mapping or calls is not iterable or calls | length > one -%}
    {{- raise_exception("a message of the role '" ~ role ~ "' has the tool_calls " ~ calls | string | truncate(40)
        ~ '; one of the assistant has one at most, as a list') -}}
  {%- endif -%}
  {%- if message.role not in roles -%}
    {{- raise_exception("a message has the role '" ~ role ~ "'; the roles are " ~ roles | join(', ')) -}}
  {%- endif -%}
  {%- set content = [{'type': 'text', 'text': message.content}] if message.content is string else message.content -%}
  {%- if calls and (content is none or content is undefined) -%}{%- set content = [] -%}{%- endif -%}
  {%- if content is undefined or content is mapping or content is not iterable -%}
    {{- raise_exception(no_parts) -}}
  {%- endif -%}
  {%- for part in content -%}
    {%- if part is not mapping or part.type not in types or part.text is not string -%}
      {{- raise_exception(no_parts) -}}
    {%- endif -%}
  {%- endfor -%}
  {%- if calls -%}
    {%- set function = calls[0].function if calls[0] is mapping and calls[0].function is mapping else {} -%}
    {%- set values = function.arguments.values() | list if function.arguments is mapping else [] -%}
    {%- if function.name not in calculators or values | length != 1 or values[0] is not string -%}
      {%- set name = function.name | default(none) | string -%}
      {%- set name = "'" ~ name ~ "'" if function.name is string else name -%}
      {{- raise_exception('a message calls ' ~ name | truncate(40) ~ ' with ' ~ function.arguments | string
          | truncate(40) ~ '; the only tool here is the calculator (' ~ calculators | join(', ')
          ~ '), with one string in an object') -}}
    {%- endif -%}
    {%- set content = content + [{'type': 'python', 'text': values[0]}] -%}
  {%- endif -%}
  {%- set all_text = content | map(attribute='text') | join -%}
  {%- if message.role == 'system' -%}
    {%- set state.system = state.system + all_text + '\\n\\n' -%}
  {%- elif message.role == 'user' -%}
    {{- '<|user_start|>' + text(state.system + all_text) + '<|user_end|>' -}}
    {%- set state.system = '' -%}
  {%- elif message.role == 'tool' -%}
    {%- if state.previous not in ('assistant', 'tool') -%}
      {{- raise_exception('a message of the role tool follows none of the assistant') -}}
    {%- endif -%}
    {{- '<|output_start|>' + text(all_text) + '<|output_end|>' -}}
    {%- if loop.last -%}{%- if not add_generation_prompt -%}{{- '<|assistant_end|>' -}}{%- endif -%}
    {%- elif loop.nextitem.role not in ('assistant', 'tool') -%}{{- '<|assistant_end|>' -}}{%- endif -%}
  {%- else -%}
    {%- if state.previous != 'tool' -%}{{- '<|assistant_start|>' -}}{%- endif -%}
    {%- set state.text = '' -%}
    {%- for part in content -%}
      {%- if part.type == 'text' -%}{%- set state.text = state.text + part.text -%}
      {%- else -%}
        {%- set name = 'python' if part.type == 'python' else 'output' -%}
        {{- text(state.text) + '<|' + name + '_start|>' + text(part.text) + '<|' + name + '_end|>' -}}
        {%- set state.text = '' -%}
      {%- endif -%}
    {%- endfor -%}
    {{- text(state.text) -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}{{- '<|assistant_end|>' -}}{%- endif -%}
  {%- endif -%}
  {%- set state.previous = message.role -%}
{%- endfor -%}
{%- if state.system -%}{{- raise_exception('a system message is followed by none of the user') -}}{%- endif -%}
{%- if not messages -%}{{- raise_exception('there are no messages') -}}{%- endif -%}
{%- if add_generation_prompt and messages[-1].role != 'tool' -%}{{- '<|assistant_start|>' -}}{%- endif -%}
"""
