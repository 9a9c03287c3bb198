"""ComfyUI-DecAF: mask what a sentence means in a video."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """What ComfyUI calls to get the nodes. Everything is imported here, so that the package itself imports without ComfyUI."""
    from .nodes import extension

    return extension()
