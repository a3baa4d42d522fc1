"""Laws of image files: what is read, what is refused, and that nothing is half-written."""

import os
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from truepose_core.errors import TruePoseError
from truepose_core.parsing import HumanParsing
from truepose_core.pictures.files import (
    IMAGE_SUFFIXES,
    MAX_SIDE,
    atomic_write,
    check_output,
    image_size,
    load_image,
    save_image,
    whole_file,
)


def smooth(height=40, width=30):
    """An image that JPEG keeps well: uint8 [H, W, 3]."""
    y, x = np.mgrid[:height, :width]
    channels = [255 * y / height, 255 * x / width, 255 * (y + x) / (height + width)]
    return np.stack(channels, -1).astype(np.uint8)


def as_tensor(array):
    return torch.from_numpy(np.array(array, dtype=np.float32)).permute(2, 0, 1)[None] / 255


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


# Reading


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".ppm"])
def test_lossless_files_come_in_as_they_are(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(smooth()).save(path)
    image = load_image(path)
    assert image.shape == (1, 3, 40, 30) and image.dtype == torch.float32
    assert image.is_contiguous()
    assert torch.equal(image, as_tensor(smooth()))
    assert torch.equal(load_image(str(path)), image)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_files_come_in_nearly(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    Image.fromarray(smooth()).save(path, quality=95)
    assert (load_image(path) - as_tensor(smooth())).abs().max() < 0.1


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_grey_one_bit_and_palette_become_rgb(tmp_path, mode):
    image = Image.fromarray(smooth()).convert(mode)
    image.save(tmp_path / "image.png")
    expected = as_tensor(np.asarray(image.convert("RGB")))
    assert torch.equal(load_image(tmp_path / "image.png"), expected)


def test_16_bit_grey_keeps_its_precision(tmp_path):
    grey = (np.arange(40 * 30).reshape(40, 30) * 54).astype(np.uint16)
    for name in ("image.png", "image.tif"):
        Image.fromarray(grey).save(tmp_path / name)
        image = load_image(tmp_path / name)
        expected = torch.from_numpy(grey.astype(np.float32) / 65535)
        torch.testing.assert_close(image, expected.expand(1, 3, -1, -1), atol=1e-7, rtol=0)


def test_16_bit_rgb_is_scaled(tmp_path):
    # Pillow does not write this one: by hand, big endian.
    rows = (smooth(20, 16).astype(np.uint16) * 257).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)

    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = struct.pack(">IIBBBBB", 16, 20, 16, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data))
    (tmp_path / "deep.png").write_bytes(png + chunk(b"IEND", b""))
    image = load_image(tmp_path / "deep.png")
    torch.testing.assert_close(image, as_tensor(smooth(20, 16)), atol=1 / 255, rtol=0)


def test_float_grey_in_0_to_1_is_read_and_other_ranges_are_refused(tmp_path):
    grey = np.linspace(0, 1, 16 * 16, dtype=np.float32).reshape(16, 16)
    Image.fromarray(grey).save(tmp_path / "grey.tif")
    assert torch.equal(load_image(tmp_path / "grey.tif")[0, 0], torch.from_numpy(grey))
    for wrong in (grey * 300, grey - 1, grey * np.nan):
        Image.fromarray(wrong).save(tmp_path / "grey.tif")
        with pytest.raises(TruePoseError, match=r"grey\.tif.*grey values"):
            load_image(tmp_path / "grey.tif")


def test_transparency_shows_white_behind(tmp_path):
    rgba = np.dstack([smooth(), np.zeros((40, 30), np.uint8)])
    rgba[:20, :, 3] = 255
    rgba[30:, :, 3] = 51
    Image.fromarray(rgba).save(tmp_path / "image.png")
    image, opaque = load_image(tmp_path / "image.png"), as_tensor(smooth())
    assert torch.equal(image[:, :, :20], opaque[:, :, :20])
    assert torch.equal(image[:, :, 20:30], torch.ones(1, 3, 10, 30))
    torch.testing.assert_close(image[:, :, 30:], 0.2 * opaque[:, :, 30:] + 0.8)


def test_transparency_of_grey_and_palette(tmp_path):
    grey = np.full((16, 16, 2), 100, np.uint8)
    grey[:8, :, 1] = 0
    Image.fromarray(grey, "LA").save(tmp_path / "grey.png")
    palette = Image.new("P", (16, 16), 1)
    palette.putpalette([0, 0, 0, 100, 100, 100])
    palette.paste(0, (0, 0, 16, 8))
    palette.save(tmp_path / "palette.png", transparency=0)
    assert load_image(tmp_path / "grey.png")[0, :, 0].min() == 1
    image = load_image(tmp_path / "palette.png")
    assert image[0, :, :8].min() == 1
    torch.testing.assert_close(image[0, :, 8:], torch.full((3, 8, 16), 100 / 255))


