"""Clips that are not what they seem: titles in any encoding, files that lead elsewhere, paths that block, headers that promise too much."""

import http.server
import os
import socket
import struct
import sys
import threading
import zlib
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from video_files import encode, linear, number_of, numbered

from decaf.clips import open_clip
from decaf.errors import DecafError


def refused(path, *parts):
    with pytest.raises(DecafError) as caught:
        open_clip(path)
    message = str(caught.value)
    assert all(part in message for part in parts) and 20 < len(message) < 600 and message.isprintable(), message


# -- tags --------------------------------------------------------------------------------------------------------------

TITLE, TRACK, HANDLER, LANGUAGE, CHAPTER = b"TITLE-OF-FILE", b"TITLE-OF-TRACK", b"HANDLER-NAME", b"qqx", b"TITLE-OF-CHAPTER"


def tagged(path):
    with av.open(str(path), "w") as file:
        file.metadata["title"] = TITLE.decode()
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        stream.metadata.update(title=TRACK.decode(), handler_name=HANDLER.decode(), language=LANGUAGE.decode())
        if path.suffix in (".mp4", ".mkv"):
            mark = {"title": CHAPTER.decode()}
            file.set_chapters([{"id": 1, "start": 0, "end": 100, "time_base": Fraction(1, 1000), "metadata": mark}])
        for index in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(numbered(index), format="rgb24").reformat(format="yuv420p")))
        file.mux(stream.encode())
    return path


TAGS = {
    ".avi": [TITLE, TRACK],
    ".mov": [TITLE, TRACK, HANDLER],
    ".mp4": [TITLE, TRACK, HANDLER, CHAPTER],
    ".nut": [TITLE, TRACK, HANDLER, LANGUAGE],
    ".mkv": [TITLE, TRACK, HANDLER, LANGUAGE, CHAPTER],
}
TEXTS = {"latin": "für".encode("latin-1"), "jis": "ビデオ".encode("shift-jis"), "nul": b"a\0\xff\xfe", "half": b"\xed\xa0\x80"}


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("suffix, tag", [(suffix, tag) for suffix, tags in TAGS.items() for tag in tags])
def test_tags_in_any_encoding(tmp_path, suffix, tag, text):
    path = tagged(tmp_path / f"old{suffix}")
    whole = path.read_bytes()
    assert tag in whole
    path.write_bytes(whole.replace(tag, TEXTS[text].ljust(len(tag), b"\xe4")[: len(tag)]))
    assert [number_of(frame) for frame in open_clip(path)] == [0, 1, 2]


# -- files that lead elsewhere -----------------------------------------------------------------------------------------


@pytest.fixture
def server():
    """(address, the paths that were asked for) of an HTTP server of this machine."""
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{running.server_port}", asked
    running.shutdown()
    running.server_close()


def playlist(address):
    return f"#EXTM3U\n#EXT-X-VERSION:3\n#EXT-X-TARGETDURATION:5\n#EXTINF:1,\n{address}\n#EXT-X-ENDLIST\n"


def presentation(address):
    kind = 'xmlns="urn:mpeg:dash:schema:mpd:2011" type="static" mediaPresentationDuration="PT5S"'
    video = '<AdaptationSet mimeType="video/mp4"><Representation id="1" bandwidth="1" width="64" height="48">'
    parts = f"<BaseURL>{address}</BaseURL></Representation></AdaptationSet>"
    return f'<?xml version="1.0"?><MPD {kind} profiles="urn:mpeg:dash:profile:isoff-on-demand:2011"><Period>{video}{parts}</Period></MPD>'


LEADING = {
    "HLS": playlist,
    "HLS with a key": lambda address: playlist("other.ts").replace("#EXTINF", f'#EXT-X-KEY:METHOD=AES-128,URI="{address}"\n#EXTINF'),
    "concat": lambda address: f"ffconcat version 1.0\nfile '{address}'\n",
    "DASH": presentation,
    "RTP": lambda _: "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nt=0 0\nm=video 39124 RTP/AVP 96\na=rtpmap:96 H264/90000\n",
    "redirector": lambda address: f"[Reference]\nRef1={address}\n",
    "SVG": lambda address: (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="48"><image href="{address}" width="64" height="48"/></svg>'
    ),
}


