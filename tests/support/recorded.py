"""What saved workflows and translations rely on, as it was recorded: the nodes with their inputs and outputs, and their English texts.

`python tests/support/recorded.py` records it anew, from a ComfyUI as the tests find it. What would break a saved workflow it does not record.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from comfy_host import PACK, find_host

DEFINITION = PACK / "tests" / "host" / "saved" / "definition.json"
LOCALES = PACK / "locales"
COMMAND = "python tests/support/recorded.py"

LIVE = ("LoadMLLM.inputs.model.tooltip",)
"""Texts that say what lies on the user's disk. An English page takes them from the node itself; translations say the rest."""


def node_list(host, base: Path) -> dict:
    """What the server tells of every node of the pack, with no model of the user's in `base`."""
    command = [host.python, Path(__file__).with_name("node_list.py"), PACK, base]
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, env=host.environment(), cwd=base, timeout=120)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


# -- the definition --------------------------------------------------------------------------------------------------------------------


def definition(nodes: dict, pack: Path = PACK) -> dict:
    """{"nodes": {id: {"inputs", "outputs"}}, "socket_types", "blueprints"}: what a saved workflow refers to."""
    listed = {name: {"inputs": _inputs(info), "outputs": _outputs(info)} for name, info in nodes.items()}
    types = {kind for node in listed.values() for slot in [*node["inputs"], *node["outputs"]] for kind in slot["type"].split(",")}
    return {
        "nodes": listed,
        "socket_types": sorted(kind for kind in types if kind.startswith("DECAF_")),
        "blueprints": {file.stem: _blueprint(file) for file in sorted((pack / "subgraphs").glob("*.json"))},
    }


def _specs(info: dict):
    """(name, type, options, optional) of the inputs in their order."""
    for kind in ("required", "optional"):
        for name in info["input_order"].get(kind, ()):
            spec = info["input"][kind][name]
            yield name, spec[0], (spec[1] if len(spec) > 1 else {}), kind == "optional"


def _type(kind: str, told: dict) -> str:
    return told["template"]["allowed_types"] if kind == "COMFY_MATCHTYPE_V3" else kind


def _inputs(info: dict) -> list[dict]:
    listed = []
    for name, kind, told, optional in _specs(info):
        entry = {"name": name, "type": _type(kind, told), "optional": optional}
        entry |= {key: told[key] for key in ("options", "default", "min", "max", "forceInput") if key in told}
        listed.append(entry)
    return listed


def _outputs(info: dict) -> list[dict]:
    return [
        {"name": name, "type": kind, "list": many}
        for name, kind, many in zip(info["output_name"], info["output"], info["output_is_list"], strict=True)
    ]


def _blueprint(file: Path) -> dict:
    """The id and the sockets of the one box in a blueprint."""
    box = json.loads(file.read_text(encoding="utf-8"))["definitions"]["subgraphs"][0]
    sockets = {side: [{"name": one["name"], "type": one["type"]} for one in box[side]] for side in ("inputs", "outputs")}
    return {"id": box["id"], **sockets}


def differences(recorded: dict, present: dict) -> tuple[list[str], list[str]]:
    """(what breaks saved workflows, what is new), each in words."""
    broken, new = [], []
    for name, old in recorded["nodes"].items():
        if name not in present["nodes"]:
            broken.append(f"the node {name} is gone: give it back, or register a replacement with the host's node replacement")
            continue
        for side in ("inputs", "outputs"):
            _compare(f"{name}.{side}", old[side], present["nodes"][name][side], broken, new)
    new += [f"the node {name}" for name in present["nodes"] if name not in recorded["nodes"]]
    for name, old in recorded["blueprints"].items():
        now = present["blueprints"].get(name)
        if now is None or now["id"] != old["id"]:
            broken.append(f"the blueprint {name} is gone or has another id")
            continue
        for side in ("inputs", "outputs"):
            _compare(f"{name}.{side}", old[side], now[side], broken, new)
    new += [f"the blueprint {name}" for name in present["blueprints"] if name not in recorded["blueprints"]]
    gone = set(recorded["socket_types"]) - set(present["socket_types"])
    broken += [f"no socket is of the type {kind} any more" for kind in sorted(gone)]
    new += [f"the socket type {kind}" for kind in present["socket_types"] if kind not in recorded["socket_types"]]
    return broken, new


