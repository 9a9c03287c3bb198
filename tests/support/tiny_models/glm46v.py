"""GLM-4.6V-Flash: the model of GLM-4.1V with a processor and a chat template of its own. They tell it by these; its `model_type` is the same."""

from __future__ import annotations

from pathlib import Path

from . import glm4v

NAMES = ("glm46v",)
SINCE = "5.0"  # its processor
HUB_NAMES = glm4v.HUB_NAMES

CHAT = """\
[gMASK]<sop>
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>\\n' -}}
{%- if message['content'] is string -%}
{{- message['content'] -}}
{%- else -%}
{%- for part in message['content'] -%}
{%- if part['type'] == 'video' -%}
{{- '<|begin_of_video|><|video|><|end_of_video|>' -}}
{%- elif part['type'] == 'image' -%}
{{- '<|begin_of_image|><|image|><|end_of_image|>' -}}
{%- else -%}
{{- part['text'] -}}
{%- endif -%}
{%- endfor -%}
{%- endif -%}
{{- '/nothink' if message['role'] == 'user' and enable_thinking is defined and not enable_thinking else '' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>\\n' -}}
{{- '<think></think>\\n' if enable_thinking is defined and not enable_thinking else '' -}}
{%- endif -%}
"""


def write(folder: Path, name: str, **shape) -> None:
    glm4v.write(folder, name, chat=CHAT, processor="Glm46V", **shape)