@pytest.mark.parametrize("suffix", [".mp4", ".m3u8", ".ffconcat", ".mpd", ".sdp", ".ts"])
@pytest.mark.parametrize("kind", LEADING)
def test_a_clip_leads_nowhere_else(tmp_path, server, kind, suffix):
    address, asked = server
    encode(tmp_path / "other.ts", 3)
    encode(tmp_path / "other.mp4", 3)
    for target in (f"{address}/other.ts", f"{address}/other.mp4", "other.ts", "other.mp4", (tmp_path / "other.mp4").as_uri()):
        path = tmp_path / f"clip{suffix}"
        path.write_text(LEADING[kind](target))
        refused(path, path.name, "could not be opened")
    assert asked == []


def test_a_percent_sign_in_a_name_means_no_other_file(tmp_path):
    for name in ("shot1.dpx", "shot2.dpx"):
        encode(tmp_path / name, 1, codec="dpx", pixels="rgb24", container={"update": "1"})
    (tmp_path / "shot%d.dpx").write_bytes(b"not a picture")
    refused(tmp_path / "shot%d.dpx", "shot%d.dpx", "could not be opened")
    assert len(open_clip(tmp_path / "shot1.dpx")) == 1


def test_a_page_that_calls_itself_a_picture(tmp_path, monkeypatch):
    """PIL would run it with Ghostscript."""
    ran = []
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *args: ran.append(args))
    (tmp_path / "a.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n0 0 10 10 rectfill showpage\n%%EOF\n"
    )
    refused(tmp_path / "a.png", "a.png", "could not be read as an image")
    assert not ran


# -- paths -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, says",
    [("a\0b.mp4", "a\\x00b.mp4"), ("n" * 300 + ".mp4", "nnn...nnn"), ("nothing.mp4", "no file or folder"), ("a\nb", "a\\nb")],
)
def test_names_that_cannot_be(tmp_path, name, says):
    refused(tmp_path / name, says)


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
def test_neither_file_nor_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the name of a socket is short
    os.mkfifo("pipe.mp4")
    os.mkfifo("pipe.png")
    (tmp_path / "link.mp4").symlink_to("pipe.mp4")
    (tmp_path / "loop.mp4").symlink_to("loop.mp4")
    with socket.socket(socket.AF_UNIX) as one:
        one.bind("socket.mp4")
        for name in ("pipe.mp4", "pipe.png", "link.mp4", "socket.mp4"):
            refused(tmp_path / name, name, "a socket" if name.startswith("socket") else "a named pipe")
    refused("/dev/zero", "/dev/zero", "device")
    refused(tmp_path / "loop.mp4", "loop.mp4", "cannot be used as a path")
    refused(tmp_path / "pipe.mp4" / "x.mp4", "x.mp4", "no file or folder")


@pytest.mark.skipif(sys.platform == "win32", reason="has no such files")
def test_what_is_no_file_among_the_frames(tmp_path):
    """Left out, it would shift all frames after it without a word."""
    for index in range(2):
        Image.fromarray(numbered(index)).save(tmp_path / f"{index}.png")
    (tmp_path / "4.png").symlink_to("4.png")
    refused(tmp_path, "4.png", "cannot be used as a path")
    (tmp_path / "4.png").unlink()
    os.mkfifo(tmp_path / "3.png")
    refused(tmp_path, "3.png", "a named pipe")
    (tmp_path / "3.png").rename(tmp_path / "pipe")
    assert [number_of(frame) for frame in open_clip(tmp_path)] == [0, 1]


# -- sizes -------------------------------------------------------------------------------------------------------------


def png(width, height, *chunks):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(bytes((3 * min(width, 64) + 1) * min(height, 64))))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunk(*one) for one in chunks) + body + chunk(b"IEND", b"")


