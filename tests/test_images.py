"""Decoding: colours, transparency, 16 bits, damaged and missing files."""

import io
import logging
import os
import random
import struct
import sys
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

datasets = pytest.importorskip("datasets", reason="needs the extra 'recipes'")

from timm_resnas import data as D  # noqa: E402
from timm_resnas.data.images import decode, is_transparent, parse_background, to_mode  # noqa: E402


def noise(seed, mode="RGB", size=(20, 16)):
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, shape, dtype=np.uint8))


def saved(image, kind="PNG", **options):
    out = io.BytesIO()
    image.save(out, kind, **options)
    return out.getvalue()


def item(data):
    return {"bytes": data, "path": None}


def rows(items, labels=None):
    """A data set of undecoded images: bytes, paths, or None for a row without an image."""
    made = {bytes: item, str: lambda path: {"bytes": None, "path": path}, type(None): lambda none: none}
    items = [made[type(i)](i) for i in items]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    columns = {"image": items, "label": labels or [k % 2 for k in range(len(items))]}
    return datasets.Dataset.from_dict(columns, features=features)


def over(image, alpha, background):
    """`image` in front of a colour, written out in floats."""
    front, share = np.asarray(image.convert("RGB"), float), np.asarray(alpha, float)[..., None] / 255
    return front * share + np.array(background) * (1 - share)


# -- transparency -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "colour"), [("white", (255, 255, 255)), ("#102030", (16, 32, 48))])
def test_transparent_pixels_show_the_background(name, colour):
    colour_image, grey, alpha = noise(0), noise(1, "L"), noise(2, "L")
    rgba, la, palette = colour_image.copy(), grey.copy(), colour_image.quantize(16)
    rgba.putalpha(alpha), la.putalpha(alpha)
    opacity = bytes(range(0, 256, 16))
    faded = Image.fromarray(np.frombuffer(opacity, np.uint8)[np.asarray(palette)])
    key = np.where((np.asarray(grey) == grey.getpixel((3, 3))), 0, 255)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    cases = {
        "RGBA": (saved(rgba), over(colour_image, alpha, colour)),
        "LA": (saved(la), over(grey, alpha, colour)),
        "palette": (saved(palette, transparency=opacity), over(palette, faded, colour)),
        "one grey": (saved(grey, transparency=grey.getpixel((3, 3))), over(grey, key, colour)),
        "16 bits": (saved(deep, transparency=grey.getpixel((3, 3)) * 257), over(grey, key, colour)),
        "webp": (saved(rgba, "WEBP", lossless=True, exact=True), over(colour_image, alpha, colour)),
        "tiff": (saved(rgba, "TIFF"), over(colour_image, alpha, colour)),
    }
    background = parse_background(name)
    for kind, (data, expected) in cases.items():
        got = np.asarray(decode(item(data), background=background), float)
        assert np.abs(got - expected).max() <= 1, kind  # Pillow rounds to bytes
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            assert is_transparent(image), kind
    grey_model = decode(item(cases["LA"][0]), "L", background=background)
    weights = np.array([0.299, 0.587, 0.114])
    assert np.abs(np.asarray(grey_model, float) - cases["LA"][1] @ weights).max() <= 2


def test_opaque_pixels_stay_as_they_are():
    image = noise(0)
    for opaque in (image.convert("RGBA"), image.quantize(16), image.convert("CMYK"), image.convert("1"), image):
        assert not is_transparent(opaque)
        got = to_mode(opaque, "RGB", "#123456")
        np.testing.assert_array_equal(np.asarray(got), np.asarray(opaque.convert("RGB")))


