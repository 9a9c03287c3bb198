"""What a node shows while it works and when it is done: its bar, its words, its pictures."""

import time
from dataclasses import replace
from unittest.mock import patch

import comfy.utils
import torch
from comfy_execution.utils import CurrentNodeContext
from kit import NODES, error_of, fused, images, mllm, module, prompts, run, sam2, segment


class Page:
    """The server with a page that looks, or without: it writes down what it is sent."""

    def __init__(self, looks=True):
        self.client_id, self.words, self.bar, self.pictures = "page" if looks else None, [], [], []

    def send_progress_text(self, text, node, client):
        assert (node, client) == ("7", self.client_id)
        self.words.append(text)

    def hook(self, value, total, preview, node_id=None):
        self.bar.append(value / total)
        if preview is not None:
            self.pictures.append((time.monotonic(), preview[1]))

    def __enter__(self):
        self._patch = patch.object(module("nodes.live"), "_server", lambda: self)
        self._context = CurrentNodeContext("prompt", "7", 0)
        self._patch.__enter__()
        self._context.__enter__()
        comfy.utils.set_progress_bar_global_hook(self.hook)
        return self

    def __exit__(self, *_):
        comfy.utils.set_progress_bar_global_hook(None)
        self._context.__exit__(*_)
        self._patch.__exit__(*_)


def text(result):
    return "\n".join(result.ui.as_dict()["text"])


def case_heat_maps_are_shown_as_frames_are_read():
    with Page() as page, patch.object(module("nodes.live"), "_BETWEEN_PICTURES", 0), patch.object(module("nodes.live"), "_SHARE_OF_PICTURES", 99):
        run("ExtractRolloutAttention", mllm=mllm(), frames=images(6), query="the square", tokens_per_frame=32, max_key_frames=6)
    assert len(page.pictures) >= 2 and all(picture.size == (96, 72) for _, picture in page.pictures)
    assert len({picture.tobytes() for _, picture in page.pictures}) > 1, "each of another frame"
    assert "Asking about the video" in page.words and page.words[-1] == "Asking about the key frames: 6 of 6"


def case_masks_are_shown_as_they_are_tracked():
    given = prompts(6)
    with Page() as page, patch.object(module("nodes.live"), "_BETWEEN_PICTURES", 0), patch.object(module("nodes.live"), "_SHARE_OF_PICTURES", 99):
        tracks = run("SAM2VideoPropagate", sam2=sam2(), frames=images(6), prompts=given, nms_iou=0.65)[1]
    first = len(page.pictures)
    assert first >= len(given.fused.clip.key_frames) + 6, "key frames, and all frames of the clip"
    assert any("tracking through the clip" in words for words in page.words)
    with page, patch.object(module("nodes.live"), "_BETWEEN_PICTURES", 0), patch.object(module("nodes.live"), "_SHARE_OF_PICTURES", 99):
        run("DecAFCorrectObjects", sam2=sam2(), frames=images(6), tracks=tracks, object=-1, frame=2, positive_points='[{"x": 20, "y": 30}]')
    assert len(page.pictures) >= first + 6


def case_a_picture_shows_the_frame_and_what_was_found():
    live, report = module("nodes.live"), module("decaf.report")
    frame = (images(1)[0] * 255).to(torch.uint8)
    mask = torch.zeros(18, 24, dtype=torch.bool)
    mask[6:12, 0:6] = True  # the square, in another size
    with_mask = torch.from_numpy(live.np.array(live.drawn(report.Preview(0, frame, masks=(mask,)))))
    assert torch.equal(with_mask[34:38, 10:14], frame[34:38, 10:14]) and with_mask[60:, 60:].float().mean() < frame[60:, 60:].float().mean() / 2
    heat = torch.zeros(9, 12)
    heat[4, 9] = 1e-6  # attention is small; what counts is where it is largest
    hot = torch.from_numpy(live.np.array(live.drawn(report.Preview(0, frame, heat=heat)))).float()
    assert hot[36, 76].sum() > 1.3 * hot[10, 10].sum()
    large = torch.zeros(1080, 1920, 3, dtype=torch.uint8)
    assert max(live.drawn(report.Preview(0, large, heat=heat)).size) == 384