def test_cmyk_becomes_rgb(tmp_path):
    rgb = np.zeros((32, 32, 3), np.uint8)
    rgb[:, :16], rgb[:, 16:] = (200, 30, 30), (30, 30, 200)
    for name in ("image.jpg", "image.tif"):
        Image.fromarray(rgb).convert("CMYK").save(tmp_path / name)
        image = load_image(tmp_path / name)
        assert (image - as_tensor(rgb))[:, :, :, [4, 27]].abs().max() < 0.1, name


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied(tmp_path, orientation):
    upright = Image.fromarray(smooth())
    turn = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(turn[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(tmp_path / "image.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "image.png"), as_tensor(smooth()))


def test_an_animation_gives_its_first_frame(tmp_path):
    frames = [Image.new("L", (20, 20), value) for value in (0, 255)]
    frames[0].save(tmp_path / "image.gif", save_all=True, append_images=frames[1:])
    assert not load_image(tmp_path / "image.gif").any()


def test_a_phones_two_picture_jpeg_gives_its_first(tmp_path):
    first = Image.fromarray(smooth())
    first.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (30, 40))])
    assert (load_image(tmp_path / "a.jpg") - as_tensor(smooth())).abs().max() < 0.2


# Refusing


def refused(path, said, **options):
    with pytest.raises(TruePoseError, match=said) as caught:
        load_image(path, **options)
    assert path.name in str(caught.value)


def test_no_file_a_folder_and_an_empty_file(tmp_path):
    refused(tmp_path / "none.png", "does not exist")
    refused(tmp_path, "is a folder")
    (tmp_path / "empty.png").touch()
    refused(tmp_path / "empty.png", "empty")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    refused(tmp_path / "pipe.png", "not a regular file")


@pytest.mark.parametrize(
    "content",
    [b"hello", b"\x89PNG\r\n\x1a\n", b"%!PS-Adobe-3.0 EPSF-3.0\n", b"\0" * 5000, b"\xff\xd8"],
)
def test_what_is_no_image(tmp_path, content):
    (tmp_path / "image.png").write_bytes(content)
    refused(tmp_path / "image.png", "not an image|damaged")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".bmp"])
def test_truncated_files_at_any_length(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    whole = path.read_bytes()
    for share in (0.9, 0.5, 0.1, 0.01):
        path.write_bytes(whole[: int(share * len(whole))])
        refused(path, "damaged|not an image|empty")


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@given(st.integers(0, 2**31 - 1))
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_raise_nothing_else(tmp_path_factory, seed):
    rng = np.random.default_rng(seed)
    path = tmp_path_factory.mktemp("damaged") / "image"
    suffix = ["PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP"][seed % 6]
    Image.fromarray(smooth()).save(path, suffix)
    content = bytearray(path.read_bytes())
    for place in rng.integers(0, len(content), 8):
        content[place] = rng.integers(0, 256)
    path.write_bytes(content)
    try:
        image = load_image(path)
    except TruePoseError:
        return
    assert image.min() >= 0 and image.max() <= 1


@pytest.mark.parametrize("size", [(1, 1), (15, 100), (100, 15)])
def test_tiny_images(tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "tiny.png")
    refused(tmp_path / "tiny.png", f"{size[0]}x{size[1]}.*at least 16")


@pytest.mark.parametrize(
    ("width", "height"),
    [(MAX_SIDE + 1, 20), (9000, 9000), (12000, 12000), (2**31 - 1, 2**31 - 1)],
)
def test_bombs_are_refused_from_their_header(tmp_path, recwarn, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    refused(path, "too large")
    assert not recwarn.list


def test_the_bound_can_be_lowered(tmp_path):
    Image.new("RGB", (100, 50)).save(tmp_path / "image.png")
    assert load_image(tmp_path / "image.png", max_pixels=5000).shape == (1, 3, 50, 100)
    refused(tmp_path / "image.png", "100x50.*4999", max_pixels=4999)


def test_a_png_whose_transparency_is_longer_than_a_palette_is_damaged(tmp_path):
    def chunk(kind, content):
        crc = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + crc

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 16, 16, 8, 3, 0, 0, 0))
    data = (
        chunk(b"PLTE", bytes(range(6)))
        + chunk(b"tRNS", bytes(range(256)) + bytes(44))
        + chunk(b"IDAT", zlib.compress(bytes(17 * 16)))
    )
    path = tmp_path / "image.png"
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + data + chunk(b"IEND", b""))
    with pytest.raises(TruePoseError, match=r"image\.png is damaged.*again"):
        load_image(path)
    # Labels have no transparency.
    assert HumanParsing.from_label_image(path).is_empty


