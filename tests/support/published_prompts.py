"""What the chat template and the processor that a model is published with make of a question and pictures."""

import numpy as np
import torch
from PIL import Image

QUESTION = "Which object is 最大的 thing here?"

FPS = 0.8
"""Of the published videos' frames: slots of two are 2.5 seconds apart, and not all whole ones."""


def pictures(count, height, width):
    return [torch.from_numpy(np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)) for seed in range(count)]


def chat(mllm, processor, content):
    """The published prompt of a model that is to answer at once. What opens its answer is the family's where the template has no switch."""
    messages = [{"role": "user", "content": content}]
    return processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False, enable_thinking=False) + mllm.family.answer_opening


def published(mllm, processor, kind, frames):
    """What the model's processor makes of the question and pictures that need no resizing, with the times of the frames."""
    text = chat(mllm, processor, [{"type": kind}, {"type": "text", "text": QUESTION}])
    if kind == "image":
        return processor(text=[text], images=[Image.fromarray(frames[0].numpy())], do_resize=False, return_tensors="pt")
    video, count = torch.stack(frames).permute(0, 3, 1, 2), len(frames)
    told = {"total_num_frames": count, "fps": FPS, "duration": count / FPS, "frames_indices": list(range(count))}
    return processor(text=[text], videos=[video], video_metadata=[told], do_resize=False, do_sample_frames=False, return_tensors="pt")
