"""Decoding of images: ranges, orientation and transparency of users' files; what cannot be read is refused."""

import os
import zlib

import numpy as np
import pytest
from PIL import Image

from iciia_exp.data.readers.files import list_files
from iciia_exp.data.readers.images import decode, extensions, open_image, read_image
from iciia_exp.errors import UserError

RAMP = np.arange(65536, dtype=np.uint16).reshape(256, 256)
EXPECTED = np.round(RAMP / 257).astype(np.uint8)


def write(path, values, **options):
    Image.fromarray(values).save(path, **options)
    return path


def grey(path):
    image = read_image(path)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert (pixels == pixels[..., :1]).all()
    return pixels[..., 0]


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_16_bits_keep_their_range(tmp_path, name):
    np.testing.assert_array_equal(grey(write(tmp_path / name, RAMP)), EXPECTED)


def test_16_bits_of_a_pgm(tmp_path):
    (tmp_path / "a.pgm").write_bytes(b"P5 256 256 65535\n" + RAMP.astype(">u2").tobytes())
    np.testing.assert_array_equal(grey(tmp_path / "a.pgm"), EXPECTED)


def test_floats_are_0_to_1(tmp_path):
    values = np.linspace(0, 1, 256, dtype=np.float32).reshape(16, 16)
    np.testing.assert_array_equal(grey(write(tmp_path / "a.tif", values)), np.arange(256).reshape(16, 16))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.full((4, 4), 2.0, np.float32), "floating-point values from 2 to 2; expected 0 to 1"),
        (np.full((4, 4), -0.1, np.float32), "floating-point"),
        (np.full((4, 4), np.nan, np.float32), "floating-point values from nan"),
        (np.full((4, 4), 70000, np.int32), r"32-bit integers \(70000 to 70000\), whose white is not known"),
    ],
)
def test_other_ranges_are_refused(tmp_path, values, message):
    with pytest.raises(ValueError, match=message):
        read_image(write(tmp_path / "a.tif", values))


@pytest.mark.parametrize("end", ["jpg", "png", "webp", "tif"])
@pytest.mark.parametrize("turn", range(1, 9))
def test_the_orientation_of_exif_is_applied(tmp_path, end, turn):
    upright = Image.new("RGB", (40, 24), "white")
    upright.paste((200, 0, 0), (0, 0, 20, 12))  # red above left
    stored = {2: [0], 3: [3], 4: [1], 5: [5], 6: [2], 7: [6], 8: [4]}.get(turn, [])  # the inverse of each orientation
    image = upright
    for operation in stored:
        image = image.transpose(Image.Transpose(operation))
    exif = Image.Exif()
    exif[0x0112] = turn
    image.save(tmp_path / f"a.{end}", exif=exif, **({"quality": 95} if end in ("jpg", "webp") else {}))
    found = np.asarray(read_image(tmp_path / f"a.{end}")).astype(int)
    assert found.shape == (24, 40, 3)
    assert np.abs(found - np.asarray(upright)).mean() < 4


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_is_none(tmp_path):
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09garbage")
    assert read_image(tmp_path / "a.jpg").size == (8, 4)


def transparent():
    palette = Image.new("P", (4, 4))
    palette.putpalette([9, 9, 9] * 256)
    return {
        "rgba.png": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {}),
        "la.png": (Image.new("LA", (4, 4), (9, 0)), {}),
        "colour.png": (Image.new("RGB", (4, 4), (1, 2, 3)), {"transparency": (1, 2, 3)}),
        "palette.gif": (palette, {"transparency": 0}),
        "palette.png": (palette, {"transparency": 0}),
        "rgba.webp": (Image.new("RGBA", (4, 4), (255, 0, 0, 0)), {"lossless": True}),
    }


@pytest.mark.parametrize("name", transparent())
def test_hidden_colours_stay_hidden(tmp_path, name):
    image, options = transparent()[name]
    image.save(tmp_path / name, **options)
    assert np.unique(np.asarray(read_image(tmp_path / name))).tolist() == [255]


