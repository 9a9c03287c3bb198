"""A workflow in API form in which every node of the pack is at work."""

from __future__ import annotations


def node(class_type: str, /, **inputs) -> dict:
    return {"class_type": class_type, "inputs": inputs}


def whole_graph(frames: list) -> dict:
    """Every node of the pack at work on a clip of six frames, from `frames`: a link."""
    return {
        "image": node("LoadImage", image="example.png"),
        "clip": node("RepeatImageBatch", image=["image", 0], amount=6),
        "video": node("LoadVideo", file="clip.mp4"),
        "mllm": node("LoadMLLM", model="tiny_qwen2_5_vl", dtype="fp32"),
        "sam2": node("DecAFLoadSAM2", model="tiny_sam2.safetensors", precision="auto"),
        "extract": node(
            "ExtractRolloutAttention", mllm=["mllm", 0], frames=frames, query="it", setting="expression", max_key_frames=2, tokens_per_frame=16,
            start_layer=-1, object_question="", background_question="", not_this="", first_frame=0, last_frame=-1, key_frames="",
        ),
        "contrast": node("ObjectBackgroundFusion", object=["extract", 0], background=["extract", 1], sigma=1.0),
        "fused": node("FrameFusion", attention=["contrast", 0], video_weight=0.5, method="as published"),
        "prompts": node("AttentionToSAM2Prompts", fused=["fused", 0], threshold=0.9, presence_threshold=0.0),
        "shown": node("DecAFAttentionPreview", frames=frames, fused=["fused", 0], prompts=["prompts", 0]),
        "propagate": node(
            "SAM2VideoPropagate", sam2=["sam2", 0], frames=frames, prompts=["prompts", 0], score_threshold=0.5, nms_iou=0.7, preview_fps=24.0,
            targets="all", method="agreement",
        ),
        "query": node("DecAFPickQuery", tracks=["propagate", 1], query="1"),
        "query_mask": node("MaskPreview", mask=["query", 0]),
        "corrected": node(
            "DecAFCorrectObjects", sam2=["sam2", 0], frames=frames, tracks=["propagate", 1], object=-1, frame=1, mode="refine",
            positive_points='[{"x": 20, "y": 20}]', negative_points="", mask=["propagate", 0],
        ),
        "objects": node("DecAFShowObjects", frames=frames, tracks=["corrected", 1], style="tint", opacity=0.8, numbers=True, preview_fps=24.0),
        "picked": node("DecAFTracksToMask", tracks=["corrected", 1], objects="", score_threshold=0.0, max_objects=0),
        "one_frame": node("DecAFFrameOfVideo", frames=frames, which="one frame", frame=2, longest_side=48),
        "matched": node(
            "DecAFPickTracks", fused=["fused", 0], objects=["propagate", 1], pick="all that match", number=1, share=0.6, presence_threshold=0.0,
            least_match=0.0, match="agreement", lead=0,
        ),
        "matched_mask": node("MaskPreview", mask=["matched", 0]),
        "one_frame_shown": node("PreviewImage", images=["one_frame", 0]),
        "refined": node("DecAFRefineMask", masks=["corrected", 1], grow=1, feather=2.0, holes=9, specks=0, smooth=1, border=2, shortest=0),
        "applied": node(
            "DecAFApplyMask", frames=frames, masks=["refined", 0], effect="cut out", invert=False, strength=0.5, format="auto", objects="",
            colour="#00B140", preview_fps=24.0,
        ),
        "saved": node("DecAFSaveCutOut", video=["applied", 0], filename_prefix="cut", format="as it is"),
        "mask": node("MaskPreview", mask=["picked", 0]),
        "sample": node("DecAFSampleClip", clip_seed=3, kind="any", frames=2),
        "sample_shown": node("PreviewImage", images=["sample", 0]),
    }  # fmt: skip
