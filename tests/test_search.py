"""The parts of a search, on scores that are made up: no supernet is trained."""

import json
import types

import numpy as np
import plain_vit  # noqa: F401 - another family's space
import pytest
import timm
import torch
from PIL import Image

from recipes.search import resolve
from timm_resnas.data import content_hashes, load_splits, training_record
from timm_resnas.engine import plots
from timm_resnas.engine import search as job
from timm_resnas.engine.options import parse
from timm_resnas.engine.report import report
from timm_resnas.engine.run import Deadline, Run, RunError
from timm_resnas.engine.settings import SearchOptions
from timm_resnas.engine.supernet import SearchData
from timm_resnas.hub import save_pretrained
from timm_resnas.nas.cost import Budget
from timm_resnas.nas.jsonl import read_jsonl, write_jsonl
from timm_resnas.nas.space import BudgetError, SearchSpace

MICRO = SearchSpace.preset("micro", img_size=16)
IMAGES = 400
ALONE = types.SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)
SMALL = ["--population", "12", "--iterations", "3", "--parents", "4", "--mutations", "3", "--crossovers", "3"]


class Scores:
    """In an evaluator's place: a larger network has a higher score, with some disorder."""

    world, rank = 1, 0

    def __init__(self, stops=False):
        self.stops, self.asked, self.stopped = stops, [], set()

    def true(self, arch):
        share = MICRO.costs(arch)["params"] / MICRO.costs(MICRO.largest)["params"]
        return int(250 * share) + sum(arch.key().encode()) % 100

    def score(self, archs, report=None, at_least=None):
        self.asked.append(len(archs))
        scores = [self.true(a) for a in archs]
        if at_least is None or not self.stops:
            return scores
        self.stopped |= {a.key() for a, s in zip(archs, scores, strict=True) if s < at_least}
        return scores

    def record(self, arch, prescreened=False):
        stopped = prescreened and arch.key() in self.stopped
        return {"seconds": 0.5, **({"prescreened": IMAGES // 2} if stopped else {})}


def searched(tmp_path, *given, minutes=None, evaluator=None):
    options = resolve(parse(SearchOptions, [*SMALL, *given, "--output", str(tmp_path), "--name", "run"]))
    run = Run(options, ALONE, "")
    run.begin()
    search = job.make_search(options, MICRO, job.make_budget(options, MICRO), IMAGES)
    evaluator = evaluator or Scores()
    ended = job.run_search(options, search, evaluator, run, Deadline(minutes), IMAGES)
    assert read_jsonl(run / "history.jsonl") == search.history
    return run, search, ended


def test_a_search_runs_to_its_end(tmp_path, capsys):
    _, search, ended = searched(tmp_path)
    assert ended is None and search.done
    assert [r["generation"] for r in search.history] == [0] * 12 + [1] * 6 + [2] * 6
    assert all(r["seconds"] == 0.5 and {"model", "args"} <= r.keys() for r in search.history)
    limit = int(0.2 * MICRO.costs(MICRO.largest)["macs"])
    assert all(0.975 * limit <= r["macs"] <= limit for r in search.history)
    header, *lines = capsys.readouterr().out.strip().splitlines()
    assert header.split() == ["generation", "candidates", "best", *"mean of parents MACs seconds ends in".split()]
    assert [line.split()[:2] for line in lines] == [["1", "12"], ["2", "18"], ["3", "24"]]
    top = sorted((r["score"] for r in search.history), reverse=True)
    assert [float(v) for v in lines[-1].split()[2:4]] == pytest.approx([top[0] / 400, np.mean(top[:4]) / 400], abs=1e-4)


def test_the_seed_decides_the_history(tmp_path):
    first, again, other = (searched(tmp_path / name, "--seed", seed)[1] for name, seed in ("a0", "b0", "c1"))
    assert first.history == again.history != other.history


def test_max_minutes_ends_after_a_whole_generation(tmp_path):
    run, search, ended = searched(tmp_path, "--max-minutes", "0.001", minutes=1e-9)
    assert ended == "--max-minutes 0.001: ended after 1 of 3 generations"
    assert {r["generation"] for r in search.history} == {0}


def test_random_search_without_a_budget(tmp_path):
    _, search, _ = searched(tmp_path, "--search", "random", "--budget", "none")
    macs = [r["macs"] for r in search.history]
    assert search.budget is None and max(macs) > 1.2 * min(macs)


def test_a_front_has_no_lower_band(tmp_path, capsys):
    _, search, _ = searched(tmp_path, "--search", "pareto", "--objectives", "macs, params", "--budget", "macs=60%")
    assert search.objectives == ("macs", "params") and search.budget.lower == 0
    assert all(p["macs"] <= search.budget.limits["macs"] for p in search.front())
    assert search.hypervolumes == sorted(search.hypervolumes) and len(search.hypervolumes) == 3
    lines = capsys.readouterr().out.strip().splitlines()
    assert "hypervolume" in lines[0] and float(lines[-1].split()[3]) == pytest.approx(search.hypervolumes[-1], abs=1e-4)


def test_budgets(tmp_path):
    def budget(text):
        return job.make_budget(resolve(parse(SearchOptions, ["--budget", text])), MICRO)

    assert budget("none") is None
    assert dict(budget("macs=40%,params=1M")) == {"macs": int(0.4 * 8351680), "params": 1_000_000}
    with pytest.raises(RunError, match="latency=3ms needs --latency-table FILE"):
        budget("latency=3ms")
    with pytest.raises(BudgetError, match=r"macs=1M is below the smallest .* from 1\.1124M to 8\.3517M"):
        searched(tmp_path, "--budget", "macs=1M")


def test_prescreened_candidates(tmp_path):
    """Stopped below what the parents have; never the best, nor on the front; how many were stopped wrongly."""
    evaluator = Scores(stops=True)
    run, search, _ = searched(tmp_path, "--prescreen", "0.5", evaluator=evaluator)
    stopped = [r for r in search.history if "prescreened" in r]
    assert 0 < len(stopped) < 12 and all(r["generation"] > 0 and r["score"] < r["at_least"] for r in stopped)
    best, measured = job.choose(search, None, run)
    assert measured == [] and best["key"] == search.best["key"] and "prescreened" not in best
    evaluator.true = lambda arch: 400  # as if all of them had been underrated
    effect = job.prescreen_effect(search.history, evaluator, IMAGES)
    share = len(stopped) * 200 / (400 * len(search.history))
    assert effect == {
        **{"stopped": len(stopped), "rechecked": len(stopped), "would_be_parents": len(stopped)},
        "images_saved": pytest.approx(share),
    }
    assert job.prescreen_effect([r for r in search.history if r not in stopped], evaluator, IMAGES) is None


def test_the_best_under_a_latency_budget_is_measured(tmp_path, monkeypatch, capsys):
    """The first of the ranking that keeps the limit end to end; where none does, the fastest."""
    run, search, _ = searched(tmp_path, "--budget", "none")
    records = sorted(search.history, key=lambda r: (-r["score"], r["macs"], r["key"]))
    for record in search.history:
        record["latency_ms"] = 2.0 if record is not records[0] else 9.0
    search = types.SimpleNamespace(history=search.history, budget={"latency_ms": 3.0}.items(), space=MICRO)
    times = iter([3.5, 3.2, 2.9])
    monkeypatch.setattr(job, "measure_network", lambda arch, space, table: {"ms": next(times)})
    best, measured = job.choose(search, "table", run)
    assert best is records[3]  # the first is predicted above the limit, the next two are measured above it
    assert [(m["key"], m["ms"]) for m in measured] == [
        (records[k]["key"], t) for k, t in ((1, 3.5), (2, 3.2), (3, 2.9))
    ]
    times = iter([5.0 - 0.1 * (k == 4) for k in range(20)])
    best, measured = job.choose(search, "table", run)
    assert best is records[5] and len(measured) == 10
    assert "none of the 10 best networks keeps the limit" in capsys.readouterr().out


def test_the_front_of_records():
    points = [(5, 10), (3, 10), (9, 40), (3, 4), (7, 39), (1, 2), (9, 41)]
    records = [{"macs": m, "params": -m, "score": s, "key": str(i)} for i, (m, s) in enumerate(points)]
    assert [(r["macs"], r["score"]) for r in job.front(records, "macs")] == [(1, 2), (3, 10), (7, 39), (9, 41)]
    assert [(r["params"], r["score"]) for r in job.front(records, "params")] == [(-9, 41)]


def test_the_cost_of_the_front():
    """The budget's first; of mini, memory is the same for all networks."""
    assert job.front_cost(None, MICRO) == "macs"
    assert job.front_cost(Budget(params=10**6, macs=10**7), MICRO) == "params"
    assert job.front_cost(Budget(memory=10**7, params=10**6), SearchSpace.preset("mini")) == "params"
    assert job.front_cost(Budget(memory=10**7), SearchSpace.preset("mini")) == "macs"


# -- data -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return load_splits("digits")


def test_prescreening_has_its_share_of_every_class(digits):
    val = list(range(0, 1200, 3))
    data = SearchData(digits, MICRO, [], val, {"input_size": [3, 16, 16], "mean": [0.5] * 3, "std": [0.5] * 3})
    options = parse(SearchOptions, ["--prescreen", "0.4"])
    first, rest = job.val_parts(options, data, torch.device("cpu"))
    found = [torch.cat([y for _, y in part]) for part in (first, rest)]
    labels = np.asarray(digits.train["label"][:])[val]
    assert sorted(torch.cat(found).tolist()) == sorted(labels.tolist())
    for c in range(10):
        assert int((found[0] == c).sum()) == int(0.4 * (labels == c).sum())
    assert job.val_parts(parse(SearchOptions, []), data, torch.device("cpu"))[0] is None
    with pytest.raises(RunError, match="leaves a part empty"):
        job.val_parts(parse(SearchOptions, ["--prescreen", "0.001"]), data, torch.device("cpu"))


def unseen(splits, record, *given):
    options = resolve(parse(SearchOptions, ["--supernet", "net", *given]))
    return job.split_unseen(options, splits, record)


def test_images_that_the_supernet_was_trained_on(digits):
    _, held_out, _ = unseen(digits, None)
    record = training_record(digits.train, held_out, content_hashes(digits.train))
    train, val, note = unseen(digits, record)
    assert set(val) == set(held_out) and note is None and not set(train) & set(val)
    more = ["--val-per-class", "100", "--val-fraction", "0.9"]
    with pytest.raises(RunError, match="were trained on by net: .* --allow-leak"):
        unseen(digits, record, *more)
    _, val, note = unseen(digits, record, *more, "--allow-leak")
    leaked = len(set(val) - set(held_out))
    assert leaked > 0
    assert note == f"{leaked} of the {len(val)} images that candidates are scored on were trained on"
    assert "cannot be ruled out" in unseen(digits, None)[2]


def test_a_leak_is_found_by_content_in_other_files(digits, tmp_path):
    """The training images of digits as PNG files in folders: no index tells, only their pixels do."""
    train, val, _ = unseen(digits, None)
    for part, indices in (("train", train[:200] + val[:150]), ("test", range(60))):
        source = digits.train if part == "train" else digits.test
        for i in indices:
            item = source[i]
            folder = tmp_path / part / str(item["label"])
            folder.mkdir(parents=True, exist_ok=True)
            item["image"].save(folder / f"{i}.png")
    png = load_splits(f"imagefolder:{tmp_path}")
    record = training_record(digits.train, val, content_hashes(digits.train))
    _, kept, note = unseen(png, record, "--val-per-class", "5")
    assert note is None and len(kept) == 50
    assert not set(content_hashes(digits.train, train)) & set(content_hashes(png.train, kept))
    with pytest.raises(RunError, match="200 of the 350 images"):
        unseen(png, record, "--val-fraction", "0.9", "--val-per-class", "30")


# -- a supernet that was trained before -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def supernet(tmp_path_factory):
    """Of micro at 16 px, as it was initialised; a folder."""
    torch.manual_seed(0)
    net = timm.create_model(MICRO.supernet, space=MICRO.to_dict())
    folder = tmp_path_factory.mktemp("net") / "supernet"
    return save_pretrained(net, folder, label_names=[str(i) for i in range(10)], golden=False)


def loaded(supernet, tmp_path, *given):
    argv = ["--supernet", str(supernet), *given, "--output", str(tmp_path), "--name", "run"]
    options = resolve(parse(SearchOptions, argv))
    return job.load_supernet(options, Run(options, ALONE, ""))


def written(space, path):
    path.write_text(json.dumps(space))
    return str(path)


def test_a_space_within_the_supernets_restricts_candidates(supernet, tmp_path):
    """Two widths of every MLP and the widest embedding: all candidates are of these."""
    space = MICRO.to_dict()
    space["model_args"] = {**space["model_args"], "img_size": [32, 32], "num_classes": 7}  # the supernet's are taken
    for kept in space["num_channels_to_keep"]:
        if isinstance(kept, list):
            del kept[1:]
        elif kept:
            del kept["mlp"][2:]
    net, data, _ = loaded(supernet, tmp_path / "within", "--space", written(space, tmp_path / "space.json"))
    whole = loaded(supernet, tmp_path / "whole")[1]
    assert (
        data.config["input_size"] == (3, 16, 16) and data.space.model_args == MICRO.model_args == net.space.model_args
    )
    assert whole.space == net.space == MICRO and 1 < data.space.size() < MICRO.size()

    def found(data):
        archs = job.make_search(parse(SearchOptions, SMALL), data.space, None, IMAGES).ask()
        layers = [layer for arch in archs for layer in arch.layers(**MICRO.model_args) if layer.kind == "mlp"]
        shapes = [dict(layer.shape) for layer in layers]
        return {shape["dim"] for shape in shapes}, {shape["hidden"] for shape in shapes}

    assert found(data) == ({64, 112, 160}, {192, 144, 336, 252, 480, 360})
    assert found(whole)[0] > {64, 112, 160} and found(whole)[1] > {192, 144, 336, 252, 480, 360}
    with torch.no_grad():
        x = torch.randn(2, 3, 16, 16)
        small = net.eval().extract(data.space.smallest)(x)
        torch.testing.assert_close(net(x, archs=[data.space.smallest]), small, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "given, message",
    [
        (["--space", "mini"], "--space mini does not fit the supernet"),
        (["--space", "{wider}"], "wider.json does not fit the supernet"),
        (["--space", "nowhere"], "unknown search space 'nowhere'; known: "),
        (["--img-size", "32"], "--img-size [32] is not that of the supernet, (16, 16); leave the option out"),
        (["--dataset", "imagefolder:{photos}"], "has the 10 classes 0, 1, 2"),
        (["--space", "plain_vit"], "--space plain_vit does not fit the supernet"),
    ],
)
def test_what_does_not_fit_a_supernet_is_refused(given, message, supernet, tmp_path):
    wider = MICRO.to_dict()
    wider["network_def"][1][2] = [64, 256]
    wider["num_channels_to_keep"][1]["mlp"] = [256, 192]
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for k in range(4):
            Image.new("RGB", (16, 16), (9 * k, 0, 0)).save(tmp_path / "photos" / name / f"{k}.png")
    files = {"wider": written(wider, tmp_path / "wider.json"), "photos": tmp_path / "photos"}
    with pytest.raises(ValueError) as error:
        loaded(supernet, tmp_path, *(g.format(**files) for g in given))
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_plain_network_is_no_supernet(tmp_path):
    net = timm.create_model("vit_resnas", network_def=MICRO.smallest.to_network_def(), patch_size=4, img_size=16)
    folder = save_pretrained(net, tmp_path / "best", golden=False)
    with pytest.raises(RunError, match=rf"^--supernet {folder} is a {type(net).__name__}; expected a supernet, as"):
        loaded(folder, tmp_path)


# -- report -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """What the report reads, of a search on made-up scores."""
    run, search, ended = searched(tmp_path_factory.mktemp("runs"), "--max-minutes", "9", minutes=1e-9)
    scores = Scores()

    def record(arch):
        return {**arch.record(), "key": arch.key(), **MICRO.costs(arch), "score": scores.true(arch), "test": 300}

    rng = np.random.default_rng(0)
    facts = {
        **{"command": "accelerate launch recipes/search.py", "dataset": "digits", "space": "micro", "seed": 0},
        **{"space_size": float(MICRO.size()), "space_dict": MICRO.to_dict(), "search": "evolution", "parents": 4},
        "budget": {"asked": "macs=20%", **search.budget.to_dict()},
        **{"supernet": None, "leak": None, "candidates": len(search.history), "ended_early": ended, "resumed": False},
        **{"seconds": {"training": 3.0, "search": 4.0}, "processes": 1, "versions": {"timm": "1"}, "prescreen": None},
        "best": {**search.best, "test": 310},
        "finalists": [],
        "largest": record(MICRO.largest),
        "random": [record(a) for a in MICRO.sample_many(5, rng, search.budget)],
        "spread": [record(a) for a in MICRO.sample_many(5, rng)],
        **{"front": [search.best], "val_images": IMAGES, "test_images": 360},
    }
    run.write_json("results.json", facts)
    return run.folder, facts


def test_a_report(finished):
    folder, facts = finished
    table = report(folder)
    text = (folder / "report.md").read_text()
    assert "Front of accuracy against MACs" in text and "| folder | MACs | params | memory | validation |" in text
    assert table in text and f"| {310 / 360:.4f} " in table and "mean of 5 random" in table
    assert "ended after 1 of 3 generations" in text and "that were not trained on" in text and "Leak" not in text
    for name in ("pareto.png", "progress.png", "choices.png"):
        with Image.open(folder / name) as image:
            assert image.size[0] > 500


@pytest.mark.parametrize(
    "cost, columns, axis",
    [
        ("params", ["params", "MACs", "memory", "latency"], "M parameters"),
        ("latency_ms", ["latency", "MACs", "params", "memory"], "latency in ms"),
        ("memory", ["memory", "MACs", "params", "latency"], "kB of memory"),
    ],
)
def test_a_report_shows_the_cost_of_the_front(cost, columns, axis, finished, tmp_path, monkeypatch):
    """The table's first column and the picture's axis: what is drawn there is taken from the picture."""
    folder, facts = finished
    facts = json.loads(json.dumps({**facts, "objectives": [cost]}))
    history = read_jsonl(folder / "history.jsonl")
    parts = [facts["best"], facts["largest"], *facts["random"], *facts["spread"], *facts["front"], *history]
    for record in parts:
        record["latency_ms"] = record["macs"] / 1e6
    write_jsonl(tmp_path / "history.jsonl", history)
    (tmp_path / "results.json").write_text(json.dumps(facts))
    drawn = {}
    monkeypatch.setattr(plots, "save", lambda figure, path: drawn.update({path.name: figure}))
    table = report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert (
        f"## Front of accuracy against {columns[0]}\n" in text and f"![score against {columns[0]}](pareto.png)" in text
    )
    assert "| folder | " + " | ".join(columns) + " | validation |" in text
    assert table.splitlines()[0].split("|")[2].strip() == columns[0]
    (axes,) = drawn["pareto.png"].axes
    assert axes.get_xlabel() == axis
    (line,) = axes.get_lines()
    scale = {"params": 1e6, "latency_ms": 1, "memory": 1e3}[cost]
    assert line.get_xdata() == pytest.approx([facts["front"][0][cost] / scale])


def test_a_report_tells_of_leaks_and_prescreening(finished, tmp_path):
    folder, facts = finished
    screen = {"stopped": 7, "images_saved": 0.25, "rechecked": 5, "would_be_parents": 1}
    facts = {**facts, "leak": "3 of the 400 images were trained on", "prescreen": screen}
    (tmp_path / "results.json").write_text(json.dumps(facts))
    (tmp_path / "history.jsonl").write_bytes((folder / "history.jsonl").read_bytes())
    report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "**Leak:** 3 of the 400 images" in text and "that were not trained on" not in text
    assert "stopped 7 candidates and saved 25% of the images" in text and "1 of the 5 closest" in text


@pytest.mark.parametrize(
    "supernet, named",
    [
        ("/home/someone/runs/digits-micro/supernet", "digits-micro/supernet"),
        ("net/", "net"),
        ("hf-hub:owner/name", "hf-hub:owner/name"),
    ],
)
def test_the_heading_names_a_supernet_without_its_path(supernet, named, finished, tmp_path):
    folder, facts = finished
    facts = {**facts, "supernet": supernet, "space": f"that of {supernet}"}
    (tmp_path / "results.json").write_text(json.dumps(facts))
    (tmp_path / "history.jsonl").write_bytes((folder / "history.jsonl").read_bytes())
    report(tmp_path)
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert lines[0] == f"# Search on digits, space that of {named}"
    assert f"- supernet: {supernet}" in lines


@pytest.mark.parametrize("correct", [None, 309, 310, 311])
def test_a_report_says_where_the_baseline_is_not_beaten(correct, finished, tmp_path):
    """The network has 310 right answers; a run of before had no baseline."""
    folder, facts = finished
    if correct is not None:
        found = {"name": "random forest", "test": correct, "images": 360, "train_images": 1437, "seconds": 1.0}
        facts = {**facts, "baseline": found}
    (tmp_path / "results.json").write_text(json.dumps(facts))
    (tmp_path / "history.jsonl").write_bytes((folder / "history.jsonl").read_bytes())
    shown = report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert shown in text and ("| random forest " in shown) is (correct is not None)
    assert ("does not beat a simple classifier" in shown) is (correct is not None and correct >= 310)
    if correct is not None:
        assert f"| {correct / 360:.4f} " in shown and "trained on 1437 training images" in shown


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"best": 3}', "null"])
def test_a_damaged_results_file_is_named(text, finished, tmp_path):
    (tmp_path / "results.json").write_text(text)
    (tmp_path / "history.jsonl").write_bytes((finished[0] / "history.jsonl").read_bytes())
    with pytest.raises(RunError, match="results.json is damaged"):
        report(tmp_path)


def test_a_damaged_history_is_named(finished, tmp_path):
    (tmp_path / "results.json").write_bytes((finished[0] / "results.json").read_bytes())
    (tmp_path / "history.jsonl").write_text('{"key": 3}\n')
    with pytest.raises(RunError, match="history.jsonl is damaged"):
        report(tmp_path)
    with pytest.raises(RunError, match="holds no results.json; expected the folder of a finished search"):
        report(tmp_path / "other")
