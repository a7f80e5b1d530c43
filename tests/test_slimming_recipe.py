"""search.py --search slimming: a chain of networks down to the budget, whatever interrupts it."""

import json
import types
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from recipe_server import Recipe, wait_until

import timm_resnas
from recipes import report as report_recipe
from recipes import search as recipe
from recipes.search import resolve
from timm_resnas.arch import Arch
from timm_resnas.engine import search as job
from timm_resnas.engine.options import parse
from timm_resnas.engine.run import Deadline, Run
from timm_resnas.engine.settings import SearchOptions
from timm_resnas.nas.evaluate import Evaluator
from timm_resnas.nas.evolution import rank_key
from timm_resnas.nas.jsonl import read_jsonl
from timm_resnas.nas.space import SearchSpace

NANO = Path(__file__).with_name("nano.json")
SPACE = SearchSpace.from_dict(json.loads(NANO.read_text()))  # of 16 px
QUICK = [
    *("--cpu", "--threads", "1", "--search", "slimming", "--budget", "macs=70%", "--slim-step", "0.1"),
    *("--together", "2", "--num-random", "2", "--num-any-cost", "2", "--val-per-class", "6"),
]
SHRINK = [
    *("--cpu", "--threads", "1", "--search", "slimming", "--budget", "macs=80%", "--slim-step", "0.1"),
    *("--num-random", "2", "--calibration", "64", "--epochs", "0", "--finetune-epochs", "0"),
]


def without_seconds(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(folder / "history.jsonl")]


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def runs(recipe_server, tmp_path_factory):
    """Runs in an untrained supernet."""
    torch.manual_seed(0)
    net = timm.create_model(SPACE.supernet, space=SPACE.to_dict())
    folder = tmp_path_factory.mktemp("net") / "supernet"
    timm_resnas.save_pretrained(net, folder, label_names=[str(i) for i in range(10)], golden=False)
    return Recipe(recipe_server, "search", [*QUICK, "--supernet", str(folder)])


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return folder, runs.run(folder)


