"""Data sets in tables (hf:<folder>): labels, splits, damaged files; classes by name; records of a run."""

import gc
import io
import json
import shutil

import numpy as np
import pytest
from PIL import Image

datasets = pytest.importorskip("datasets", reason="needs the extra 'recipes'")

import pandas as pd  # noqa: E402
import pyarrow.parquet as pq  # noqa: E402

from timm_resnas import data as D  # noqa: E402


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    yield
    datasets.enable_progress_bars()


def png(value):
    out = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 255 - value, 7)).save(out, "PNG")
    return out.getvalue()


def pictures(count, start=0):
    return [{"bytes": png(start + k), "path": None} for k in range(count)]


def save(folder, split, features=None, **columns):
    folder.mkdir(parents=True, exist_ok=True)
    count = len(next(iter(columns.values())))
    columns.setdefault("image", pictures(count, 100 * (split != "train")))
    features = datasets.Features({"image": datasets.Image(), **(features or {})}) if features is not None else None
    made = datasets.Dataset.from_dict(columns, features=features)
    made = made if features is not None else made.cast_column("image", datasets.Image())
    made.to_parquet(folder / f"{split}-00000.parquet")
    return f"hf:{folder}"


def load(name, tmp_path, **options):
    return D.load_splits(name, cache_dir=tmp_path / "cache", **options)


def values(dataset):
    """Which of `pictures` a data set holds."""
    return [row["image"].getpixel((0, 0))[0] for row in dataset]


