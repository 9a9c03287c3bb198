"""The page's texts in other languages: all of them, none left in English, with the same numbers, folders and option names."""

import json
import re

import pytest
from recorded import DEFINITION, LIVE, LOCALES, read_texts

LANGUAGES = ("zh", "zh-TW", "ja", "ko", "fr", "de", "es", "ru")
SAME = {"mllm", "sam2", "format", "style", "mode", "attention", "sigma", "fps", "images", "video"}
"""Names of inputs and outputs that are the same word in another language."""

ENGLISH = read_texts("en")
NODES = json.loads(DEFINITION.read_text(encoding="utf-8"))["nodes"]


def options_in(path: str, text: str) -> set[str]:
    """Options of the combo that a tooltip explains: these stay in English on the page. "auto: ..." or 'class name'."""
    node = path.split(".")[0]
    options = {option for slot in NODES[node]["inputs"] for option in slot.get("options", ())}
    return {option for option in options if re.search(rf"(^|[\s(]){re.escape(option)}:", text) or f"'{option}'" in text}


def kept(path: str, text: str) -> list[str]:
    """What a translation repeats letter by letter: numbers, folders of models, formats, options."""
    words = re.findall(r"\d+(?:\.\d+)*|models/\w+|#RRGGBB|\.safetensors|\.pt\b|\bLoRA\b|\bJSON\b|\bSAM\b|\bCLIP\b", text)
    return [*words, *options_in(path, text)]


def test_the_languages_are_these():
    assert sorted(folder.name for folder in LOCALES.iterdir()) == sorted(["en", *LANGUAGES])
    assert {file.name for file in LOCALES.rglob("*") if file.is_file()} == {"nodeDefs.json"}


def test_there_is_something_to_keep():
    """Or the comparison below would pass on nothing."""
    assert sum(len(kept(path, text)) for path, text in ENGLISH.items()) > 150
    assert "class name" in options_in("ExtractRolloutAttention.inputs.setting.tooltip", "expression: .. class name: the model first")


@pytest.mark.parametrize("language", LANGUAGES)
def test_complete(language):
    texts = read_texts(language)
    missing = [f"{path}: {ENGLISH.get(path, '(see the node)')!r}" for path in [*ENGLISH, *LIVE] if not texts.get(path, "").strip()]
    assert not missing, f"translate into locales/{language}/nodeDefs.json:\n  " + "\n  ".join(missing)
    over = [path for path in texts if path not in ENGLISH and path not in LIVE]
    assert not over, "nothing in English has these any more:\n  " + "\n  ".join(over)


@pytest.mark.parametrize("language", LANGUAGES)
def test_translated(language):
    same = [f"{path}: {text!r}" for path, text in read_texts(language).items() if text == ENGLISH.get(path) and text not in SAME]
    assert not same, "\n".join(same)


@pytest.mark.parametrize("language", LANGUAGES)
def test_what_must_stay_stays(language):
    texts = read_texts(language)
    lost = [f"{path}: {word!r}" for path, text in ENGLISH.items() if path in texts for word in kept(path, text) if word not in texts[path]]
    assert not lost, "\n".join(lost)
    assert [path for path in ENGLISH if path in texts and texts[path].count("\n") != ENGLISH[path].count("\n")] == []


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_the_page_can_read_them(language):
    """Braces, @ and | mean something to it: a text with them is not shown, or stops an older page."""
    assert [path for path, text in read_texts(language).items() if re.search(r"[{}@|]", text)] == []


@pytest.mark.parametrize("language", ["en", *LANGUAGES])
def test_names_of_a_node_differ(language):
    """Two inputs or two outputs of a node have two names."""
    seen: dict = {}
    for path, text in read_texts(language).items():
        if path.endswith(".name"):
            seen.setdefault((path.rsplit(".", 2)[0], text), []).append(path)
    assert [paths for paths in seen.values() if len(paths) > 1] == []


@pytest.mark.parametrize("language", LANGUAGES)
def test_one_name_is_translated_in_one_way(language):
    """Inputs and outputs that are called the same belong together."""
    texts, ways = read_texts(language), {}
    for path, text in ENGLISH.items():
        if path.endswith(".name") and path in texts:
            ways.setdefault(text, set()).add(texts[path])
    assert {name: found for name, found in ways.items() if len(found) > 1} == {}


@pytest.mark.parametrize("language", LANGUAGES)
def test_texts_call_nodes_by_their_names(language):
    """A tooltip that sends the user to another node names it as the page does."""
    texts = read_texts(language)
    names = {text: texts.get(path, "") for path, text in ENGLISH.items() if path.endswith(".display_name")}
    wrong = [
        f"{path}: {names[name]!r} for {name!r}"
        for path, text in ENGLISH.items()
        if path in texts and not path.endswith("_name")
        for name in names
        if name in text and names[name] not in texts[path]
    ]
    assert not wrong, "\n".join(wrong)
