"""Masks applied to clips, and the files looked at frame by frame: count, times, alpha, colours, samples of the sound."""

import os
import signal
import subprocess
import sys
import weakref
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from sounding_clips import heard, soft_masks, times_of, tones, write_clip
from video_files import encode, number_of, numbered, set_display_matrix

from decaf.clips import clip_from_images, open_clip, open_window
from decaf.clips.base import Clip
from decaf.errors import DecafError
from decaf.finishing import SoundFile, SoundWave, apply_mask, read_with_alpha, tracks_from_masks
from decaf.settings import EffectSettings

CUT_OUT = EffectSettings("cut out")
BLUR = EffectSettings("blur", strength=0.3)


def whole(frames, size=(48, 64)):
    """Masks of everything."""
    return tracks_from_masks(torch.ones(frames, *size))


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("source") / "clip.mp4")


# -- pictures --------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("suffix", "alpha_error", "colour_error"), [(".mov", 1, 3), (".webm", 12, 30), ("", 0, 0)])
def test_a_cut_out_frame_by_frame(source, tmp_path, suffix, alpha_error, colour_error):
    """Every frame is there, in order, with its alpha; and its colours inside, where the object is."""
    clip, masks = open_clip(source), soft_masks(30)
    path = tmp_path / f"cut{suffix}"
    apply_mask(path, clip, masks, CUT_OUT)
    if suffix:
        pictures = list(read_with_alpha(path))
    else:
        pictures = [np.asarray(Image.open(file)) for file in sorted(path.iterdir())]
    assert len(pictures) == len(clip)
    for index, picture in enumerate(pictures):
        alpha = masks.alpha(index, index + 1)[0].numpy()
        assert picture.shape == (48, 64, 4) and 0 < (alpha > 0).mean() < 1 and len(np.unique(alpha)) > 4
        assert np.abs(picture[..., 3].astype(int) - alpha).max() <= alpha_error
        inside = alpha == 255
        error = np.abs(picture[..., :3].astype(int) - clip[index].numpy())[inside]
        assert error.mean() <= colour_error / 3 and np.percentile(error, 99) <= colour_error


def test_alpha_of_a_webm_is_announced(source, tmp_path):
    """Browsers look for the note; FFmpeg's own decoder leaves alpha out, and the pictures it gives are whole all the same."""
    apply_mask(tmp_path / "cut.webm", open_clip(source), soft_masks(30), CUT_OUT)
    with av.open(str(tmp_path / "cut.webm")) as file:
        tags = {key.lower(): value for key, value in file.streams.video[0].metadata.items()}
        assert tags["alpha_mode"] == "1" and len(list(file.decode(video=0))) == 30


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
def test_without_alpha(source, tmp_path, suffix):
    """Where nothing is changed, the numbers in the frames can still be read; and there is no alpha that is none."""
    nothing = tracks_from_masks(torch.zeros(30, 48, 64))
    apply_mask(tmp_path / f"out{suffix}", open_clip(source), nothing, BLUR)
    pictures = list(read_with_alpha(tmp_path / f"out{suffix}"))
    assert [number_of(picture) for picture in pictures] == list(range(30)) and pictures[0].shape == (48, 64, 3)


def test_inverted(source, tmp_path):
    clip, masks = open_clip(source), soft_masks(30)
    apply_mask(tmp_path / "cut.mov", clip, masks, EffectSettings("cut out", invert=True))
    alpha = next(read_with_alpha(tmp_path / "cut.mov"))[..., 3].astype(int)
    assert np.abs(alpha - (255 - masks.alpha(0, 1)[0].numpy().astype(int))).max() <= 1


def test_only_some_objects(tmp_path):
    """And masks of one frame are those of all frames."""
    masks = tracks_from_masks(torch.ones(1, 48, 64))
    clip = clip_from_images(torch.rand(3, 48, 64, 3))
    apply_mask(tmp_path / "none", clip, masks, EffectSettings("matte"), objects=[])
    apply_mask(tmp_path / "all", clip, masks, EffectSettings("matte"))
    for name, value in (("none", 0), ("all", 255)):
        files = sorted((tmp_path / name).iterdir())
        assert len(files) == 3 and all((next(read_with_alpha(file)) == value).all() for file in files)


