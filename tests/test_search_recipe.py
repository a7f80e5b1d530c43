"""The main job, run as a user runs it, with sizes that take seconds."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import search
import train
import yaml
from nursery import Nursery
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_resnas import Arch
from timm_resnas.arch import Block
from timm_resnas.nas.evolution import rank_key
from timm_resnas.nas.jsonl import read_jsonl
from timm_resnas.nas.space import SearchSpace

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    *("--cpu", "--threads", "1", "--epochs", "1", "--eval-every", "1", "--warmup-epochs", "0", "--population", "6"),
    *("--arch-warmup-epochs", "0", "--iterations", "3", "--parents", "4", "--mutations", "2", "--crossovers", "2"),
    *("--num-random", "3", "--num-spread", "3"),
]


def run(tmp_path, *options, name="run"):
    search.main([*QUICK, "--output", str(tmp_path), "--name", name, *options])
    return tmp_path / name


def without_seconds(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(folder / "history.jsonl")]


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
    for name in ("pareto.png", "progress.png"):
        with Image.open(folder / name) as image:
            assert image.size[0] > 500
    history = read_jsonl(folder / "history.jsonl")
    results = json.loads((folder / "results.json").read_text())
    assert [r["generation"] for r in history] == [0] * 6 + [1] * 4 + [2] * 4
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
    assert "generation candidates" in printed


def test_search_validation_is_cut_from_training_images_only(finished):
    data = json.loads((finished[0] / "state" / "data.json").read_text())
    train, val = data
    assert len(train) + len(val) == 1437 and not set(train) & set(val)
    assert json.loads((finished[0] / "results.json").read_text())["val_images"] == len(val)


def test_best_reproduces_its_test_accuracy_with_plain_timm(finished):
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
assert model.pretrained_cfg['label_names' if 'label_names' in model.pretrained_cfg else 'num_classes']
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    results = json.loads((folder / "results.json").read_text())
    assert int(done.stdout) == results["best"]["test"]
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["architecture"] == "vit_resnas" and config["label_names"] == [str(i) for i in range(10)]
    assert config["timm_resnas"]["macs"] == results["best"]["macs"]


def test_every_point_of_the_front_loads(finished):
    import timm

    folder, _ = finished
    results = json.loads((folder / "results.json").read_text())
    for k, point in enumerate(results["front"], start=1):
        model = timm.create_model(f"local-dir:{folder}/pareto/{k}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == point["params"]


def test_same_seed_same_history_other_seed_other_history(finished, tmp_path):
    assert without_seconds(run(tmp_path)) == without_seconds(finished[0])
    assert without_seconds(run(tmp_path, "--seed", "1", name="other")) != without_seconds(finished[0])


def test_running_again_computes_nothing_anew(finished, monkeypatch, capsys):
    folder, _ = finished
    before = without_seconds(folder)
    monkeypatch.setattr("timm_resnas.nas.evaluate.Evaluator._count", forbid_search_scores(folder))
    search.main([*QUICK, "--output", str(folder.parent), "--name", "run"])
    assert without_seconds(folder) == before
    assert "trained before" in capsys.readouterr().out


def forbid_search_scores(folder):
    """Scoring test images is allowed (they are not cached), candidates' scores are not."""
    from timm_resnas.nas.evaluate import Evaluator

    original = Evaluator._count

    def count(self, archs, at_least):
        assert self._file is None, "a candidate was scored again"
        return original(self, archs, at_least)

    return count


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


def test_search_on_a_folder_of_photographs(photos, tmp_path, capsys):
    folder = run(tmp_path, "--dataset", f"imagefolder:{photos}", "--batch-size", "16", "--budget", "macs=12M,params=1M")
    results = json.loads((folder / "results.json").read_text())
    assert results["val_images"] == 37 and results["test_images"] == 27
    config = json.loads((folder / "best" / "config.json").read_text())
    assert config["label_names"] == [f"class_{c}" for c in range(5)] and config["num_classes"] == 5
    assert all(r["params"] <= 1_000_000 for r in read_jsonl(folder / "history.jsonl"))
    assert "5 classes" in capsys.readouterr().out


