"""The nodes as they are against what was recorded: saved workflows open and run, and the English texts are those of the nodes."""

import json

import pytest
from recorded import COMMAND, DEFINITION, LIVE, definition, differences, english, flat, node_list, read_texts


@pytest.fixture(scope="module")
def nodes(host, tmp_path_factory):
    return node_list(host, tmp_path_factory.mktemp("no_models"))


def test_saved_workflows_find_what_they_refer_to(nodes):
    broken, new = differences(json.loads(DEFINITION.read_text(encoding="utf-8")), definition(nodes))
    assert not broken, "saved workflows break:\n  " + "\n  ".join(broken)
    assert not new, f"new, which is allowed; record it with `{COMMAND}`:\n  " + "\n  ".join(new)


def test_the_english_texts_are_those_of_the_nodes(nodes):
    present = {path: text for path, text in flat(english(nodes)).items() if path not in LIVE}
    recorded = read_texts("en")
    changed = [path for path in {**present, **recorded} if present.get(path) != recorded.get(path)]
    assert not changed, f"record them with `{COMMAND}`, then translate them anew:\n  " + "\n  ".join(changed)