def test_a_background_runs_beside_the_clip(tmp_path):
    """At half the rate, each of its frames is seen twice; after its end it begins again."""
    clip = open_clip(encode(tmp_path / "front.mp4", 12, rate=20))
    behind = open_clip(encode(tmp_path / "behind.mp4", 4, rate=10, options={"crf": "1"}))
    nothing = tracks_from_masks(torch.zeros(12, 48, 64))
    apply_mask(tmp_path / "out", clip, nothing, EffectSettings("new background"), background=behind)
    shown = [number_of(next(read_with_alpha(file))) for file in sorted((tmp_path / "out").iterdir())]
    assert shown == [0, 0, 1, 1, 2, 2, 3, 3, 0, 0, 1, 1]


# -- times -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".webm"])
@pytest.mark.parametrize("rate", [Fraction(24000, 1001), Fraction(25), Fraction(60000, 1001), Fraction(15, 2)])
def test_times_are_those_of_the_clip(tmp_path, suffix, rate):
    source = write_clip(tmp_path / "in.mp4", 20, rate=rate, sound=None)
    apply_mask(tmp_path / f"out{suffix}", open_clip(source), whole(20), BLUR)
    wanted, end = times_of(source)
    found, found_end = times_of(tmp_path / f"out{suffix}")
    if suffix == ".webm":
        assert len(found) == 20 and max(abs(a - b) for a, b in zip(found, wanted, strict=True)) <= Fraction(1, 2000)
    else:
        assert found == wanted and found_end == end
        with av.open(str(tmp_path / f"out{suffix}")) as file:
            assert file.streams.video[0].average_rate == rate and file.streams.video[0].frames == 20


@pytest.mark.parametrize("name", ["in.mp4", "in.mkv"])
def test_a_variable_rate_stays_variable(tmp_path, name):
    times = [0, 33, 90, 100, 250, 251, 400, 700, 733, 1000]
    source = write_clip(tmp_path / name, 10, times=times, sound=None)
    for suffix in (".mp4", ".mov", ".webm"):
        apply_mask(tmp_path / f"out{suffix}", open_clip(source), whole(10), BLUR)
        found, _ = times_of(tmp_path / f"out{suffix}")
        assert [round(1000 * time) for time in found] == times


def test_images_have_the_rate_that_is_given(tmp_path):
    clip = clip_from_images(torch.rand(6, 48, 64, 3))
    apply_mask(tmp_path / "out.mp4", clip, whole(6), BLUR, fps=Fraction(30000, 1001))
    times, end = times_of(tmp_path / "out.mp4")
    assert times == [index * Fraction(1001, 30000) for index in range(6)] and end == 6 * Fraction(1001, 30000)


def test_one_frame(tmp_path):
    clip = clip_from_images(torch.rand(1, 48, 64, 3))
    for suffix in (".mp4", ".mov", ".webm"):
        apply_mask(tmp_path / f"one{suffix}", clip, whole(1), BLUR)
        assert len(list(read_with_alpha(tmp_path / f"one{suffix}"))) == 1


# -- sound -----------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".mp4", ".mov"])
def test_sound_is_copied_sample_by_sample(source, tmp_path, suffix):
    assert apply_mask(tmp_path / f"out{suffix}", open_clip(source), whole(30), BLUR, sound=SoundFile(source)) == ""
    begin, samples, rate = heard(source)
    found_begin, found, found_rate = heard(tmp_path / f"out{suffix}")
    assert (found_begin, found_rate) == (begin, rate) and np.array_equal(found, samples)


def offset(found, found_rate, begin, wanted, rate):
    """By how many seconds `found` comes later than `wanted`, of the left tone, by the best match; and how good that is, 1 at most."""
    grid = np.arange(0.1, wanted.shape[1] / rate - 0.1, 1 / 48000)
    reference = np.interp(grid, np.arange(wanted.shape[1]) / rate, wanted[0])
    best = max(
        (np.corrcoef(reference, np.interp(grid + shift, float(begin) + np.arange(found.shape[1]) / found_rate, found[0]))[0, 1], shift)
        for shift in np.arange(-60, 61) / 24000
    )
    return best[1], best[0]