def test_config_file_sets_defaults_and_flags_override(tmp_path):
    config = tmp_path / "quick.yaml"
    config.write_text("population: 5\nmutation-prob: 0.5\ncpu: true\n")
    parser = search.make_parser()
    args = search.parse(parser, ["--config", str(config), "--population", "7"])
    assert (args.population, args.mutation_prob, args.cpu) == (7, 0.5, True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("populaton: 5", "unknown options: populaton"),
        ("population: many", "population: 'many' cannot be read"),
        ("cpu: 3", "cpu must be true or false"),
        ("amp: int3", "amp must be one of no, bf16, fp16"),
        ("- 3", "must hold 'option: value' lines"),
        ("a: [", "is not YAML"),
    ],
)
def test_bad_config_files(text, message, tmp_path, capsys):
    config = tmp_path / "bad.yaml"
    config.write_text(text)
    with pytest.raises(SystemExit) as stopped:
        search.main(["--config", str(config)])
    assert stopped.value.code == 2 and message in capsys.readouterr().err


def test_resolved_configuration_is_saved(finished):
    saved = yaml.safe_load((finished[0] / "config.yaml").read_text())
    assert saved["population"] == 6 and saved["space"] == "micro" and saved["lr"] > 0


@pytest.mark.parametrize(
    "options, message",
    [
        (["--img-size", "200"], "not a multiple of the total stride 16"),
        (["--space", "nano"], "unknown search space 'nano'; known: vit_resnas_tiny"),
        (["--budget", "macs=1M"], "budget"),
        (["--budget", "macs=900M"], "budget"),
        (["--budget", "flops=1G"], "expected name=value"),
        (["--dataset", "imagefolder:/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset", "digitz"], "unknown data set 'digitz'"),
        (["--batch-size", "66"], "multiple"),
        (["--batch-size", "2048"], "training images"),
        (["--num-archs", "0"], "--num-archs must be at least 1"),
        (["--population", "0"], "population"),
        (["--mutation-prob", "7"], "mutation_prob"),
        (["--first-look", "1"], "--first-look must be at least 0 and below 1"),
        (["--first-look", "0.001"], "leaves a part empty"),
        (["--first-look", "0.5", "--search", "random"], "--first-look needs --search evolution"),
        (["--search", "pareto", "--objectives", "macs,speed"], "speed"),
        (["--search", "pareto", "--objectives", "latency"], "--latency-table"),
        (["--budget", "latency=3ms"], "--latency-table"),
        (["--latency-table", "/nowhere/table.json"], "/nowhere/table.json"),
        (["--supernet", "/nowhere/supernet"], "/nowhere/supernet"),
    ],
)
def test_wrong_input_is_one_message_before_any_training(options, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run(tmp_path, *options)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip()]
    assert stopped.value.code == 2
    assert len(lines) == 1 and lines[0].startswith("search.py: error: ") and message in lines[0]
    assert not (tmp_path / "run" / "training.jsonl").exists() and "epoch" not in captured.out


def test_empty_folder(tmp_path, capsys):
    (tmp_path / "photos").mkdir()
    with pytest.raises(SystemExit):
        run(tmp_path, "--dataset", f"imagefolder:{tmp_path / 'photos'}")
    assert str(tmp_path / "photos") in capsys.readouterr().err


def test_a_folder_with_other_options_is_refused(finished, capsys):
    folder, _ = finished
    with pytest.raises(SystemExit):
        search.main([*QUICK, "--output", str(folder.parent), "--name", "run", "--lr", "0.5"])
    assert "lr 0.002 (now 0.5)" in capsys.readouterr().err


def test_max_minutes_ends_in_good_order(tmp_path, capsys):
    folder = run(tmp_path, "--max-minutes", "0.001")
    assert {r["generation"] for r in read_jsonl(folder / "history.jsonl")} == {0}
    assert "ended after 1 of 3 generations" in (folder / "report.md").read_text()
    assert (folder / "best" / "model.safetensors").exists()


