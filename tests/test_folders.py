"""Image folders as people have them: which folders are parts, which are classes, and what is evaluated."""

import os
import unicodedata

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets", reason="needs the extra 'recipes'")

from timm_resnas import data as D  # noqa: E402
from timm_resnas.data.names import natural_key, part_kind  # noqa: E402


def picture(path, value=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), value % 256, dtype=np.uint8)).save(path)


def make(root, layout):
    """{'train/cat': 5} -> five images in each such folder, all different."""
    value = 0
    for folder, count in layout.items():
        (root / folder).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture(root / folder / f"{k}.png", value)
            value += 1
    return f"imagefolder:{root}"


def sizes(splits):
    return splits.class_names, len(splits.train), len(splits.test)


def paths(dataset):
    raw = dataset.cast_column("image", datasets.Image(decode=False))
    return [row["image"]["path"] for row in raw]


# -- parts and classes ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "test"),
    [
        *[("train", "test"), ("Train", "Test"), ("TRAIN", "TEST"), ("Training", "Testing"), ("training", "tst")],
        *[
            ("train_set", "test_set"),
            ("Training Set", "Test set"),
            ("train-images", "val-images"),
            ("trainset", "Eval"),
        ],
        *[("train", "validation"), ("train", "Valid"), ("train", "val"), ("Train", "DEV"), ("trn", "evaluation")],
    ],
)
def test_usual_names_of_parts(tmp_path, train, test):
    name = make(tmp_path, {f"{train}/cat": 3, f"{train}/dog": 4, f"{test}/cat": 2, f"{test}/dog": 2})
    splits = D.load_splits(name)
    assert sizes(splits) == (("cat", "dog"), 7, 4) and splits.notes == ()
    part = D.load_eval(name)
    assert (part.split, len(part.dataset), part.total, part.class_names) == (test, 4, 4, ("cat", "dog"))
    assert len(D.load_eval(name, "train").dataset) == 7
    assert len(D.load_eval(name, test.lower()).dataset) == 4


def test_names_that_are_not_parts():
    for name in ("trains", "contest", "testa", "invalid", "train 2", "cat", "", "devil", "tests2"):
        assert part_kind(name) is None, name
    assert [part_kind(n) for n in ("Train ", "test.data", "VALID")] == ["train", "test", "val"]


def test_parts_that_are_not_used_are_said(tmp_path):
    layout = {f"{p}/{c}": 3 for p in ("train", "Val", "TEST", "extra") for c in ("cat", "dog")}
    splits = D.load_splits(make(tmp_path, layout))
    assert sizes(splits) == (("cat", "dog"), 6, 6)
    assert splits.notes == (f"not used: Val, extra in {tmp_path}",)
    assert paths(splits.test)[0].endswith("TEST/cat/0.png")
    assert D.load_eval(f"imagefolder:{tmp_path}").split == "TEST"
    assert D.load_eval(f"imagefolder:{tmp_path}", "val").split == "Val"
    assert D.load_eval(f"imagefolder:{tmp_path}", "extra").split == "extra"
    chosen = D.load_splits(f"imagefolder:{tmp_path}", train_split="extra", test_split="val")
    assert chosen.notes == (f"not used: TEST, train in {tmp_path}",)


def test_test_images_without_labels(tmp_path):
    """As in public contests: a flat test folder."""
    name = make(tmp_path, {"train/cat": 5, "train/dog": 5, "Test": 4})
    splits = D.load_splits(name)
    assert sizes(splits) == (("cat", "dog"), 8, 2)
    assert splits.notes == (
        f"not used: Test in {tmp_path}, without class folders",
        f"{tmp_path} has no test part with class folders: one is cut from train",
    )
    make(tmp_path, {"valid/cat": 3, "valid/dog": 3})
    splits = D.load_splits(name)
    assert len(splits.test) == 6 and splits.notes == (f"not used: Test in {tmp_path}, without class folders",)
    assert D.load_eval(name).split == "valid"
    with pytest.raises(D.DataError, match="Test holds images but no class folders"):
        D.load_splits(name, test_split="Test")