@pytest.mark.parametrize(
    ("name", "encoder", "samples", "suffix", "codec"),
    [
        ("in.mp4", "aac", 44100, ".webm", "opus"),
        ("in.mkv", "flac", 48000, ".mp4", "aac"),
        ("in.mkv", "flac", 44100, ".mov", "pcm_s24le"),
        ("in.mkv", "libopus", 48000, ".mov", "pcm_s24le"),
        ("in.mkv", "libopus", 48000, ".mp4", "opus"),
        ("in.mkv", "libopus", 48000, ".webm", "opus"),
        ("in.mov", "pcm_s16le", 48000, ".mov", "pcm_s16le"),
        ("in.avi", "mp3", 44100, ".mp4", "mp3"),
        ("in.ts", "mp2", 48000, ".mp4", "aac"),
    ],
)
def test_sound_that_a_file_cannot_hold_is_encoded(tmp_path, name, encoder, samples, suffix, codec):
    """In step with the pictures, whatever time the file begins with."""
    pictures = "mpeg4" if name == "in.avi" else "libx264"  # AVI has no times for frames that are shown in another order than they are stored
    source = write_clip(tmp_path / name, 40, rate=Fraction(25), codec=pictures, sound=encoder, samples=samples)
    assert apply_mask(tmp_path / f"out{suffix}", open_clip(source), whole(40), BLUR, sound=SoundFile(source)) == ""
    with av.open(str(tmp_path / f"out{suffix}")) as file:
        assert file.streams.audio[0].codec.canonical_name == codec
    begin, found, rate = heard(tmp_path / f"out{suffix}")
    was, original, original_rate = heard(source)
    times, _ = times_of(tmp_path / f"out{suffix}")
    source_times, _ = times_of(source)
    later, likeness = offset(found, rate, begin - times[0] - (was - source_times[0]), original, original_rate)
    assert likeness > 0.98 and abs(later) < 0.002, (later, likeness)


def test_the_sound_of_a_part_begins_with_it(tmp_path):
    """To the sample: not to the packet, which is 1024 of them."""
    source = write_clip(tmp_path / "in.mov", 60, rate=Fraction(25), sound="pcm_s16le", samples=48000)
    part = open_window(source, 0.72, 1.64)
    assert len(part) == 23
    window = (Fraction(18, 25), Fraction(41, 25))
    apply_mask(tmp_path / "out.mov", part, whole(23), BLUR, sound=SoundFile(source, window))
    assert times_of(tmp_path / "out.mov")[0] == [Fraction(index, 25) for index in range(23)]
    begin, found, rate = heard(tmp_path / "out.mov")
    assert begin == 0 and found.shape[1] == 23 * 48000 // 25
    assert np.abs(found - tones(2.4, 48000)[:, 34560:78720]).max() < 1e-4


def test_the_sound_of_a_part_in_a_webm(tmp_path):
    """Which has no way to say that the beginning of its sound is not to be heard."""
    source = write_clip(tmp_path / "in.mov", 60, rate=Fraction(25), sound="pcm_s16le", samples=48000)
    apply_mask(tmp_path / "out.webm", open_window(source, 0.72, 1.64), whole(23), BLUR, sound=SoundFile(source, (Fraction(18, 25), Fraction(41, 25))))
    begin, found, rate = heard(tmp_path / "out.webm")
    times, _ = times_of(tmp_path / "out.webm")
    later, likeness = offset(found, rate, begin - times[0], tones(2.4, 48000)[:, 34560:78720], 48000)
    assert times[0] == 0 and likeness > 0.98 and abs(later) < 0.002, (times[0], later, likeness)


def test_sound_in_memory(tmp_path):
    wave = torch.from_numpy(tones(1.0, 44100))
    apply_mask(tmp_path / "out.mov", clip_from_images(torch.rand(10, 48, 64, 3)), whole(10), BLUR, fps=Fraction(10), sound=SoundWave(wave, 44100))
    begin, found, rate = heard(tmp_path / "out.mov")
    assert (begin, rate, found.shape[1]) == (0, 44100, 44100) and np.abs(found - wave.numpy()).max() < 1e-4


def test_sound_longer_or_shorter_than_the_pictures(tmp_path):
    for seconds in (0.3, 3.0):
        source = write_clip(tmp_path / f"{seconds}.mp4", 25, rate=Fraction(25), seconds=seconds)
        apply_mask(tmp_path / f"out{seconds}.mp4", open_clip(source), whole(25), BLUR, sound=SoundFile(source))
        assert np.array_equal(heard(tmp_path / f"out{seconds}.mp4")[1], heard(source)[1])


