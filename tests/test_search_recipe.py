"""The main job, run as a user runs it, with sizes that take seconds."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import yaml
from PIL import Image
from recipe_server import ROOT, Recipe, parts, wait_until
from safetensors.torch import load_file, save_file

from recipes import search as recipe
from timm_resnas.nas.cost import format_cost
from timm_resnas.nas.evolution import rank_key
from timm_resnas.nas.jsonl import read_jsonl

SEARCH = [
    *("--cpu", "--threads", "1", "--population", "10", "--iterations", "3", "--parents", "4"),
    *("--mutations", "2", "--crossovers", "2", "--num-random", "3", "--num-any-cost", "3"),
]
# 11 steps on 16 px digits
QUICK = [
    *(*SEARCH, "--img-size", "16", "--batch-size", "80", "--num-archs", "2", "--epochs", "1", "--eval-every", "1"),
    *("--warmup-epochs", "0", "--arch-warmup-epochs", "0"),
]


def run(tmp_path, *options, name="run"):
    recipe.main([*QUICK, "--output", str(tmp_path), "--name", name, *options])
    return tmp_path / name


def without(record):
    return {k: v for k, v in record.items() if k != "seconds"}


def without_seconds(folder):
    return [without(r) for r in read_jsonl(folder / "history.jsonl")]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One search through Accelerate's launcher."""
    folder = tmp_path_factory.mktemp("runs")
    command = [sys.executable, "-m", "accelerate.commands.launch", str(ROOT / "recipes" / "search.py"), *QUICK]
    done = subprocess.run([*command, "--name", "run", "--output", str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder / "run", done.stdout


@pytest.mark.oldest
def test_output_of_a_search(finished):
    folder, printed = finished
    for name in ("config.yaml", "history.jsonl", "training.jsonl", "results.json", "report.md", "state/data.json"):
        assert (folder / name).stat().st_size > 0
    for name in ("pareto.png", "progress.png", "choices.png"):
        with Image.open(folder / name) as image:
            assert image.size[0] > 500
    history, results = read_jsonl(folder / "history.jsonl"), results_of(folder)
    assert [r["generation"] for r in history] == [0] * 10 + [1] * 4 + [2] * 4
    assert len({r["key"] for r in history}) == len(history) == results["candidates"]
    limit = results["budget"]["macs"]
    assert all(0.975 * limit <= r["macs"] <= limit for r in history)
    assert limit == int(0.2 * results["largest"]["macs"])
    assert results["best"]["key"] == min(history, key=rank_key)["key"]
    macs = [p["macs"] for p in results["front"]]
    scores = [p["score"] for p in results["front"]]
    assert macs == sorted(set(macs)) and scores == sorted(set(scores))
    assert len(list((folder / "pareto").iterdir())) == len(macs)
    # the last table is printed, and its numbers are those of the files
    test = f"{results['best']['test'] / results['test_images']:.4f}"
    assert f"| {test} " in next(line for line in printed.splitlines() if line.startswith("| best"))
    found = without(results["baseline"])
    assert found["images"] == 360 and found["train_images"] == 1437 and found["test"] > 345
    assert f"| {found['test'] / 360:.4f} " in next(r for r in printed.splitlines() if r.startswith("| random forest"))
    said = "does not beat a simple classifier"
    assert (said in printed) is (said in (folder / "report.md").read_text())
    assert (said in printed) is (results["best"]["test"] <= found["test"])
    header = next(line for line in printed.splitlines() if line.split()[:2] == ["generation", "candidates"])
    assert "mean of parents" in header and header.endswith("ends in")


def test_search_validation_is_cut_from_training_images_only(finished):
    train, val = parts(finished[0])
    assert len(train) + len(val) == 1437 and not set(train) & set(val)
    assert results_of(finished[0])["val_images"] == len(val)


def test_best_reproduces_its_test_accuracy_with_plain_timm(finished, python):
    """In a new process, with timm's own preprocessing and loader."""
    folder, _ = finished
    code = f"""
import timm, timm_resnas, torch
from timm_resnas.data import load_splits
model = timm.create_model('local-dir:{folder}/best', pretrained=True).eval()
config = timm.data.resolve_model_data_config(model)
transform = timm.data.create_transform(**config, is_training=False)
test = load_splits('digits').test
x = torch.stack([transform(image.convert('RGB')) for image in test['image']])
with torch.inference_mode():
    print(int((model(x).argmax(-1) == torch.tensor(test['label'])).sum()))
assert model.num_classes == 10 and model.pretrained_cfg['label_names'] == [str(i) for i in range(10)]
"""
    done = python.run(code)
    assert done.returncode == 0, done.stderr
    results = results_of(folder)
    assert int(done.stdout) == results["best"]["test"]
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["architecture"] == "vit_resnas" and config["label_names"] == [str(i) for i in range(10)]
    assert config["timm_resnas"]["macs"] == results["best"]["macs"]


def test_every_point_of_the_front_loads(finished):
    folder, _ = finished
    for k, point in enumerate(results_of(folder)["front"], start=1):
        model = timm.create_model(f"local-dir:{folder}/pareto/{k}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == point["params"]


def test_resolved_configuration_is_saved(finished):
    saved = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert saved["population"] == 10 and saved["space"] == "micro" and saved["lr"] == 2e-3
    assert saved["budget"] == "macs=20%" and "config" not in saved


def test_running_again_scores_nothing(finished, capsys):
    folder, _ = finished
    before, scores = without_seconds(folder), (folder / "state" / "scores-0.jsonl").read_bytes()
    recipe.main([*QUICK, "--output", str(folder.parent), "--name", "run"])
    assert without_seconds(folder) == before and (folder / "state" / "scores-0.jsonl").read_bytes() == scores
    printed = capsys.readouterr().out
    assert "trained before" in printed and "epoch " not in printed


def test_search_on_a_folder_of_photographs(photos, tmp_path, capsys):
    options = ["--dataset", f"imagefolder:{photos}", "--batch-size", "16", "--iterations", "2"]
    folder = run(tmp_path, *options, "--budget", "params=1M,macs=60%")
    results = results_of(folder)
    assert results["val_images"] == 37 and results["test_images"] == 27
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["label_names"] == [f"class_{c}" for c in range(5)] and config["num_classes"] == 5
    history = read_jsonl(folder / "history.jsonl")
    assert all(975_000 <= r["params"] <= 1_000_000 and r["macs"] <= results["budget"]["macs"] for r in history)
    params = [p["params"] for p in results["front"]]  # what the budget names first
    assert results["objectives"] == ["params"] and params == sorted(set(params))
    rows = [line for line in (folder / "report.md").read_text().splitlines() if line.startswith("| pareto/")]
    assert [row.split(" | ")[1] for row in rows] == [format_cost("params", p) for p in params]
    assert "5 classes" in capsys.readouterr().out


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Colour JPEGs of differing sizes in 5 classes of unequal numbers; the class decides the hue."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for c, count in enumerate([30, 18, 25, 40, 22]):
        (folder / f"class_{c}").mkdir()
        for i in range(count):
            height, width = rng.integers(24, 90, 2)
            pixels = rng.normal(60 + 30 * c, 25, (height, width, 3)) * np.roll([1.0, 0.6, 0.3], c)
            image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
            image.save(folder / f"class_{c}" / f"{i}.jpg", quality=90)
    return folder


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options, message",
    [
        (["--img-size", "200"], "not a multiple of the total stride 16"),
        (["--space", "nano"], "unknown search space 'nano'; known: "),
        (["--space", "autoformer_micro", "--img-size", "20"], "image size 20x20 is not a multiple of the patch size 8"),
        (["--space", "autoformer_micro", "--token-labeling"], "which networks of --space autoformer_micro lack"),
        (
            ["--budget", "macs=10K"],
            "macs=10K is below the smallest network of the space, whose networks have macs",
        ),
        (["--budget", "macs=900M"], "macs=900M is above the largest network of the space"),
        (["--budget", "macs=1e400"], "1e400 is beyond what any network costs"),
        (["--budget", "flops=1G"], "expected name=value"),
        (["--dataset", "imagefolder:/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset", "digitz"], "unknown data set 'digitz'"),
        (["--batch-size", "66", "--num-archs", "4"], "--batch-size 66 is not a multiple of --num-archs 4"),
        (["--batch-size", "2048"], "2048 is more than the"),
        (["--prescreen", "0.001"], "leaves a part empty"),
        (["--prescreen", "0.5", "--search", "random"], "--prescreen needs --search evolution"),
        (["--search", "pareto", "--objectives", "macs,speed"], "speed"),
        (["--search", "pareto", "--objectives", "latency"], "--latency-table"),
        (["--budget", "latency=3ms"], "--latency-table"),
        (["--latency-table", "/nowhere/table.json"], "/nowhere/table.json"),
        (["--supernet", "/nowhere/supernet"], "/nowhere/supernet"),
        (["--warmup-epochs", "3"], "--warmup-epochs 3 is more than --epochs 1"),
    ],
)
def test_wrong_input_is_one_message_before_any_training(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *options)
    captured = capsys.readouterr()
    lines = [
        line for line in captured.err.splitlines() if line.startswith("search.py")
    ]  # torch may warn of the machine
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("search.py: error: ") and message in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists() and "epoch" not in captured.out


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit):
        run(tmp_path, "--dataset", f"imagefolder:{tmp_path / 'photos'}")
    assert str(tmp_path / "photos") in capsys.readouterr().err


def test_a_folder_with_other_options_is_refused(finished, capsys):
    folder, _ = finished
    with pytest.raises(SystemExit):
        recipe.main([*QUICK, "--output", str(folder.parent), "--name", "run", "--lr", "0.5"])
    assert "lr 0.002 (now 0.5)" in capsys.readouterr().err


# -- with a supernet that was trained before --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(recipe_server, finished):
    return Recipe(recipe_server, "search", [*SEARCH, "--supernet", str(finished[0] / "supernet")])


@pytest.fixture(scope="module")
def searched(runs, tmp_path_factory):
    """A search with the supernet of another run."""
    folder = tmp_path_factory.mktemp("searched") / "run"
    runs.run(folder)
    return folder


def test_a_supernet_is_searched_on_images_that_it_has_not_seen(finished, searched):
    """Its own run's: candidates, scores and order are the same as there."""
    assert parts(searched) == parts(finished[0])
    assert "training ends" not in Path(f"{searched}.log").read_text() and not (searched / "training.jsonl").exists()
    results = results_of(searched)
    assert results["leak"] is None and results["supernet"] == str(finished[0] / "supernet")
    assert without_seconds(searched) == without_seconds(finished[0])
    assert {**results["largest"]} == results_of(finished[0])["largest"]


def test_two_processes_have_the_history_of_one(runs, searched, tmp_path):
    runs.run_two(tmp_path / "two")
    assert without_seconds(tmp_path / "two") == without_seconds(searched)
    scored = [len(read_jsonl(f)) for f in sorted((tmp_path / "two" / "state").glob("scores-*.jsonl"))]
    assert len(scored) == 2 and min(scored) > 0
    assert sum(scored) == len(read_jsonl(searched / "state" / "scores-0.jsonl"))  # none twice
    results = results_of(tmp_path / "two")
    assert results["processes"] == 2
    assert without(results["baseline"]) == without(results_of(searched)["baseline"])


def test_killed_and_resumed_searches_have_the_history_of_an_unbroken_one(runs, searched, tmp_path):
    folder = tmp_path / "killed"
    scores = folder / "state" / "scores-0.jsonl"
    for count in (1, 12):
        pid = runs.start(folder)
        wait_until(lambda n=count: scores.exists() and scores.read_bytes().count(b"\n") >= n, pid, f"{folder}.log")
        runs.kill(pid)
        with scores.open("a") as f:
            f.write('{"key": "half a li')
    runs.run(folder)
    assert without_seconds(folder) == without_seconds(searched)
    assert without(results_of(folder)["baseline"]) == without(results_of(searched)["baseline"])
    scored = [r["key"] for r in read_jsonl(scores)]
    assert len(scored) == len(set(scored))


def test_a_supernet_that_changed_under_its_name(runs, finished, tmp_path):
    shutil.copytree(finished[0] / "supernet", tmp_path / "net")
    folder, given = tmp_path / "run", ["--supernet", str(tmp_path / "net")]
    pid = runs.start(folder, *given)
    wait_until((folder / "config.yaml").exists, pid, f"{folder}.log")
    runs.kill(pid)
    path = tmp_path / "net" / "model.safetensors"
    weights = load_file(path)
    weights["head.bias"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    config.get("timm_resnas", {}).pop("sha256", None)  # as if it were another supernet, not a damaged one
    (tmp_path / "net" / "config.json").write_text(json.dumps(config))
    assert runs.wait(runs.start(folder, *given)) == 2
    assert "has changed since" in Path(f"{folder}.log").read_text()


def test_pareto_search(runs, tmp_path):
    """With nothing to compare with, and a limit on what is set against accuracy."""
    options = ["--search", "pareto", "--objectives", "macs,params", "--budget", "macs=60%", "--iterations", "2"]
    folder = tmp_path / "run"
    log = runs.run(folder, *options, "--num-random", "0", "--num-any-cost", "0")
    results = results_of(folder)
    front = results["front"]
    for a in front:
        rivals = [b for b in front if b["score"] >= a["score"]]
        assert [b for b in rivals if b["macs"] <= a["macs"] and b["params"] <= a["params"]] == [a]
    assert len(list((folder / "pareto").iterdir())) == len(front)
    assert results["budget"]["lower"] == 0 and all(p["macs"] <= results["budget"]["macs"] for p in front)
    assert results["hypervolumes"] == sorted(results["hypervolumes"]) and len(results["hypervolumes"]) == 2
    assert results["random"] == [] and "hypervolume" in log
    assert "accuracy against MACs and params" in (folder / "report.md").read_text()


def test_prescreening(runs, tmp_path):
    """Continued with all candidates scored in full meanwhile, it has the same history."""
    folder = tmp_path / "run"
    options = ["--population", "30", "--parents", "1", "--mutations", "10", "--prescreen", "0.5", "--iterations", "2"]
    runs.run(folder, *options)
    results, history = results_of(folder), without_seconds(folder)
    stopped = [r for r in history if "prescreened" in r]
    assert results["prescreen"]["stopped"] == len(stopped) > 0
    assert all(r["score"] < r["at_least"] and r["prescreened"] < results["val_images"] for r in stopped)
    assert "prescreened" not in results["best"] and "Pre-screening" in (folder / "report.md").read_text()
    runs.run(folder, *options)
    assert without_seconds(folder) == history


def test_the_finer_score_of_a_supernets_search(runs, searched, tmp_path):
    """Candidates are ranked by the likelihood of the labels; tables still show correct answers."""
    runs.run(tmp_path / "run", "--score", "likelihood")
    history, counted = without_seconds(tmp_path / "run"), {r["key"]: r["score"] for r in without_seconds(searched)}
    assert all(r["score"] < 0 for r in history)
    assert (
        all(r["correct"] == counted[r["key"]] for r in history if r["key"] in counted) and history[0]["key"] in counted
    )
    assert len({r["score"] for r in history}) == len(history)
    results = results_of(tmp_path / "run")
    best = min(history, key=rank_key)
    assert results["best"]["key"] == best["key"] and results["best"]["score"] == best["correct"]
    shown = f"| {best['correct'] / results['val_images']:.4f} "
    assert shown in (tmp_path / "run" / "report.md").read_text()