@pytest.mark.parametrize(
    "parts", [("A", "B"), ("photo", "sketch", "art"), ("fold1", "fold2"), ("trainA", "testA"), ("2019", "2020")]
)
def test_folders_that_hold_the_same_folders_are_never_classes(tmp_path, parts):
    name = make(tmp_path, {f"{p}/{c}": 4 for p in parts for c in ("cat", "dog", "owl")})
    with pytest.raises(
        D.DataError, match=r"hold the same sub-folders \(cat, dog, owl\).* by --train-split and --test-split"
    ):
        D.load_splits(name)
    with pytest.raises(D.DataError, match=r"hold the same sub-folders .* by --split"):
        D.load_eval(name)
    one, other = parts[:2]
    splits = D.load_splits(name, train_split=one, test_split=other)
    assert sizes(splits) == (("cat", "dog", "owl"), 12, 12)
    alone = D.load_splits(name, train_split=one)
    assert (len(alone.train), len(alone.test)) == (9, 3)
    unused = [p for p in sorted(parts, key=natural_key) if p != one]
    assert alone.notes[0] == f"not used: {', '.join(unused)} in {tmp_path}"
    assert D.load_splits(name, train_split=".").class_names == tuple(sorted(parts, key=natural_key))
    assert (D.load_eval(name, one).total, D.load_eval(name, ".").total) == (12, 12 * len(parts))


def test_parts_whose_classes_nearly_agree_are_not_classes(tmp_path):
    name = make(tmp_path, {"A/cat": 3, "A/dog": 3, "A/owl": 3, "B/cat": 3, "B/dog": 3})
    with pytest.raises(D.DataError, match=r"A, B hold the same sub-folders \(cat, dog\)"):
        D.load_splits(name)


def test_sub_folders_of_classes_stay_allowed(tmp_path):
    nested = make(tmp_path / "a", {"animal/cat": 5, "animal/dog": 5, "car/bus": 5, "car/van": 5})
    assert D.load_splits(nested).class_names == ("animal", "car")
    loose = make(tmp_path / "b", {"apple": 5, "apple/2019": 5, "pear": 5, "pear/2019": 5})  # images beside them
    assert D.load_splits(loose).num_train == 16


def test_a_part_beside_class_folders(tmp_path):
    name = make(tmp_path, {"cat": 5, "dog": 5, "Test/cat": 2, "Test/dog": 2})
    with pytest.raises(
        D.DataError, match=r"has the part Test beside other folders \(cat, dog\).*--train-split \. --te"
    ):
        D.load_splits(name)
    with pytest.raises(D.DataError, match=r"has the part Test beside other folders \(cat, dog\)"):
        D.load_eval(name)
    assert sizes(D.load_splits(name, train_split=".", test_split="Test")) == (("cat", "dog"), 10, 4)
    assert D.load_eval(name, "Test").total == 4


def test_several_parts_of_one_kind(tmp_path):
    name = make(tmp_path, {f"{p}/{c}": 3 for p in ("Train", "training", "test") for c in ("cat", "dog")})
    with pytest.raises(
        D.DataError, match="several parts that could be meant, Train, training; name one by --train-spl"
    ):
        D.load_splits(name)
    assert len(D.load_splits(name, train_split="Train").test) == 6
    assert D.load_eval(name).split == "test"
    with pytest.raises(D.DataError, match="Train, training; name one by --split"):
        D.load_eval(name, "train")
    make(tmp_path, {"train/cat": 1, "train/dog": 1})  # the plain name wins
    assert len(D.load_splits(name).train) == 2


def test_nothing_to_train_on(tmp_path):
    name = make(tmp_path, {"val/cat": 3, "val/dog": 3})
    with pytest.raises(D.DataError, match="has no part to train on; it has val: name one by --train-split"):
        D.load_splits(name)
    part = D.load_eval(name)
    assert (part.split, part.total, part.class_names) == ("val", 6, ("cat", "dog"))
    assert len(D.load_splits(name, train_split="val").train) == 4


def test_a_wrapping_folder(tmp_path):
    make(tmp_path, {f"photos/{p}/{c}": 3 for p in ("train", "test") for c in ("cat", "dog")})
    for load in (D.load_splits, D.load_eval):
        with pytest.raises(
            D.DataError, match="single folder 'photos', which holds test, train; give imagefolder:.*otos"
        ):
            load(f"imagefolder:{tmp_path}")


