"""The classifier that every result is set beside."""

import numpy as np
import pytest
from PIL import Image
from test_stream import open_stream, png, write

from timm_resnas.data import default_data_config, load_splits
from timm_resnas.engine import baseline
from timm_resnas.engine.baseline import features, sample, score_baseline, verdict

COLOURS = {"blue": (40, 60, 200), "green": (40, 200, 60), "red": (200, 60, 40)}


def config(side=32, in_chans=3, **more):
    mean = [0.5] * in_chans
    return {"input_size": [in_chans, side, side], "mean": mean, "std": mean, "crop_pct": 1.0, **more}


def without_seconds(result):
    return {k: v for k, v in result.items() if k != "seconds"}


@pytest.fixture(scope="module")
def coloured(tmp_path_factory):
    """Noise of any size on the colour of its class; nothing else tells the classes apart."""
    folder, rng = tmp_path_factory.mktemp("data") / "coloured", np.random.default_rng(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(20):
            pixels = rng.normal(colour, 30, (*rng.integers(20, 70, 2), 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(folder / name / f"{i}.png")
    return load_splits(f"imagefolder:{folder}")


def test_colour_alone_is_learned_and_nothing_is_drawn_anew(coloured):
    result = score_baseline(coloured, config())
    assert (result["test"], result["images"], result["train_images"]) == (12, 12, 48)
    np.random.seed(1)
    assert without_seconds(score_baseline(coloured, config())) == without_seconds(result)


def test_images_without_classes_are_answered_by_chance(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(200):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    result = score_baseline(load_splits(f"imagefolder:{tmp_path}"), config(16))
    assert result["images"] == 80 and 24 < result["test"] < 56  # 3.6 standard deviations around one half


@pytest.mark.parametrize("in_chans", [1, 3])
def test_digits(in_chans):
    splits = load_splits("digits")
    result = score_baseline(splits, default_data_config(splits, 32, in_chans=in_chans))
    assert result["images"] == 360 and result["train_images"] == 1437 and result["test"] / 360 > 0.97


def test_features_of_a_picture_by_hand(tmp_path):
    """Left half red, right half a transparent one on the background; and both as the model of one channel sees them."""
    pixels = np.zeros((32, 32, 4), dtype=np.uint8)
    pixels[:, :16] = (255, 0, 0, 255)
    pixels[:, 16:] = (0, 255, 0, 0)  # green is stored there, and not seen
    for path in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / path).mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / path / "0.png")
    splits = load_splits(f"imagefolder:{tmp_path}", background="#0000ff")
    x, labels = features(splits.test, config(background=splits.background))
    assert labels.tolist() == [0, 1] and x.shape == (2, 3 * 256 + 64)
    cells = x[0, :768].reshape(3, 16, 16)
    assert (cells[0] == np.repeat([1, 0], 8)).all() and (cells[2] == np.repeat([0, 1], 8)).all() and not cells[1].any()
    shares = x[0, 768:]
    assert {int(i): float(shares[i]) for i in np.flatnonzero(shares)} == {3 * 16: 0.5, 3: 0.5}  # red, blue
    x, _ = features(splits.test, config(in_chans=1, background=splits.background))
    red, blue = 76, 29  # greys of ITU-R BT.601
    np.testing.assert_allclose(x[0, :256].reshape(16, 16)[0], np.repeat([red, blue], 8) / 255, rtol=1e-6)
    shares = x[0, 256:]
    assert {int(i): float(shares[i]) for i in np.flatnonzero(shares)} == {red * 64 // 255: 0.5, blue * 64 // 255: 0.5}


def test_large_data_sets_are_not_read_whole(coloured, monkeypatch):
    taken = sample(coloured.train, 30)
    assert len(taken) == 30 and taken["label"] == sample(coloured.train, 30)["label"]
    assert set(taken["label"]) == {0, 1, 2} and len({p["path"] for p in undecoded(taken)}) == 30
    assert sample(coloured.train, 48) is coloured.train
    monkeypatch.setattr(baseline, "TRAIN_IMAGES", 30)
    monkeypatch.setattr(baseline, "TEST_IMAGES", 7)
    result = score_baseline(coloured, config())
    assert (result["test"], result["images"], result["train_images"]) == (7, 7, 30)


def undecoded(dataset):
    return dataset.cast_column("image", dataset.features["image"].__class__(decode=False))["image"]


def test_a_stream_is_read_at_several_places(tmp_path):
    stream = open_stream(write(tmp_path / "repo", "train", [20] * 3))
    taken = sample(stream, 12)
    numbers = [0, 1, 2, 3, 20, 21, 22, 23, 40, 41, 42, 43]
    assert [image["bytes"] for image in taken["image"]] == [png(i, "RGB") for i in numbers]
    assert taken["label"] == [i % 3 for i in numbers]
    assert len(sample(stream, 1000)) == 60


def test_unreadable_images_are_left_out(tmp_path):
    rng = np.random.default_rng(0)
    for name in "ab":
        (tmp_path / name).mkdir()
        for i in range(10):
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(tmp_path / name / f"{i}.png")
    splits = load_splits(f"imagefolder:{tmp_path}")
    for part in (splits.train, splits.test):
        with open(undecoded(part)[0]["path"], "wb") as file:
            file.write(b"no image")
    result = score_baseline(splits, config(16))
    assert (result["images"], result["train_images"]) == (3, 15)


def test_it_is_said_exactly_where_the_network_is_not_better():
    simple = {"test": 300, "images": 400}
    assert verdict(0.7501, simple) is None and verdict(1.0, simple) is None
    for accuracy in (0.75, 0.2):
        text = verdict(accuracy, simple)
        assert f"{accuracy:.4f} of the test images" in text and "0.7500" in text
        assert "--model NAME" in text and "--pretrained" in text and "more images" in text and "--epochs" in text
    assert "--pretrained" not in verdict(0.2, simple, pretrained=True)
