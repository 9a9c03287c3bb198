"""What the cases about ComfyUI's own language models share. Runs inside ComfyUI's Python."""

from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from kit import SETTINGS, images, module, run
from small_core import FILES, folder_of, shrunk

QUERIES = "the bright square\nwhatever is not dark"
_made: dict = {}


def models() -> Path:
    return Path(SETTINGS["base"]) / "models"


def clip_of(family, name=None):
    """What Load CLIP gives of a file."""
    import nodes

    with shrunk(models() / "LLM" / folder_of(family)):
        return nodes.CLIPLoader().load_clip(name or FILES[family], "qwen_image")[0]


def clip(family):
    if family not in _made:
        _made[family] = clip_of(family)
    return _made[family]


def theirs(family):
    """The same weights through transformers."""
    if ("theirs", family) not in _made:
        _made["theirs", family] = run("LoadMLLM", model=folder_of(family), dtype="fp32")[0]
    return _made["theirs", family]


def extract(mllm, frames=None, **inputs):
    """(objects, backgrounds, answers)."""
    inputs = {"query": QUERIES, "tokens_per_frame": 32, "max_key_frames": 4} | inputs
    return run("ExtractRolloutAttention", mllm=mllm, frames=images(5) if frames is None else frames, **inputs).args


def expect_equal(found, expected, most=1e-4):
    """Maps equal to `most` of their largest value, presence to `most`, and the same answers."""
    assert len(found[0]) == len(expected[0]) == len(found[1]) == len(expected[1])
    for one, other in zip([*found[0], *found[1]], [*expected[0], *expected[1]], strict=True):
        for name in ("video", "frame"):
            mine, reference = getattr(one, name), getattr(other, name)
            assert mine.shape == reference.shape
            error = float((mine - reference).abs().max() / reference.abs().max())
            assert error <= most, f"{one.kind}, {name}: {error:.1e}"
        assert (one.presence is None) == (other.presence is None)
        assert one.presence is None or abs(one.presence - other.presence) <= most
        assert one.answers == other.answers
    assert float(expected[0][0].video.std()) > 1e-5, "a flat map would equal any other flat map"


@contextmanager
def key_frames_at_once(tokens):
    with patch.object(module("decaf.attention.batches"), "ENOUGH_TOKENS_ON_CPU", tokens):
        yield
