"""Runs functions of cases_*.py inside ComfyUI's own Python. Prints a JSON line before each, and one after it: seconds, and what went wrong.

`python inside.py SETTINGS.json`, with ComfyUI's checkout on PYTHONPATH. Started by test_nodes.py; ComfyUI's environment has no pytest.
"""

import asyncio
import importlib
import json
import sys
import time
import traceback
from pathlib import Path

settings = json.loads(Path(sys.argv[1]).read_text())
sys.path.append(str(Path(settings["pack"]) / "tests" / "support"))

from comfy.cli_args import args  # noqa: E402

args.cpu = not settings.get("gpu")
for flag in settings.get("flags", ()):  # as they are called in comfy.cli_args
    setattr(args, flag, True)
args.base_directory = settings["base"]

import torch  # noqa: E402
from node_list import load_pack, nodes  # noqa: E402

torch.set_num_threads(1)  # tiny tensors on a busy machine


def main():
    before = set(sys.modules)
    pack = load_pack(Path(settings["pack"]))
    imported = {name.partition(".")[0] for name in set(sys.modules) - before}
    import kit

    kit.NODES.update(asyncio.run(nodes(pack)))
    kit.SETTINGS.update(settings, imported=imported)
    modules = [importlib.import_module(file.stem) for file in sorted(Path(__file__).parent.glob("cases_*.py"))]
    cases = [(name, case) for module in modules for name, case in vars(module).items() if name.startswith("case_")]
    for name, case in cases:
        if name not in settings["cases"]:
            continue
        print(json.dumps({"begin": name}), flush=True)
        start = time.perf_counter()
        torch.manual_seed(0)
        try:
            case()
            error = None
        except BaseException:  # also ComfyUI's interrupt, which is no Exception
            error = traceback.format_exc()
        print(json.dumps({"case": name, "seconds": round(time.perf_counter() - start, 2), "error": error}), flush=True)


if __name__ == "__main__":
    main()