def test_the_chain_is_written_as_networks_that_timm_loads(finished):
    folder, log = finished
    results, history = results_of(folder), without_seconds(folder)
    front, limit = results["front"], results["budget"]["macs"]
    macs = [p["macs"] for p in front]
    assert macs == sorted(macs) and macs[0] <= limit < macs[1] and results["budget"]["lower"] == 0
    assert front[-1]["key"] == SPACE.largest.key() == history[0]["key"] and history[0]["origin"] == "start"
    visited = [r["key"] for r in history if r["origin"] in ("start", "step")]
    chain = [p["key"] for p in reversed(front)]  # a step of a single action was scored as such
    assert [key for key in chain if key in visited] == visited and len(visited) > 2
    assert set(chain) - set(visited) <= {r["key"] for r in history if r["origin"] == "action"}
    # the search again, by the scores on record
    options = resolve(parse(SearchOptions, QUICK))
    again = job.make_search(options, SPACE, job.make_budget(options, SPACE), results["val_images"])
    recorded = {r["key"]: r["score"] for r in history}
    while not again.done:
        again.tell([(arch, recorded[arch.key()]) for arch in again.ask()])
    assert [r["key"] for r in again.chain()] == chain
    assert sorted(p.name for p in (folder / "pareto").iterdir()) == sorted(str(k + 1) for k in range(len(front)))
    scores = {r["key"]: r["score"] for r in history}
    for k, point in enumerate(front, start=1):
        model = timm.create_model(f"local-dir:{folder}/pareto/{k}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == point["params"]
        info = json.loads((folder / "pareto" / str(k) / "config.json").read_text())["timm_resnas"]
        assert info["search_val"]["correct"] == scores[point["key"]] == point["score"]
    best = min((r for r in history if r["macs"] <= limit), key=rank_key)
    assert results["best"]["key"] == best["key"]
    assert all(0.975 * limit <= r["macs"] <= limit for r in results["random"])  # as dear as what was found
    assert "share of largest" in log and "score about" in log


def test_the_report_shows_the_chain(finished, monkeypatch, capsys):
    from timm_resnas.engine import plots

    folder, _ = finished
    text = (folder / "report.md").read_text()
    assert "## The chain: accuracy against MACs" in text and "Front of" not in text
    assert text.count("| pareto/") == len(results_of(folder)["front"])
    drawn, save = {}, plots.save
    monkeypatch.setattr(plots, "save", lambda figure, path: (save(figure, path), drawn.update({path.name: figure})))
    report_recipe.main([str(folder)])
    with Image.open(folder / "pareto.png") as image:
        assert image.size[0] > 500
    axes = drawn["pareto.png"].axes[0]
    labels = {c.get_label(): c for c in axes.collections} | {line.get_label(): line for line in axes.lines}
    front, history = results_of(folder)["front"], read_jsonl(folder / "history.jsonl")
    assert len(labels["rejected"].get_offsets()) == len(history) - len(front)
    x, y = labels["chain"].get_data()
    assert x.tolist() == pytest.approx([p["macs"] / 1e6 for p in front])
    assert (y * results_of(folder)["val_images"]).tolist() == pytest.approx([p["score"] for p in front])


def test_killed_and_on_two_processes_it_is_the_same_chain(runs, finished, tmp_path):
    folder, scores = tmp_path / "killed", tmp_path / "killed" / "state" / "scores-0.jsonl"
    pid = runs.start(folder)
    wait_until(lambda: scores.exists() and scores.read_bytes().count(b"\n") >= 20, pid, f"{folder}.log")
    runs.kill(pid)
    runs.run(folder)
    runs.run_two(tmp_path / "two")
    for other in (folder, tmp_path / "two"):
        assert without_seconds(other) == without_seconds(finished[0])
        assert results_of(other)["front"] == results_of(finished[0])["front"]
    keys = [r["key"] for r in read_jsonl(scores)]
    assert len(keys) == len(set(keys))


def test_ended_early_it_keeps_what_it_has_reached(tmp_path):
    """Above the budget: the last network of the chain stands for the best."""
    alone = types.SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
    argv = [*QUICK, "--max-minutes", "0.001", "--budget", "macs=40%", "--output", str(tmp_path), "--name", "run"]
    options = resolve(parse(SearchOptions, argv))
    run = Run(options, alone, "")
    run.begin()
    search = job.make_search(options, SPACE, job.make_budget(options, SPACE), 64)
    x, y = torch.randn(8, 3, 16, 16), torch.zeros(8, dtype=torch.long)
    net = timm.create_model(SPACE.supernet, space=SPACE.to_dict())
    ended = job.run_search(options, search, Evaluator(net, [(x, y)]), run, Deadline(1e-9), 8)
    assert ended == "--max-minutes 0.001: ended after 1 steps" and search.best is None
    best, _ = job.choose(search, None, run)
    assert best == search.chain()[-1] and best["macs"] > search.budget.limits["macs"]


def test_without_training(tmp_path):
    recipe.main(
        [
            *("--cpu", "--threads", "1", "--search", "slimming", "--budget", "params=80%", "--slim-step", "0.1"),
            *("--score", "params", "--img-size", "16", "--num-random", "2", "--output", str(tmp_path), "--name", "run"),
        ]
    )
    results = results_of(tmp_path / "run")
    params = [p["params"] for p in results["front"]]
    assert params == sorted(params) and params[0] <= results["budget"]["params"] < params[1]
    assert len(list((tmp_path / "run" / "pareto").iterdir())) == len(params)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small ViT with the digits' classes, as it was initialised."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    folder = tmp_path_factory.mktemp("base") / "best"
    config = {"input_size": [3, 32, 32]}
    return timm_resnas.save_pretrained(model, folder, label_names=list(map(str, range(10))), data_config=config)


def test_a_pretrained_model_is_slimmed(recipe_server, base, tmp_path):
    folder = tmp_path / "run"
    log = Recipe(recipe_server, "search", [*SHRINK, "--model", str(base)]).run(folder)
    results, history = results_of(folder), without_seconds(folder)
    assert "to start from" not in log and history[0]["origin"] == "start"
    front, limit = results["front"], results["budget"]["macs"]
    assert front[0]["macs"] <= limit < front[1]["macs"]
    assert front[-1]["macs"] == max(r["macs"] for r in history) == results["networks"]["full model"]["macs"]
    correct = {r["key"]: r["correct"] for r in history}
    assert all(p["score"] == correct[p["key"]] for p in front)
    for k, point in enumerate(front, start=1):
        model = timm.create_model(f"local-dir:{folder}/pareto/{k}", pretrained=True)
        assert sum(p.numel() for p in model.parameters()) == point["params"]
    assert Arch.from_record(results["best"]).base == "test_vit" and results["best"]["macs"] <= limit
    text = (folder / "report.md").read_text()
    assert "## The chain: accuracy against MACs" in text and text.count("| pareto/") == len(front)
    with Image.open(folder / "pareto.png") as image:
        assert image.size[0] > 500


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--population", "9"], "--population is of --search evolution; it does not go with"),
        (["--mutations", "9"], "--mutations is of --search evolution"),
        (["--search", "evolution"], "--slim-step is of --search slimming; it does not go with --search evolution"),
        (["--gain", "mes"], "--gain mes needs --latency-table FILE"),
        (["--gain", "latency"], "--gain latency needs --latency-table FILE"),
        (["--budget", "macs=101%"], "above the largest network of the space"),
        (["--prescreen", "0.5"], "--prescreen needs --search evolution"),
    ],
)
def test_wrong_input_is_one_message_before_any_work(given, message, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*QUICK, "--img-size", "16", *given, "--output", str(tmp_path), "--name", "run"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search.py")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists()
