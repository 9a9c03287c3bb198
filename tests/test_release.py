"""What a release needs: one version, a changelog that begins with it, an icon and a banner as the registry takes them."""

import re
from pathlib import Path

from PIL import Image

import decaf

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10; pytest brings it there
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
COMFY = PROJECT["tool"]["comfy"]


def colours(picture: Image.Image) -> int:
    """Of a small copy: a picture that is empty has one."""
    return len(picture.convert("RGB").resize((32, 32)).getcolors(1024))


def test_one_version():
    version = PROJECT["project"]["version"]
    assert re.fullmatch(r"\d+\.\d+\.\d+", version) and decaf.__version__ == version
    headings = re.findall(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)
    assert headings[0] == version and headings[-1] == "0.1.0" and len(set(headings)) == len(headings)


def test_the_registry_is_told_everything():
    assert {"PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui", "includes"} <= set(COMFY)
    assert all(COMFY[key] for key in ("PublisherId", "DisplayName", "Icon", "Banner", "requires-comfyui"))
    assert all((ROOT / folder).is_dir() for folder in COMFY["includes"])
    assert PROJECT["project"]["urls"]["Repository"]


def test_icon_and_banner_are_there_and_of_the_sizes_that_it_takes():
    files = {key: ROOT / "assets" / COMFY[key].rsplit("/assets/", 1)[1] for key in ("Icon", "Banner")}
    with Image.open(files["Icon"]) as icon:
        assert icon.width == icon.height <= 400 and colours(icon) > 50
    with Image.open(files["Banner"]) as banner:
        assert abs(banner.width / banner.height - 21 / 9) < 0.01 and colours(banner) > 50


def test_publishing_puts_the_address_in_place():
    """Wherever the address of the repository is written, the placeholder is what the workflow replaces."""
    workflow = (ROOT / ".github" / "workflows" / "publish.yml").read_text(encoding="utf-8")
    (placeholder,) = re.findall(r"s\|(.+?)\|\$GITHUB_REPOSITORY\|g", workflow)
    addresses = [*PROJECT["project"]["urls"].values(), COMFY["Icon"], COMFY["Banner"]]
    assert all(placeholder in address for address in addresses)
