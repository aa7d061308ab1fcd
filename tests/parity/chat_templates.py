"""Chat templates in the shapes that published models have, and conversations to render by them."""

# ruff: noqa: E501

from __future__ import annotations

from typing import Any

CALL = {"type": "function", "function": {"name": "get", "arguments": {"city": "Zürich", "n": 2}}}
CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "question": [{"role": "user", "content": "Hello?"}],
    "turns": [
        {"role": "user", "content": "  Hello?\n"},
        {"role": "assistant", "content": "Hi — 'you' & <me>."},
        {"role": "user", "content": "再见 👋"},
    ],
    "system": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Why?", "name": None},
    ],
    "refused": [
        {"role": "assistant", "content": "I begin."},
        {"role": "assistant", "content": "And go on."},
    ],
    "asks first": [{"role": "user", "content": "A"}, {"role": "user", "content": "B"}],
    "thinks": [
        {"role": "user", "content": "2 + 2?"},
        {"role": "assistant", "content": "<think>\nEasy.\n</think>\n\n4"},
        {"role": "user", "content": "And 3?"},
        {"role": "assistant", "content": "5", "reasoning_content": "Add one."},
        {"role": "user", "content": "Thanks."},
    ],
    "calls": [
        {"role": "system", "content": "Use tools."},
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]},
        {"role": "tool", "name": "get", "content": '{"sun": true}'},
        {"role": "tool", "name": "get", "content": "rain"},
        {"role": "assistant", "content": "Sun, then rain."},
        {"role": "user", "content": "Good."},
    ],
    "parts": [
        {"role": "user", "content": [{"type": "text", "text": "Look: "}, {"type": "image"}]},
    ],
}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "get",
        "description": "é <b> 'quoted' & \"so\"",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["Zürich", "Bern"]},
                "n": {"type": ["integer", "null"], "default": 3},
                "list": {"type": "array", "items": {"type": "number"}},
                "inner": {"type": "object", "properties": {"x": {"type": "boolean"}}},
            },
            "required": ["city"],
        },
    },
}
VARIABLES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "no prompt": {"add_generation_prompt": False},
    "tools": {"tools": [TOOL, TOOL]},
    "thinking": {"enable_thinking": True},
    "no thinking": {"enable_thinking": False},
    "documents": {
        "documents": [{"title": "One", "text": "First."}, {"title": "Two", "text": "Second."}]
    },
}
TEMPLATES = {
    "llama-3": """{% set loop_messages = messages %}{% for message in loop_messages %}
    {%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'
        + message['content'] | trim + '<|eot_id|>' %}
    {%- if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}""",
    "qwen": """{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n<tools>' }}
    {%- for tool in tools %}{{- "\n" }}{{- tool | tojson }}{%- endfor %}
    {{- '\n</tools><|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}
{%- endif %}
{%- set ns = namespace(last=messages|length - 1, seen=false) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if message.role == "user" and not ns.seen %}
        {%- set ns.seen = true %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == "system" and loop.first %}{% continue %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' + message.content.strip('\n') + '<|im_end|>\n' }}
    {%- if loop.index0 > ns.last %}{{- '<!-- late -->' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\n\n</think>' }}
    {%- endif %}
{%- endif %}""",
    "mistral": """{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (loop.index0 % 2 == 0) %}
        {{- raise_exception("Conversation roles must alternate user/assistant") }}
    {%- endif %}
    {%- if message["role"] == "user" %}
        {%- if system_message is defined and loop.last %}
            {{- "[INST] " + system_message + "\n\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- else %}
        {{- " " + message["content"] + eos_token }}
    {%- endif %}
{%- endfor %}""",
    "gemma": """{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- set first_user_prefix = messages[0]['content'] + '\n\n' -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'assistant') -%}{%- set role = "model" -%}
    {%- else -%}{%- set role = message['role'] -%}{%- endif -%}
    {{ '<start_of_turn>' + role + '\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}{{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}{{ item['text'] | trim }}{%- endfor -%}
    {%- else -%}{{ raise_exception("Invalid content type") }}{%- endif -%}
    {{ '<end_of_turn>\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}{{'<start_of_turn>model\n'}}{%- endif -%}""",
    "chatml": """{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}
{{ '<|im_start|>system\nBe helpful.<|im_end|>\n' }}{% endif %}
{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}""",
    "phi": """{% for message in messages %}{% if message['role'] == 'system' %}
{{-'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}
{{-'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}
{{-'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}""",
    "tools": """{%- macro shown(value) -%}
    {{- value if value is string else value | tojson -}}
{%- endmacro -%}
{%- if tools -%}
    <|im_start|>system
    {%- if messages and messages[0].role == "system" %}{{ "\\n" + messages[0].content }}{% endif %}

# Tools
    {%- for tool in tools %}
        {%- set f = tool.function if tool.function is defined else tool %}

{{ f.name }}: {{ f.description | trim }}
        {%- for name, schema in f.parameters.properties.items() if schema is mapping %}
 - {{ name }}{{ "" if name in f.parameters.required else "?" }}: {{ shown(schema.type) }}
            {%- if schema.enum %} ({{ schema.enum | map("upper") | join(" | ") }}){% endif %}
            {%- if "default" in schema %} = {{ schema.default }}{% endif %}
        {%- endfor %}
{{ f.parameters | tojson(indent=2) }}
    {%- endfor %}<|im_end|>
{% endif -%}
{%- for message in messages -%}
    {%- if message.role == "tool" -%}
        {%- if loop.first or loop.previtem.role != "tool" %}<|im_start|>user{% endif %}
<tool_response>
{{ shown(message.content) }}
</tool_response>
        {%- if loop.last or loop.nextitem.role != "tool" %}<|im_end|>
{% endif -%}
    {%- elif message.tool_calls -%}
<|im_start|>assistant
        {%- for call in message.tool_calls %}
<tool_call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</tool_call>
        {%- endfor %}<|im_end|>
{% elif message.content is string and not (loop.first and tools and message.role == "system") -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endif -%}
{%- endfor -%}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif -%}""",
    "reasoning": """{%- set ns = namespace(is_first=false, last=-1) -%}
{%- for message in messages %}{% if message.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}
{%- endfor -%}
{{ bos_token }}{{ messages | selectattr('role', 'equalto', 'system') | map(attribute='content') | join('\n\n') }}
{%- for message in messages | rejectattr('role', 'equalto', 'system') -%}
    {%- set content = message.content if message.content is string else '' -%}
    {%- set thought = message.reasoning_content | default('', true) -%}
    {%- if '</think>' in content -%}
        {%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') -%}
        {%- set content = content.split('</think>')[-1].lstrip('\n') -%}
    {%- endif -%}
    {%- if message.role == 'assistant' -%}
<｜Assistant｜>
        {%- if thought and loop.index0 > ns.last %}<think>{{ thought }}</think>{% endif -%}
{{ content }}{{ eos_token }}
    {%- elif message.role == 'user' -%}
<｜User｜>{{ content | trim }}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
<｜Assistant｜>
    {%- if enable_thinking is defined and enable_thinking %}<think>
{% elif enable_thinking is defined %}<think></think>{% endif -%}
{%- endif -%}""",
    "macros": """{%- macro kind(schema, level=0) -%}
    {%- if schema.type == "array" -%}{{ kind(schema["items"], level + 1) }}[]
    {%- elif schema.type == "object" -%}{
        {%- for name, inner in schema.properties | dictsort -%}
{{ name }}: {{ kind(inner, level + 1) }}{{ ", " if not loop.last }}
        {%- endfor -%} }
    {%- elif schema.enum -%}{%- for each in schema.enum -%}"{{ each }}"{{ " | " if not loop.last }}{%- endfor -%}
    {%- elif schema.type is iterable and schema.type is not string -%}{{ schema.type | join(" | ") }}
    {%- else -%}{{ schema.type }}{%- endif -%}
{%- endmacro -%}
{%- set today = strftime_now("%Y-%m-%d") -%}
<|start|>system<|message|>Date: {{ today | length }}{% if tools is not none %}

namespace functions {
    {%- for tool in tools %}
// {{ tool.function.description | replace("é", "e") | upper }}
type {{ tool.function.name }} = (_: {{ kind(tool.function.parameters) }}) => any;
    {%- endfor %}
}{% endif %}<|end|>
{%- for message in messages -%}
    {%- if message.tool_calls is defined and message.tool_calls -%}
        {%- set call = (message.tool_calls | first).function -%}
<|start|>assistant to={{ call.name }}<|message|>{{ call.arguments | tojson }}<|call|>
    {%- elif message.content is iterable and message.content is not string -%}
<|start|>{{ message.role }}<|message|>
        {%- for part in message.content %}{{ part.text if part.type == "text" else "[" ~ part.type ~ "]" }}{% endfor -%}
<|end|>
    {%- else -%}
<|start|>{{ message.role }}<|message|>{{ message.content }}<|{{ "return" if loop.last and message.role == "assistant" else "end" }}|>
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}<|start|>assistant{%- endif -%}""",
    "documents": """{%- set given = documents if documents else [] -%}
{%- set system %}You answer{% if given %} from {{ given | length }} documents{% endif %}.{% endset -%}
<|start_of_role|>system<|end_of_role|>{{ system }}<|end_of_text|>
{% for document in given -%}
<|start_of_role|>document {"id": {{ loop.index }}}<|end_of_role|>
{{ document.title | title }} / {{ document['text'][:20] }}<|end_of_text|>
{% endfor -%}
{%- for message in messages if message.content is string and message.role in ("user", "assistant") -%}
<|start_of_role|>{{ message.role }}<|end_of_role|>{{ "%s" | format(message.content) }}<|end_of_text|>
{{ loop.cycle("", " ") }}
{%- else -%}
nobody said anything
{%- endfor -%}
{%- if add_generation_prompt -%}<|start_of_role|>assistant<|end_of_role|>{%- endif -%}""",
}
