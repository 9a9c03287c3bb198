"""Zoom: single frames cut to what the video attends, and maps put back where the window lies."""

from dataclasses import replace

import pytest
import torch
from random_clips import clip_of
from slow import EACH_FAMILY

from decaf import extract_attention, extract_attentions, load_mllm
from decaf.attention import zoom
from decaf.attention.batches import image_layout, memory_needed, window_layout
from decaf.attention.fusion import agreement, frame_fusion, min_max, object_background_fusion, resize, slots_to_frames
from decaf.attention.zoom import Windows, find_windows, share_of_whole
from decaf.clips import clip_from_images
from decaf.command.attention_file import load_attention, save_attention
from decaf.errors import DecafError
from decaf.mllm import Layout
from decaf.report import Report
from decaf.settings import AttentionSettings

QUERY, OTHER = "the dog that gets the ball first", "the cup"
ZOOM = {"single_frames": "zoom", "tokens_per_frame": 40}


@pytest.fixture
def always(monkeypatch):
    """Windows wherever the maps of random models peak."""
    monkeypatch.setattr(zoom, "HELD", 0.0)


def window(rows=10, cols=12):
    return Layout("image", (1, rows, cols), (rows * cols,), 1, 1)


def blobs(*places, slots=2, rows=10, cols=12):
    maps = torch.zeros(slots, rows, cols)
    for slot, row, col in places:
        maps[slot, row : row + 2, col : col + 2] = 0.5
    return maps


def test_a_window_lies_around_what_is_attended_with_a_margin():
    found = find_windows(blobs((0, 4, 5), (1, 1, 8)), [blobs()], 4, window())
    assert found.grid == (20, 24) and len(found.tops) == 4
    for key, (row, col) in enumerate([(8, 10), (8, 10), (2, 16), (2, 16)]):  # in cells of the whole frame; a slot holds two frames
        top, left = found.tops[key], found.lefts[key]
        assert top <= max(row - 2, 0) and top + 10 >= row + 6 and left <= col - 2 and left + 12 >= col + 6
    assert found.tops[0] == found.tops[1] != found.tops[2]


@pytest.mark.parametrize(
    "maps", [blobs((0, 1, 1), (0, 7, 9), (1, 1, 1), (1, 7, 9)), torch.full((2, 10, 12), 0.3), blobs()], ids=["far apart", "flat", "nothing"]
)
def test_frames_stay_whole_where_a_quarter_is_not_enough(maps):
    assert find_windows(maps, [blobs()], 4, window()) is None


def test_the_background_and_what_is_not_meant_do_not_count():
    """What both questions attend is nothing to look at: the larger of the others is subtracted."""
    both = blobs((0, 1, 1), (0, 7, 9), (1, 1, 1), (1, 7, 9))
    corner = blobs((0, 7, 9), (1, 7, 9))
    for others in ([corner], [blobs(), corner]):
        found = find_windows(both, others, 4, window())
        assert found is not None and max(found.tops) <= 2 and max(found.lefts) <= 2


@pytest.mark.parametrize("size", [(60, 90), (61, 91), (7, 5), (1, 1)])
def test_what_is_cut_out_is_put_back_where_it_was(size):
    """Brightness rises along both axes: seen through a window and put back, each cell has the brightness of its place."""
    height, width = size
    ramp = (torch.arange(height)[:, None] * (160 / height) + torch.arange(width) * (80 / width)).to(torch.uint8)
    frame = ramp[..., None].expand(-1, -1, 3)
    windows = Windows((8, 12), (0, 4, 3), (6, 0, 5))
    cut = windows.cut([frame] * 3, slice(0, 3))
    assert all(part.shape == frame.shape and part.dtype == torch.uint8 for part in cut)
    small = torch.stack([torch.nn.functional.interpolate(part[None, None, ..., 0].float(), (4, 6), mode="area")[0, 0] for part in cut])
    back = windows.put_back(small, slice(0, 3))
    assert back.shape == (3, 8, 12) and windows.seen.sum((1, 2)).tolist() == [24] * 3
    assert (back[~windows.seen] == 0).all()
    if height > 7:
        whole = torch.nn.functional.interpolate(frame[None, None, ..., 0].float(), (8, 12), mode="area")[0, 0].expand(3, -1, -1)
        assert (back - whole)[windows.seen].abs().max() < 12  # a cell is 20 brighter than the one above
    one = windows.put_back(small[1:2], slice(1, 2))
    assert torch.equal(one[0], back[1])


