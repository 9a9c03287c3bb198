"""Masks refined and applied, as nodes. Run by inside.py; each raises when something is wrong."""

import json
import unicodedata
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import folder_paths
import numpy as np
import torch
from comfy.cli_args import args
from comfy_api.latest import InputImpl, Types, io
from kit import NODES, error_of, images, module, run, segment, video, with_cancel
from PIL import Image


def square(frames=12, height=72, width=96):
    """MASK: a square of 20 pixels."""
    mask = torch.zeros(frames, height, width)
    mask[:, 14:34, 22:42] = 1
    return mask


def tracks(frames=6):
    return segment(frames)[1]


def applied(frames, masks, **more):
    return run("DecAFApplyMask", frames=frames, masks=masks, **more)[0]


def case_tracks_stay_tracks_and_a_mask_a_mask():
    found = tracks()
    refined = run("DecAFRefineMask", masks=found, feather=3.0, grow=2, specks=0)[0]
    assert type(refined) is type(found) and refined.tracks == found.tracks
    mask = run("DecAFTracksToMask", tracks=refined)[0]
    assert mask.shape == (6, 72, 96) and mask.dtype == torch.float32 and mask.unique().numel() > 4
    given = square()
    soft = run("DecAFRefineMask", masks=given, feather=2.0)[0]
    assert soft.shape == given.shape and torch.equal(soft >= 0.5, given > 0) and soft.unique().numel() > 4
    hard = run("DecAFRefineMask", masks=given, feather=0.0, grow=-3)[0]
    assert hard.sum() == 12 * 14 * 14


def case_a_cut_out_has_alpha_sound_and_times():
    clip = video()
    mask = run("DecAFRefineMask", masks=square(), feather=2.0)[0]
    for format, alpha in (("auto", 1), ("webm (VP9)", 8)):
        made, report, (alone,) = run("DecAFApplyMask", frames=clip, masks=mask, format=format).args
        assert alone is made
        assert "with alpha" in report and made.get_dimensions() == (96, 72)
        path = Path(made.get_stream_source())
        pictures = list(module("decaf.finishing").read_with_alpha(path))
        assert len(pictures) == 12
        for picture, wanted in zip(pictures, mask, strict=True):
            assert np.abs(picture[..., 3] / 255 - wanted.numpy()).max() <= alpha / 255
    assert made.get_frame_rate() == clip.get_frame_rate()


def case_a_saved_cut_out_is_the_file_itself():
    made = applied(video(), square())
    shown = run("DecAFSaveCutOut", video=made, filename_prefix="cut/%width%").ui.as_dict()
    assert len(shown["images"]) == 1
    saved = Path(folder_paths.get_output_directory()) / "cut" / "96_00001_.mov"
    assert saved.read_bytes() == Path(made.get_stream_source()).read_bytes()
    run("DecAFSaveCutOut", video=made, filename_prefix="cut/png", format="PNG pictures")
    folder = Path(folder_paths.get_output_directory()) / "cut" / "png_00001_"
    names = sorted(path.name for path in folder.iterdir())
    assert names == [f"{index:05d}.png" for index in range(12)]
    with Image.open(folder / names[5]) as picture:
        assert picture.mode == "RGBA" and np.array_equal(np.asarray(picture)[..., 3] > 127, square()[5].numpy() > 0)