def test_half_transparent_pixels_are_mixed_with_white(tmp_path):
    Image.new("RGBA", (1, 1), (0, 0, 100, 128)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png").getpixel((0, 0)) == (127, 127, 177)


@pytest.mark.parametrize("mode", ["RGB", "L", "1", "CMYK", "YCbCr", "P"])
def test_other_images_are_as_pillow_converts_them(tmp_path, mode):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8)).convert(mode)
    path = tmp_path / ("a.tif" if mode in ("CMYK", "YCbCr") else "a.png")
    image.save(path)
    with Image.open(path) as again:
        assert read_image(path).tobytes() == decode(path).tobytes() == again.convert("RGB").tobytes()


def test_published_datasets_are_read_by_conversion_alone(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (8, 4), "red").save(tmp_path / "a.jpg", exif=exif)
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert decode(tmp_path / "a.jpg").size == (8, 4)
    assert decode(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)


# ---- refused


def bomb(path, side=13_000):
    """Write a PNG that declares so many pixels."""

    def chunk(kind, data):
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    head = side.to_bytes(4, "big") * 2 + bytes([8, 2, 0, 0, 0])
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    )
    return path


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("read", [read_image, decode])
def test_bombs_are_refused_before_they_are_decoded(tmp_path, read):
    with pytest.raises(ValueError, match=r"^has 13,000 x 13,000 pixels, more than 89,478,485"):
        read(bomb(tmp_path / "a.png"))


@pytest.mark.parametrize("read", [read_image, decode])
def test_what_is_no_regular_file_is_refused(tmp_path, read):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="is not a regular file"):
        read(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    with pytest.raises((ValueError, OSError)):
        read(tmp_path / "folder.png")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_files_are_closed(tmp_path):
    write(tmp_path / "a.png", RAMP)
    before = len(os.listdir("/proc/self/fd"))
    kept = [read_image(tmp_path / "a.png") for _ in range(3)]
    with pytest.raises(ValueError, match="pixels"), open_image(bomb(tmp_path / "b.png")):
        pass
    assert len(os.listdir("/proc/self/fd")) == before
    assert kept[0].getpixel((0, 0)) == (0, 0, 0)


# ---- listed


def test_formats_are_pillows_without_those_that_run_programs():
    assert {".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff"} < set(extensions())
    assert not {".eps", ".ps", ".pdf", ".mpg", ".h5"} & set(extensions())


def test_folders_and_links(tmp_path):
    (tmp_path / "a" / "0.jpg").mkdir(parents=True)
    for name in ("a/1.JPG", "a/0.jpg/2.png", "b.txt", ".hidden.png", "a/.DS_Store"):
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    (tmp_path / "__MACOSX" / "3.jpg").touch()
    (tmp_path / "a" / "up").symlink_to(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "4.gif").touch()
    (tmp_path / "a" / "link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "a" / "link.png").symlink_to(tmp_path / "a" / "1.JPG")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nothing")
    found, others = list_files(tmp_path, extensions())
    assert found == ["a/0.jpg/2.png", "a/1.JPG", "a/link.png", "a/link/4.gif", "broken.png", "elsewhere/4.gif"]
    assert others == ["b.txt"]


def test_names_that_are_not_utf_8_are_named(tmp_path):
    os.mkdir(tmp_path / "a")
    with open(os.fsencode(tmp_path / "a") + b"/caf\xe9.png", "wb"):
        pass
    with pytest.raises(UserError, match=r"the name of a/caf\\udce9\.png is not UTF-8; rename it"):
        list_files(tmp_path, (".png",))


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    (tmp_path / "locked").mkdir()
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied")
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UserError, match=r"locked: cannot be read \(Permission denied\)$"):
        list_files(tmp_path, (".png",))