def test_queries_zoom_only_while_that_takes_no_more_than_whole_frames():
    first, second, third = (Windows((4, 4), (place,), (0,)) for place in (0, 1, 2))
    small, large = window(2, 2), window(4, 4)
    assert share_of_whole([first, second, third], small, large) == [first, second, third]
    assert share_of_whole([first, first, Windows((4, 4), (0,), (0,))], small, small) == [first] * 3
    assert share_of_whole([first, second], small, small) is None
    assert share_of_whole([first, None], small, large) is None


@pytest.mark.parametrize("family", EACH_FAMILY)
@pytest.mark.parametrize("size", [(60, 90), (121, 70)])
def test_a_window_is_asked_as_a_picture_of_its_own(mllm_folder, family, size, always):
    """The maps are those of a clip that consists of the windows, and lie where the windows do."""
    mllm, clip, report = load_mllm(mllm_folder(family)), clip_of(3, *size), Report()
    found = extract_attention(mllm, clip, QUERY, **ZOOM, progress=report)
    layout = window_layout(mllm, size, 1, AttentionSettings(tokens_per_frame=40))
    _, rows, cols = layout.grid
    whole = extract_attention(mllm, clip, QUERY, tokens_per_frame=40)
    windows = None
    for one, other in zip(found, whole, strict=True):
        assert torch.equal(one.video, other.video) and one.presence == other.presence and other.seen is None
        assert one.frame.shape == one.seen.shape == (3, 2 * rows, 2 * cols)
        assert (one.frame[~one.seen] == 0).all() and one.seen.sum((1, 2)).tolist() == [rows * cols] * 3
        first = [seen.nonzero()[0].tolist() for seen in one.seen]
        windows = Windows((2 * rows, 2 * cols), *zip(*first, strict=True))
        assert torch.equal(windows.seen, one.seen)
    cut = clip_from_images(torch.stack(windows.cut([clip[index] for index in range(3)], slice(0, 3))))
    alone = extract_attention(mllm, cut, QUERY, detail="fast", tokens_per_frame=40)
    for one, other in zip(found, alone, strict=True):
        torch.testing.assert_close(one.frame[one.seen].view(3, rows, cols), other.frame, rtol=1e-4, atol=1e-8)
    assert report.counts["frames_zoomed"] == 3 and report.counts["frames_encoded_image"] == 3
    fused = frame_fusion(object_background_fusion(*found))
    assert fused.map.shape == found[0].frame.shape and fused.map.max() == 1


def test_a_quarter_of_the_tokens(mllm_folder, always):
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(4)
    image, part = (layout(mllm, (60, 90), 1, AttentionSettings(tokens_per_frame=40)).tokens for layout in (image_layout, window_layout))
    assert image == 4 * part
    counts = {}
    for single_frames in ("whole", "zoom"):
        report = Report()
        extract_attention(mllm, clip, QUERY, tokens_per_frame=40, single_frames=single_frames, progress=report)
        counts[single_frames] = report.counts["visual_tokens_prefilled"]
    assert counts["whole"] - counts["zoom"] == 4 * 3 * part


def test_whole_frames_are_the_published_ones(mllm_folder, monkeypatch):
    monkeypatch.setattr(zoom, "HELD", 1.1)
    mllm, clip, report = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(3), Report()
    found = extract_attentions(mllm, clip, [QUERY, OTHER], **ZOOM, not_this="the hand", progress=report)
    whole = extract_attentions(mllm, clip, [QUERY, OTHER], tokens_per_frame=40, not_this="the hand")
    assert report.counts["frames_zoomed"] == 0
    for pair, same in zip(found, whole, strict=True):
        for one, other in zip((*pair, pair[0].not_this), (*same, same[0].not_this), strict=True):
            assert torch.equal(one.frame, other.frame) and torch.equal(one.video, other.video) and one.seen is None


