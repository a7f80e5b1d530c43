"""Data: sets by name or path, splits, leaks, transforms, loaders."""

import gzip
import hashlib
import io
import itertools
import logging
import random
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torch.testing import assert_close

datasets = pytest.importorskip("datasets", reason="needs the extra 'recipes'")
pytest.importorskip("sklearn", reason="needs the extra 'recipes'")

from timm_resnas import data as D  # noqa: E402
from timm_resnas.data import loaders, splits  # noqa: E402
from timm_resnas.data.images import decode  # noqa: E402

CFG = {
    "input_size": [3, 32, 32],
    "interpolation": "bicubic",
    "mean": [0.3, 0.4, 0.5],
    "std": [0.2, 0.3, 0.4],
    "crop_pct": 1.0,
    "crop_mode": "center",
}


@pytest.fixture(scope="module")
def digits():
    return D.load_splits("digits")


def labels_of(dataset):
    return np.asarray(dataset["label"][:])


def make_dataset(images, labels, num_classes=None):
    """Any mix of PIL images and bytes -> Dataset."""
    encoded = []
    for image in images:
        if isinstance(image, Image.Image):
            buffer = io.BytesIO()
            image.save(buffer, "TIFF" if image.mode == "CMYK" else "PNG")
            image = buffer.getvalue()
        encoded.append({"bytes": image, "path": None})
    names = [f"c{i}" for i in range(num_classes or max(labels) + 1)]
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=names)})
    return datasets.Dataset.from_dict({"image": encoded, "label": labels}, features=features)


def noise(seed, size=(20, 16), mode="RGB"):
    rng = np.random.RandomState(seed)
    shape = size[::-1] + ((3,) if mode == "RGB" else ())
    return Image.fromarray(rng.randint(0, 256, shape, dtype=np.uint8))


# ---- digits -----------------------------------------------------------------------------------------------------


def test_digits_parts(digits):
    from sklearn.datasets import load_digits

    source = load_digits()
    assert (len(digits.train), len(digits.test), digits.num_classes) == (1437, 360, 10)
    assert (digits.native_size, digits.in_chans) == ((8, 8), 1)
    assert digits.class_names == tuple("0123456789")
    assert set(digits.train.features) == {"image", "label"}
    # stratified: each class's share of the test part is off by less than one image
    counts = np.bincount(labels_of(digits.test))
    assert np.abs(counts - np.bincount(source.target) * 360 / 1797).max() < 1

    # every source image is there once, pixel for pixel
    def key(pixels, label):
        return pixels.tobytes(), int(label)

    expected = {
        key((im * 255 / 16).round().astype(np.uint8), t) for im, t in zip(source.images, source.target, strict=True)
    }
    found = [key(np.asarray(row["image"]), row["label"]) for part in (digits.train, digits.test) for row in part]
    assert len(found) == len(set(found)) == 1797
    assert set(found) == expected
    assert found[0][0] == np.asarray(D.Images(digits.train, mode="L", cache_limit=0)[0][0]).tobytes()


def test_digits_test_part_is_always_the_same(digits):
    random.seed(5), np.random.seed(5), torch.manual_seed(5)
    again = D.load_splits("digits")
    assert D.content_hashes(again.test) == D.content_hashes(digits.test)
    # labels and pixels, written down: a change would make scores of different releases incomparable
    content = b"".join(bytes([row["label"]]) + np.asarray(row["image"]).tobytes() for row in digits.test)
    assert hashlib.sha256(content).hexdigest()[:32] == "94622b161c4c9271c4c9a0c548b0bb7a"


# ---- the search's validation set and leaks ----------------------------------------------------------------------


def test_split_search_val_takes_25_per_class(digits):
    train, val = D.split_search_val(digits.train, seed=3)
    labels = labels_of(digits.train)
    assert np.bincount(labels[val]).tolist() == [25] * 10
    assert sorted(train + val) == list(range(1437)) and train == sorted(train) and val == sorted(val)
    assert all(type(i) is int for i in train + val)
    np.random.seed(1)
    assert D.split_search_val(digits.train, seed=3) == (train, val)
    assert D.split_search_val(digits.train, seed=4)[1] != val


def test_split_search_val_small_classes():
    dataset = make_dataset([b""] * 139, [0] * 125 + [1] * 10 + [2] * 2 + [3] * 2)
    _, val = D.split_search_val(dataset, per_class=25, fraction=0.3)
    assert np.bincount(labels_of(dataset)[val]).tolist() == [25, 3, 1, 1]
    # a class's draw does not depend on the other classes
    alone = dataset.select(range(125))
    assert D.split_search_val(alone)[1] == [i for i in val if i < 125]