def test_hidden_colours_never_reach_a_model():
    """Black drawings on nothing: by their colours alone all of them are the same black picture."""
    drawings = []
    for k in range(4):
        drawing = Image.new("RGBA", (16, 16), (0, 0, 0, 0))
        drawing.paste((0, 0, 0, 255), (4 * k, 0, 4 * k + 4, 16))
        drawings.append(saved(drawing))
    data = rows(drawings)
    assert len(set(D.content_hashes(data))) == 4
    config = dict(input_size=[3, 16, 16], mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
    for extra, value in (({}, 1.0), ({"background": "red"}, torch.tensor([1.0, 0.0, 0.0]).view(3, 1, 1))):
        shown = D.eval_batches(data, D.eval_transform({**config, **extra})).images
        ((trained, _),) = D.train_loader(data, D.train_transform({**config, **extra}, no_aug=True), 4).epoch(0)
        assert {x.numpy().tobytes() for x in trained} == {x.numpy().tobytes() for x in shown}
        assert (shown[0, :, :, :4] == 0).all() and (shown[0, :, :, 4:] == value).all()


def test_colours():
    found = [parse_background(c) for c in ("white", "#ABC", "rgb(1, 2, 3)", "#010203ff")]
    assert found == ["#ffffff", "#aabbcc", "#010203", "#010203"]
    for wrong in ("whit", "#12345678", "", None):
        with pytest.raises(D.DataError, match="background must be"):
            parse_background(wrong)


def test_background_of_a_data_set(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(5):
            image = noise(k).convert("RGBA")
            if k < 3:
                image.putpixel((0, 0), (255, 0, 0, 0 if name == "a" else 128))
            image.save(tmp_path / name / f"{k}.png")
    name = f"imagefolder:{tmp_path}"
    splits = D.load_splits(name, background="grey")
    assert splits.background == "#808080"
    assert splits.notes == ("6 of 10 images have transparent pixels; they show the background #808080 (--background)",)
    assert D.default_data_config(splits, 32)["background"] == "#808080"
    assert "background" not in D.default_data_config(D.load_splits(name), 32)
    assert (
        D.load_eval(name).notes[-1].startswith("6 of 10 images have transparent pixels; they show the background #ff")
    )


# -- depth ------------------------------------------------------------------------------------------------------------


def test_deep_greys_and_floats_are_scaled():
    grey = np.asarray(noise(2, "L"))
    forms = [grey.astype(np.uint16) * 257, grey.astype(np.int32) * 257, grey.astype(np.int32)]
    forms += [grey.astype(np.float32) / 255, grey.astype(np.float32), grey.astype(np.float32) * 257]
    for form in forms:
        data = saved(Image.fromarray(form), "TIFF")
        np.testing.assert_array_equal(np.asarray(decode(item(data)))[..., 1], grey)
        np.testing.assert_array_equal(np.asarray(decode(item(data), "L")), grey)


# -- damage that leaves the pixels as they are ------------------------------------------------------------------------


def chunk(kind, data, crc=None):
    check = zlib.crc32(kind + data) if crc is None else crc
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)


@pytest.mark.parametrize(
    "damage",
    [
        chunk(b"eXIf", b"garbage"),
        chunk(b"eXIf", b"MM\0*\0\0\0\x08\0\0", crc=1),
        chunk(b"eXIf", b"MM\0*\xff\xff\xff\xff"),
        chunk(b"iCCP", b"x", crc=3),
        chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(3_000_000))),
        chunk(b"pHYs", b"1"),
        chunk(b"gAMA", b""),
    ],
    ids=lambda data: data[4:8].decode(),
)
def test_damaged_metadata_of_a_png(damage, tmp_path):
    image = noise(0).quantize(8)
    data = saved(image, transparency=3)
    (tmp_path / "a.png").write_bytes(data[:33] + damage + data[33:])
    for source in (item(data[:33] + damage + data[33:]), {"bytes": None, "path": str(tmp_path / "a.png")}):
        np.testing.assert_array_equal(np.asarray(decode(source)), np.asarray(decode(item(data))))
    assert not np.array_equal(np.asarray(decode(item(data))), np.asarray(image.convert("RGB")))  # tRNS is kept


@pytest.mark.parametrize("kind", ["JPEG", "WEBP"])
def test_damaged_exif_of_other_formats(kind):
    image = noise(0)
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95}
    damaged, plain = (saved(image, kind, **options, **more) for more in ({"exif": b"Exif\0\0garbage!"}, {}))
    np.testing.assert_array_equal(np.asarray(decode(item(damaged))), np.asarray(decode(item(plain))))


def test_damaged_pixels_are_still_found():
    data = saved(noise(0))
    for wrong in (data[:300], data[:60] + bytes(40) + data[100:], b"\x89PNG\r\n\x1a\n"):
        with pytest.raises(Exception):  # noqa: B017 - whatever Pillow raises
            decode(item(wrong))


# -- missing files and rows -------------------------------------------------------------------------------------------


def missing_set(tmp_path):
    """24 rows; 5 has no image, 6 is a link to nothing, 7 a folder."""
    items = [saved(noise(k)) for k in range(24)]
    os.symlink(tmp_path / "nowhere.png", tmp_path / "link.png")
    (tmp_path / "folder.png").mkdir()
    items[5:8] = [None, str(tmp_path / "link.png"), str(tmp_path / "folder.png")]
    return rows(items)