def test_each_query_looks_at_its_own_region(mllm_folder, always):
    """And gets what it would get alone; from the fifth on, whole frames, which all share, take fewer tokens."""
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(3)
    queries = [QUERY, OTHER, "who leaves?"]
    together = extract_attentions(mllm, clip, queries, **ZOOM, not_this="the hand")
    for query, pair in zip(queries, together, strict=True):
        alone = extract_attention(mllm, clip, query, **ZOOM, not_this="the hand")
        for one, other in zip((*pair, pair[0].not_this), (*alone, alone[0].not_this), strict=True):
            assert torch.equal(one.seen, other.seen)
            torch.testing.assert_close(one.frame, other.frame, rtol=1e-4, atol=1e-8)
        object_background_fusion(*pair)  # not_this has the query's grid
    many = extract_attentions(mllm, clip, [f"the thing number {number}" for number in range(12)], **ZOOM)
    assert all(pair[0].seen is None for pair in many)


def test_progress_counts_every_look(mllm_folder, always):
    told, seen = [], []
    report = Report(lambda done, total, what: told.append((done, total)) if "key frames" in what else None, watch=lambda make: seen.append(make()))
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(3)
    pairs = extract_attentions(mllm, clip, [QUERY, OTHER], **ZOOM, progress=report)
    different = 1 + (not torch.equal(pairs[0][0].seen, pairs[1][0].seen))
    assert told[-1] == (3 * different, 3 * different) and [done for done, _ in told] == sorted(done for done, _ in told)
    shown = seen[1]  # after the video: of a single frame, the map on the whole picture
    place = pairs[0][0].clip.key_frames.index(shown.index)
    torch.testing.assert_close(shown.heat, pairs[0][0].frame[place])
    assert torch.equal(shown.frame, clip[shown.index])


def test_what_no_frame_showed_is_told_by_the_video(mllm_folder, always):
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(4)
    contrast = object_background_fusion(*extract_attention(mllm, clip, QUERY, **ZOOM))
    seen, frame = contrast.seen, contrast.frame
    video = resize(slots_to_frames(contrast.video, 4), frame.shape[-2:])
    share = 0.5 * agreement(video[seen], frame[seen])
    expected = {"agreement": share, "as published": 0.5}
    for method, weight in expected.items():
        mixed = torch.where(seen, (1 - weight) * video + weight * frame, video)
        torch.testing.assert_close(frame_fusion(contrast, method=method).map, min_max(mixed))


def test_is_kept_in_files(mllm_folder, tmp_path, always):
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(2)
    pair = extract_attention(mllm, clip, QUERY, **ZOOM, not_this="the hand")
    save_attention(tmp_path / "kept", pair, {"made": "here"}, record := {"seconds": {}, "counts": {}, "queries_at_once": 1})
    (object, background), told = load_attention(tmp_path / "kept", {"made": "here"})
    assert told == record
    for one, other in ((object, pair[0]), (background, pair[1]), (object.not_this, pair[0].not_this)):
        assert torch.equal(one.seen, other.seen) and one.seen.any()
    wrong = tuple(replace(one, seen=one.seen[:, :2], not_this=None) for one in pair)
    save_attention(tmp_path / "kept", wrong, {"made": "here"}, record)
    assert load_attention(tmp_path / "kept", {"made": "here"}) is None
    with pytest.raises(DecafError, match="whether single frames showed them.*Extract it again"):
        frame_fusion(wrong[0])


def test_what_cannot_be_asked(mllm_folder):
    mllm, clip = load_mllm(mllm_folder("qwen2_5_vl")), clip_of(2)
    with pytest.raises(DecafError, match='no kind of single frames "half"; choose one of whole, zoom'):
        extract_attention(mllm, clip, QUERY, single_frames="half")
    with pytest.raises(DecafError, match='asks about last. Choose the setting "expression"'):
        extract_attention(mllm, clip, QUERY, setting="class name", single_frames="zoom")


def test_memory_is_that_of_whole_frames_which_may_be_needed(mllm_folder):
    mllm = load_mllm(mllm_folder("qwen2_5_vl"))
    said = [memory_needed(mllm, 8, (120, 180), AttentionSettings(tokens_per_frame=100, single_frames=name)) for name in ("whole", "zoom")]
    assert said[0] <= said[1] < 1.2 * said[0]
