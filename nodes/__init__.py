"""The nodes, in the order of the graph."""

from comfy_api.latest import ComfyExtension, io

from . import boxes
from .attention import ExtractRolloutAttention, FrameFusion, ObjectBackgroundFusion
from .finishing import DecAFApplyMask, DecAFRefineMask, DecAFSaveCutOut
from .load import DecAFLoadSAM2, LoadMLLM
from .objects import DecAFCorrectObjects, DecAFShowObjects, DecAFTracksToMask
from .pick_tracks import DecAFFrameOfVideo, DecAFPickTracks
from .preview import DecAFAttentionPreview
from .queries import DecAFPickQuery
from .sample import DecAFSampleClip
from .segmentation import AttentionToSAM2Prompts, SAM2VideoPropagate

NODES: list[type[io.ComfyNode]] = [
    DecAFSampleClip,
    LoadMLLM,
    ExtractRolloutAttention,
    ObjectBackgroundFusion,
    FrameFusion,
    DecAFAttentionPreview,
    AttentionToSAM2Prompts,
    DecAFLoadSAM2,
    SAM2VideoPropagate,
    DecAFPickQuery,
    DecAFShowObjects,
    DecAFCorrectObjects,
    DecAFTracksToMask,
    DecAFFrameOfVideo,
    DecAFPickTracks,
    DecAFRefineMask,
    DecAFApplyMask,
    DecAFSaveCutOut,
]


class _Extension(ComfyExtension):
    async def on_load(self) -> None:
        boxes.tell_aliases()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return NODES


def extension() -> ComfyExtension:
    return _Extension()