# -- labels -----------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # datasets leaves the table open
def test_labels_of_metadata_csv(tmp_path):
    for part, count in (("train", 8), ("test", 4)):
        (tmp_path / "set" / part).mkdir(parents=True)
        for k in range(count):
            (tmp_path / "set" / part / f"{k}.png").write_bytes(png(k))
        table = pd.DataFrame({"file_name": [f"{k}.png" for k in range(count)], "label": ["dog", "cat"] * (count // 2)})
        table.to_csv(tmp_path / "set" / part / "metadata.csv", index=False)
    splits = load(f"hf:{tmp_path / 'set'}", tmp_path)
    assert splits.class_names == ("cat", "dog") and splits.train["label"][:] == [1, 0] * 4
    assert splits.test["label"][:] == [1, 0] * 2 and values(splits.test) == [0, 1, 2, 3]
    gc.collect()  # what was left open is found here, not in another test


@pytest.mark.parametrize(
    ("labels", "dtype", "names", "expected"),
    [
        (["b10", "b2", "a"] * 3, "large_string", ("a", "b2", "b10"), [2, 1, 0] * 3),
        (["b10", "b2", "a"] * 3, "string", ("a", "b2", "b10"), [2, 1, 0] * 3),
        ([10, 2, 5] * 3, "uint8", ("2", "5", "10"), [2, 0, 1] * 3),
        ([True, False, True] * 3, "bool", ("False", "True"), [1, 0, 1] * 3),
        ([10.0, 2.0, 5.0] * 3, "float64", ("2", "5", "10"), [2, 0, 1] * 3),
    ],
)
def test_plain_labels(tmp_path, labels, dtype, names, expected):
    feature = {"label": datasets.Value(dtype)}
    name = save(tmp_path / "set", "train", feature, label=labels)
    save(tmp_path / "set", "test", feature, label=labels[:2])
    splits = load(name, tmp_path)
    assert splits.class_names == names and splits.train["label"][:] == expected
    assert splits.test["label"][:] == expected[:2]
    # a folder with these classes has them in the same order
    for folder in names:
        (tmp_path / "folders" / folder).mkdir(parents=True)
        for k in range(2):
            (tmp_path / "folders" / folder / f"{k}.png").write_bytes(png(k))
    assert D.load_splits(f"imagefolder:{tmp_path / 'folders'}").class_names == names


def test_tables_of_pandas(tmp_path):
    (tmp_path / "set").mkdir()
    for kind in ("str", "category"):
        table = pd.DataFrame({"image": pictures(6), "label": pd.Series(["b", "a"] * 3, dtype=kind)})
        table.to_parquet(tmp_path / "set" / "train.parquet")
        splits = load(f"hf:{tmp_path / 'set'}", tmp_path, test_fraction=0.34)
        assert splits.class_names == ("a", "b") and sorted(values(splits.train) + values(splits.test)) == list(range(6))
    table = pd.DataFrame({"picture": [png(k) for k in range(6)], "kind": ["b", "a"] * 3})
    table.to_parquet(tmp_path / "set" / "train.parquet")
    with pytest.raises(D.DataError, match="has no image column among picture, kind; name one by --image-key"):
        load(f"hf:{tmp_path / 'set'}", tmp_path)
    splits = load(f"hf:{tmp_path / 'set'}", tmp_path, image_key="picture", label_key="kind")
    assert splits.class_names == ("a", "b") and (splits.native_size, len(splits.train)) == ((8, 8), 4)


@pytest.mark.parametrize(
    ("labels", "dtype", "message"),
    [
        (["a", None] * 4, "string", "images without a label"),
        (["a", ""] * 4, "string", "images without a label"),
        ([1.0, float("nan")] * 4, "float64", "images without a label"),
        ([1.0, 0.5] * 4, "float64", "the column 'label' of .* holds 0.5, not a class .--label-key"),
        ([[1, 2]] * 8, None, "a class label, text or integer is needed .--label-key"),
    ],
)
def test_labels_that_are_none(tmp_path, labels, dtype, message):
    kind = datasets.Value(dtype) if dtype else datasets.List(datasets.Value("int64"))
    name = save(tmp_path / "set", "train", {"label": kind}, label=labels)
    with pytest.raises(D.DataError, match=message):
        load(name, tmp_path)


def test_labels_outside_the_classes(tmp_path):
    name = save(tmp_path / "set", "train", {"label": datasets.Value("int64")}, label=[0, 1, 2] * 3)
    path = next((tmp_path / "set").glob("*.parquet"))
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata(features.arrow_schema.metadata), path)
    with pytest.raises(D.DataError, match="the training part of .* has [0-9] labels such as 2; 0 to 1 were expected"):
        load(name, tmp_path)


def test_two_label_columns(tmp_path):
    """CIFAR-100's columns."""
    features = {
        "fine_label": datasets.ClassLabel(names=["x", "y", "z"]),
        "coarse_label": datasets.ClassLabel(num_classes=2),
    }
    columns = dict(fine_label=[0, 1, 2] * 3, coarse_label=[0, 1, 0] * 3)
    name = save(tmp_path / "set", "train", features, **columns)
    save(tmp_path / "set", "test", features, **columns)
    message = (
        r"which column is the label, fine_label \(3 classes\), coarse_label \(2 classes\)\? Name it by --label-key"
    )
    for action in (D.load_splits, D.load_eval):
        with pytest.raises(D.DataError, match=message):
            action(name, cache_dir=tmp_path / "cache")
    with pytest.raises(D.DataError, match="which column is the label"):
        load(name, tmp_path, streaming=True, num_train=9)
    assert load(name, tmp_path, label_key="fine_label").class_names == ("x", "y", "z")
    stream = load(name, tmp_path, label_key="coarse_label", streaming=True, num_train=9)
    assert stream.class_names == ("0", "1")
    part = D.load_eval(name, label_key="coarse_label", cache_dir=tmp_path / "cache")
    assert part.dataset["label"][:] == columns["coarse_label"]
    with pytest.raises(D.DataError, match="no column 'fine'; it has fine_label, coarse_label, image .--label-key"):
        load(name, tmp_path, label_key="fine")


# -- splits -----------------------------------------------------------------------------------------------------------

NAMES = {"label": datasets.ClassLabel(names=["a", "b"])}


def test_splits_that_are_not_used_are_said(tmp_path):
    for split in ("train", "test", "validation"):
        name = save(tmp_path / "set", split, NAMES, label=[0, 1] * 3 if split != "test" else [-1] * 6)
    splits = load(name, tmp_path)
    assert splits.notes == (f"not used: test (6 images without labels) of {name}",) and len(splits.test) == 6
    part = D.load_eval(name, cache_dir=tmp_path / "cache")
    assert (part.split, part.total) == ("validation", 6)
    assert D.load_eval(name, "val", cache_dir=tmp_path / "cache").split == "validation"
    with pytest.raises(D.DataError, match="the split 'test' of .* has no labels"):
        load(name, tmp_path, test_split="Test")
    with pytest.raises(D.DataError, match="has no split 'dev'; it has .*--train-split"):
        load(name, tmp_path, train_split="dev")


def test_a_single_split_is_evaluated_whole(tmp_path):
    name = save(tmp_path / "set", "test", NAMES, label=[0, 1] * 3)
    part = D.load_eval(name, cache_dir=tmp_path / "cache")
    assert (part.split, len(part.dataset), part.total, part.class_names) == ("test", 6, 6, ("a", "b"))
    with pytest.raises(D.DataError, match="has no split to train on; it has test .--train-split"):
        load(name, tmp_path)
    name = save(tmp_path / "other", "train", NAMES, label=[0, 1] * 10)
    part = D.load_eval(name, cache_dir=tmp_path / "cache")
    assert (part.split, len(part.dataset), part.total) == ("train", 20, 20)
    part = D.load_eval(name, "test", cache_dir=tmp_path / "cache")
    splits = load(name, tmp_path)
    assert (part.split, len(part.dataset), part.total) == ("test (cut from train)", 4, 20)
    assert values(part.dataset) == values(splits.test)
    assert splits.notes == (f"{name} has no test split with labels: one is cut from train",)
    rest = D.load_eval(name, "train", cache_dir=tmp_path / "cache")
    assert values(rest.dataset) == values(splits.train)


def test_a_split_without_the_columns_does_not_stop_evaluation(tmp_path):
    for split in ("unsupervised", "validation"):
        path = tmp_path / "saved" / split
        rows = {"image": pictures(6), **({"label": [0, 1] * 3} if split == "validation" else {})}
        features = {"image": datasets.Image(), **(NAMES if split == "validation" else {})}
        made = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        made.save_to_disk(path)
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["unsupervised", "validation"]}')
    part = D.load_eval(f"hf:{tmp_path / 'saved'}")
    assert (part.split, part.total, part.class_names) == ("validation", 6, ("a", "b"))


def test_a_small_test_split_counts_its_classes_as_training_does(tmp_path):
    text = {"label": datasets.Value("string")}
    name = save(tmp_path / "set", "train", text, label=["ant", "bee", "cow"] * 2)
    save(tmp_path / "set", "test", text, label=["cow", "bee"])
    part = D.load_eval(name, cache_dir=tmp_path / "cache")
    assert part.class_names == load(name, tmp_path).class_names == ("ant", "bee", "cow")
    assert part.dataset["label"][:] == [2, 1]


@pytest.mark.parametrize("files", [("Train.parquet", "Test.parquet"), ("TRAIN/a.parquet", "Testing/a.parquet")])
def test_parts_that_datasets_would_take_for_one(tmp_path, files):
    save(tmp_path / "made", "train", NAMES, label=[0, 1] * 5)
    for file in files:
        (tmp_path / "set" / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "made" / "train-00000.parquet", tmp_path / "set" / file)
    for action in (D.load_splits, D.load_eval):
        with pytest.raises(D.DataError, match="as one split, 'train'; rename them to test and train"):
            action(f"hf:{tmp_path / 'set'}", cache_dir=tmp_path / "cache")


def test_configurations_are_named(tmp_path):
    for config in ("one", "two"):
        save(tmp_path / "set" / config, "train", NAMES, label=[0, 1] * 5)
    text = "".join(f"- config_name: {c}\n  data_files: {c}/*.parquet\n" for c in ("one", "two"))
    (tmp_path / "set" / "README.md").write_text(f"---\nconfigs:\n{text}---\n")
    name = f"hf:{tmp_path / 'set'}"
    with pytest.raises(D.DataError, match=r"Config name is missing. .*\['one', 'two'\] \(--hf-config\)"):
        load(name, tmp_path)
    with pytest.raises(D.DataError, match=r"'three' not found. .*\['one', 'two'\] \(--hf-config\)"):
        load(name, tmp_path, hf_config="three")
    assert len(load(name, tmp_path, hf_config="two").train) == 8


def test_rows_keep_their_order_on_any_disk(tmp_path):
    """Shards are read in the order of their names, in whatever order they were written."""
    found = []
    for order in ([0, 1, 2], [2, 0, 1]):
        folder = tmp_path / f"set{order[0]}"
        for k in order:
            save(folder, f"train-{k:05}-of-00003", NAMES, label=[0, 1] * 3, image=pictures(6, 10 * k))
        splits = load(f"hf:{folder}", tmp_path)
        found.append((values(splits.train), values(splits.test)))
    assert found[0] == found[1] and found[0][0] == sorted(found[0][0])


# -- damaged files ----------------------------------------------------------------------------------------------------


def halved(data):
    return data[: len(data) // 2]


def zeroed(data):
    middle = len(data) // 4
    return data[:middle] + bytes(200) + data[middle + 200 :]


@pytest.mark.parametrize("damage", [halved, zeroed, lambda data: b"", lambda data: b"\0" * len(data)])
@pytest.mark.parametrize("streaming", [False, True])
def test_damaged_parquet_is_named(tmp_path, damage, streaming):
    for split in ("train", "test"):
        name = save(tmp_path / "set", split, NAMES, label=[0, 1] * 50)
    path = tmp_path / "set" / "test-00000.parquet"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(D.DataError, match="test-00000.parquet cannot be read: .") as error:
        load(name, tmp_path, streaming=streaming, num_train=100 if streaming else None)
    assert "\n" not in str(error.value)


def test_damaged_shard_of_a_stream(tmp_path):
    for split in ("train", "test"):
        name = save(tmp_path / "set", split, NAMES, label=[0, 1] * 200)
    splits = load(name, tmp_path, streaming=True, num_train=400)
    path = tmp_path / "set" / "train-00000.parquet"
    path.write_bytes(zeroed(path.read_bytes()))
    config = dict(input_size=[3, 8, 8], mean=[0.0] * 3, std=[1.0] * 3, crop_pct=1.0)
    loader = D.stream_loader(splits.train, D.train_transform(config), 100, num_images=400, buffer_size=100)
    with pytest.raises(D.DataError, match="file 1 of the stream's 1 cannot be read: ."):
        list(loader.epoch(0))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("metadata.csv", b"\xff\xfe\x00label"),
        ("metadata.csv", b'file_name,label\n"0.png,a\n'),
        ("metadata.csv", b""),
        ("metadata.jsonl", b'{"file_name": "0.png", "label": "a"}\n{"file_name":'),
        ("metadata.parquet", b"PAR1 nonsense PAR1"),
    ],
)
def test_damaged_metadata_is_named(tmp_path, file, content):
    (tmp_path / "set").mkdir()
    for k in range(4):
        (tmp_path / "set" / f"{k}.png").write_bytes(png(k))
    (tmp_path / "set" / file).write_bytes(content)
    with pytest.raises(D.DataError, match=f"{file} cannot be read: .") as error:
        load(f"hf:{tmp_path / 'set'}", tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["state.json", "dataset_info.json", "data-00000-of-00001.arrow"])
