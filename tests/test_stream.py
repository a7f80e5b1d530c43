"""Training from a stream: batches that depend on seed, epoch and step alone, however they are read."""

import logging
from io import BytesIO

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from timm_resnas import data as D
from timm_resnas.data.stream import default_shards

pytestmark = pytest.mark.oldest

NAMES = ["ant", "bee", "cat"]


@pytest.fixture(autouse=True, scope="module")
def quiet():
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


def png(value, mode="RGB"):
    out = BytesIO()
    colour = value if mode == "L" else (value, 255 - value, 7)
    Image.new(mode, (8, 8), colour).save(out, "PNG")
    return out.getvalue()


def write(folder, part, sizes, start=0, label="label", names=NAMES, mode="RGB", broken=()):
    """Parquet files with the given numbers of images; image i has the grey value i and the class i mod 3."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int64")
    features = datasets.Features({"image": datasets.Image(), label: kind})
    for k, size in enumerate(sizes):
        rows = range(start, start + size)
        images = [{"bytes": b"no image" if i in broken else png(i, mode), "path": None} for i in rows]
        columns = {"image": images, label: [i % 3 for i in rows]}
        made = datasets.Dataset.from_dict(columns, features=features)
        made.to_parquet(str(folder / "data" / f"{part}-{k:05}-of-{len(sizes):05}.parquet"))
        start += size
    return folder


def open_stream(folder):
    return datasets.load_dataset(str(folder), streaming=True, cache_dir=str(folder / "cache"))["train"]


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """120 images in 6 files."""
    return open_stream(write(tmp_path_factory.mktemp("even"), "train", [20] * 6))


def transform(augment=False):
    config = dict(input_size=[3, 8, 8], mean=[0.0] * 3, std=[1.0] * 3, interpolation="bilinear", crop_pct=1.0)
    config["crop_mode"] = "center"
    if augment:
        return D.train_transform(config, scale=(0.1, 1.0), hflip=0.5, color_jitter=0.8, re_prob=0.5)
    return D.train_transform(config, no_aug=True)


def loader(stream, batch_size=24, *, augment=False, num_images=120, seed=3, buffer_size=36, **options):
    return D.stream_loader(
        stream, transform(augment), batch_size, num_images=num_images, seed=seed, buffer_size=buffer_size, **options
    )


def values(batches):
    """Which images batches hold, and that labels are theirs."""
    out = []
    for x, y in batches:
        numbers = (x[:, 0, 0, 0] * 255).round().int()
        assert torch.equal(y, numbers.long() % 3)
        out.append(numbers.tolist())
    return out


def equal(one, other):
    one, other = list(one), list(other)
    return len(one) == len(other) and all(
        torch.equal(a, b) for x, y in zip(one, other, strict=True) for a, b in zip(x, y, strict=True)
    )


# -- order ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_shards", "buffer_size"), [(None, 36), (1, 7), (2, 50), (3, 4096), (6, 6)])
def test_order(even, num_shards, buffer_size):
    """The order, written out: files are dealt to shards, and a shard's blocks shuffled."""
    made = loader(even, num_shards=num_shards, buffer_size=buffer_size)
    assert len(made) == 5
    num_shards = num_shards or 1
    for epoch in (0, 4):
        files = np.random.RandomState([3, 0, epoch]).permutation(6)
        queues = []
        for shard in range(num_shards):
            rows, queue = [20 * s + i for s in files[shard::num_shards] for i in range(20)], []
            for number, start in enumerate(range(0, len(rows), buffer_size // num_shards)):
                block = rows[start : start + buffer_size // num_shards]
                order = np.random.RandomState([3, 0, epoch, shard, number]).permutation(len(block))
                queue += [block[i] for i in order]
            queues.append(queue)
        each = 24 // num_shards
        wanted = [[v for q in queues for v in q[step * each : (step + 1) * each]] for step in range(5)]
        assert values(made.epoch(epoch)) == wanted
        assert sorted(sum(wanted, [])) == list(range(120))  # each image once
    assert values(made.epoch(1)) != values(made.epoch(0))


def test_resume_workers_and_processes(even):
    """Augmented images are the same after any skip, with any workers, in any number of processes."""
    whole = list(loader(even, augment=True, num_shards=6).epoch(2))
    assert not equal(whole, loader(even, augment=True, num_shards=6).epoch(1)) and len(whole) == 5
    for skip in range(6):
        assert equal(whole[skip:], loader(even, augment=True, num_shards=6).epoch(2, skip))
    working = loader(even, augment=True, num_shards=6, num_workers=2)
    list(working.epoch(0))
    assert equal(whole, working.epoch(2)) and equal(whole[3:], working.epoch(2, 3))
    for world in (2, 3, 6):
        ranks = [loader(even, augment=True, num_shards=6, rank=r, world=world).epoch(2) for r in range(world)]
        together = [
            tuple(torch.cat(parts) for parts in zip(*batches, strict=True)) for batches in zip(*ranks, strict=True)
        ]
        assert equal(whole, together)


def test_a_process_reads_only_its_files(even, monkeypatch):
    read, shard = [], datasets.IterableDataset.shard

    def note(self, num_shards, index, **kwargs):
        read.append(index)
        return shard(self, num_shards, index, **kwargs)

    monkeypatch.setattr(datasets.IterableDataset, "shard", note)
    for rank in range(3):
        list(loader(even, num_shards=6, rank=rank, world=3).epoch(0))
    assert sorted(read) == list(range(6))


def test_files_of_different_sizes(tmp_path):
    """A short shard starts again, a long one is cut; over the epochs all images are seen."""
    stream = open_stream(write(tmp_path, "train", [5, 15, 40, 20]))
    made = loader(stream, 16, num_shards=2, num_images=80, buffer_size=8)
    seen = set()
    for epoch in range(12):
        batches = values(made.epoch(epoch))
        assert [len(b) for b in batches] == [16] * 5
        assert equal(list(made.epoch(epoch))[4:], made.epoch(epoch, 4))
        for part in (slice(0, 8), slice(8, 16)):  # a shard's images come equally often, but for the last pass
            times = np.unique([v for b in batches for v in b[part]], return_counts=True)[1]
            assert times.max() - times.min() <= 1
        seen.update(sum(batches, []))
    assert seen == set(range(80))


def test_default_shards():
    found = [default_shards(batch, files) for batch, files in ((64, 1), (64, 7), (64, 8), (64, 300), (60, 300), (7, 9))]
    assert found == [1, 1, 2, 16, 15, 1]


def test_global_generators_are_left_alone(even):
    torch.manual_seed(0)
    np.random.seed(0)
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    list(loader(even, augment=True).epoch(0))
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_an_epoch_that_is_left_early(even):
    made = loader(even)
    first = next(made.epoch(0))
    assert equal([first], list(made.epoch(0))[:1])


# -- what is wrong with data ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_workers", [0, 1])
def test_unreadable_images_are_counted_once(tmp_path, caplog, num_workers):
    stream = open_stream(write(tmp_path, "train", [30, 30], broken=[7]))
    made = loader(stream, 12, num_images=60, num_workers=num_workers)
    with caplog.at_level(logging.WARNING):
        for epoch in range(2):
            seen = sum(values(made.epoch(epoch)), [])
            assert len(seen) == 60 and set(seen) == set(range(60)) - {7}  # another of its batch comes twice
    assert len(made.corrupt) == 1 and "UnidentifiedImageError" in next(iter(made.corrupt.values()))
    assert caplog.text.count("an image of the stream cannot be read and is left out") == 1


def test_too_many_unreadable_images(tmp_path):
    (tmp_path / "data").mkdir()
    rows = [{"image": {"bytes": b"x%d" % i, "path": None}, "label": 0} for i in range(8)]
    rows += [{"image": {"bytes": png(i), "path": None}, "label": i % 3} for i in range(32)]
    made = datasets.Dataset.from_list(
        rows, features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    )
    made.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    with pytest.raises(D.DataError, match="3 images of 40 cannot be read, more than the 2 allowed"):
        list(loader(open_stream(tmp_path), 10, num_images=40).epoch(0))


def test_images_without_a_label(tmp_path):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(10)], "label": [0, 1, 2, -1] + [0] * 6}
    (tmp_path / "data").mkdir()
    made = datasets.Dataset.from_dict(rows, features=features)
    made.to_parquet(str(tmp_path / "data" / "train-00000-of-00001.parquet"))
    with pytest.raises(D.DataError, match="has the label -1; 0 to 2 were expected"):
        list(loader(open_stream(tmp_path), 5, num_images=10).epoch(0))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(batch_size=25, num_shards=6), "25 is not a positive multiple of the 6 shards"),
        (dict(num_shards=7), r"num_shards \(--stream-shards\) must lie between 1 and the stream's 6 files, got 7"),
        (dict(world=4, num_shards=6), "4 processes cannot share 6 shards of a stream with 6 files .* a multiple of 4"),
        (dict(world=2, rank=2, num_shards=6), "rank must lie between 0 and 1, got 2"),
        (dict(num_images=20), "a batch of 24 is larger than the 20 training images"),
        (dict(buffer_size=3, num_shards=6), "buffer_size must be at least num_shards, 6; got 3"),
        (dict(seed=-1), "seed must lie between 0"),
    ],
)
def test_sizes_that_do_not_fit(even, options, message):
    with pytest.raises(D.DataError, match=message):
        loader(even, **options)