def test_split_search_val_errors():
    dataset = make_dataset([b""] * 4, [0, 0, 0, 1])
    with pytest.raises(D.DataError, match="class 'c1' has 1 training image .* too few"):
        D.split_search_val(dataset)
    with pytest.raises(D.DataError, match="0 of them usable"):
        D.split_search_val(dataset.select(range(3)), avoid=[True] * 3)
    with pytest.raises(D.DataError, match="fraction"):
        D.split_search_val(dataset, fraction=1.0)


def test_content_hashes_see_pixels_or_bytes():
    image = noise(0)
    png, bmp = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG"), image.save(bmp, "BMP")
    dataset = make_dataset([png.getvalue(), bmp.getvalue(), noise(1), noise(1)], [0, 0, 0, 0])
    a, b, c, d = D.content_hashes(dataset)
    assert a == b != c == d
    a, b, c, d = D.content_hashes(dataset, of="bytes")
    assert a != b and c == d
    assert D.content_hashes(dataset, [2, 0]) == [D.content_hashes(dataset)[i] for i in (2, 0)]
    # a transposed shape of the same bytes is another picture
    flat = [Image.fromarray(np.zeros(s, np.uint8)) for s in ((4, 6), (6, 4))]
    assert len(set(D.content_hashes(make_dataset(flat, [0, 0])))) == 2


def test_check_leak(digits, caplog):
    train, val = D.split_search_val(digits.train)
    assert D.check_leak(digits.train, train, val, digits.test) == {
        "index": [], "train_val": [], "val_test": [], "train_test": []
    }  # fmt: skip
    with pytest.raises(D.DataError, match=rf"1 are also trained on \(indices {val[7]}\)"):
        D.check_leak(digits.train, sorted([*train, val[7]]), val, digits.test)

    pictures = [noise(s) for s in (0, 1, 2, 3, 0, 5)]  # 0 and 4 are the same picture
    dataset = make_dataset(pictures, [0, 1] * 3)
    with pytest.raises(D.DataError, match=r"1 show a picture that is trained on \(train, val: \(0, 4\)\)"):
        D.check_leak(dataset, [0, 1, 2, 3], [4, 5])
    with pytest.raises(D.DataError, match=r"1 show a picture of the test part \(val, test: \(5, 1\)\)"):
        D.check_leak(dataset, [0, 1], [5], make_dataset([noise(9), noise(5)], [0, 1]))
    assert D.find_leaks(dataset, [0, 1], [1, 5])["index"] == [1]
    assert D.find_leaks(dataset, [0, 1], [1, 5])["train_val"] == []
    with caplog.at_level(logging.WARNING):
        leaks = D.check_leak(dataset, [1, 2], [3], make_dataset([noise(2)], [0]))
    assert leaks["train_test"] == [(2, 0)]
    assert "1 training image shows a picture of the test part" in caplog.text
    assert "1 of the 1 test images" in caplog.text and "100 percentage points" in caplog.text

    # kept out of validation, repeated pictures leak nothing
    flags = D.repeated(D.content_hashes(dataset), D.content_hashes(make_dataset([noise(5)], [0])))
    assert flags == [True, False, False, False, True, True]
    for seed in range(5):
        train, val = D.split_search_val(dataset, per_class=1, fraction=0.3, seed=seed, avoid=flags)
        assert not set(val) & {0, 4, 5}
        D.check_leak(dataset, train, val)


def test_stratified_counts():
    labels = np.repeat([0, 1, 2], [10, 50, 3])
    assert splits.stratified_counts(labels, 13) == {0: 2, 1: 10, 2: 1}
    assert sum(splits.stratified_counts(labels, 20).values()) == 20


# ---- image folders ----------------------------------------------------------------------------------------------


CLASSES = {"apple": 12, "b10": 7, "b2": 5, "cherry pie": 20, "test": 4}  # unequal; names that mislead


@pytest.fixture(scope="module")
def photo_folder(tmp_path_factory):
    """Colour JPEGs, PNGs and greys of differing sizes in 5 unequal classes."""
    root = tmp_path_factory.mktemp("photos")
    rng = np.random.RandomState(0)
    for c, (name, count) in enumerate(CLASSES.items()):
        (root / name / "sub").mkdir(parents=True)
        for i in range(count):
            size = (int(rng.randint(20, 60)), int(rng.randint(20, 60)))
            image = noise(100 * c + i, size, "L" if i % 4 == 3 else "RGB")
            if i % 4 == 1:
                image.save(root / name / f"{i}.png")
            else:
                image.save(root / name / ("sub" if i == 0 else "") / f"{i}.JPG", "JPEG")
    (root / "apple" / "notes.txt").write_text("no image")
    (root / "apple" / ".hidden.png").write_bytes(b"")
    (root / ".cache").mkdir()
    return root


