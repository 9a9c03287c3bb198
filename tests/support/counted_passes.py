"""A pack for ComfyUI's server that counts what models compute: calls of PyTorch modules by their class, of whichever pack they are."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

PATH = "/decaf_tests/passes"


def make_pack(custom_nodes: Path) -> None:
    """The server then answers at `PATH`: name of a module's class -> calls since it was asked last."""
    pack = custom_nodes / "counted_passes_for_tests"
    pack.mkdir(parents=True, exist_ok=True)
    lines = (
        "import sys",
        f"sys.path.append({str(Path(__file__).parent)!r})",
        "from counted_passes import count",
        "count()",
        "NODE_CLASS_MAPPINGS = {}",
        "",
    )
    (pack / "__init__.py").write_text("\n".join(lines), encoding="utf-8")


def count() -> None:
    from aiohttp import web
    from server import PromptServer

    calls: Counter[str] = Counter()
    # Hooked from outside: what a pack counts itself would not show what it forgets to count.
    torch.nn.modules.module.register_module_forward_pre_hook(lambda module, given: calls.update([type(module).__name__]))

    @PromptServer.instance.routes.get(PATH)
    async def passes(_):
        told = dict(calls)
        calls.clear()
        return web.json_response(told)