def case_nobody_looks_and_nothing_is_drawn():
    with Page(looks=False) as page, patch.object(module("nodes.live"), "drawn", side_effect=AssertionError("drawn")):
        segment(6, nms_iou=0.63)
    assert not page.pictures and page.bar


def case_pictures_take_little_of_the_time():
    """However long one takes: the next waits so much longer."""
    live, report = module("nodes.live"), module("decaf.report")
    made = []

    def make():
        made.append(time.monotonic())
        time.sleep(0.03)
        return report.Preview(0, torch.zeros(8, 8, 3, dtype=torch.uint8), heat=torch.rand(2, 2))

    with Page() as page:
        node = live.NodeReport()
        end = time.monotonic() + 4
        while time.monotonic() < end:
            node.progress(1, 3, "work")
            node.preview(make)
            time.sleep(0.01)
    gaps = [later - earlier for earlier, later in zip(made, made[1:], strict=False)]
    assert len(made) == len(page.pictures) >= 2 and min(gaps) >= 0.03 / 0.02, gaps


def case_the_bar_moves_and_is_never_full_while_something_goes_on():
    live = module("nodes.live")
    with Page() as page:
        node = live.NodeReport()
        node(0, 2, "first")
        for _ in range(4):  # a long pass that finishes no unit
            time.sleep(0.5)
            for _ in range(30):
                node.check_cancelled()
        crept = list(page.bar)
        time.sleep(live._BETWEEN_EVENTS)
        node(1, 2, "first")
        node(2, 2, "first")
        node(0, 640, "second")
        time.sleep(live._BETWEEN_EVENTS)
        node(2, 640, "second")  # less than ComfyUI's own bar would send
    assert len(crept) >= 3 and crept == sorted(set(crept)) and crept[0] == 0 and crept[-1] < 0.5, page.bar
    assert page.bar[len(crept) :] == [0.5, 0.99, 0.0, 2 / 640]
    assert page.words == ["first: 0 of 2", "first: 1 of 2", "first: 2 of 2", "second: 0 of 640", "second: 2 of 640"]


def case_a_query_that_is_not_in_the_clip_is_said_on_the_nodes():
    there = fused(4)
    queries = [replace(there, query=query, presence=presence) for query, presence in (("the cup.", 0.04), ("the square.", 0.9))]
    found = [run("AttentionToSAM2Prompts", fused=one, threshold=0.9, presence_threshold=0.2) for one in queries]
    there_not = '"the cup" is not in this clip: presence 0.04'
    assert text(found[0]) == there_not and '"the square": ' in text(found[1]) and "point" in text(found[1])
    tracked = [segment(4, one[0]) for one in found]
    assert text(tracked[0]) == there_not and text(tracked[1]).startswith('"the square": 1 object, score 0.')
    for result, message in zip(tracked, (there_not, tracked[1][1].message), strict=True):
        shown = run("DecAFShowObjects", frames=images(4), tracks=result[1]).ui.as_dict()
        # ComfyUI joins what a node shows of several queries by the names that the first one has.
        assert set(shown) == {"text", "images", "animated"}
        assert (shown["text"] == []) if not message else shown["text"][0].startswith(message)
    pictures = [run("DecAFAttentionPreview", frames=images(4), fused=one.fused, prompts=one) for one in (found[0][0], found[1][0])]
    assert [text(result) for result in pictures] == [there_not, ""]


def case_the_preview_shows_one_picture_and_hands_on_what_came_in():
    given = prompts(6, 0.5)
    result = run("DecAFAttentionPreview", frames=images(6), fused=given.fused, prompts=given)
    shown = result.ui.as_dict()["images"]
    assert len(shown) == 1, "one picture with six frames, not a grid of small ones"
    assert result[3] is given.fused and result[4] is given
    assert result[2].shape[0] == 1 and result[2].shape[3] == 3 and result[2].max() > 0.5
    assert [item.id for item in NODES["DecAFAttentionPreview"].GET_SCHEMA().outputs][:2] == ["images", "coarse_mask"], "new ones come behind"
    alone = run("DecAFAttentionPreview", frames=images(6), fused=given.fused)
    assert alone[3] is given.fused and alone[4] is None
    assert "prompts" in error_of("SAM2VideoPropagate", sam2=sam2(), frames=images(6), prompts=alone[4])