def test_sound_of_an_unknown_format_is_told(tmp_path):
    """The pictures are worth having without it."""
    source = write_clip(tmp_path / "in.avi", 10, rate=Fraction(25), sound="mp3")
    data = bytearray(source.read_bytes())
    tag = data.index(b"strf", data.index(b"auds")) + 8
    data[tag : tag + 2] = b"\x34\x12"
    source.write_bytes(data)
    with av.open(str(source)) as file:
        assert file.streams.audio and file.streams.audio[0].codec_context is None
    told = apply_mask(tmp_path / "out.mp4", open_clip(source), whole(10), BLUR, sound=SoundFile(source))
    assert "sound of in.avi is in a format that is not known here" in told and len(list(read_with_alpha(tmp_path / "out.mp4"))) == 10
    assert "carry no sound" in apply_mask(tmp_path / "pictures", open_clip(source), whole(10), BLUR, sound=SoundFile(source))


# -- odd sources -----------------------------------------------------------------------------------------------------------------------


def test_rotated(tmp_path):
    source = encode(tmp_path / "phone.mp4", 8)
    set_display_matrix(source, 0, 1, -1, 0)
    clip = open_clip(source)
    assert clip.frame_size == (64, 48)
    apply_mask(tmp_path / "out.mov", clip, soft_masks(8, (64, 48)), CUT_OUT)
    pictures = list(read_with_alpha(tmp_path / "out.mov"))
    with av.open(str(tmp_path / "out.mov")) as file:
        assert next(file.decode(video=0)).rotation == 0
    assert [number_of(np.rot90(clip[index])) for index in range(8)] == list(range(8))
    inside = pictures[3][..., 3] == 255
    assert np.abs(pictures[3][..., :3].astype(int) - clip[3].numpy())[inside].max() < 8


@pytest.mark.parametrize("size", [(47, 63), (48, 63), (5, 3)])
def test_odd_sizes(tmp_path, size):
    """ProRes, VP9 and PNG hold them; H.264 repeats the last row and column."""
    clip = clip_from_images(torch.rand(3, *size, 3))
    masks = tracks_from_masks((torch.rand(3, *size) > 0.5).float())
    for name in ("out.mov", "out.webm", "out"):
        apply_mask(tmp_path / name, clip, masks, CUT_OUT)
        first = next(read_with_alpha(tmp_path / name if "." in name else tmp_path / name / "00000.png"))
        assert first.shape == (*size, 4)
    apply_mask(tmp_path / "out.mp4", clip, masks, BLUR)
    assert next(read_with_alpha(tmp_path / "out.mp4")).shape == (size[0] + size[0] % 2, size[1] + size[1] % 2, 3)


def test_ten_bits_and_full_colour(tmp_path):
    source = encode(tmp_path / "in.mkv", 6, pixels="yuv444p10le", options={"crf": "1"})
    clip = open_clip(source)
    apply_mask(tmp_path / "out.mov", clip, whole(6), CUT_OUT)
    assert [number_of(picture[..., :3]) for picture in read_with_alpha(tmp_path / "out.mov")] == list(range(6))


# -- what cannot be --------------------------------------------------------------------------------------------------------------------


def refused(path, clip=None, masks=None, settings=CUT_OUT, **more):
    clip = clip or clip_from_images(torch.rand(3, 48, 64, 3))
    with pytest.raises(DecafError) as error:
        apply_mask(path, clip, masks or whole(3), settings, **more)
    return str(error.value)


def test_what_cannot_be_is_a_sentence(tmp_path):
    assert "H.264 has no alpha. Choose .mov (ProRes 4444) or .webm (VP9)" in refused(tmp_path / "out.mp4")
    assert "Let the name end in .mp4" in refused(tmp_path / "out.xyz")
    assert "2 masks for the 3 frames" in refused(tmp_path / "out.mov", masks=whole(2))
    assert "masks are 64x47, but" in refused(tmp_path / "out.mov", masks=whole(3, (47, 64)))
    assert "no effect 'sparkle'" in refused(tmp_path / "out.mov", settings=EffectSettings("sparkle"))
    assert "'strength' is 2" in refused(tmp_path / "out.mov", settings=EffectSettings("blur", strength=2))
    assert "is no colour" in refused(tmp_path / "out.mov", settings=EffectSettings("colour rest", colour="#12"))
    assert "has no background" in refused(tmp_path / "out.mov", settings=EffectSettings("new background"))
    (tmp_path / "file").write_text("")
    assert "is a file. Give a folder" in refused(tmp_path / "file")
    assert "could not be written" in refused(tmp_path / "file" / "out.mov")
    assert [path.name for path in tmp_path.iterdir()] == ["file"], "and nothing is left behind"


