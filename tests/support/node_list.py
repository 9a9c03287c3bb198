"""The pack and its nodes, loaded as ComfyUI does, inside ComfyUI's Python.

`node_list.py PACK BASE` prints what ComfyUI's server tells of the nodes, as JSON.
"""

import asyncio
import importlib.util
import json
import sys
from pathlib import Path


def load_pack(folder: Path):
    """The pack in `folder`, imported as a package under a name of its own."""
    spec = importlib.util.spec_from_file_location("pack_under_test", folder / "__init__.py", submodule_search_locations=[str(folder)])
    pack = importlib.util.module_from_spec(spec)
    sys.modules["pack_under_test"] = pack
    spec.loader.exec_module(pack)
    return pack


async def nodes(pack) -> dict[str, type]:
    """The pack's nodes by id."""
    extension = await pack.comfy_entrypoint()
    return {node.GET_SCHEMA().node_id: node for node in await extension.get_node_list()}


def main():
    from comfy.cli_args import args

    args.cpu, args.base_directory = True, sys.argv[2]
    listed = asyncio.run(nodes(load_pack(Path(sys.argv[1]))))
    print(json.dumps({name: node.GET_NODE_INFO_V1() for name, node in listed.items()}))


if __name__ == "__main__":
    main()
