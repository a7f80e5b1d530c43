"""Evaluating a model: scores against a slow reference, classes matched by name and number, reassessed labels."""

import json
import math
import re

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from PIL import Image
from recipe_server import Recipe
from timm.data import ImageNetInfo

from recipes import evaluate as recipe
from timm_resnas.engine import evaluate
from timm_resnas.engine.run import RunError
from timm_resnas.hub import save_pretrained

TINY = "((0,16),(1,(16,2,8),(16,32),1),(3,16,24),(1,(24,2,12),(24,48),1),(2,24,10))"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of random weights for digits; its answers are unevenly confident."""
    torch.manual_seed(0)
    net = timm.create_model("vit_resnas", network_def=TINY, patch_size=4, img_size=16)
    with torch.no_grad():
        net.head.weight *= 60
    net.pretrained_cfg.update(crop_pct=1.0)
    names = [str(n) for n in range(10)]
    return save_pretrained(net, tmp_path_factory.mktemp("model") / "best", label_names=names)


class Fixed(torch.nn.Module):
    """Gives the logits that are its input."""

    num_classes = 7

    def forward(self, x):
        return x


def reference(logits, labels):
    """Loop over images, then over bins."""
    n = len(logits)
    loss = top1 = top5 = 0
    bins = [[] for _ in range(15)]
    for z, y in zip(logits.double().tolist(), labels.tolist(), strict=True):
        total = sum(math.exp(v) for v in z)
        p = [math.exp(v) / total for v in z]
        order = sorted(range(len(z)), key=lambda k: -z[k])
        loss -= math.log(p[y])
        top1 += order[0] == y
        top5 += y in order[:5]
        confidence = p[order[0]]
        bins[max(0, math.ceil(confidence * 15) - 1)].append((confidence, order[0] == y))
    ece = sum(len(b) / n * abs(sum(c for c, _ in b) / len(b) - sum(r for _, r in b) / len(b)) for b in bins if b)
    return {"images": n, "correct": top1, "top1": top1 / n, "top5": top5 / n, "loss": loss / n, "ece": ece}


def test_scores_equal_a_slow_reference():
    generator = torch.Generator().manual_seed(3)
    logits = 2 * torch.randn(203, 7, generator=generator)
    labels = torch.where(torch.rand(203, generator=generator) < 0.6, logits.argmax(1), torch.arange(203) % 7)
    expected = reference(logits, labels)
    assert 0.55 < expected["top1"] < 0.8 and expected["ece"] > 0.01
    batches = list(zip(logits.split(50), labels.split(50), strict=True))
    found = evaluate.evaluate(Accelerator(cpu=True), Fixed(), batches)
    assert found == pytest.approx(expected, rel=1e-5)
    # some of the classes only, in another order: the others are no answers
    classes = [4, 0, 5, 2, 6, 1]
    kept = labels != 3
    number = torch.tensor([classes.index(int(y)) for y in labels[kept]])
    found = evaluate.evaluate(Accelerator(cpu=True), Fixed(), [(logits[kept], number)], classes=classes, timed=True)
    assert found.pop("images_per_second") > 0  # one batch, measured a second time
    assert found == pytest.approx(reference(logits[kept][:, classes], number), rel=1e-5)


def test_reassessed_labels():
    logits = torch.eye(7)[[0, 1, 2, 3]] + 0.1 * torch.arange(7)
    real = [[5, 0], [], [6], [4, 1]]  # right, not counted, among five, wrong: 3 6 5 4 2 are the first of image 3
    found = evaluate.evaluate(Accelerator(cpu=True), Fixed(), [(logits, torch.arange(4))], real=real)
    assert found == {"images": 3, "correct": 1, "top1": 1 / 3, "top5": 1.0}
    found = evaluate.evaluate(Accelerator(cpu=True), Fixed(), [(logits, torch.arange(4))], real=[[0], [], [6], [0]])
    assert found == {"images": 3, "correct": 1, "top1": 1 / 3, "top5": 2 / 3}


def test_few_classes_have_no_top5():
    class Three(Fixed):
        num_classes = 3

    found = evaluate.evaluate(Accelerator(cpu=True), Three(), [(torch.eye(3), torch.arange(3))])
    assert "top5" not in found and found["top1"] == 1
    with pytest.raises(RunError, match="no images"):
        evaluate.evaluate(Accelerator(cpu=True), Three(), [])


def main(*options):
    return recipe.main(["--cpu", "--threads", "1", *options])


def test_a_folder_on_digits(folder, tmp_path, capsys):
    found = main("--model", str(folder.parent), "--batch-size", "50", "--json", str(tmp_path / "scores.json"))
    line = capsys.readouterr().out.splitlines()[1]
    assert re.fullmatch(
        r"top-1 0\.\d{4}  top-5 0\.\d{4}  loss \d+\.\d{4}  calibration error 0\.\d{4}  [\d.]+ images/s  \(360 images\)",
        line,
    )
    assert json.loads((tmp_path / "scores.json").read_text()) == found
    assert found["images"] == 360 and found["input_size"] == [3, 16, 16] and found["images_per_second"] > 0
    assert main("--model", f"local-dir:{folder}", "--json", "-")["loss"] == pytest.approx(found["loss"], rel=1e-5)
    printed = json.loads(capsys.readouterr().out)
    assert printed["correct"] == found["correct"] and printed["classes"] == 10
    assert main("--model", str(folder), "--split", "train")["images"] == 1437


def test_other_resolutions_and_crops(folder):
    plain = main("--model", str(folder))
    larger = main("--model", str(folder), "--img-size", "24", "32")
    assert larger["input_size"] == [3, 24, 32] and larger["loss"] != plain["loss"]
    cropped = main("--model", str(folder), "--crop-pct", "0.5", "--interpolation", "bilinear")
    assert cropped["crop_pct"] == 0.5 and cropped["loss"] != plain["loss"]
    squashed = main("--model", str(folder), "--img-size", "24", "32", "--crop-mode", "squash")
    assert squashed["crop_mode"] == "squash" and squashed["loss"] != larger["loss"]


def test_two_processes_as_one(folder, tmp_path, recipe_server):
    options = ["--cpu", "--threads", "1", "--model", str(folder), "--batch-size", "50"]
    Recipe(recipe_server, "evaluate", options, named=False).run_two(
        tmp_path / "two", "--json", str(tmp_path / "two.json")
    )
    two, one = json.loads((tmp_path / "two.json").read_text()), main("--model", str(folder), "--batch-size", "50")
    assert two["images"] == one["images"] == 360 and two["correct"] == one["correct"]
    for key in ("top5", "loss", "ece"):
        assert two[key] == pytest.approx(one[key], rel=1e-5), key


# -- classes ----------------------------------------------------------------------------------------------------------


class Named:
    def __init__(self, num_classes, names=None):
        self.num_classes = num_classes
        self.pretrained_cfg = {} if names is None else {"label_names": names}


def test_classes_are_matched_by_name():
    abc = Named(3, ["a", "b", "c"])
    assert evaluate.matched_classes(abc, ["a", "b", "c"]) is None
    assert evaluate.matched_classes(abc, ["c", "a"]) == [2, 0]
    assert evaluate.matched_classes(abc, ["c", "b", "a"]) == [2, 1, 0]
    assert evaluate.matched_classes(Named(3), ["x", "y", "z"]) is None
    for model, names, message in (
        (abc, ["x", "y", "z"], "a, b, c, the data the 3 x, y, z"),
        (abc, ["a", "d"], "\\bd\\b"),
        (abc, ["a", "b", "d"], "\\bd\\b"),
        (Named(3), ["x", "y"], "the model has 3 classes without names, the data 2; take a model"),
    ):
        with pytest.raises(RunError, match=message):
            evaluate.matched_classes(model, names)


def test_subsets_of_imagenet():
    """Folders with WordNet names find ImageNet's classes; timm's lists give the same numbers."""
    imagenet = Named(1000)
    synsets = ImageNetInfo().label_names()
    assert evaluate.matched_classes(imagenet, synsets) is None
    for name in ("imagenet-a", "imagenet_r"):
        numbers = evaluate.read_valid_labels(name, imagenet, 200)
        assert evaluate.matched_classes(imagenet, [synsets[n] for n in numbers]) == numbers
        assert len(set(numbers)) == 200
    with pytest.raises(RunError, match="imagenet-z is neither a file nor one of timm's lists: .*imagenet_a"):
        evaluate.read_valid_labels("imagenet-z", imagenet, 200)
    with pytest.raises(RunError, match="200 numbers up to .* the data has 10 classes, the model 1000"):
        evaluate.read_valid_labels("imagenet-a", imagenet, 10)


def test_a_list_of_class_numbers(folder, tmp_path):
    images = tmp_path / "images"
    for c in "xy":
        for part in ("train", "test"):
            (images / part / c).mkdir(parents=True)
            Image.fromarray(np.full((16, 16, 3), 40, dtype=np.uint8)).save(images / part / c / "1.png")
    (tmp_path / "labels.txt").write_text("3\n7\n")
    given = ["--model", str(folder), "--dataset", f"imagefolder:{images}"]
    found = main(*given, "--valid-labels", str(tmp_path / "labels.txt"))
    assert (found["images"], found["correct"], found["classes"]) == (2, 1, 2)  # the same picture twice
    (tmp_path / "labels.txt").write_text("3\nseven\n")
    with pytest.raises(SystemExit):
        main(*given, "--valid-labels", str(tmp_path / "labels.txt"))


def test_reassessed_labels_of_files(folder, tmp_path):
    rng = np.random.default_rng(0)
    for part in ("train", "val"):
        for i in range(1, 5):
            path = tmp_path / "images" / part / "ab"[i % 2] / f"ILSVRC2012_val_{i:08d}.JPEG"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    given = ["--model", str(folder), "--dataset", f"imagefolder:{tmp_path / 'images'}"]
    real = tmp_path / "real.json"
    real.write_text(json.dumps([list(range(10)), [], list(range(10)), []]))  # images 1 and 3: whatever it says
    found = main(*given, "--real-labels", str(real))
    assert (found["images"], found["correct"], found["labels"]) == (2, 2, "real") and "loss" not in found
    real.write_text(json.dumps([[], [], [], [11]]))
    found = main(*given, "--real-labels", str(real))
    assert (found["images"], found["correct"], found["top5"]) == (1, 0, 0)


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--model is missing"),
        (["--model", "vit_resnas_tyni"], "did you mean vit_resnas_tiny"),
        (["--model", "vit_resnas_tiny"], "it has no pretrained weights"),
        (["--model", "/nowhere/best"], "there is no folder /nowhere/best"),
        (["--model", "FOLDER", "--img-size", "20"], "20x20 is not a multiple of the total stride 8"),
        (["--model", "FOLDER", "--split", "holdout", "--dataset", "imagefolder:/nowhere"], "there is no folder"),
        (["--model", "FOLDER", "--batch-size", "0"], r"argument --batch-size: must be in \[1, inf\), got 0"),
        (["--model", "FOLDER", "--real-labels"], "all images of ImageNet's validation set; this part has 360"),
        (["--model", "FOLDER", "--json", "/nowhere/scores.json"], "scores.json: there is no folder /nowhere"),
        (["--model", "FOLDER", "--valid-labels", "some"], "neither a file nor one of timm's lists"),
    ],
)
def test_what_is_refused(given, message, folder, capsys):
    with pytest.raises(SystemExit) as end:
        main(*[str(folder) if g == "FOLDER" else g for g in given])
    assert end.value.code == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and re.search(message, error), error