def test_options_that_would_do_nothing(tmp_path):
    name = make(tmp_path, {"cat": 3, "dog": 3})
    for option in ("image_key", "label_key", "hf_config"):
        flag = "--" + option.replace("_", "-")
        for load in (D.load_splits, D.load_eval):
            with pytest.raises(D.DataError, match=f"{flag} could choose; leave {flag} out"):
                load(name, **{option: "x"})
    with pytest.raises(D.DataError, match="digits has nothing that --train-split, --test-split could choose"):
        D.load_splits("digits", train_split="x", test_split="y")


def test_a_table_beside_the_images_is_pointed_to(tmp_path):
    picture(tmp_path / "a.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\na.png,cat\n")
    with pytest.raises(D.DataError, match="images but no class folders.*metadata.csv beside them is read by hf:"):
        D.load_splits(f"imagefolder:{tmp_path}")


# -- what is evaluated is evaluated whole -----------------------------------------------------------------------------


def test_class_folders_are_evaluated_whole(tmp_path):
    name = make(tmp_path, {f"n{k:08}": 20 for k in range(6)})
    part = D.load_eval(name)
    assert (part.split, len(part.dataset), part.total, part.num_classes) == ("all", 120, 120, 6)
    assert part.notes == (
        f"{name} has no separate test part: all 120 images are evaluated, also those that training uses. --split test "
        "takes the ones that it keeps for testing",
    )
    splits = D.load_splits(name)
    for split, dataset in (("test", splits.test), ("train", splits.train)):
        part = D.load_eval(name, split)  # what training here tests and trains on
        assert part.split == f"{split} (cut from all)" and part.total == 120
        assert D.content_hashes(part.dataset) == D.content_hashes(dataset)
    with pytest.raises(D.DataError, match="has no folder 'exam'"):
        D.load_eval(name, "exam")


def test_one_part_only_is_evaluated_whole(tmp_path):
    name = make(tmp_path, {"train/cat": 10, "train/dog": 10})
    assert (D.load_eval(name).split, D.load_eval(name).total) == ("train", 20)
    part = D.load_eval(name, "test")
    assert (part.split, len(part.dataset), part.total) == ("test (cut from train)", 4, 20)
    assert D.content_hashes(part.dataset) == D.content_hashes(D.load_splits(name).test)
    rest = D.load_eval(name, "train")
    assert rest.split == "train (cut from train)"
    assert D.content_hashes(rest.dataset) == D.content_hashes(D.load_splits(name).train)
    make(tmp_path / "one", {"only": 3})  # a class is enough to evaluate on
    assert D.load_eval(f"imagefolder:{tmp_path / 'one'}").class_names == ("only",)


def test_other_data_sets_by_load_eval():
    part, splits = D.load_eval("digits"), D.load_splits("digits")
    assert (part.split, len(part.dataset), part.total, part.in_chans) == ("test", 360, 1797, 1)
    assert D.content_hashes(part.dataset) == D.content_hashes(splits.test)
    assert len(D.load_eval("digits", "train").dataset) == 1437
    with pytest.raises(D.DataError, match="digits has no split 'val'; it has train, test"):
        D.load_eval("digits", "val")
    with pytest.raises(D.DataError, match="unknown data set"):
        D.load_eval("mnist")


# -- order ------------------------------------------------------------------------------------------------------------


def test_natural_order_is_total():
    names = [
        "b10",
        "b2",
        "B2",
        "b02",
        "é",
        unicodedata.normalize("NFD", "é"),
        "e",
        "z",
        "1²",
        "9" * 5000,
        "IMG_1",
        "img_1",
    ]
    expected = sorted(names, key=natural_key)
    for seed in range(20):
        mixed = [names[i] for i in np.random.RandomState(seed).permutation(len(names))]
        assert sorted(mixed, key=natural_key) == expected
    assert [n for n in expected if n.lower().startswith("b")] == ["B2", "b02", "b2", "b10"]
    assert [unicodedata.normalize("NFC", n) for n in expected[-3:]] == ["z", "é", "é"]  # however a disk stores it
    keys = [natural_key(n) for n in expected]
    assert all(a < b for a, b in zip(keys, keys[1:], strict=False))


