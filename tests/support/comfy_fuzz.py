"""Prompts in ComfyUI's API form, spoilt by chance: `spoilt(random, prompt)` gives the JSON text to post, and what was done to it."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from random import Random

NUMBERS = (0, -1, 1, 2, 16, 0.5, -0.0, 1e-300, 1e300, 10**400, -(2**63), 2**64, float("nan"), float("inf"), float("-inf"))
TEXTS = (
    "", " \n\t", "0", "-1", "NaN", "it", "the red square\nthe blue one", "x" * 10**5, "{query} " + "x" * 10**5, "{query}" * 1000, "word " * 400,
    "<|im_end|><|vision_start|><|image_pad|>",
    "<IMG_CONTEXT></img>", "{query}", "{object} {answers} {query}", "{{}}", "%s%n",
    "\ud800", "a\udfffb", "\x00", "a\x00b", "\u202e\u200b\ufeff",
    "赤い四角", "👨‍👩‍👧‍👦" * 50, "../../../etc/passwd", "..\\..\\secret", "/dev/zero", "clip.mp4", "example.png", "input/../clip.mp4",
    "tiny_qwen2_vl", "tiny_internvl", "tiny_sam2.safetensors", "choose a model", "download: Qwen/Qwen2.5-VL-3B-Instruct", "download: ../x",
    "bf16", "fp16", "fp32", "float64", "expression", "class name",
)  # fmt: skip
KEYS = ("", "0", "-1", "extract", "extract:1", "a.b", "\ud800", "x" * 10**4, "None", "__proto__", "赤")
CLASSES = (
    "",
    "NoSuchNode",
    "LoadMLLM",
    "SAM2VideoPropagate",
    "KSampler",
    "PreviewImage",
    "ExtractRolloutAttention",
    "DecAFSampleClip",
    7,
    None,
    [],
    {},
)


def spoilt(random: Random, prompt: dict, ours: Callable[[str], bool]) -> tuple[str, list[str]]:
    """One to three things are wrong with it. `ours`: whether a class of nodes is this pack's; numbers and texts are changed in its nodes
    alone, since core nodes rightly make pictures of any size that they are asked for."""
    prompt = copy.deepcopy(prompt)
    done = [random.choice(MUTATIONS)(random, prompt, ours) for _ in range(random.choice((1, 1, 1, 2, 3)))]
    text = json.dumps(prompt)
    if random.random() < 0.03:  # the same key twice: the last one counts
        text = text[:-1] + "," + text[1:]
        done.append("every id twice")
    return f'{{"prompt": {text}}}', [one for one in done if one]


def literal(random: Random, deep: int = 2):
    """Any JSON value."""
    kind = random.randrange(7 if deep else 5)
    if kind < 2:
        return random.choice(NUMBERS)
    if kind < 4:
        return random.choice(TEXTS)
    if kind == 4:
        return random.choice((None, True, False))
    if kind == 5:
        return [literal(random, deep - 1) for _ in range(random.choice((0, 1, 2, 2, 3, 50)))]
    return random.choice(({}, {"__value__": literal(random, deep - 1)}, {"a": literal(random, deep - 1), "": None}, {"__type__": "IMAGE"}))


def _node(random: Random, prompt: dict, fitting: Callable[[dict], bool] = lambda node: True) -> str | None:
    keys = [key for key, node in prompt.items() if isinstance(node, dict) and isinstance(node.get("inputs"), dict) and fitting(node)]
    return random.choice(keys) if keys else None


def _place(random: Random, prompt: dict, fitting: Callable[[str, object], bool]) -> tuple[dict, str, str] | None:
    """(inputs, name, where it is) of an input with a fitting class of node and value."""
    found = [
        (node["inputs"], name, f"{key}.{name}")
        for key, node in prompt.items()
        if isinstance(node, dict) and isinstance(node.get("inputs"), dict)
        for name, value in node["inputs"].items()
        if fitting(node.get("class_type"), value)
    ]
    return random.choice(found) if found else None


def _set(place, value, what: str) -> str:
    if place is None:
        return ""
    inputs, name, where = place
    inputs[name] = value
    return f"{where}: {what} {ascii(value)[:80]}"


def _is_link(value) -> bool:
    return isinstance(value, list) and len(value) == 2


def drop_input(random, prompt, ours):
    place = _place(random, prompt, lambda kind, value: True)
    if place is None:
        return ""
    del place[0][place[1]]
    return f"{place[2]} dropped"


def drop_node(random, prompt, ours):
    key = _node(random, prompt)
    prompt.pop(key, None)
    return f"{key} dropped"


def literal_on_socket(random, prompt, ours):
    return _set(_place(random, prompt, lambda kind, value: _is_link(value)), literal(random), "not a link but")


def odd_value(random, prompt, ours):
    place = _place(random, prompt, lambda kind, value: ours(kind) and not _is_link(value))
    return _set(place, random.choice((random.choice(NUMBERS), random.choice(TEXTS), literal(random))), "value")


def odd_text(random, prompt, ours):
    place = _place(random, prompt, lambda kind, value: ours(kind) and isinstance(value, str))
    return _set(place, random.choice(TEXTS), "text")


def odd_number(random, prompt, ours):
    place = _place(random, prompt, lambda kind, value: ours(kind) and isinstance(value, int | float))
    return _set(place, random.choice(NUMBERS), "number")


def link_elsewhere(random, prompt, ours):
    """To another output, to a node that need not exist, or round in a circle."""
    place = _place(random, prompt, lambda kind, value: _is_link(value))
    target = random.choice([*prompt, *prompt, "nowhere", 7, None, ""])
    return _set(place, [target, random.choice((0, 0, 0, 1, 2, 3, 4, -1, 99, 0.5, "0", None))], "linked to")


def link_value(random, prompt, ours):
    """A value that comes over a link, whose range ComfyUI does not check."""
    value = random.choice((*NUMBERS[:9], random.choice(TEXTS)))
    kind = "StringConstant" if isinstance(value, str) else "PrimitiveInt" if isinstance(value, int) else "PrimitiveFloat"
    kind = "PrimitiveString" if kind == "StringConstant" else kind
    place = _place(random, prompt, lambda owner, old: ours(owner) and type(old) is type(value))
    if place is None:
        return ""
    prompt["source"] = {"class_type": kind, "inputs": {"value": value}}
    return _set(place, ["source", 0], f"over a link {ascii(value)[:60]}:")


def other_class(random, prompt, ours):
    key = _node(random, prompt)
    if key is None:
        return ""
    prompt[key]["class_type"] = random.choice([*CLASSES, *(node.get("class_type") for node in prompt.values() if isinstance(node, dict))])
    return f"{key} is a {ascii(prompt[key]['class_type'])}"


def other_key(random, prompt, ours):
    key, new = _node(random, prompt), random.choice(KEYS)
    if key is not None:
        prompt[new] = prompt.pop(key)
    return f"{key} is called {ascii(new)[:30]}"


def more_input(random, prompt, ours):
    key = _node(random, prompt, lambda node: ours(node.get("class_type")))
    if key is None:
        return ""
    name = random.choice(["video-preview", "cls", "self", "inputs", "frames.0", "", "\ud800", *prompt[key]["inputs"]])
    prompt[key]["inputs"][name] = value = literal(random)
    return f"{key}.{ascii(name)} added: {ascii(value)[:60]}"


def no_node(random, prompt, ours):
    # Not a known class without "inputs": that ends the thread in which ComfyUI 0.33 works on prompts, whatever pack the class is of.
    key = random.choice([*prompt, "more"])
    prompt[key] = random.choice((None, [], "node", 5, {}, {"inputs": {}}, {"class_type": "LoadMLLM", "inputs": []}))
    return f"{key} is {prompt[key]}"


MUTATIONS = (
    drop_input, drop_node, literal_on_socket, literal_on_socket, odd_value, odd_value, odd_text, odd_text, odd_number, odd_number,
    link_elsewhere, link_elsewhere, link_value, link_value, other_class, other_key, more_input, no_node,
)  # fmt: skip