def _compare(where: str, old: list[dict], now: list[dict], broken: list[str], new: list[str]) -> None:
    """Slots stay in their places, since saved workflows hold the values of widgets and the ends of links by number; more may follow."""
    places = [slot["name"] for slot in now]
    for number, slot in enumerate(old):
        name = slot["name"]
        if name not in places:
            broken.append(f"{where}: {name} is gone")
        elif places.index(name) != number:
            broken.append(f"{where}: {name} is number {places.index(name)} and was {number}")
        else:
            broken += [f"{where}: {name}: {problem}" for problem in _changed(slot, now[number])]
            added = [option for option in now[number].get("options", ()) if option not in slot.get("options", ())]
            wider = [key for key in ("min", "max", "type", "optional") if slot.get(key) != now[number].get(key)]
            new += [f"{where}: {name}: the option {option!r}" for option in added]
            new += [f"{where}: {name}: another {key}" for key in wider]
    for slot in now[len(old) :]:
        if slot["name"] not in [one["name"] for one in old]:
            new.append(f"{where}: {slot['name']}")
            if slot.get("optional") is False:
                broken.append(f"{where}: {slot['name']} is new and not optional: workflows without it do not run")


def _changed(old: dict, now: dict) -> list[str]:
    found = []
    lost = set(old["type"].split(",")) - set(now["type"].split(","))
    if lost or ("list" in old and old["type"] != now["type"]):  # an input may take more kinds, an output is of one
        found.append(f"its type is {now['type']} and was {old['type']}")
    if old.get("optional") and not now["optional"]:
        found.append("it was optional")
    found += [
        f"its {key} is {now.get(key)!r} and was {old.get(key)!r}"
        for key in ("default", "list", "forceInput")
        if old.get(key) != now.get(key)
    ]
    found += [f"the option {option!r} is gone" for option in old.get("options", ()) if option not in now.get("options", ())]
    if now.get("min", old.get("min")) != old.get("min") and not now["min"] < old.get("min", now["min"]):
        found.append(f"its smallest value is {now['min']} and was {old.get('min')}")
    if now.get("max", old.get("max")) != old.get("max") and not now["max"] > old.get("max", now["max"]):
        found.append(f"its largest value is {now['max']} and was {old.get('max')}")
    return found


# -- the English texts -----------------------------------------------------------------------------------------------------------------


def english(nodes: dict) -> dict:
    """The texts of all nodes in the form of a `nodeDefs.json`, as the page looks them up: outputs by their number."""
    texts = {}
    for name, info in nodes.items():
        told = {"display_name": info["display_name"], "description": info["description"], "inputs": {}, "outputs": {}}
        for slot, _, options, _ in _specs(info):
            told["inputs"][slot.replace(".", "_")] = {"name": options.get("display_name") or slot, "tooltip": options["tooltip"]}
        for number, (slot, tooltip) in enumerate(zip(info["output_name"], info["output_tooltips"], strict=True)):
            told["outputs"][str(number)] = {"name": slot, "tooltip": tooltip}
        texts[name] = told
    return texts


def flat(texts: dict, path: str = "") -> dict[str, str]:
    """{"LoadMLLM.inputs.dtype.name": text, ...}, in order."""
    found = {}
    for key, value in texts.items():
        here = f"{path}.{key}" if path else key
        found |= flat(value, here) if isinstance(value, dict) else {here: value}
    return found


def nested(texts: dict[str, str]) -> dict:
    """The other way."""
    whole: dict = {}
    for path, text in texts.items():
        *above, last = path.split(".")
        place = whole
        for key in above:
            place = place.setdefault(key, {})
        place[last] = text
    return whole


def read_texts(language: str) -> dict[str, str]:
    return flat(json.loads((LOCALES / language / "nodeDefs.json").read_text(encoding="utf-8")))


def write(path: Path, content: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> int:
    host = find_host()
    if isinstance(host, str):
        print(host)
        return 1
    with tempfile.TemporaryDirectory() as base:
        nodes = node_list(host, Path(base))
    present = definition(nodes)
    recorded = (
        json.loads(DEFINITION.read_text(encoding="utf-8")) if DEFINITION.is_file() else {"nodes": {}, "socket_types": [], "blueprints": {}}
    )
    broken, new = differences(recorded, present)
    if broken and "--anyway" not in sys.argv:
        print("Not recorded, as saved workflows would break (--anyway records it):", *broken, sep="\n  ")
        return 1
    write(DEFINITION, present)
    texts = {path: text for path, text in flat(english(nodes)).items() if path not in LIVE}
    write(LOCALES / "en" / "nodeDefs.json", nested(texts))
    print(f"{len(present['nodes'])} nodes and {len(texts)} English texts recorded", *(f"new: {one}" for one in new), sep="\n  ")
    return 0


if __name__ == "__main__":
    sys.exit(main())