# -- a supernet from elsewhere ----------------------------------------------------------------------------------------


SEARCH = [*QUICK[:3], *QUICK[QUICK.index("--iterations") :], "--population", "12"]


@pytest.fixture(scope="module")
def nursery(finished):
    made = Nursery("search", [*SEARCH, "--supernet", str(finished[0] / "supernet")])
    yield made
    made.close()


@pytest.fixture(scope="module")
def adopted(nursery, tmp_path_factory):
    """A search with the supernet of another run."""
    folder = tmp_path_factory.mktemp("adopted") / "run"
    nursery.run(folder)
    return folder


def test_a_supernet_is_searched_on_images_that_it_has_not_seen(finished, adopted):
    before, after = (json.loads((f / "state" / "data.json").read_text()) for f in (finished[0], adopted))
    assert after == [*before, None]
    assert "epoch" not in Path(f"{adopted}.log").read_text() and not (adopted / "training.jsonl").exists()
    results = json.loads((adopted / "results.json").read_text())
    assert results["leak"] is None and results["supernet"] == str(finished[0] / "supernet")
    assert results["largest"]["score"] == json.loads((finished[0] / "results.json").read_text())["largest"]["score"]
    with Image.open(adopted / "choices.png") as image:
        assert image.size[0] > 500


def test_two_processes_have_the_history_of_one(nursery, adopted, tmp_path):
    nursery.run_two(tmp_path / "two")
    assert without_seconds(tmp_path / "two") == without_seconds(adopted)
    scored = [len(read_jsonl(f)) for f in sorted((tmp_path / "two" / "state").glob("scores-*.jsonl"))]
    assert len(scored) == 2 and min(scored) > 0
    assert sum(scored) == len(read_jsonl(adopted / "state" / "scores-0.jsonl"))  # none twice
    assert json.loads((tmp_path / "two" / "results.json").read_text())["processes"] == 2


def test_killed_and_resumed_searches_have_the_history_of_an_unbroken_one(nursery, adopted, tmp_path):
    folder = tmp_path / "killed"
    scores = folder / "state" / "scores-0.jsonl"
    for count in (1, 9, 15):
        pid = nursery.start(folder)
        while not (scores.exists() and scores.read_bytes().count(b"\n") >= count):
            os.kill(pid, 0)  # it runs
            time.sleep(0.001)
        os.kill(pid, signal.SIGKILL)
        nursery.wait(pid)
        with scores.open("a") as f:
            f.write('{"key": "half a li')
    nursery.run(folder)
    assert without_seconds(folder) == without_seconds(adopted)
    scored = [r["key"] for r in read_jsonl(scores)]
    assert len(scored) == len(set(scored))


def test_images_that_the_supernet_was_trained_on_are_refused(finished, tmp_path, capsys):
    options = [*SEARCH, "--supernet", str(finished[0] / "supernet"), "--output", str(tmp_path)]
    more = [*options, "--val-per-class", "100", "--val-fraction", "0.9"]
    with pytest.raises(SystemExit):
        search.main([*more, "--name", "refused"])
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and "were trained on by" in lines[0] and "--allow-leak" in lines[0]
    search.main([*more, "--name", "allowed", "--allow-leak"])
    said = "images that candidates are scored on were trained on"
    assert said in capsys.readouterr().out
    report = (tmp_path / "allowed" / "report.md").read_text()
    assert "**Leak:**" in report and said in report and "that were not trained on" not in report