# A small file that holds a large picture

GROWTH = """
import re, sys
from pathlib import Path
from PIL import Image
from truepose_core.pictures.files import load_image
from truepose_core.parsing import HumanParsing

def peak():
    # Not getrusage, which counts what the parent held before this process was its own.
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**10

path, what = sys.argv[1:]
load = {
    "image": lambda path: load_image(path),
    "small": lambda path: load_image(path, largest_side=512),
    "labels": lambda path: HumanParsing.from_label_image(path, size=(512, 512)),
}[what]
Image.new("L", (64, 64), 1).save(path + ".png")
load(path + ".png")
before = peak()
load(path)
print(peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="only Linux tells the peak of one process")
@pytest.mark.parametrize("what", ["image", "small", "labels"])
@pytest.mark.parametrize("mode", ["P", "RGBA"])
def test_a_file_is_read_in_16_bytes_per_pixel(tmp_path, what, mode):
    side = 5000
    path = tmp_path / "plain.png"
    Image.new(mode, (side, side), 2 if mode == "P" else (0, 0, 0, 255)).save(path)
    assert path.stat().st_size < 2**18
    command = [sys.executable, "-c", GROWTH, str(path), what]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 16 * side**2 / 2**20 + 30


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "I;16"])
def test_a_large_picture_is_scaled_down_in_bytes_as_in_floats(tmp_path, mode):
    if mode == "I;16":
        image = Image.fromarray(smooth(90, 60)[..., 0].astype(np.uint16) * 257)
    else:
        image = Image.fromarray(smooth(90, 60)).convert(mode)
    image.save(tmp_path / "image.png")
    whole = load_image(tmp_path / "image.png")
    wanted = torch.nn.functional.interpolate(whole, (45, 30), mode="bicubic", antialias=True).clamp(0, 1)
    scaled = load_image(tmp_path / "image.png", largest_side=45)
    torch.testing.assert_close(scaled, wanted, atol=1.1 / 255, rtol=0)
    assert torch.equal(load_image(tmp_path / "image.png", largest_side=90), whole)


def test_the_size_of_a_picture_is_that_of_what_is_read(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(smooth()).save(tmp_path / "turned.jpg", exif=exif)
    Image.fromarray(smooth()).save(tmp_path / "upright.png")
    for name in ("turned.jpg", "upright.png"):
        assert image_size(tmp_path / name) == tuple(load_image(tmp_path / name).shape[:1:-1]), name


# Writing


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_saved_images_load_back(tmp_path, suffix):
    path = tmp_path / f"image{suffix}"
    image = as_tensor(smooth())
    assert save_image(image, path) == path
    assert (load_image(path) - image).abs().max() < (1e-6 if suffix == ".png" else 0.1)
    assert os.listdir(tmp_path) == [path.name]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_float_types_shapes_and_upper_case(tmp_path, dtype):
    image = as_tensor(smooth()).to(dtype)
    save_image(image[0], tmp_path / "a.PNG")
    assert (load_image(tmp_path / "a.PNG") - as_tensor(smooth())).abs().max() < 0.01
    save_image(image[:, :1], tmp_path / "grey.png")
    loaded = load_image(tmp_path / "grey.png")
    assert torch.equal(loaded[:, 0], loaded[:, 2])


def test_values_are_rounded_and_clipped(tmp_path):
    row = torch.tensor([-1.0, 0.0, 0.5, 1.0, 2.0, 100.4 / 255, 100.6 / 255] + [0.0] * 9)
    save_image(row.expand(1, 3, 16, 16), tmp_path / "image.png")
    values = (load_image(tmp_path / "image.png")[0, 0, 0] * 255).round().int().tolist()
    assert values[:7] == [0, 0, 128, 255, 255, 100, 101]


@pytest.mark.parametrize(
    "image",
    [
        torch.rand(2, 3, 16, 16),
        torch.rand(16, 16),
        torch.rand(1, 4, 16, 16),
        torch.zeros(1, 3, 16, 16, dtype=torch.uint8),
        torch.full((1, 3, 16, 16), float("nan")),
    ],
)
def test_what_is_no_image_is_not_saved(tmp_path, image):
    with pytest.raises(TruePoseError, match=r"image\.png"):
        save_image(image, tmp_path / "image.png")
    assert not os.listdir(tmp_path)


def test_an_existing_file_is_kept_unless_asked(tmp_path):
    path = tmp_path / "image.png"
    path.write_bytes(b"mine")
    for call in (
        lambda: save_image(as_tensor(smooth()), path),
        lambda: check_output(path),
        lambda: atomic_write(path, b"other"),
    ):
        with pytest.raises(TruePoseError, match="exists already"):
            call()
        assert path.read_bytes() == b"mine"
    check_output(path, overwrite=True)
    assert path.read_bytes() == b"mine"
    save_image(as_tensor(smooth()), path, overwrite=True)
    assert load_image(path).shape == (1, 3, 40, 30)
    assert os.listdir(tmp_path) == ["image.png"]


@pytest.mark.parametrize("name", ["image", "image.gif", "image.png.exe", ".png"])
def test_unknown_suffixes_are_refused(tmp_path, name):
    with pytest.raises(TruePoseError, match=r"expected one of \.png, \.jpg"):
        save_image(as_tensor(smooth()), tmp_path / name)
    assert not os.listdir(tmp_path)


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    places = {
        tmp_path / "none" / "a.json": "does not exist",
        tmp_path / "file" / "a.json": "does not exist|Not a directory",
        tmp_path: "is a folder",
        tmp_path / ("a" * 300 + ".json"): "cannot be written",
    }
    for path, said in places.items():
        for call in (check_output, lambda p: atomic_write(p, "{}")):
            with pytest.raises(TruePoseError, match=said):
                call(path)
    assert os.listdir(tmp_path) == ["file"]


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path, monkeypatch):
    # Permission bits do not stop root, so the refusal comes from a stand-in for the disk.
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(TruePoseError, match=r"a\.json cannot be written: Permission denied"):
        check_output(tmp_path / "a.json")


@pytest.mark.parametrize("interrupt", [OSError(28, "No space left"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_nothing_is_half_written(tmp_path, monkeypatch, interrupt, step):
    def stop(*_):
        raise interrupt

    path = tmp_path / "data.json"
    path.write_text("old")
    monkeypatch.setattr(os, step, stop)
    expected = TruePoseError if isinstance(interrupt, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        atomic_write(path, "new", overwrite=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["data.json"]


def test_text_and_bytes_are_written_with_the_users_permissions(tmp_path):
    atomic_write(tmp_path / "a.json", "schön")
    assert (tmp_path / "a.json").read_bytes() == "schön".encode()
    atomic_write(tmp_path / "b.bin", b"\0\1")
    assert (tmp_path / "b.bin").read_bytes() == b"\0\1"
    (tmp_path / "plain").touch()
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_checking_leaves_nothing_behind(tmp_path):
    assert check_output(tmp_path / "a.png", suffixes=IMAGE_SUFFIXES) == tmp_path / "a.png"
    assert not os.listdir(tmp_path)


def test_pillow_is_imported_only_when_a_file_is_read():
    code = "import sys, truepose_core.pictures.files; sys.exit('PIL' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


KILLED = """
import os, signal, sys
from pathlib import Path
from truepose_core.pictures.files import atomic_write

os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
atomic_write(Path(sys.argv[1]), bytes(10_000))
"""


def test_what_a_killed_process_left_is_removed_by_the_next_of_the_same_output(tmp_path):
    path, other = tmp_path / "result.bin", tmp_path / "other.bin"
    for left_of in (path, path, other):
        subprocess.run([sys.executable, "-c", KILLED, str(left_of)], check=False)
    assert [file.stat().st_size for file in tmp_path.glob(".truepose-*.tmp")] == [10_000] * 2
    check_output(path)
    assert len(list(tmp_path.glob(".truepose-*.tmp"))) == 1
    atomic_write(other, b"whole")
    assert [file.name for file in tmp_path.iterdir()] == ["other.bin"]


def test_what_somebody_else_is_writing_is_left_alone(tmp_path):
    path = tmp_path / "result.bin"
    with whole_file(path) as file:
        file.write(b"one")
        check_output(path)
        atomic_write(path, b"two")
        assert path.read_bytes() == b"two"
    assert path.read_bytes() == b"one"
    with pytest.raises(ZeroDivisionError), whole_file(path, overwrite=True) as file:
        file.write(b"three")
        _ = 1 / 0
    assert path.read_bytes() == b"one" and list(tmp_path.iterdir()) == [path]