def test_pictures_do_not_mix(tmp_path):
    clip = clip_from_images(torch.rand(3, 48, 64, 3))
    apply_mask(tmp_path / "out", clip, whole(3), CUT_OUT)
    assert "holds pictures already" in refused(tmp_path / "out")


@pytest.mark.parametrize("name", ["out.mov", "out.webm", "out.mp4", "out"])
def test_a_full_disk(tmp_path, name):
    """Half way: a sentence, and no half of a video."""
    resource = pytest.importorskip("resource")
    clip = clip_from_images(torch.rand(30, 96, 128, 3))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, limits[1]))
    try:
        told = refused(tmp_path / name, clip, whole(30, (96, 128)), EffectSettings("blur", strength=0))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, before)
    assert "The disk is full" in told
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == []


def test_a_cancel_leaves_nothing(source, tmp_path):
    class Stop(Exception):
        pass

    def stop(done, total, what):
        if done == 10:
            raise Stop

    with pytest.raises(Stop):
        apply_mask(tmp_path / "out.mov", open_clip(source), whole(30), CUT_OUT, sound=SoundFile(source), progress=stop)
    assert list(tmp_path.iterdir()) == []


# -- memory ----------------------------------------------------------------------------------------------------------------------------


class CountedClip(Clip):
    """Makes its frames, and knows how many of them somebody holds."""

    def __init__(self, length, size):
        self.name, self.frame_size, self._length, self.alive, self.most = "made", size, length, 0, 0

    def __len__(self):
        return self._length

    def _read(self, index):
        frame = torch.from_numpy(numbered(index % 200, self.frame_size))
        self.alive += 1
        self.most = max(self.most, self.alive)
        weakref.finalize(frame, self._dropped)
        return frame

    def _dropped(self):
        self.alive -= 1


def test_frames_are_streamed(tmp_path):
    for length in (20, 60):
        clip = CountedClip(length, (48, 64))
        apply_mask(tmp_path / f"{length}.mov", clip, whole(1), CUT_OUT)
        assert clip.most <= 2


@pytest.mark.slow
@pytest.mark.skipif(not os.path.exists("/proc/self/status"), reason="the peak of a process is read from Linux's /proc")
def test_memory_is_flat(tmp_path, request):
    """Refined and cut out with sound, in a process of its own: the longer clip takes no more at its peak."""
    lengths, size = ((200, 640), (720, 1280)) if request.config.getoption("--long") else ((40, 160), (144, 256))
    peaks = {}
    for length in lengths:
        write_clip(tmp_path / f"{length}.mp4", length, size=size, rate=Fraction(25))
        made = subprocess.run(
            [sys.executable, "-c", PROCESS, str(tmp_path), str(length), *map(str, size)], capture_output=True, text=True, check=False,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert made.returncode == 0, made.stderr
        peaks[length] = int(made.stdout)
        assert len(times_of(tmp_path / f"{length}.mov")[0]) == length
    few, many = (peaks[length] for length in lengths)
    assert many - few < max(20 << 20, 0.03 * few), {length: f"{peak >> 20} MB" for length, peak in peaks.items()}


PROCESS = """
import sys
from pathlib import Path
import numpy as np, torch
torch.set_num_threads(1)
from decaf.clips import open_clip
from decaf.data import Track, Tracks
from decaf.finishing import SoundFile, apply_mask, refine
from decaf.masks import MaskStore
from decaf.settings import EffectSettings, RefineSettings
folder, length, size = Path(sys.argv[1]), int(sys.argv[2]), (int(sys.argv[3]), int(sys.argv[4]))
source = folder / f"{length}.mp4"
store = MaskStore(1, length, size)
ys, xs = np.mgrid[:size[0], :size[1]]
for index in range(length):
    x = size[1] * (0.3 + 0.4 * index / length)
    store.put(0, index, torch.from_numpy((ys - size[0] / 2) ** 2 + (xs - x) ** 2 < (size[0] / 4) ** 2))
tracks = Tracks(store, (Track(0, 0, (0.5, 0.5), 1.0, 1.0, 1.0),))
refined = refine(tracks, RefineSettings(holes=200, specks=100, smooth=1, shortest=3, grow=1, feather=2, border=2))
clip = open_clip(source, budget=8 * size[0] * size[1] * 3)
apply_mask(folder / f"{length}.mov", clip, refined, EffectSettings("cut out"), sound=SoundFile(source))
status = Path("/proc/self/status").read_text()
print(int(status.split("VmHWM:")[1].split()[0]) << 10)
"""