@pytest.mark.parametrize("files", [["1.png", "01.png", "001.png"], ["IMG_1.png", "img_1.png", "Img_1.png"]])
def test_order_does_not_depend_on_the_disk(tmp_path, monkeypatch, files):
    for name in ("a", "A", "b"):
        for k, file in enumerate(files):
            picture(tmp_path / name / file, k + 10 * ord(name))
            picture(tmp_path / name / "sub" / file, k + 10 * ord(name) + 5)

    def opened(order):
        listing = os.scandir

        class Entries(list):
            def __enter__(self):
                return self

            def __exit__(self, *_):
                pass

            def close(self):
                pass

            def __next__(self):
                if not self:
                    raise StopIteration
                return self.pop(0)

            def __iter__(self):
                return self

        def scandir(path):
            found = sorted(listing(path), key=lambda e: e.name)
            return Entries([found[i] for i in order.permutation(len(found))])

        monkeypatch.setattr(os, "scandir", scandir)
        try:
            splits = D.load_splits(f"imagefolder:{tmp_path}")
        finally:
            monkeypatch.setattr(os, "scandir", listing)
        return splits.class_names, [D.content_hashes(part) for part in (splits.train, splits.test)]

    first = opened(np.random.RandomState(0))
    assert first[0] == ("A", "a", "b")
    for seed in range(1, 6):
        assert opened(np.random.RandomState(seed)) == first


def test_names_that_look_alike(tmp_path):
    one, other = "é", unicodedata.normalize("NFD", "é")
    name = make(tmp_path / "one", {other: 3, "b": 3})
    assert D.load_splits(name).class_names == ("b", one)  # macOS' form and the usual one are the same class
    make(tmp_path / "two", {one: 3, other: 3})
    with pytest.raises(D.DataError, match="several class folders whose names look alike"):
        D.load_splits(f"imagefolder:{tmp_path / 'two'}")


# -- files ------------------------------------------------------------------------------------------------------------


def test_files_that_are_left_out_are_said(tmp_path):
    name = make(tmp_path, {"cat": 5, "dog": 5})
    for k in range(3):
        (tmp_path / "cat" / f"{k}.heic").write_bytes(b"")
    (tmp_path / "dog" / "README").write_text("")
    (tmp_path / "dog" / ".hidden").write_text("")
    os.rename(tmp_path / "dog" / "4.png", os.fsencode(tmp_path) + b"/dog/\xff.png")
    splits = D.load_splits(name)
    assert len(splits.train) + len(splits.test) == 9
    before, shown = splits.notes[0].split(" are left out: ")
    assert before == f"files below {tmp_path} that are not images by their names"
    assert sorted(shown.split(", ")) == ["1 with names that are not UTF-8", "1 without an extension", "3 .heic"]
    os.rename(tmp_path / "dog", os.fsencode(tmp_path) + b"/\xfe")
    with pytest.raises(D.DataError, match=r"class folder '\\udcfe', whose name is not UTF-8; rename it"):
        D.load_splits(name)


def test_folders_that_cannot_be_read(tmp_path, monkeypatch):
    name = make(tmp_path, {"cat/deep": 5, "cat": 5, "dog": 5})
    listing = os.scandir

    def scandir(path):
        if os.fspath(path).endswith("deep"):
            raise PermissionError(13, "Permission denied", os.fspath(path))
        return listing(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(D.DataError, match="the folder .*deep cannot be read: Permission denied"):
        D.load_splits(name)


def test_paths_that_cannot_be():
    for kind in ("imagefolder", "fashion-mnist", "hf"):
        for load in (D.load_splits, D.load_eval):
            with pytest.raises(D.DataError, match="there is no user whose folder is ~nobody-here/x"):
                load(f"{kind}:~nobody-here/x")
    for path in ("a" * 5000, "a\0b"):
        with pytest.raises(D.DataError, match="there is no folder"):
            D.load_splits(f"imagefolder:{path}")


def test_links_in_a_circle(tmp_path):
    name = make(tmp_path, {"cat": 5, "dog": 5})
    os.symlink(tmp_path / "cat", tmp_path / "cat" / "loop")
    os.symlink(tmp_path, tmp_path / "dog" / "up")
    found = D.load_eval(name)
    assert np.bincount(found.dataset["label"][:]).tolist() == [5, 10]