def test_imagefolder_class_folders(photo_folder):
    out = D.load_splits(f"imagefolder:{photo_folder}")
    assert out.class_names == ("apple", "b2", "b10", "cherry pie", "test")  # natural order
    counts = [CLASSES[n] for n in out.class_names]
    expected = [max(1, round(0.2 * c)) for c in counts]
    assert np.bincount(labels_of(out.test)).tolist() == expected
    assert np.bincount(labels_of(out.train)).tolist() == [c - e for c, e in zip(counts, expected, strict=True)]
    assert out.in_chans == 3 and 20 <= min(out.native_size) <= max(out.native_size) < 60
    assert not set(D.content_hashes(out.train)) & set(D.content_hashes(out.test))
    again = D.load_splits(f"imagefolder:{photo_folder}")
    assert D.content_hashes(again.test) == D.content_hashes(out.test)
    assert len(D.load_splits(f"imagefolder:{photo_folder}", test_fraction=0.5).test) > len(out.test)

    train, val = D.split_search_val(out.train)
    assert len(set(labels_of(out.train)[val])) == 5
    loader = D.train_loader(out.train.select(train), D.train_transform(CFG), 8)
    x, y = next(loader.epoch(0))
    assert x.shape == (8, 3, 32, 32) and x.dtype == torch.float32 and y.dtype == torch.int64