def test_a_limit_of_our_own_for_pictures(tmp_path, monkeypatch):
    """PIL's holds for the process, and others switch it off."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    (tmp_path / "bomb.png").write_bytes(png(20000, 20000))
    refused(tmp_path / "bomb.png", "bomb.png", "20000x20000", "178 million")


BOMB = zlib.compress(bytes(200 << 20), 9)


@pytest.mark.parametrize("suffix", [".png", ".mp4"])
@pytest.mark.parametrize("width, height", [(65535, 65535), (1 << 30, 1), (20000, 20000), (0, 5)])
def test_pictures_that_would_fill_the_memory(tmp_path, width, height, suffix):
    (tmp_path / f"bomb{suffix}").write_bytes(png(width, height))
    refused(tmp_path / f"bomb{suffix}", "bomb")


@pytest.mark.parametrize("kind, head", [(b"zTXt", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0"), (b"iCCP", b"a\0\0")])
def test_text_that_unpacks_to_gigabytes(tmp_path, kind, head):
    """Refused, or the picture without it."""
    (tmp_path / "a.png").write_bytes(png(8, 8, (kind, head + BOMB)))
    try:
        assert open_clip(tmp_path / "a.png").frame_size == (8, 8)
    except DecafError as error:
        assert "a.png" in str(error)


def test_text_of_many_chunks(tmp_path):
    info = PngImagePlugin.PngInfo()
    for _ in range(2000):
        info.add_text("a", "b" * 2000, zip=True)
    Image.fromarray(numbered(3)).save(tmp_path / "a.png", pnginfo=info)
    assert number_of(open_clip(tmp_path / "a.png")[0]) == 3


@pytest.mark.parametrize("name", ["huge.mkv", "huge.avi", "huge.mp4", "huge.h264"])
def test_a_header_that_promises_too_much(tmp_path, name):
    """A file of a few bytes a frame, whose frames are gigapixels by what it says."""
    codec = "libx264" if name.endswith("h264") else "mpeg4"
    path = encode(tmp_path / name, 3, codec=codec, size=(48, 64))
    data = path.read_bytes()
    changed = {
        "huge.mkv": (b"\xb0\x81\x40\xba\x81\x30", b"\xb0\x81\xff\xba\x81\xff"),
        "huge.avi": (struct.pack("<IiiHH", 40, 64, 48, 1, 24), struct.pack("<IiiHH", 40, 65535, 65535, 1, 24)),
        "huge.mp4": (b"\x00\x40\x00\x30\x00\x48", b"\xff\xff\xff\xff\x00\x48"),
    }.get(name)
    if changed:
        assert changed[0] in data
        path.write_bytes(data.replace(*changed))
    else:
        path = encode(tmp_path / "wide.h264", 1, size=(16, 16384), options={"preset": "ultrafast"})
    try:
        assert len(open_clip(path))  # the stream itself may know better
    except DecafError as error:
        assert path.name in str(error)


def test_frames_over_the_limit_are_not_decoded(tmp_path, monkeypatch):
    path = encode(tmp_path / "a.mkv", 3)
    monkeypatch.setattr("decaf.clips.video_file.MAX_PIXELS", 64 * 48 - 1)
    refused(path, "a.mkv", "64x48", "million pixels")
    raw = encode(tmp_path / "a.h264", 3)  # has no header but the stream's own
    refused(raw, "a.h264")
    monkeypatch.setattr("decaf.clips.video_file.MAX_PIXELS", 64 * 48)
    assert len(open_clip(path)) == len(open_clip(raw)) == 3


# -- kinds of pictures and videos --------------------------------------------------------------------------------------


def test_more_kinds_of_pictures(tmp_path):
    grey = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (16, 1))
    Image.fromarray(grey).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=100)
    palette = Image.fromarray(grey).convert("P")
    palette.info["transparency"] = 3
    palette.save(tmp_path / "see_through.png")
    Image.fromarray(grey).save(tmp_path / "many.gif", save_all=True, append_images=[Image.fromarray(255 - grey)] * 300)
    os.rename(tmp_path / "many.gif", tmp_path / "many.png")
    for name in ("cmyk.jpg", "see_through.png", "many.png"):
        frame = open_clip(tmp_path / name)[0]
        assert frame.dtype == torch.uint8 and (frame.int() - torch.from_numpy(grey).int()[..., None]).abs().max() <= 3, name


def test_a_clip_of_one_frame_and_no_length(tmp_path):
    path = encode(tmp_path / "one.mp4", 1)
    data = bytearray(path.read_bytes())
    for box in (b"mvhd", b"mdhd"):
        offset = data.index(box) + 4 + 4 + 8 + 4
        data[offset : offset + 4] = bytes(4)
    path.write_bytes(data)
    assert len(open_clip(path)) == len(linear(path)) == 1
