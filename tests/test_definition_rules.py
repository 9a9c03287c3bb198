"""What breaks a saved workflow and what does not, on the recorded nodes with one change each."""

import copy
import json

import pytest
from recorded import DEFINITION, differences

RECORDED = json.loads(DEFINITION.read_text(encoding="utf-8"))
RECORDED["blueprints"]["Box"] = {"id": "1", "inputs": [{"name": "clip", "type": "VIDEO"}], "outputs": [{"name": "mask", "type": "MASK"}]}


def slot(made, node, name, side="inputs"):
    return next(one for one in made["nodes"][node][side] if one["name"] == name)


def rename(made):
    slot(made, "LoadMLLM", "dtype")["name"] = "precision"


def reorder(made):
    inputs = made["nodes"]["ExtractRolloutAttention"]["inputs"]
    inputs[2], inputs[3] = inputs[3], inputs[2]


def new_in_the_middle(made):
    made["nodes"]["LoadMLLM"]["inputs"].insert(0, {"name": "first", "type": "INT", "optional": True})


def another_option(made):
    slot(made, "DecAFApplyMask", "effect")["options"][0] = "cut-out"


BREAKS = {
    "a node": (lambda made: made["nodes"].pop("FrameFusion"), "FrameFusion is gone"),
    "an input": (lambda made: made["nodes"]["FrameFusion"]["inputs"].pop(), "method is gone"),
    "a renamed input": (rename, "dtype is gone"),
    "another order": (reorder, "query is number 3 and was 2"),
    "in the middle": (new_in_the_middle, "model is number 1 and was 0"),
    "another type": (lambda made: slot(made, "FrameFusion", "video_weight").update(type="INT"), "its type is INT"),
    "fewer types": (lambda made: slot(made, "DecAFApplyMask", "frames").update(type="VIDEO"), "its type is VIDEO and was IMAGE,VIDEO"),
    "an option": (another_option, "the option 'cut out' is gone"),
    "a default": (lambda made: slot(made, "FrameFusion", "video_weight").update(default=0.4), "its default is 0.4"),
    "a range": (lambda made: slot(made, "DecAFRefineMask", "grow").update(max=64), "its largest value is 64"),
    "not optional": (lambda made: slot(made, "FrameFusion", "video_weight").update(optional=False), "it was optional"),
    "a new input that is not optional": (
        lambda made: made["nodes"]["FrameFusion"]["inputs"].append({"name": "x", "type": "INT", "optional": False}),
        "x is new and not optional",
    ),
    "an output": (lambda made: made["nodes"]["LoadMLLM"]["outputs"].pop(), "mllm is gone"),
    "an output's type": (lambda made: slot(made, "SAM2VideoPropagate", "mask", "outputs").update(type="IMAGE"), "its type is IMAGE"),
    "a socket type": (lambda made: made["socket_types"].remove("DECAF_TRACKS"), "of the type DECAF_TRACKS"),
    "a blueprint": (lambda made: made["blueprints"].clear(), "the blueprint Box is gone"),
    "a blueprint's id": (lambda made: made["blueprints"]["Box"].update(id="2"), "the blueprint Box is gone or has another id"),
    "a blueprint's socket": (lambda made: made["blueprints"]["Box"]["outputs"].clear(), "Box.outputs: mask is gone"),
}

ADDS = {
    "a node": (lambda made: made["nodes"].update(DecAFNew={"inputs": [], "outputs": []}), "the node DecAFNew"),
    "an input": (
        lambda made: made["nodes"]["FrameFusion"]["inputs"].append({"name": "x", "type": "INT", "optional": True}),
        "FrameFusion.inputs: x",
    ),
    "an output": (
        lambda made: made["nodes"]["LoadMLLM"]["outputs"].append({"name": "x", "type": "INT", "list": False}),
        "LoadMLLM.outputs: x",
    ),
    "an option": (lambda made: slot(made, "DecAFApplyMask", "effect")["options"].append("fog"), "the option 'fog'"),
    "a type": (lambda made: slot(made, "LoadMLLM", "dtype").update(type="COMBO,STRING"), "another type"),
    # The host runs what follows once for every entry.
    "an output that became a list": (lambda made: slot(made, "LoadMLLM", "mllm", "outputs").update(list=True), "another list"),
    "a wider range": (lambda made: slot(made, "DecAFRefineMask", "grow").update(max=256, min=-256), "another max"),
    "a blueprint": (lambda made: made["blueprints"].update(More=made["blueprints"]["Box"]), "the blueprint More"),
}


def changed(change):
    made = copy.deepcopy(RECORDED)
    change(made)
    return differences(RECORDED, made)


def test_nothing_changed():
    assert changed(lambda made: None) == ([], [])


@pytest.mark.parametrize("what", BREAKS)
def test_breaks(what):
    change, told = BREAKS[what]
    assert any(told in line for line in changed(change)[0]), changed(change)


@pytest.mark.parametrize("what", ADDS)
def test_adds(what):
    change, told = ADDS[what]
    broken, new = changed(change)
    assert not broken and any(told in line for line in new), (broken, new)
