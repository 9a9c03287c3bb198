"""The slow way: transformers' own tracker of SAM 3, driven through its inference session. It shares nothing with decaf."""

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F


def session(model, frames):
    """`frames`: (H, W, 3) uint8, resized and normalised as SAM 3 was trained."""
    from transformers.models.sam3_tracker_video.modeling_sam3_tracker_video import Sam3TrackerVideoInferenceSession

    side = model.image_size
    pictures = [torch.from_numpy(np.array(Image.fromarray(frame.numpy()).resize((side, side)))) for frame in frames]
    video = torch.stack(pictures).permute(0, 3, 1, 2).float() / 255
    height, width = frames[0].shape[:2]
    return Sam3TrackerVideoInferenceSession(video=(video - 0.5) / 0.5, video_height=height, video_width=width, dtype=torch.float32)


def at_size(logits, frames):
    return F.interpolate(logits, size=frames[0].shape[:2], mode="bilinear", align_corners=False)[:, 0]


def mask_input(model, mask):
    side = model.image_size
    return (F.interpolate(mask[None, None].float(), size=(side, side), mode="bilinear", align_corners=False, antialias=True) >= 0.5).float()


def propagate(model, frames, prompts) -> torch.Tensor:
    """(T, H, W) logits of one object that is given by masks on some frames: forward from the first of them, and backward."""
    state = session(model, frames)
    index, start = state.obj_id_to_idx(1), prompts[0][0]
    for frame, mask in prompts:
        state.add_mask_inputs(index, frame, mask_input(model, mask))
        state.obj_with_new_inputs = [1]
        model(state, frame_idx=frame)
    out = torch.full((len(frames), *frames[0].shape[:2]), float("nan"))
    for reverse in (False, True):
        for found in model.propagate_in_video_iterator(state, start_frame_idx=start, reverse=reverse):
            out[found.frame_idx] = at_size(found.pred_masks, frames)[0]
    return out


def clicked(model, frames, frame: int, points, labels) -> torch.Tensor:
    """(T, H, W) logits of one object that is given by clicks; `points` (n, 2) in 0..1, a box as two of them with the labels 2 and 3."""
    state = session(model, frames)
    index = state.obj_id_to_idx(1)
    state.add_point_inputs(
        index,
        frame,
        {"point_coords": (points * model.image_size)[None, None], "point_labels": torch.tensor(labels, dtype=torch.int32)[None, None]},
    )
    state.obj_with_new_inputs = [1]
    model(state, frame_idx=frame)
    out = torch.full((len(frames), *frames[0].shape[:2]), float("nan"))
    for reverse in (False, True):
        for found in model.propagate_in_video_iterator(state, start_frame_idx=frame, reverse=reverse):
            out[found.frame_idx] = at_size(found.pred_masks, frames)[0]
    return out


@torch.no_grad()
def point_mask(model, frames, frame: int, xy) -> tuple[torch.Tensor, float]:
    """(H, W) logits and predicted IoU of the best mask at one point."""
    state = session(model, frames)
    embeddings = model.get_image_embeddings(state.get_frame(frame)[None])
    out = model._single_frame_forward(
        input_points=(xy * model.image_size)[None, None, None],
        input_labels=torch.ones(1, 1, 1, dtype=torch.int32),
        image_embeddings=embeddings,
    )
    return at_size(out.pred_masks, frames)[0], float(out.iou_scores.max())