def test_a_leak_is_found_by_content_in_other_files(finished, tmp_path, capsys):
    """The training images of digits as PNG files in folders: no index tells, only their pixels do."""
    from timm_resnas.data import load_splits

    splits, (train, val) = load_splits("digits"), json.loads((finished[0] / "state" / "data.json").read_text())
    for part, indices in (("train", train[:200] + val[:150]), ("test", [])):
        source = splits.train if part == "train" else splits.test
        for i in indices or range(60):
            item = source[i]
            folder = tmp_path / "png" / part / str(item["label"])
            folder.mkdir(parents=True, exist_ok=True)
            item["image"].save(folder / f"{i}.png")
    options = [*SEARCH, "--supernet", str(finished[0] / "supernet"), "--output", str(tmp_path)]
    options += ["--dataset", f"imagefolder:{tmp_path / 'png'}", "--val-per-class", "5"]
    search.main([*options, "--name", "unseen"])
    assert json.loads((tmp_path / "unseen" / "results.json").read_text())["leak"] is None
    data = json.loads((tmp_path / "unseen" / "state" / "data.json").read_text())
    from timm_resnas.data import content_hashes

    hashes = set(content_hashes(splits.train, train))
    assert not hashes & set(content_hashes(load_splits(f"imagefolder:{tmp_path / 'png'}").train, data[1]))
    capsys.readouterr()
    with pytest.raises(SystemExit):
        search.main([*options, "--name", "seen", "--val-fraction", "0.9", "--val-per-class", "30"])
    assert "200 of the 350 images" in capsys.readouterr().err


def test_a_supernet_that_does_not_say_what_it_saw(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "supernet", tmp_path / "silent")
    (tmp_path / "silent" / "training_data.json").unlink()
    search.main([*SEARCH, "--supernet", str(tmp_path / "silent"), "--output", str(tmp_path), "--name", "run"])
    assert "cannot be ruled out" in (tmp_path / "run" / "report.md").read_text()


def test_a_space_within_the_supernet(finished, tmp_path):
    """A file with fewer choices than the supernet's own space."""
    space = SearchSpace.preset("micro").to_dict()
    for entry, kept in zip(space["network_def"], space["num_channels_to_keep"], strict=True):
        if isinstance(kept, dict):
            kept["mlp"] = [entry[2][1]]
    (tmp_path / "wide.json").write_text(json.dumps(space))
    options = ["--space", str(tmp_path / "wide.json"), "--output", str(tmp_path), "--name", "run"]
    search.main([*SEARCH, "--supernet", str(finished[0] / "supernet"), "--budget", "macs=60%", *options])
    widest = {b.mlp_hidden for b in Arch.from_network_def(space["network_def"]).blocks if isinstance(b, Block)}
    for record in read_jsonl(tmp_path / "run" / "history.jsonl"):
        present = [b for b in Arch.from_network_def(record["network_def"]).blocks if isinstance(b, Block) and b.exists]
        assert {b.mlp_hidden for b in present} <= widest


@pytest.mark.parametrize(
    "options, message",
    [
        (["--space", "mini"], "fit"),
        (["--img-size", "48"], "is not that of the supernet"),
        (["--dataset", "photos"], "has 5 classes, the supernet 10"),
    ],
)
def test_what_does_not_fit_the_supernet(finished, photos, options, message, tmp_path, capsys):
    options = [f"imagefolder:{photos}" if o == "photos" else o for o in options]
    with pytest.raises(SystemExit):
        search.main([*SEARCH, "--supernet", str(finished[0] / "supernet"), "--output", str(tmp_path), *options])
    assert message in capsys.readouterr().err


def test_training_on_from_the_result_validates_on_what_its_weights_have_not_seen(finished, tmp_path):
    folder, _ = finished
    options = ["--cpu", "--threads", "1", "--model", str(folder), "--pretrained", "--epochs", "1", "--lr", "1e-5"]
    train.main([*options, "--batch-size", "128", "--seed", "7", "--output", str(tmp_path), "--name", "run"])
    seen, unseen = json.loads((folder / "state" / "data.json").read_text())
    trained, val = json.loads((tmp_path / "run" / "state" / "data.json").read_text())
    assert len(val) == 250 and set(val) <= set(unseen) and set(seen) <= set(trained)