def case_the_picture_shows_the_object_that_comes_late():
    """Its frame with the most alpha, and without alpha the one in the middle."""
    late = square(12)
    late[:7] = 0
    late[9, 10:60, 10:80] = 1
    for format in ("auto", "webm (VP9)"):
        made = applied(video(), late, format=format)
        source = Path(made.get_stream_source())
        frames = list(module("decaf.finishing").read_with_alpha(source))
        assert np.array_equal(module("decaf.finishing").fullest_frame(source), frames[9])
        shown = picture_of(run("DecAFSaveCutOut", video=made, filename_prefix="late/cut"))
        wanted = module("decaf.pictures.styles").on_checkerboard(torch.from_numpy(frames[9])).numpy()
        assert np.array_equal(shown, wanted) and not np.array_equal(shown[10:60, 10:80], np.roll(shown, 40, 1)[10:60, 10:80])
    opaque = applied(images(12), late, effect="dim rest")
    shown = picture_of(run("DecAFSaveCutOut", video=opaque, filename_prefix="late/opaque"))
    frames = list(module("decaf.finishing").read_with_alpha(Path(opaque.get_stream_source())))
    assert min(range(12), key=lambda index: np.abs(frames[index].astype(int) - shown).sum()) == 6
    for held in (images(5), images(1)):
        loose = InputImpl.VideoFromComponents(Types.VideoComponents(images=held, audio=None, frame_rate=Fraction(10)))
        shown = picture_of(run("DecAFSaveCutOut", video=loose, filename_prefix="late/loose"))
        assert np.abs(shown / 255 - held[len(held) // 2].numpy()).max() < 0.02
        one = applied(held, torch.ones(1, 72, 96))
        assert np.abs(picture_of(run("DecAFSaveCutOut", video=one, filename_prefix="late/few")) / 255 - held[0].numpy()).max() < 0.5


def picture_of(result):
    """What the node shows: (H, W, 3) uint8."""
    (shown,) = result.ui.as_dict()["images"]
    with Image.open(Path(folder_paths.get_temp_directory()) / shown["subfolder"] / shown["filename"]) as picture:
        return np.asarray(picture.convert("RGB"))


def case_exr_pictures_are_linear_and_premultiplied():
    """Read back as half floats: the colours of the clip as light, times alpha."""
    mask = run("DecAFRefineMask", masks=square(), feather=2.0)[0]
    made = applied(images(12), mask)
    run("DecAFSaveCutOut", video=made, filename_prefix="cut/exr", format="EXR pictures")
    folder = Path(folder_paths.get_output_directory()) / "cut" / "exr_00001_"
    files = sorted(folder.iterdir())
    assert [path.name for path in files] == [f"{index:05d}.exr" for index in range(12)]
    with av.open(str(files[5])) as file:
        frame = next(file.decode(video=0))
    assert frame.format.name == "gbrapf16le"
    green, blue, red, alpha = (np.frombuffer(plane, np.float16).reshape(72, -1)[:, :96].astype(float) for plane in frame.planes)
    assert np.abs(alpha - mask[5].numpy()).max() < 1.5 / 255
    pixels = images(12)[5].numpy()
    light = np.where(pixels <= 0.04045, pixels / 12.92, ((pixels + 0.055) / 1.055) ** 2.4) * alpha[..., None]
    assert np.abs(np.stack([red, green, blue], -1) - light).max() < 0.03 and light.max() > 0.5


def case_one_video_per_object():
    found = segment(6, max_objects=0, score_threshold=0.0)[1]
    assert len(found.tracks) > 1
    whole, report, videos = run("DecAFApplyMask", frames=images(6), masks=found, one_per_object=True).args
    assert len(videos) == len(found.tracks) and f"and {len(videos)} objects each by itself" in report
    first = next(module("decaf.finishing").read_with_alpha(Path(whole.get_stream_source())))
    assert np.abs(first[..., 3].astype(int) - found.alpha(0, 1)[0].numpy()).max() <= 1
    for place, (made, track) in enumerate(zip(videos, found.tracks, strict=True)):
        run("DecAFSaveCutOut", video=made, filename_prefix="each/cut")
        (saved,) = (Path(folder_paths.get_output_directory()) / "each").glob(f"cut_object-{track.id}_*.mov")
        pictures = list(module("decaf.finishing").read_with_alpha(saved))
        for index, picture in enumerate(pictures):
            assert np.abs(picture[..., 3].astype(int) - found.alpha(index, index + 1, [place])[0].numpy()).max() <= 1
    number = found.tracks[1].id
    (one,) = run("DecAFApplyMask", frames=images(6), masks=found, one_per_object=True, objects=str(number))[2]
    assert one.part == f"object-{number}"
    none = type(found)(module("decaf.masks").MaskStore(0, 6, (72, 96)), ())
    assert "no object to make a video of" in error_of("DecAFApplyMask", frames=images(6), masks=none, one_per_object=True)
    assert not applied(images(6), none, effect="matte").get_components().images.max() > 0.01


def case_a_film_of_nothing_says_why():
    """In its report and on the node; one of something says nothing on the node, but names the words as the others do."""
    found = tracks()
    there_not = '"the cup" is not in this clip: presence 0.04.'
    for message, query, said in (
        (there_not, "the cup.", there_not),
        ("No object scores above 0.9.", "the cup.", '"the cup": No object scores above 0.9.'),
        ("", "", "No object was found."),
    ):
        none = replace(found.picked([]), message=message, query=query)
        result = run("DecAFApplyMask", frames=images(6), masks=none)
        assert result.ui.as_dict() == {"text": [said]} and result[1].endswith(f"cut out. {said}"), result[1]
    for masks in (found, square(6)):
        result = run("DecAFApplyMask", frames=images(6), masks=masks)
        assert result.ui.as_dict() == {"text": []} and result[1].endswith("cut out.")


def case_the_names_of_queries_are_in_the_names_of_files():
    """Of each query's film and of each object's; what a file system or ComfyUI would not take is left out."""
    found, folder = tracks(), Path(folder_paths.get_output_directory()) / "names"
    number = found.tracks[0].id
    for name, written in (
        ("ball", "_ball"), ("Größe_2", "_Größe_2"), ("", ""), ("../a b:%width%\\?.", "_a-b-width"), ("...", ""), ("x" * 300, "_" + "x" * 40),
    ):  # fmt: skip
        named = replace(found, name=name)
        whole, _, (one,) = run("DecAFApplyMask", frames=images(6), masks=named, one_per_object=True, objects=str(number)).args
        assert "_" * bool(whole.part) + whole.part == written
        for film, more in ((whole, written), (one, f"{written}_object-{number}")):
            before = set(folder.iterdir()) if folder.is_dir() else set()
            run("DecAFSaveCutOut", video=film, filename_prefix="names/cut")
            (saved,) = set(folder.iterdir()) - before
            assert unicodedata.normalize("NFC", saved.name) in (f"cut{more}_00001_.mov", f"cut{more}_00002_.mov"), saved
    refined = run("DecAFRefineMask", masks=replace(found, name="ball"))[0]
    assert applied(images(6), refined).part == "ball"
    run("DecAFSaveCutOut", video=applied(images(6), refined), filename_prefix="names/png", format="PNG pictures")
    assert len(list((folder / "png_ball_00001_").iterdir())) == 6


def case_the_workflow_is_in_what_is_saved():
    """As ComfyUI's own nodes write it, where its page reads it; packets, times, sound and alpha are those of the file without it."""
    workflow = {"nodes": [{"id": 7, "title": "Größe {"}], "version": 0.4}
    prompt = {"7": {"class_type": "DecAFSaveCutOut", "inputs": {"filename_prefix": "told/cut"}}}
    hidden = {io.Hidden.prompt: prompt, io.Hidden.extra_pnginfo: {"workflow": workflow}}
    folder = Path(folder_paths.get_output_directory()) / "told"

    def saved(made, name, **more):
        run("DecAFSaveCutOut", video=made, filename_prefix=f"told/{name}", hidden=hidden, **more)
        (path,) = folder.glob(f"{name}_*_*")
        return path

    def told(path):
        with av.open(str(path)) as file:
            return {key.lower(): json.loads(text) for key, text in file.metadata.items() if key.lower() in ("workflow", "prompt")}

    wanted = {"workflow": workflow, "prompt": prompt}
    clip = video()
    for name, more in (("mov", {}), ("webm", {"format": "webm (VP9)"}), ("mp4", {"effect": "blur"})):
        made = applied(clip, square(), **more)
        source, path = Path(made.get_stream_source()), saved(made, name)
        assert path.suffix == f".{name}" and told(path) == wanted and told(source) == {}
        assert packets_of(path) == packets_of(source)
        before, after = (list(module("decaf.finishing").read_with_alpha(file)) for file in (source, path))
        assert np.array_equal(before, after) and before[0].shape[2] == (3 if name == "mp4" else 4)
    loose = InputImpl.VideoFromComponents(Types.VideoComponents(images=images(4), audio=None, frame_rate=Fraction(10)))
    assert told(saved(loose, "loose")) == wanted
    pictures = sorted(saved(made, "png", format="PNG pictures").iterdir())
    for index, file in enumerate(pictures):
        with Image.open(file) as picture:
            assert {key: json.loads(text) for key, text in picture.text.items()} == (wanted if index == 0 else {})
    saved(made, "exr", format="EXR pictures")
    try:
        args.disable_metadata = True
        assert saved(made, "none").read_bytes() == source.read_bytes() and told(saved(loose, "nowhere")) == {}
        with Image.open(saved(made, "bare", format="PNG pictures") / "00000.png") as picture:
            assert picture.text == {}
    finally:
        args.disable_metadata = False
    with_cancel("DecAFSaveCutOut", video=made, filename_prefix="told/cancelled", hidden=hidden)
    assert not [path for path in folder.iterdir() if path.name.startswith((".", "cancelled"))]


def packets_of(path):
    """What each stream is and holds: frame rate, times, bytes, and the alpha that VP9 has beside them."""
    with av.open(str(path)) as file:
        packets = [packet for packet in file.demux() if packet.size]
        rates = [(one.type, one.time_base, getattr(one, "average_rate", None), one.start_time, one.duration) for one in file.streams]
        return rates, [(one.stream.index, one.pts, one.dts, one.duration, one.is_keyframe, bytes(one)) for one in packets]


def case_a_video_in_memory_is_saved_too():
    loose = InputImpl.VideoFromComponents(Types.VideoComponents(images=images(4), audio=None, frame_rate=Fraction(10)))
    run("DecAFSaveCutOut", video=loose, filename_prefix="loose")
    with av.open(str(Path(folder_paths.get_output_directory()) / "loose_00001_.mp4")) as file:
        assert len(list(file.decode(video=0))) == 4


def case_sound_in_memory_is_carried():
    wave = torch.sin(torch.arange(44100) * 2 * torch.pi * 440 / 44100).expand(1, 2, -1)
    components = Types.VideoComponents(images=images(10), audio={"waveform": wave, "sample_rate": 44100}, frame_rate=Fraction(10))
    made = applied(InputImpl.VideoFromComponents(components), square(10), effect="blur")
    heard = made.get_components().audio
    assert heard["sample_rate"] == 44100 and abs(heard["waveform"].shape[-1] - 44100) <= 1024
    middle = torch.stack([heard["waveform"][0, 0, 10000:30000], wave[0, 0, 10000:30000]])
    assert torch.corrcoef(middle)[0, 1] > 0.99 and abs(middle[0].std() / middle[1].std() - 1) < 0.05


def case_a_trimmed_video_keeps_its_part():
    whole = video()
    start = 4 / float(whole.get_frame_rate())
    part = InputImpl.VideoFromFile(whole.get_stream_source(), start_time=start + 1e-3)
    frames = part.get_components().images
    made = applied(part, square(len(frames)), effect="matte")
    assert len(made.get_components().images) == len(frames) < 12


def case_images_and_a_background():
    clip = images(3)
    made = applied(clip, square(3), effect="new background", background=torch.zeros(1, 9, 30, 3) + torch.tensor([1.0, 0.0, 0.0]))
    shown = made.get_components().images
    assert shown.shape == (3, 72, 96, 3) and (shown[:, 2, 2] - torch.tensor([1.0, 0.0, 0.0])).abs().max() < 0.1
    assert (shown[0, 24, 32] - clip[0, 24, 32]).abs().max() < 0.1
    one = applied(clip, square(1), effect="dim rest", strength=1.0).get_components().images
    assert one[:, 2, 2].max() < 0.05


def case_what_cannot_be_is_a_sentence():
    clip, mask = images(3), square(3)
    told = lambda **more: error_of("DecAFApplyMask", **{"frames": clip, "masks": mask} | more)  # noqa: E731
    assert "has no alpha" in told(format="mp4 (H.264)")
    assert "2 masks for the 3 frames" in told(masks=square(2))
    assert "are 60x72, but the frames of images are 96x72" in told(masks=square(3, 72, 60))
    assert "takes tracks or a mask" in told(masks=torch.zeros(3, 72, 96, 1))
    assert "at least one pixel" in told(masks=torch.zeros(0, 72, 96))
    assert "has no background" in told(effect="new background")
    assert "no colour" in told(effect="colour rest", colour="greenish")
    assert "no object 7; the tracks hold 0" in told(objects="7") and "'one', which is not a number" in told(objects="one")
    assert "takes tracks or a mask" in told(masks="mask")
    assert "leads out of" in error_of("DecAFSaveCutOut", video=video(), filename_prefix="../../x")
    assert "takes tracks or a mask" in error_of("DecAFRefineMask", masks=3)
    assert "from -128 to 128" in error_of("DecAFRefineMask", masks=mask, grow=1000)


def case_cancel_stops_applying():
    before = set(Path(folder_paths.get_temp_directory()).iterdir())
    with_cancel("DecAFApplyMask", frames=images(6), masks=square(6))
    assert set(Path(folder_paths.get_temp_directory()).iterdir()) == before
    with_cancel("DecAFRefineMask", masks=square(6))
    with_cancel("DecAFShowObjects", frames=images(6), tracks=tracks(6))
    made = applied(images(6), square(6))
    saved = Path(folder_paths.get_output_directory())
    for format in ("as it is", "PNG pictures", "EXR pictures"):
        with_cancel("DecAFSaveCutOut", video=made, filename_prefix="cancelled/cut", format=format)
    assert not [path for path in (saved / "cancelled").rglob("*") if path.is_file() and path.name.startswith((".", "cut"))]


def case_the_save_node_is_the_only_leaf():
    """A node in the middle that shows a video gets one more input from the page, and would run again."""
    leaves = {name for name in ("DecAFRefineMask", "DecAFApplyMask", "DecAFSaveCutOut") if NODES[name].GET_SCHEMA().is_output_node}
    assert leaves == {"DecAFSaveCutOut"}