@pytest.mark.parametrize("content", [halved, lambda data: b"{"])
def test_damaged_files_of_save_to_disk_are_named(tmp_path, file, content):
    features = datasets.Features({"image": datasets.Image(), **NAMES})
    made = datasets.Dataset.from_dict({"image": pictures(10), "label": [0, 1] * 5}, features=features)
    made.save_to_disk(tmp_path / "set")
    path = tmp_path / "set" / file
    path.write_bytes(content(path.read_bytes()))
    with pytest.raises(D.DataError, match=f"{file} cannot be read: ."):
        load(f"hf:{tmp_path / 'set'}", tmp_path)


def test_other_errors_of_datasets(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.jsonl").write_text("nonsense\n")
    with pytest.raises(D.DataError, match="train.jsonl cannot be read: ."):
        load(f"hf:{tmp_path / 'set'}", tmp_path)
    (tmp_path / "set" / "train.jsonl").write_text('{"image": 1}\n')
    (tmp_path / "set" / "train-2.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(D.DataError, match="must have the same columns, but there .* new columns .*image"):
        load(f"hf:{tmp_path / 'set'}", tmp_path)
    made = datasets.Dataset.from_dict({"image": pictures(10), "label": [0, 1] * 5})
    made.save_to_disk(tmp_path / "saved")
    (tmp_path / "saved" / "state.json").write_text("{}")
    with pytest.raises(D.DataError, match="datasets cannot open .*'_data_files' is missing"):
        load(f"hf:{tmp_path / 'saved'}", tmp_path)


# -- classes by name --------------------------------------------------------------------------------------------------


def test_match_classes():
    match = D.match_classes
    assert match(["cat", "dog", "owl"], ["cat", "dog", "owl"]) is None
    order = match(["cat", "dog", "owl"], ["owl", "dog", "cat"])
    logits = np.array([[1.0, 2.0, 3.0]])
    assert order == [2, 1, 0] and logits[:, order].tolist() == [[3.0, 2.0, 1.0]]
    assert match(["é", "b"], ["b", "e\u0301"]) == [1, 0]
    assert match(["a", "b", "c", "d"], ["d", "b"], subset=True) == [3, 1]
    assert match(["n1", "n2", "n3"], ["tench", "shark"], aliases=[["shark", "tench", "ray"]], subset=True) == [1, 0]
    assert match(["n1", "n2"], ["crane", "crane"], aliases=[["crane", "crane"]]) is None  # the same list


@pytest.mark.parametrize(
    ("model", "data", "options", "message"),
    [
        (
            ["a", "b"],
            ["a", "c"],
            {},
            "has the 2 classes a, b, set the 2 a, c; only set has c; only net has b.*same names",
        ),
        (["a", "b", "c"], ["a", "b"], {}, "only net has c"),
        (["a", "b"], ["a", "b", "c"], {"subset": True}, "only set has c"),
        (["a", "a", "b"], ["b", "a"], {"subset": True}, r"stands for several \(a\) cannot be matched"),
        (["a", "b"], ["b", "b"], {"subset": True}, r"stands for several \(b\)"),
        (["a", "b"], ["x", "y"], {"aliases": [["p", "q"]]}, "net has the 2 classes a, b, set the 2 x, y"),
    ],
)
def test_classes_that_cannot_be_matched(model, data, options, message):
    with pytest.raises(D.DataError, match=message):
        D.match_classes(model, data, model="net", data="set", **options)


def test_a_model_of_one_order_on_data_of_another(tmp_path):
    """Trained on (cat, dog, owl) from folders, met by a table whose ClassLabel says (owl, dog, cat)."""
    features = {"label": datasets.ClassLabel(names=["owl", "dog", "cat"])}
    name = save(tmp_path / "set", "test", features, label=[0, 1, 2] * 2)
    part = D.load_eval(name, cache_dir=tmp_path / "cache")
    answers = np.eye(3)[[2, 1, 0] * 2]  # right, in the model's order
    order = D.match_classes(["cat", "dog", "owl"], part.class_names)
    assert (answers[:, order].argmax(1) == part.dataset["label"][:]).all()


# -- what a run reads back --------------------------------------------------------------------------------------------


@pytest.fixture
def labelled():
    return datasets.Dataset.from_dict(
        {"label": [0, 1] * 6}, features=datasets.Features({"label": datasets.ClassLabel(names=["a", "b"])})
    )


def test_split_records(labelled):
    train, val = D.split_search_val(labelled)
    record = json.loads(json.dumps(D.split_record(labelled, np.array(train), val)))
    assert D.read_split(record, labelled) == (train, val)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: None,
        lambda r: [r["train"], r["val"]],
        lambda r: {k: v for k, v in r.items() if k != "val"},
        lambda r: {**r, "val": r["val"][1:]},
        lambda r: {**r, "train": r["val"], "val": r["train"]},
        lambda r: {**r, "train": [str(i) for i in r["train"]]},
        lambda r: {**r, "train": [float(i) for i in r["train"]]},
        lambda r: {**r, "train": 7},
        lambda r: {**r, "val": [*r["val"][:-1], 99]},
        lambda r: {**r, "digest": "0"},
    ],
)
def test_damaged_split_records(labelled, damage):
    record = D.split_record(labelled, *D.split_search_val(labelled))
    with pytest.raises(D.DataError, match="state/data.json is damaged; remove the run's folder"):
        D.read_split(damage(record), labelled, "state/data.json")