def test_a_plain_network_is_no_supernet(finished, tmp_path, capsys):
    with pytest.raises(SystemExit):
        search.main([*SEARCH, "--supernet", str(finished[0] / "best"), "--output", str(tmp_path)])
    assert "expected a supernet" in capsys.readouterr().err


# -- other searches ---------------------------------------------------------------------------------------------------


def test_first_looks(finished, tmp_path):
    supernet = ["--supernet", str(finished[0] / "supernet"), "--output", str(tmp_path)]
    more = ["--population", "30", "--iterations", "3", "--parents", "1", "--mutations", "10"]
    search.main([*SEARCH, *supernet, *more, "--first-look", "0.5", "--name", "look"])
    results = json.loads((tmp_path / "look" / "results.json").read_text())
    history = read_jsonl(tmp_path / "look" / "history.jsonl")
    ended = [r for r in history if "looked" in r]
    assert results["first_look"]["ended"] == len(ended) > 0
    assert all(r["score"] < r["at_least"] and r["looked"] < results["val_images"] for r in ended)
    assert "looked" not in results["best"] and "First looks ended" in (tmp_path / "look" / "report.md").read_text()
    before = without_seconds(tmp_path / "look")
    search.main([*SEARCH, *supernet, *more, "--first-look", "0.5", "--name", "look"])  # scored in full meanwhile
    assert without_seconds(tmp_path / "look") == before


def test_pareto_search(finished, tmp_path):
    options = ["--search", "pareto", "--objectives", "macs,params", "--output", str(tmp_path), "--name", "run"]
    search.main([*SEARCH, "--supernet", str(finished[0] / "supernet"), *options])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    front = results["front"]
    for a in front:
        rivals = [b for b in front if b["score"] >= a["score"]]
        assert [b for b in rivals if b["macs"] <= a["macs"] and b["params"] <= a["params"]] == [a]
    assert len(list((tmp_path / "run" / "pareto").iterdir())) == len(front)
    assert results["hypervolumes"] == sorted(results["hypervolumes"]) and len(results["hypervolumes"]) == 3
    assert "accuracy against MACs and params" in (tmp_path / "run" / "report.md").read_text()


def test_nothing_to_compare_with(finished, tmp_path):
    """One generation, no yardsticks, a budget for a front."""
    options = ["--num-random", "0", "--num-spread", "0", "--iterations", "1", "--output", str(tmp_path)]
    options = [*SEARCH, "--supernet", str(finished[0] / "supernet"), *options]
    for name, kind in (("evolution", []), ("front", ["--search", "pareto", "--budget", "macs=30%"])):
        search.main([*options, *kind, "--name", name])
        results = json.loads((tmp_path / name / "results.json").read_text())
        assert results["random"] == [] and results["candidates"] == 12
    limit = results["budget"]["macs"]
    assert results["budget"]["lower"] == 0 and all(p["macs"] <= limit for p in results["front"])


def test_another_supernet_under_the_same_name(finished, tmp_path, capsys):
    shutil.copytree(finished[0] / "supernet", tmp_path / "net")
    options = [*SEARCH, "--supernet", str(tmp_path / "net"), "--output", str(tmp_path), "--name", "run"]
    search.main([*options, "--iterations", "1"])
    path = tmp_path / "net" / "model.safetensors"
    weights = load_file(path)
    weights["head.bias"] += 1
    save_file(weights, path, metadata={"format": "pt"})
    with pytest.raises(SystemExit):
        search.main([*options, "--iterations", "1"])
    assert "has changed since" in capsys.readouterr().err


def test_random_search_without_a_budget(finished, tmp_path):
    options = ["--search", "random", "--budget", "none", "--output", str(tmp_path), "--name", "run"]
    search.main([*SEARCH, "--supernet", str(finished[0] / "supernet"), *options])
    macs = [r["macs"] for r in read_jsonl(tmp_path / "run" / "history.jsonl")]
    assert max(macs) > 1.2 * min(macs) and "Budget: none" in (tmp_path / "run" / "report.md").read_text()