def test_missing_images_are_left_out_and_counted(tmp_path, caplog):
    data = missing_set(tmp_path)
    config = dict(input_size=[3, 16, 16], mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
    hashes = D.content_hashes(data)
    assert [k for k, h in enumerate(hashes) if not h] == [5, 6, 7] and len(set(hashes)) == 22
    assert D.content_hashes(data, of="bytes")[5:8] == [""] * 3
    assert D.repeated(["", "a"]) == [True, False]
    flags = D.repeated(hashes, hashes[:1])
    assert [k for k, f in enumerate(flags) if f] == [0, 5, 6, 7]
    assert D.find_leaks(data, [5, 6, 8], [7, 9], data.select([5, 6, 7]))["train_test"] == []
    record = D.training_record(data, [8], hashes)
    assert len(record["hashes"]) == 20 and sum(D.trained_on(record, data, hashes)) == 23
    with caplog.at_level(logging.WARNING):
        batches = D.eval_batches(data, D.eval_transform(config), max_corrupt=0.2)
    assert sorted(batches.corrupt) == [5, 6, 7] and len(batches.labels) == 21
    assert "image 5 of 24 cannot be read and is left out: empty row: ValueError: the row holds no image" in caplog.text
    for workers in (0, 1):
        loader = D.train_loader(
            data, D.train_transform(config), 24, cache_limit=0, num_workers=workers, max_corrupt=0.2
        )
        assert len(next(loader.epoch(0))[1]) == 24 and sorted(loader.corrupt) == [5, 6, 7]
    assert D.channel_stats(data) == D.channel_stats(data.select([k for k in range(24) if k not in (5, 6, 7)]))


def test_a_broken_link_in_a_class_folder(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for k in range(5):
            noise(k + 10 * (name == "b")).save(tmp_path / name / f"{k}.png")
    os.symlink(tmp_path / "nowhere", tmp_path / "a" / "9.png")
    os.symlink(tmp_path / "a", tmp_path / "a" / "again")  # its images must not count twice
    part = D.load_eval(f"imagefolder:{tmp_path}")
    assert part.total == 11
    config = dict(input_size=[3, 16, 16], mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
    batches = D.eval_batches(part.dataset, D.eval_transform(config))
    assert len(batches.labels) == 10 and list(batches.corrupt) == [5]


# -- channels ---------------------------------------------------------------------------------------------------------


def test_channels_of_grey_models():
    config = dict(input_size=[3, 24, 32], mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225], crop_pct=0.9)
    grey = D.adapt_channels(config, 1)
    assert grey == dict(input_size=[1, 24, 32], mean=[0.459], std=[0.2256], crop_pct=0.9)
    assert D.adapt_channels(config, 3) == config
    assert D.adapt_channels(grey, 3)["mean"] == [0.459] * 3
    picture = noise(0).resize((64, 64)).convert("RGB")
    data = rows([saved(picture)], [0])
    colour, one = (D.channel_stats(data, in_chans=c) for c in (3, 1))
    found = D.adapt_channels({"input_size": [3, 8, 8], "mean": colour[0], "std": colour[1]}, 1)
    assert found["mean"][0] == pytest.approx(one[0][0], abs=0.003)
    assert D.eval_batches(data, D.eval_transform(grey)).images.shape == (1, 1, 24, 32)
    with pytest.raises(D.DataError, match="mean has 3 numbers, the model 2 input channels; give --mean"):
        D.adapt_channels(config, 2)


def test_a_large_image_is_opened_without_a_warning(monkeypatch):
    # warnings are errors in tests
    item = {"bytes": saved(noise(0, size=(40, 30))), "path": None}
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert decode(item).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(Image.DecompressionBombError):
        decode(item)


def test_a_large_image_is_cropped_without_a_warning(monkeypatch):
    image = noise(0, size=(40, 30))
    config = dict(input_size=[3, 16, 16], mean=[0.0] * 3, std=[1.0] * 3)
    transform = D.train_transform(config, scale=(0.9, 1.0), hflip=0.0, color_jitter=None)

    def crop(image):
        random.seed(0)
        return transform(image)

    whole, halved = crop(image), crop(image.reduce(2))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    assert torch.equal(crop(image), halved)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert torch.equal(crop(image), whole) and not torch.equal(whole, halved)


def test_large_images_are_opened_by_several_threads(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    large = item(saved(noise(0, size=(40, 30))))
    before, interval = list(warnings.filters), sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(lambda _: decode(large).size, range(2000)))  # raises what a thread raised
    finally:
        sys.setswitchinterval(interval)
    assert set(sizes) == {(40, 30)} and warnings.filters == before
