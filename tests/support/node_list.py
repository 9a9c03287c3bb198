"""Prints what ComfyUI's server tells of the pack's nodes, as JSON. Run inside ComfyUI's Python by `recorded.py`: `node_list.py PACK BASE`."""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path

from comfy.cli_args import args

args.cpu, args.base_directory = True, sys.argv[2]


def load_pack(folder: Path):
    spec = importlib.util.spec_from_file_location("pack_under_test", folder / "__init__.py", submodule_search_locations=[str(folder)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["pack_under_test"] = pack
    spec.loader.exec_module(pack)
    return pack


async def nodes(pack):
    return await (await pack.comfy_entrypoint()).get_node_list()


if __name__ == "__main__":
    listed = {node.GET_SCHEMA().node_id: node.GET_NODE_INFO_V1() for node in asyncio.run(nodes(load_pack(Path(sys.argv[1]))))}
    print(json.dumps(listed))
