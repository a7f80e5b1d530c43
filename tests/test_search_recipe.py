"""The main job, run as a user runs it, with sizes that take seconds."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import search
import yaml
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from timm_resnas.nas.evolution import rank_key
from timm_resnas.nas.jsonl import read_jsonl

ROOT = Path(__file__).resolve().parents[1]
QUICK = [
    *("--cpu", "--threads", "1", "--epochs", "1", "--eval-every", "1", "--warmup-epochs", "0", "--population", "6"),
    *("--arch-warmup-epochs", "0", "--iterations", "3", "--parents", "4", "--mutations", "2", "--crossovers", "2"),
    *("--num-random", "3", "--num-spread", "3"),
]


@pytest.fixture(autouse=True)
def fresh_accelerate():
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()


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

    def count(self, arch):
        assert self._file is None, "a candidate was scored again"
        return original(self, arch)

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
        (["--budget", "latency=3ms"], "latency"),
        (["--dataset", "imagefolder:/nowhere/at/all"], "/nowhere/at/all"),
        (["--dataset", "digitz"], "unknown data set 'digitz'"),
        (["--batch-size", "66"], "multiple"),
        (["--batch-size", "2048"], "training images"),
        (["--num-archs", "0"], "--num-archs must be at least 1"),
        (["--population", "0"], "population"),
        (["--mutation-prob", "7"], "mutation_prob"),
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
