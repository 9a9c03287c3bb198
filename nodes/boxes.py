"""The words by which the page's search finds the boxes in `subgraphs`."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

SUBGRAPHS = Path(__file__).parents[1] / "subgraphs"


def tell_aliases() -> None:
    """Has ComfyUI's list of boxes tell the page ours. The page reads them from that list only, though the files have them, and the list of
    ComfyUI 0.33 leaves them out. In a ComfyUI that lists boxes otherwise nothing is changed: they are found by their titles then."""
    with suppress(ImportError, AttributeError):
        from server import PromptServer

        manager = PromptServer.instance.subgraph_manager
        listed = manager.get_custom_node_subgraphs

        async def with_aliases(*args, **kwargs):
            entries = await listed(*args, **kwargs)
            with suppress(AttributeError, KeyError, TypeError, OSError, ValueError):
                for entry in entries.values():
                    file = Path(entry["path"])
                    if "search_aliases" not in entry["info"] and file.parent.resolve() == SUBGRAPHS.resolve():
                        entry["info"]["search_aliases"] = json.loads(file.read_text(encoding="utf-8"))["extra"]["BlueprintSearchAliases"]
            return entries

        manager.get_custom_node_subgraphs = with_aliases