def test_imagefolder_given_splits(photo_folder, tmp_path):
    for part in ("train", "val"):
        for name in ("x", "y"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(3):
                noise(i).save(tmp_path / part / name / f"{i}.png")
    out = D.load_splits(f"imagefolder:{tmp_path}")
    assert (len(out.train), len(out.test), out.class_names) == (6, 6, ("x", "y"))
    with pytest.raises(D.DataError, match="has no folder 'exam'; it has"):
        D.load_splits(f"imagefolder:{tmp_path}", test_split="exam")

    (tmp_path / "val" / "z").mkdir()
    noise(0).save(tmp_path / "val" / "z" / "0.png")
    with pytest.raises(D.DataError, match="class folders differ.*: none; only in .*val: z"):
        D.load_splits(f"imagefolder:{tmp_path}")
    (tmp_path / "val" / "z" / "0.png").unlink()
    with pytest.raises(D.DataError, match="z holds no images"):
        D.load_splits(f"imagefolder:{tmp_path}")


def test_imagefolder_errors(tmp_path):
    def load():
        return D.load_splits(f"imagefolder:{tmp_path}")

    with pytest.raises(D.DataError, match="there is no folder .*nothing"):
        D.load_splits(f"imagefolder:{tmp_path}/nothing")
    with pytest.raises(D.DataError, match="holds no class folders; expected"):
        load()
    noise(0).save(tmp_path / "a.png")
    with pytest.raises(D.DataError, match="holds images but no class folders"):
        load()
    (tmp_path / "train").mkdir()
    noise(0).save(tmp_path / "train" / "a.png")
    with pytest.raises(D.DataError, match="train holds no class folders"):
        load()
    (tmp_path / "bus").mkdir()  # now train/ is a class
    for name in ("1.png", "2.png"):
        noise(1).save(tmp_path / "bus" / name)
    with pytest.raises(D.DataError, match="class 'train' has a single image"):
        load()
    noise(1).save(tmp_path / "train" / "b.png")
    assert load().class_names == ("bus", "train")
    (tmp_path / "only" / "one").mkdir(parents=True)
    for name in ("1.png", "2.png"):
        noise(1).save(tmp_path / "only" / "one" / name)
    with pytest.raises(D.DataError, match="single class 'one'"):
        D.load_splits(f"imagefolder:{tmp_path}/only")


def test_unknown_names():
    for name in ("mnist", "imagefolder", "hf:", "digits:x"):
        with pytest.raises(D.DataError, match="unknown data set .*known are digits, fashion-mnist:<dir>"):
            D.load_splits(name)


def test_upright_and_shrink(tmp_path):
    image = Image.fromarray(np.linspace(0, 255, 400 * 300).reshape(300, 400).astype(np.uint8)).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    item = {"path": str(tmp_path / "a.jpg"), "bytes": None}
    full = decode(item)
    reference = datasets.Image().decode_example(item)
    np.testing.assert_array_equal(np.asarray(full), np.asarray(reference))
    small = decode(item, shrink=50)
    assert full.size == (300, 400) and small.size == (50, 67)
    assert np.abs(np.asarray(full.resize((50, 67)), float) - np.asarray(small, float)).mean() < 2


# ---- corrupt images ---------------------------------------------------------------------------------------------


def broken_set():
    """24 images, of which 3 and 4 are no images and 10 is cut short."""
    pictures = [noise(s) for s in range(24)]
    buffer = io.BytesIO()
    pictures[10].save(buffer, "PNG")
    pictures[3] = pictures[4] = b"not an image"
    pictures[10] = buffer.getvalue()[:300]
    return make_dataset(pictures, [k % 4 for k in range(24)])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("shift", [None, 2])
def test_corrupt_images_are_replaced_and_counted(workers, shift, caplog):
    transform = D.train_transform(CFG, shift=shift)
    loader = D.train_loader(broken_set(), transform, 8, num_workers=workers, max_corrupt=0.2, cache_limit=0)
    with caplog.at_level(logging.WARNING):
        batches = list(loader.epoch(0))
    assert sorted(loader.corrupt) == [3, 4, 10] and caplog.text.count("cannot be read") == 3
    labels = torch.cat([y for _, y in batches]).numpy()
    expected = np.arange(24) % 4
    expected[[3, 4, 10]] = [5 % 4, 5 % 4, 11 % 4]  # the next readable image, with its own label
    np.testing.assert_array_equal(labels, expected[order_of(24, 0)])
    kept = D.train_loader(broken_set(), transform, 8, max_corrupt=0.2)
    for (x, y), (x2, y2) in zip(batches, kept.epoch(0), strict=True):
        assert torch.equal(x, x2) and torch.equal(y, y2)


def test_too_many_corrupt_images():
    with pytest.raises(D.DataError, match="2 images of 24 cannot be read, more than the 1 allowed"):
        D.train_loader(broken_set(), D.train_transform(CFG), 8)
    with pytest.raises(D.DataError, match="cannot be read, more than the 1 allowed"):
        D.eval_batches(broken_set(), D.eval_transform(CFG), 8)
    loader = D.train_loader(broken_set(), D.train_transform(CFG), 8, cache_limit=0, num_workers=1)
    with pytest.raises(D.DataError, match="cannot be read, more than the 1 allowed"):
        list(loader.epoch(0))


@pytest.mark.parametrize("limit", [1 << 30, 21 * 3 * 32 * 32 * 2, 0])
def test_corrupt_images_are_left_out_of_evaluation(limit):
    dataset = broken_set()
    batches = D.eval_batches(dataset, D.eval_transform(CFG), 8, memory_limit=limit, max_corrupt=0.2)
    out = list(batches)
    assert [len(y) for _, y in out] == [6, 7, 8] and sorted(batches.corrupt) == [3, 4, 10]
    good = [k for k in range(24) if k not in (3, 4, 10)]
    reference = D.eval_batches(dataset, D.eval_transform(CFG), 32, indices=good)
    assert torch.equal(torch.cat([x for x, _ in out]), reference.images)
    assert torch.equal(torch.cat([y for _, y in out]), reference.labels)


# ---- idx files --------------------------------------------------------------------------------------------------


def write_idx(path, array):
    header = bytes((0, 0, 8, array.ndim)) + b"".join(s.to_bytes(4, "big") for s in array.shape)
    data = header + array.tobytes()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


@pytest.fixture
def idx_folder(tmp_path):
    rng = np.random.RandomState(0)
    pixels = rng.randint(0, 256, (50, 6, 5), dtype=np.uint8)
    labels = np.arange(50, dtype=np.uint8) % 10
    write_idx(tmp_path / "train-images-idx3-ubyte.gz", pixels[:30])
    write_idx(tmp_path / "train-labels-idx1-ubyte", labels[:30])
    write_idx(tmp_path / "t10k-images.idx3-ubyte", pixels[30:])
    write_idx(tmp_path / "t10k-labels-idx1-ubyte.gz", labels[30:])
    return tmp_path, pixels, labels


def test_fashion_mnist_files(idx_folder):
    folder, pixels, labels = idx_folder
    out = D.load_splits(f"fashion-mnist:{folder}")
    assert (out.num_classes, out.native_size, out.in_chans) == (10, (6, 5), 1)
    assert out.class_names[9] == "Ankle boot"
    for dataset, part in ((out.train, slice(0, 30)), (out.test, slice(30, 50))):
        np.testing.assert_array_equal(np.stack([np.asarray(r["image"]) for r in dataset]), pixels[part])
        np.testing.assert_array_equal(labels_of(dataset), labels[part])


def test_fashion_mnist_errors(idx_folder):
    folder, pixels, labels = idx_folder

    def check(match):
        with pytest.raises(D.DataError, match=match):
            D.load_splits(f"fashion-mnist:{folder}")

    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels[30:49])
    check("20 images but 19 labels in the t10k files")
    write_idx(folder / "t10k-labels-idx1-ubyte.gz", labels[30:] + 1)
    check("label 10 in the t10k files")
    write_idx(folder / "train-labels-idx1-ubyte", labels[:30, None])
    check("train-labels-idx1-ubyte is not an idx file: it starts with '00000802', not with '00000801'")
    (folder / "train-images-idx3-ubyte").write_bytes((folder / "t10k-images.idx3-ubyte").read_bytes()[:-1])
    check(r"train-images-idx3-ubyte is damaged: its header says \[20, 6, 5\], but 599 bytes follow")
    (folder / "train-images-idx3-ubyte").unlink()
    whole = (folder / "train-images-idx3-ubyte.gz").read_bytes()
    (folder / "train-images-idx3-ubyte.gz").write_bytes(whole[: len(whole) // 2])
    check("train-images-idx3-ubyte.gz cannot be read")
    (folder / "train-images-idx3-ubyte.gz").unlink()
    check("holds no train-images-idx3-ubyte")
    with pytest.raises(D.DataError, match="there is no folder"):
        D.load_splits("fashion-mnist:/no/such/folder")


# ---- hf ---------------------------------------------------------------------------------------------------------


def hf_part(count, labels, label="label", feature=None, image="image"):
    rows = {image: [noise(s) for s in range(count)], label: labels, "extra": [0] * count}
    features = datasets.Features({image: datasets.Image(), label: feature, "extra": datasets.Value("int64")})
    return datasets.Dataset.from_dict(rows, features=features)


def test_hf_parquet_folder(tmp_path):
    feature = datasets.ClassLabel(names=["no", "yes"])
    folder = tmp_path / "repo"
    folder.mkdir()
    train = hf_part(10, [0, 1] * 5, feature=feature)
    train.to_parquet(folder / "train-00000.parquet")
    hf_part(4, [-1] * 4, feature=feature).to_parquet(folder / "test-00000.parquet")  # hidden labels
    hf_part(6, [1, 0] * 3, feature=feature).to_parquet(folder / "validation-00000.parquet")
    out = D.load_splits(f"hf:{folder}", cache_dir=tmp_path / "cache")
    assert (len(out.train), len(out.test), out.class_names) == (10, 6, ("no", "yes"))
    assert set(out.train.features) == {"image", "label"} and labels_of(out.test).tolist() == [1, 0] * 3
    np.testing.assert_array_equal(np.asarray(out.train[3]["image"]), np.asarray(noise(3)))
    with pytest.raises(D.DataError, match="'test' of .* has no labels"):
        D.load_splits(f"hf:{folder}", cache_dir=tmp_path / "cache", test_split="test")
    with pytest.raises(D.DataError, match="no split 'dev'; it has train, validation, test"):
        D.load_splits(f"hf:{folder}", cache_dir=tmp_path / "cache", train_split="dev")
    with pytest.raises(D.DataError, match="no column 'picture'; it has image, label, extra"):
        D.load_splits(f"hf:{folder}", cache_dir=tmp_path / "cache", image_key="picture")


def test_hf_saved_to_disk(tmp_path):
    strings = datasets.Value("string")
    train = hf_part(10, ["b", "a"] * 5, "kind", strings, image="picture")
    train.save_to_disk(tmp_path / "one")
    out = D.load_splits(f"hf:{tmp_path / 'one'}", label_key="kind")
    assert (out.class_names, len(out.train), len(out.test)) == (("a", "b"), 8, 2)  # cut off: 20% of each class
    with pytest.raises(D.DataError, match=r"which column is the label, picture, kind, extra\\?.*--label-key"):
        D.load_splits(f"hf:{tmp_path / 'one'}")
    both = datasets.DatasetDict(train=train, test=hf_part(2, ["a", "new"], "kind", strings, image="picture"))
    both.save_to_disk(tmp_path / "two")
    with pytest.raises(D.DataError, match="classes of the test split that the training split lacks: new"):
        D.load_splits(f"hf:{tmp_path / 'two'}", label_key="kind")
    with pytest.raises(D.DataError, match="'extra' of .*: no|not an image"):
        D.load_splits(f"hf:{tmp_path / 'two'}", label_key="kind", image_key="extra")


def test_hf_cannot_open(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(D.DataError, match="datasets cannot open"):
        D.load_splits(f"hf:{tmp_path / 'empty'}", cache_dir=tmp_path / "cache")


# ---- transforms -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [[3, 32, 32], [3, 24, 40], [1, 32, 32]])
def test_eval_transform_is_timms(digits, size):
    c = size[0]
    cfg = {**CFG, "input_size": size, "mean": CFG["mean"][:c], "std": CFG["std"][:c], "crop_pct": 0.9}
    reference = create_transform(**{**cfg, "input_size": tuple(size)})
    transform = D.eval_transform(cfg)
    dataset = digits.train.select(range(5))
    batches = D.eval_batches(dataset, transform, 2)
    mode = "RGB" if c == 3 else "L"
    expected = torch.stack([reference(row["image"].convert(mode)) for row in dataset])
    assert torch.equal(torch.cat([x for x, _ in batches]), expected)  # bit for bit
    assert len(batches) == 3 and torch.equal(batches.labels, torch.tensor(dataset["label"][:]))


def test_shift_moves_whole_images(digits):
    image = noise(0, (32, 32))
    transform = D.train_transform(CFG, shift=3, hflip=0.5, vflip=0.0)
    padded = transform.prepare([image] * 4)
    # draws: top, left, horizontal flip, vertical flip
    draws = np.array([[0.5, 0.5, 0.9, 0], [0.0, 0.5, 0.9, 0], [0.5, 0.999, 0.9, 0], [0.5, 0.5, 0.1, 0]])
    out = transform.batch(padded, draws)
    whole = np.asarray(image).transpose(2, 0, 1)
    np.testing.assert_array_equal(out[0], whole)
    np.testing.assert_array_equal(out[1, :, 3:], whole[:, :-3])
    assert not out[1, :, :3].any()
    np.testing.assert_array_equal(out[2, :, :, :-3], whole[:, :, 3:])
    assert not out[2, :, :, -3:].any()
    np.testing.assert_array_equal(out[3], whole[:, :, ::-1])
    still = D.train_transform(CFG, shift=3, no_aug=True)
    loader = D.train_loader(digits.train.select(range(8)), still, 8)
    x, _ = next(loader.epoch(0))
    expected = D.eval_batches(digits.train.select(order_of(8, 0)), D.eval_transform(CFG), 8).images
    assert torch.equal(x, expected)


def test_shifts_are_uniform():
    keys = loaders.sample_keys(0, 3, np.arange(7000))
    assert len(set(keys.tolist())) == 7000
    draws = loaders.uniform_draws(keys, 4)
    assert draws.min() >= 0 and draws.max() < 1
    counts = np.stack([np.bincount((draws[:, k] * 7).astype(int), minlength=7) for k in range(4)])
    assert np.abs(counts - 1000).max() < 5 * np.sqrt(1000 * 6 / 7)
    assert np.abs(np.corrcoef(draws.T) - np.eye(4)).max() < 0.05
    for other in (loaders.sample_keys(1, 3, np.arange(7000)), loaders.sample_keys(0, 4, np.arange(7000))):
        assert abs(np.corrcoef(draws[:, 0], loaders.uniform_draws(other, 1)[:, 0])[0, 1]) < 0.05


@pytest.mark.parametrize("auto_augment", ["rand-m10-n15-p1.0", "rand-m10-inc1-n15-p1.0", "v0-mstd0.5", "augmix-m10"])
def test_posterize_at_full_strength_works(auto_augment):
    # timm then keeps 0 bits of each pixel, which newer Pillow releases refuse
    transform = D.train_transform(CFG, auto_augment=auto_augment)
    random.seed(0), np.random.seed(0)
    for _ in range(40):
        assert transform(noise(0)).shape == (3, 32, 32)


def test_transform_errors():
    with pytest.raises(D.DataError, match="shift takes the place of auto_augment, scale"):
        D.train_transform(CFG, shift=2, scale=(0.5, 1), auto_augment="rand-m9")
    with pytest.raises(D.DataError, match="shift must lie between"):
        D.train_transform(CFG, shift=32)
    with pytest.raises(D.DataError, match="4 input channels"):
        D.eval_transform({**CFG, "input_size": [4, 32, 32]})
    with pytest.raises(D.DataError, match="mean and std need 1 numbers"):
        D.eval_transform({**CFG, "input_size": [1, 32, 32]})


def test_default_data_config(digits, photo_folder):
    pixels = np.stack([np.asarray(r["image"]) for r in digits.train.select(range(100))]) / 255
    cfg = D.default_data_config(digits, 32, indices=range(100))
    assert cfg["mean"] == pytest.approx([pixels.mean()] * 3, abs=1e-4)
    assert cfg["std"] == pytest.approx([pixels.std()] * 3, abs=1e-4)
    assert cfg["crop_pct"] == 1.0 and cfg["input_size"] == [3, 32, 32]
    assert all(type(v) is float for v in cfg["mean"] + cfg["std"])
    grey = D.default_data_config(digits, (32, 48), in_chans=1)
    assert grey["input_size"] == [1, 32, 48] and len(grey["mean"]) == 1
    photos = D.load_splits(f"imagefolder:{photo_folder}")
    cfg = D.default_data_config(photos, 64)
    assert cfg["mean"] == [0.485, 0.456, 0.406] and cfg["crop_pct"] == 0.875
    for splits_ in (digits, photos):
        D.train_transform(D.default_data_config(splits_, 32), **D.default_augment(splits_, 32))


# ---- loaders ----------------------------------------------------------------------------------------------------

AUGMENTS = {
    "shift": {"shift": 3, "hflip": 0.5, "re_prob": 0.5},
    "crop": {"scale": (0.3, 1.0), "color_jitter": 0.4, "re_prob": 0.5},
    "rand": {"auto_augment": "rand-m9-mstd0.5-inc1"},
    "augmix": {"auto_augment": "augmix-m5-w4-d2", "color_jitter": None},
}


def order_of(size, epoch, seed=0):
    """The order of an epoch, written out."""
    return np.random.RandomState([seed, 0, epoch]).permutation(size)


def same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    return all(torch.equal(a, b) for pair in zip(batches, others, strict=True) for a, b in zip(*pair, strict=True))


@pytest.fixture(scope="module")
def few(digits):
    return digits.train.select(range(70))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_batches_depend_on_seed_and_epoch_only(few, augment):
    transform = D.train_transform(CFG, **AUGMENTS[augment])
    loader = D.train_loader(few, transform, 16, seed=1)
    reference = list(loader.epoch(2))
    assert len(loader) == len(reference) == 4  # the last 6 images are dropped
    random.seed(9), np.random.seed(9), torch.manual_seed(9)
    list(loader.epoch(0))
    assert same(loader.epoch(2), reference)
    assert same(loader.epoch(2, skip=3), reference[3:])
    assert list(loader.epoch(2, skip=4)) == []
    assert not same(loader.epoch(3), reference)
    assert not same(D.train_loader(few, transform, 16, seed=2).epoch(2), reference)
    # not decoded in advance
    assert same(D.train_loader(few, transform, 16, seed=1, cache_limit=0).epoch(2), reference)
    # processes share each batch
    ranks = [D.train_loader(few, transform, 16, seed=1, rank=r, world=2).epoch(2) for r in range(2)]
    joined = [tuple(torch.cat(pair) for pair in zip(a, b, strict=True)) for a, b in zip(*ranks, strict=True)]
    assert same(joined, reference)
    # the last step for accelerators, normalising there, gives the same
    if transform.erasing is None:
        late = loaders._Samples(loader._samples.images, transform, 1, late=True, cache_limit=1 << 30)
        x, y, _ = late.__getitems__([(2, i) for i in order_of(70, 2, seed=1)[:16]])
        assert x.dtype == torch.uint8 and same([(transform.normalize(x), y)], reference[:1])


@pytest.mark.parametrize("augment", ["shift", "crop"])
def test_workers_change_nothing(few, augment):
    transform = D.train_transform(CFG, **AUGMENTS[augment])
    alone = D.train_loader(few, transform, 16, seed=1)
    workers = D.train_loader(few, transform, 16, seed=1, num_workers=2)
    for epoch in (0, 1):  # the workers stay
        assert same(workers.epoch(epoch), alone.epoch(epoch))
    iterator = workers.epoch(2)
    next(iterator)  # left in the middle
    del iterator
    assert same(workers.epoch(1, skip=2), list(alone.epoch(1))[2:])


def test_augmentation_differs_between_images_and_epochs():
    dataset = make_dataset([noise(0)] * 64, [0] * 64, 2)
    for augment in (AUGMENTS["shift"], AUGMENTS["crop"]):
        loader = D.train_loader(dataset, D.train_transform(CFG, **augment), 64)
        first, second = (next(loader.epoch(e))[0] for e in (0, 1))
        assert len({x.numpy().tobytes() for x in torch.cat([first, second])}) > 64


def test_each_epoch_is_a_permutation(few):
    loader = D.train_loader(few, D.train_transform(CFG, shift=0, hflip=0.0), 10, seed=5)
    images = D.eval_batches(few, D.eval_transform(CFG)).images
    epochs = [torch.cat([x for x, _ in loader.epoch(e)]) for e in range(3)]
    for epoch, found in enumerate(epochs):
        assert torch.equal(found, images[order_of(70, epoch, seed=5)])
    assert not any(torch.equal(a, b) for a, b in itertools.combinations([images, *epochs], 2))


def test_global_generators_are_left_alone(few):
    def state():
        numpy = np.random.get_state()
        return random.getstate(), numpy[1].tolist(), numpy[2], torch.get_rng_state().tolist()

    loader = D.train_loader(few, D.train_transform(CFG, **AUGMENTS["crop"]), 16)
    evaluation = D.eval_batches(few, D.eval_transform(CFG), 16, memory_limit=0)
    before = state()
    for _ in loader.epoch(0):
        assert state() == before
    list(evaluation)
    D.split_search_val(few, per_class=1), D.load_splits("digits")
    assert state() == before


def test_train_loader_errors(few):
    transform = D.train_transform(CFG, shift=1)
    with pytest.raises(D.DataError, match="a batch of 71 is larger than the 70 training images"):
        D.train_loader(few, transform, 71)
    with pytest.raises(D.DataError, match="9 is not a positive multiple of 2"):
        D.train_loader(few, transform, 9, world=2)
    with pytest.raises(D.DataError, match="rank must lie between 0 and 1"):
        D.train_loader(few, transform, 8, world=2, rank=2)
    with pytest.raises(D.DataError, match="seed must lie"):
        D.train_loader(few, transform, 8, seed=-1)
    with pytest.raises(D.DataError, match="cannot skip 9 of 8 steps"):
        next(D.train_loader(few, transform, 8).epoch(0, skip=9))


def test_eval_batches_cached_or_not(few):
    transform = D.eval_transform(CFG)
    indices = list(range(69, 10, -2))
    size = len(indices) * 3 * 32 * 32
    cached, as_bytes, decoded, workers = (
        D.eval_batches(few, transform, 8, indices=indices, memory_limit=limit, num_workers=n)
        for limit, n in ((4 * size, 0), (4 * size - 1, 0), (size - 1, 0), (size - 1, 2))
    )
    assert [b.cached for b in (cached, as_bytes, decoded, workers)] == [True, True, False, False]
    assert cached.images.dtype == torch.float32 and as_bytes.images.dtype == torch.uint8
    for other in (as_bytes, decoded, workers, cached):
        assert len(other) == 4 and same(other, cached) and same(other, cached)
    assert cached.labels.tolist() == [few[i]["label"] for i in indices]
    ranks = [list(D.eval_batches(few, transform, 8, indices=indices, rank=r, world=3)) for r in range(3)]
    assert same([ranks[k % 3][k // 3] for k in range(4)], cached)
    with pytest.raises(D.DataError, match="no images to evaluate on"):
        D.eval_batches(few, transform, 8, indices=[])


def test_images_are_kept_only_within_the_limit(few):
    assert D.Images(few).cached and not D.Images(few, cache_limit=1000).cached
    for cached in (1 << 30, 0):
        images = D.Images(few, cache_limit=cached, transform=D.eval_transform(CFG))
        x, y = images[3]  # a map-style data set for timm's loaders
        assert torch.equal(x, D.eval_transform(CFG)(few[3]["image"].convert("RGB"))) and y == few[3]["label"]
    assert_close(images.labels, labels_of(few))


def test_import_needs_no_extras(python):
    code = "import sys, timm_resnas.data; print([m for m in ('datasets', 'sklearn', 'pyarrow') if m in sys.modules])"
    done = python.run(code)
    assert done.stdout.strip() == "[]", done.stderr


def test_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ImportError, match=r"needs the package 'sklearn'.*pip install timm_resnas\[recipes\]"):
        D.load_splits("digits")