def test_split_records_of_other_data(labelled):
    record = D.split_record(labelled, *D.split_search_val(labelled))
    other = datasets.ClassLabel(names=["b", "a"])
    for data in (labelled.select(range(10)), labelled.select(range(11, -1, -1)), labelled.cast_column("label", other)):
        with pytest.raises(D.DataError, match="was written for other data than the 1[02] training images of now"):
            D.read_split(record, data)
    overlap = D.split_record(labelled, range(12), [3])
    with pytest.raises(D.DataError, match="written for other data"):
        D.read_split(overlap, labelled)


@pytest.mark.parametrize(
    "damage",
    [
        lambda r: [],
        lambda r: {},
        lambda r: {**r, "labels": 3},
        lambda r: {**r, "val": ["1"]},
        lambda r: {**r, "val": [1.5]},
        lambda r: {**r, "val": [float("inf")]},
        lambda r: {**r, "val": [-1]},
        lambda r: {**r, "val": [400]},
        lambda r: {**r, "hashes": [3]},
        lambda r: {**r, "hashes": "abc"},
    ],
)
def test_damaged_training_records(labelled, damage):
    record = D.training_record(labelled, [1, 5], [f"{k:032x}" for k in range(12)])
    assert D.trained_on(record, labelled) == [k not in (1, 5) for k in range(12)]
    with pytest.raises(D.DataError, match="^best/training_data.json"):
        D.trained_on(damage(record), labelled, where="best/training_data.json")
