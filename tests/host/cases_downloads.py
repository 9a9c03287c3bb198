"""Checkpoints that *Load SAM 2* fetches. Run by inside.py; each raises when something is wrong."""

import shutil
from pathlib import Path

from kit import NODES, SETTINGS, module, refused, run


def case_a_sam2_checkpoint_is_fetched_only_when_picked_and_once():
    load, folder = module("nodes.load"), Path(SETTINGS["base"]) / "models" / "sam2"
    published = module("decaf.sam2").PUBLISHED
    combo = NODES["DecAFLoadSAM2"].GET_SCHEMA().inputs[0]
    offered = [option for option in combo.options if option.startswith("download: ")]
    assert offered == [f"download: {repository}" for repository in published] and not combo.default.startswith("download: ")
    asked = []

    def fetch(repository, into, progress):
        asked.append((repository, Path(into)))
        return Path(shutil.copyfile(folder / "tiny_sam2.safetensors", Path(into) / published[repository].replace(".pt", ".safetensors")))

    kept, load.download_checkpoint = load.download_checkpoint, fetch
    try:
        run("DecAFLoadSAM2", model="tiny_sam2.safetensors")
        assert not asked
        run("DecAFLoadSAM2", model=offered[0])
        assert asked == [("facebook/sam2.1-hiera-tiny", folder)]
        (folder / "mine").mkdir()
        shutil.copyfile(as_meta_stores_it(), folder / "mine" / published["facebook/sam2.1-hiera-small"])
        run("DecAFLoadSAM2", model=offered[1])
        assert len(asked) == 1, "a file of that name was there, in a folder of models/sam2"
    finally:
        load.download_checkpoint = kept
        shutil.rmtree(folder / "mine", ignore_errors=True)
        (folder / "sam2.1_hiera_tiny.safetensors").unlink(missing_ok=True)
    assert "download: facebook/sam2.1-hiera-tiny" in NODES["DecAFLoadSAM2"].GET_SCHEMA().inputs[0].options
    assert "'download: ...'" in refused("DecAFLoadSAM2", model="choose a model")


def as_meta_stores_it() -> Path:
    """The tiny model's weights as Meta stores its checkpoints."""
    import torch
    from safetensors.torch import load_file

    file = Path(SETTINGS["scratch"]) / "tiny.pt"
    torch.save({"model": load_file(Path(SETTINGS["base"]) / "models" / "sam2" / "tiny_sam2.safetensors")}, file)
    return file