# -- by name ----------------------------------------------------------------------------------------------------------


def test_a_data_set_by_name(tmp_path):
    folder = write(tmp_path / "repo", "train", [20] * 3, label="kind")
    write(tmp_path / "repo", "test", [9], start=100, label="kind")
    splits = D.load_splits(f"hf:{folder}", streaming=True, num_train=60, cache_dir=tmp_path / "cache")
    assert isinstance(splits.train, datasets.IterableDataset) and splits.num_train == 60
    assert (splits.class_names, splits.native_size, splits.in_chans) == (tuple(NAMES), (8, 8), 3)
    assert splits.test["label"][:] == [i % 3 for i in range(100, 109)]
    assert [image.getpixel((0, 0))[0] for image in splits.test["image"][:]] == list(range(100, 109))
    seen = sum(values(loader(splits.train, 12, num_images=splits.num_train).epoch(0)), [])
    assert sorted(seen) == list(range(60))
    evaluated = D.eval_batches(splits.test, D.eval_transform(D.default_data_config(splits, 8)))
    assert torch.cat([y for _, y in evaluated]).tolist() == splits.test["label"][:]
    stored = {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")}
    D.load_splits(f"hf:{folder}", streaming=True, num_train=60, cache_dir=tmp_path / "cache")
    assert stored and stored == {p: p.stat().st_mtime_ns for p in (tmp_path / "cache").rglob("*.arrow")}
    assert D.load_splits("digits").num_train == 1437


def test_statistics_of_a_grey_stream(tmp_path):
    folder = write(tmp_path / "repo", "train", [40], mode="L")
    write(tmp_path / "repo", "test", [3], mode="L")
    splits = D.load_splits(f"hf:{folder}", streaming=True, num_train=40, cache_dir=tmp_path / "cache")
    config = D.default_data_config(splits, 8)
    grey = np.arange(40) / 255
    assert splits.in_chans == 1 and config["crop_pct"] == 1.0
    assert config["mean"] == pytest.approx([grey.mean()] * 3, abs=1e-4)
    assert config["std"] == pytest.approx([grey.std()] * 3, abs=1e-4)


@pytest.mark.parametrize(
    ("train", "test", "options", "message"),
    [
        (dict(), dict(), dict(), r"does not say how many images its split 'train' has \(--num-train\)"),
        (dict(), None, dict(num_train=9), "has no test split; it has train .--test-split.*Streaming needs both"),
        (dict(), dict(), dict(num_train=9, train_split="big"), "has no split 'big'; it has"),
        (dict(names=None), dict(names=None), dict(num_train=9), r"must name its classes \(ClassLabel\)"),
        (dict(label="kind"), dict(label="kind"), dict(num_train=9, label_key="label"), "no column 'label'"),
    ],
)
def test_data_sets_that_cannot_be_streamed(tmp_path, train, test, options, message):
    write(tmp_path / "repo", "train", [9], **train)
    if test is not None:
        write(tmp_path / "repo", "test", [3], **test)
    with pytest.raises(D.DataError, match=message):
        D.load_splits(f"hf:{tmp_path / 'repo'}", streaming=True, cache_dir=tmp_path / "cache", **options)


def test_only_data_sets_of_the_hub_are_streamed(tmp_path):
    with pytest.raises(D.DataError, match="only hf:<id> can be streamed, not digits"):
        D.load_splits("digits", streaming=True)
    saved = datasets.Dataset.from_dict({"label": [0]})
    saved.save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(D.DataError, match="written by save_to_disk"):
        D.load_splits(f"hf:{tmp_path / 'saved'}", streaming=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(D.DataError, match="datasets cannot open"):
        D.load_splits(f"hf:{tmp_path / 'empty'}", streaming=True)
