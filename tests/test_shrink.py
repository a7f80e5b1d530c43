"""search.py --model: a trained timm ViT is shrunk, whatever interrupts it."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from recipe_server import Recipe, parts, program, wait_until
from safetensors.torch import load_file

import timm_resnas
from recipes import benchmark_roads, benchmark_shrink
from recipes import report as report_recipe
from recipes import search as recipe
from timm_resnas.arch import Arch
from timm_resnas.data import load_splits
from timm_resnas.engine import shrink
from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import SearchOptions
from timm_resnas.nas.count import count_macs
from timm_resnas.nas.jsonl import read_jsonl

QUICK = [
    *("--cpu", "--threads", "1", "--population", "8", "--iterations", "2", "--parents", "4", "--mutations", "3"),
    *("--crossovers", "3", "--num-random", "3", "--budget", "macs=60%", "--calibration", "96", "--batch-size", "128"),
    *("--epochs", "1", "--finetune-epochs", "1", "--warmup-epochs", "0"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small ViT with weights and the digits' classes; nine of its ten are named otherwise in ``renamed``."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    for name, labels in (("best", map(str, range(10))), ("renamed", "abcdefghij")):
        config = {"input_size": [3, 32, 32]}
        timm_resnas.save_pretrained(model, folder / name, label_names=list(labels), data_config=config)
    convnet = timm.create_model("test_convnext", num_classes=10)
    timm_resnas.save_pretrained(convnet, folder / "convnet", label_names=list(map(str, range(10))))
    return folder


@pytest.fixture(scope="module")
def runs(recipe_server, base):
    return Recipe(recipe_server, "search", [*QUICK, "--model", str(base / "best")])


@pytest.fixture(scope="module")
def shrunk(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    runs.run(folder)
    return folder


def results_of(folder):
    """What does not depend on the clock."""
    results = json.loads((folder / "results.json").read_text())
    for row in results["networks"].values():
        del row["ms"], row["speedup"]
    for record in results["finalists"]:
        record.pop("seconds", None)
    del results["baseline"]["seconds"]
    return {k: v for k, v in results.items() if k not in ("seconds", "command", "resumed", "processes", "conditions")}


def history_of(folder):
    return [{k: v for k, v in r.items() if k != "seconds"} for r in read_jsonl(folder / "history.jsonl")]


def test_what_comes_out(shrunk, capsys):
    results, history = results_of(shrunk), history_of(shrunk)
    limit = results["budget"]["macs"]
    assert len(history) == 14 == results["candidates"]
    assert history[0]["origin"] == "start" and all(0.975 * limit <= r["macs"] <= limit for r in history)
    best = timm.create_model(f"local-dir:{shrunk / 'best'}", pretrained=True).eval()
    arch = Arch.from_record(results["best"])
    assert timm_resnas.elastic(best).space.largest == arch and arch.base == "test_vit"
    assert sum(p.numel() for p in best.parameters()) == results["best"]["params"]
    assert results["networks"]["found, fine-tuned"]["macs"] == results["best"]["macs"]
    assert best.pretrained_cfg["label_names"] == [str(i) for i in range(10)]
    config = json.loads((shrunk / "best" / "config.json").read_text())
    assert config["timm_resnas"]["macs"] == results["best"]["macs"] and config["architecture"] == "vit_elastic"
    # the accuracy is that of plain timm with timm's own preprocessing
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(best), is_training=False)
    test = load_splits("digits").test
    with torch.inference_mode():
        right = best(torch.stack([transform(i.convert("RGB")) for i in test["image"]])).argmax(-1)
    assert int((right == torch.tensor(test["label"])).sum()) == results["networks"]["found, fine-tuned"]["test"]
    before = (shrunk / "report.md").read_text()
    (shrunk / "report.md").unlink()
    report_recipe.main([str(shrunk)])
    assert (shrunk / "report.md").read_text() == before and "| found, fine-tuned" in capsys.readouterr().out


def test_the_search_sees_no_image_that_was_trained_on(shrunk):
    train, val = parts(shrunk)
    assert not set(train) & set(val) and len(train) + len(val) == 1437
    assert results_of(shrunk)["images"] == {"train": len(train), "val": len(val), "test": 360}


def test_the_score_is_the_agreement_of_the_repaired_network_with_the_full_one(shrunk):
    """Computed here from the folders alone."""
    from timm_resnas.data import eval_batches, eval_transform

    full = timm.create_model(f"local-dir:{shrunk / 'full' / 'best'}", pretrained=True).eval()
    record = results_of(shrunk)["finalists"][0]
    train, val = parts(shrunk)
    config = timm.data.resolve_model_data_config(full)
    batches = eval_batches(load_splits("digits").train, eval_transform(config), indices=val, batch_size=64)
    net = timm_resnas.load(shrunk / "supernet").eval()
    chosen = np.random.default_rng([0, 5]).permutation(train)[:96].tolist()
    parts_of = eval_batches(load_splits("digits").train, eval_transform(config), indices=chosen, batch_size=64)
    images = torch.cat([x for x, _ in parts_of])
    small = net.extract(Arch.from_record(record), repair=images)
    with torch.inference_mode():
        x = torch.cat([x for x, _ in batches])
        a, b = full(x).double().log_softmax(-1), small(x).double().log_softmax(-1)
    expected = -(a.exp() * (a - b)).sum()
    assert record["repaired"] / 65536 == pytest.approx(expected.item(), rel=1e-2, abs=1e-3)


def test_what_finalists_are_compared_with_is_computed_without_gradients():
    """The full network's answers on all validation images would hold on to its activations."""
    net = timm_resnas.elastic(timm.create_model("test_vit", img_size=32, num_classes=10)).eval()
    seen = []
    net.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
    arch, x = net.space.largest, torch.randn(4, 3, 32, 32)
    record = {**arch.record(), "key": arch.key(), "score": 1, **net.space.costs(arch)}
    search = SimpleNamespace(history=[record], budget=None)
    options = SearchOptions(score="agreement")
    choice = shrink._choose(options, net, search, [(x, torch.zeros(4, dtype=torch.long))], x, None)
    assert choice["best"]["repaired"] == 0 and seen == [False]  # the same network


def test_a_model_for_any_image_size_is_priced_at_the_size_of_the_images(recipe_server, tmp_path):
    """Its own is 160 pixels, those of its position embedding 32; the option says 48."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10, dynamic_img_size=True)
    timm_resnas.save_pretrained(model, tmp_path / "model", label_names=list(map(str, range(10))))
    given = ["--model", str(tmp_path / "model"), "--img-size", "48", "--epochs", "0", "--finetune-epochs", "0"]
    given += ["--population", "4", "--iterations", "1", "--num-random", "0", "--val-per-class", "6"]
    Recipe(recipe_server, "search", QUICK).run(tmp_path / "run", *given)
    results = results_of(tmp_path / "run")
    assert results["space_dict"]["model_args"]["img_size"] == [48, 48]
    assert results["networks"]["found, repaired"]["macs"] == results["best"]["macs"]


def test_killed_at_three_moments(runs, shrunk, tmp_path):
    folder = tmp_path / "killed"
    moments = [
        lambda: (folder / "full" / "best" / "config.json").exists(),
        lambda: (scores := folder / "state" / "scores-0.jsonl").exists() and scores.read_bytes().count(b"\n") >= 9,
        lambda: (folder / "state" / "winner.json").exists(),
    ]
    for moment in moments:
        pid = runs.start(folder)
        wait_until(moment, pid, f"{folder}.log")
        runs.kill(pid)
    runs.run(folder)
    assert history_of(folder) == history_of(shrunk) and results_of(folder) == results_of(shrunk)
    weights, expected = (load_file(f / "best" / "model.safetensors") for f in (folder, shrunk))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_processes_have_the_history_of_one(runs, shrunk, tmp_path):
    """The full model is not trained, for gradients of two processes are summed in another order."""
    given = ["--epochs", "0", "--finetune-epochs", "0", "--num-random", "1", "--val-per-class", "6"]
    runs.run(tmp_path / "one", *given)
    runs.run_two(tmp_path / "two", *given)
    assert history_of(tmp_path / "two") == history_of(tmp_path / "one")
    one, two = (load_file(tmp_path / n / "best" / "model.safetensors") for n in ("one", "two"))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_narrower_networks_trained_at_once_and_killed(runs, tmp_path):
    """One training for all sizes: random cuts of a model that knew nothing answer better than by chance."""
    given = ["--epochs", "0", "--finetune-epochs", "0", "--checkpoint-steps", "4", "--iterations", "1"]
    given += ["--elastic-epochs", "2", "--val-per-class", "6"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    runs.run(whole, *given)
    pid = runs.start(killed, *given)
    wait_until(lambda: any((killed / "elastic" / "state").glob("training/*")), pid, f"{killed}.log")
    runs.kill(pid)
    runs.run(killed, *given)
    assert history_of(killed) == history_of(whole) and results_of(killed) == results_of(whole)
    assert np.mean([r["test"] for r in results_of(whole)["random"]]) > 0.2 * 360
    net = timm_resnas.load(whole / "elastic" / "supernet")
    assert net.space.smallest.widths[0] == (0, 0)  # what was not trained can be searched as well
    assert results_of(whole)["epochs"] == {"full": 0, "elastic": 2, "finetune": 0}


def test_tokens_are_searched_as_well(runs, tmp_path):
    """At an image size of 16 patches, and with sub-networks trained at once."""
    given = ["--epochs", "0", "--finetune-epochs", "0", "--img-size", "64", "--elastic-epochs", "1"]
    given += ["--keep-ratios", "1", "0.75", "0.5", "--budget", "macs=45%", "--val-per-class", "6", "--num-random", "1"]
    folder = tmp_path / "run"
    runs.run(folder, *given)
    results, history = results_of(folder), history_of(folder)
    assert results["space_dict"]["keep_ratios"] == [1.0, 0.75, 0.5] and results["space_dict"]["blocks"] == [1, 3, 4]
    assert all(r["model"] == "vit_tokens" and r["macs"] <= results["budget"]["macs"] for r in history)
    assert len({tuple(r["args"]["keep_ratios"]) for r in history}) > 2
    arch = Arch.from_record(results["best"]).canonical()
    best = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    assert json.loads((folder / "best" / "config.json").read_text())["architecture"] == arch.model
    assert count_macs(best, (3, 64, 64)) == results["best"]["macs"] == results["networks"]["found, repaired"]["macs"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--keep-ratios", "1", "0.5"], "--keep-ratios is for --model"),
        (["--model", "{base}/best", "--keep-ratios", "0.9", "0.5"], "keep_ratios must fall from 1"),
        (["--model", "{base}/best", "--elastic-epochs", "1", "--num-archs", "1"], "--num-archs 1 is too few"),
        (["--elastic-epochs", "1"], "--elastic-epochs is for --model"),
        (["--model", "{base}/convnet"], "ConvNeXt has no blocks of attention and MLP"),
        (["--model", "vit_resnas_tiny"], "no pretrained weights"),
        (["--model", "{base}/best", "--budget", "macs=1%"], "is below the smallest network of the space"),
        (["--model", "{base}/renamed", "--epochs", "0"], "has other classes than digits"),
        (["--model", "{base}/best", "--space", "micro"], "--model goes neither with --space nor with --supernet"),
        (["--model", "{base}/best", "--step", "nasvit"], "--step is for training a supernet"),
        (["--model", "{base}/best", "--teacher-path", "x"], "--teacher-path is for training a supernet"),
        (["--model", "{base}/best", "--elastic-epochs", "1", "--mode", "masked"], "--mode is for training a supernet"),
        (["--supernet", "x", "--temperature", "0.2"], "--temperature is for training a supernet; with --supernet none"),
        (["--score", "dss", "--token-labeling"], "--token-labeling is for training a supernet; with --score dss none"),
        (["--model", "{base}/best", "--prescreen", "0.5"], "does not go with --prescreen"),
        (["--model", "{base}/best", "--search", "uniform"], "--population is of --search evolution"),
        (["--model", "{base}/best", "--budget", "latency=3ms"], "needs --latency-table"),
        (["--epochs", "0"], "--epochs 0 is for --model"),
        (["--score", "agreement"], "--score agreement is for --model"),
    ],
)
def test_wrong_input_is_one_message_before_any_work(given, message, base, tmp_path, capsys):
    argv = [*QUICK, *(g.format(base=base) for g in given), "--output", str(tmp_path), "--name", "run"]
    with pytest.raises(SystemExit) as stopped:
        recipe.main(argv)
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("search.py")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0], captured.err
    assert not (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([], "--search uniform cuts a trained vision transformer; name it by --model"),
        (["--model", "{base}/best", "--budget", "none"], "cuts a network down to a --budget"),
        (["--model", "{base}/best", "--budget", "macs=12%"], "no network of the same share of every block is within"),
        (["--model", "{base}/best", "--keep-ratios", "1", "0.5"], "--search uniform keeps all tokens"),
        (["--model", "{base}/best", "--elastic-epochs", "1"], "--search uniform scores none"),
    ],
)
def test_wrong_input_of_an_even_cut(given, message, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe.main(["--cpu", "--search", "uniform", *(g.format(base=base) for g in given), "--output", str(tmp_path)])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search.py")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not list(tmp_path.glob("*/config.yaml"))


def test_roads_to_one_budget(base, tmp_path, capsys, monkeypatch, recipe_server):
    """The benchmark runs the recipe, and reads what is there when it is started again."""

    plans = []

    def run(command, **_):
        assert command[1].endswith("recipes/search.py")
        done = recipe_server.run(program("search"), *command[2:])
        plans.append(done.stdout)
        return done

    monkeypatch.setattr(benchmark_roads.subprocess, "run", run)
    argv = ["--model", str(base / "best"), "--dataset", "digits", "--budget", "macs=60%", "--epochs", "2"]
    argv += ["--roads", "uniform", "random", "--seeds", "0", "--output", str(tmp_path), "--"]
    argv += ["--cpu", "--threads", "1", "--num-random", "0", "--calibration", "64", "--batch-size", "128"]
    benchmark_roads.main(argv)
    printed = capsys.readouterr().out.splitlines()
    for road in "uniform", "random":
        folder, scored = tmp_path / f"{road}-macs=60%-0", road == "random"
        results = results_of(folder)
        assert results["search"] == road and results["epochs"] == {"full": 0, "elastic": 0, "finetune": 2}
        assert results["candidates"] == scored and ("even cut, repaired" in results["networks"]) == scored
        best = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True)
        macs, found = count_macs(best, (3, 32, 32)), results["networks"]["found, fine-tuned"]
        assert macs == results["best"]["macs"] == found["macs"]
        assert 0.975 * results["budget"]["macs"] <= macs <= results["budget"]["macs"]
        share, test = macs / results["networks"]["full model"]["macs"], found["test"] / 360
        (line,) = (line for line in printed if line.startswith(f"| {road} | {share:.1%} |"))
        assert f"{test:.4f} ({test:.4f})" in line
    assert "fine-tune the found network, 2 epochs" in plans[0] and "masks" not in plans[0]
    assert "Nothing was searched" in (tmp_path / "uniform-macs=60%-0" / "report.md").read_text()
    trained = {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/finetune/best/*")}
    benchmark_roads.main(argv)
    accuracies = [[line.split("|")[4:] for line in lines] for lines in (printed, capsys.readouterr().out.splitlines())]
    assert accuracies[0] == accuracies[1]
    assert trained == {p: p.stat().st_mtime_ns for p in tmp_path.glob("*/finetune/best/*")}
    monkeypatch.setattr(benchmark_roads.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=1))
    with pytest.raises(SystemExit):
        benchmark_roads.main(argv)
    assert "uniform-macs=60%-0 failed" in capsys.readouterr().err
    for given, message in (
        (["--elastic=1"], "--elastic-epochs is not among the options of all roads, which are to start alike"),
        (["--finetune-epochs", "5"], "--finetune-epochs is not among the options of all roads"),
        (["--gain", "mes"], "--gain is of --search slimming; it does not go with --search uniform"),
        (["--budget", "macs=60%", "mcas=30%"], "cannot read 'mcas=30%'"),
        (["--budget", "macs=60%", "macs=60%"], "--budget has an entry twice"),
        (["--model", "nowhere-{seed}"], "nowhere-0"),
    ):
        cut = argv.index("--")
        at = len(argv) if given[0] in ("--elastic=1", "--finetune-epochs", "--gain") else cut
        with pytest.raises(SystemExit):
            benchmark_roads.main([*argv[:at], *given, *argv[at:]])
        assert message in capsys.readouterr().err
    args = benchmark_roads.parse_args([*argv, "--population", "50", "--img-size", "16"])
    options = parse(SearchOptions, benchmark_roads.shrinking(args, "random", "macs=60%", 0))
    assert (options.population, options.iterations) == (1, 1)
    assert benchmark_roads.macs_of(benchmark_roads.open_full(args, 0)) == count_macs(
        timm.create_model("test_vit", img_size=16, num_classes=10), (3, 16, 16)
    )


def test_roads_that_start_from_nothing(base, tmp_path, capsys, monkeypatch):
    """Trained as the full model was, for its epochs and the others', within the full model's share."""
    full = tmp_path / "base-3"
    shutil.copytree(base / "best", full / "best")
    config = "model: test_vit\nmodel_kwargs: [depth=2, num_heads=4]\nepochs: 7\nlr: 0.01\n"
    (full / "config.yaml").write_text(config)
    commands = []

    def run(command, **_):
        commands.append([Path(command[1]).name, *command[2:]])
        name = command[command.index("--name") + 1]
        shutil.copytree(base / "best", tmp_path / name / "best", dirs_exist_ok=True)
        (tmp_path / name / "results.json").write_text(json.dumps({"test": {"best": {"top1": 0.25}}}))
        (tmp_path / name / "config.yaml").write_text("val_fraction: 0.1\nthreads: 1\ncpu: true\nbackground: black\n")
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(benchmark_roads.subprocess, "run", run)
    argv = ["--model", str(tmp_path / "base-{seed}" / "best"), "--dataset", "digits", "--epochs", "2", "--seeds", "3"]
    argv += ["--budget", "macs=50%", "macs=30%", "--roads", "by-hand", "space", "--output", str(tmp_path)]
    hand = ["--by-hand", "depth=1", "depth=1  num_heads= 2"]
    space = ["--space", "micro", "--space-options", "--batch-size 32 --lr 1e-3"]
    for given, message in (
        (space, "the road by-hand and --by-hand go together"),
        ([*space, *hand[:2]], "--by-hand takes a text for each --budget: 2, not 1"),
        ([*space, *hand[:2], "depth"], "--by-hand takes NAME=VALUE, got 'depth'"),
        ([*space, *hand[:2], "dept=1"], "unexpected keyword argument 'dept'"),
        ([*hand, *space[:3], "--batch-size 30"], "--batch-size 30 is not a multiple of --num-archs 4"),
        ([*hand, *space[:3], "--warmup-epochs 5"], "--warmup-epochs 5 is more than --epochs 4"),
        ([*space, *hand, "--seeds", "4"], f"{tmp_path / 'base-4' / 'best'}"),
    ):
        with pytest.raises(SystemExit):
            benchmark_roads.main([*argv, *given])
        assert message in capsys.readouterr().err
    (full / "config.yaml").write_text(f"{config}pretrained: true\n")
    with pytest.raises(SystemExit):
        benchmark_roads.main([*argv, *hand, *space])
    assert "by-hand and space start from nothing; the full model started from trained" in capsys.readouterr().err
    (full / "config.yaml").write_text(config)
    assert not commands
    benchmark_roads.main([*argv, *hand, *space])
    macs = count_macs(timm.create_model("test_vit", img_size=32, num_classes=10), (3, 32, 32))
    where = ["--dataset", "digits", "--seed", "3", "--output", str(tmp_path), "--name"]
    trained = ["--config", str(full / "config.yaml"), "--epochs"]
    expected = []
    for share, kwargs in ((0.5, ["depth=1", "num_heads=4"]), (0.3, ["depth=1", "num_heads=2"])):
        by_hand, found = (f"{road}-macs={share:.0%}-3" for road in ("by-hand", "space"))
        options = ["--supernet", str(tmp_path / "supernet-3" / "supernet"), "--cpu", "--background", "black"]
        options += ["--val-fraction", "0.1", "--threads", "1", "--budget", f"macs={int(share * macs)},lower=0.975"]
        best = [
            "--model",
            f"local-dir:{tmp_path / f'{found}-search' / 'best'}",
            "--pretrained",
            "--img-size",
            "32",
            "32",
        ]
        expected += [
            ["train.py", *trained, "9", "--model-kwargs", *kwargs, *where, by_hand],
            [
                "supernet.py",
                "--batch-size",
                "32",
                "--lr",
                "1e-3",
                "--space",
                "micro",
                "--epochs",
                "4",
                *where,
                "supernet-3",
            ],
            ["search.py", *options, *where, f"{found}-search"],
            ["train.py", *trained, "5", "--model-kwargs", *best, *where, found],
        ]
    assert commands == expected
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1:3] for line in lines[2:]] == [[f" {r} ", " 100.0% "] for r in ("by-hand", "space")] * 2
    assert all(line.endswith("x |  | 0.2500 (0.2500) |  |") for line in lines[2:])


def test_the_benchmark_of_shrinking(base, tmp_path, capsys, monkeypatch):
    """Rows for each budget; what costs the same and is repaired is nearer to the full model."""
    monkeypatch.setitem(sys.modules, "torch_pruning", None)  # not installed
    argv = ["--model", str(base / "best"), "--calibrate", "digits", "--probe", "digits", "--budgets", "60"]
    benchmark_shrink.main(
        [
            *argv,
            "--images",
            "96",
            "--held",
            "32",
            "--seeds",
            "2",
            "--candidates",
            "10",
            "--keep-ratios",
            "1",
            "0.5",
            "--json",
            str(tmp_path / "rows"),
        ]
    )
    rows = {r["network"]: r for r in json.loads((tmp_path / "rows").read_text())["rows"]}
    assert rows["full model"]["cosine"] == pytest.approx([1, 1]) and len(rows) == 12
    assert rows["60% uniform, repaired"]["cosine"][0] > rows["60% uniform"]["cosine"][0]
    for kind in "searched", "searched with tokens":
        assert rows[f"60% {kind}, repaired"]["macs"] == pytest.approx(0.6, rel=0.03)
    assert "| 60% searched, repaired |" in capsys.readouterr().out


def test_the_benchmark_at_budgets_that_an_even_cut_misses(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_pruning", None)
    argv = [
        "--model",
        str(base / "best"),
        "--calibrate",
        "digits",
        "--probe",
        "digits",
        "--json",
        str(tmp_path / "rows"),
    ]
    few = ["--images", "32", "--held", "8", "--seeds", "1", "--candidates", "10"]
    benchmark_shrink.main([*argv, *few, "--budgets", "20"])
    rows = {r["network"]: r["macs"] for r in json.loads((tmp_path / "rows").read_text())["rows"]}
    assert rows["20% searched, repaired"] <= 0.2 and "20% uniform" not in rows
    capsys.readouterr()
    with pytest.raises(SystemExit):  # before the work
        benchmark_shrink.main([*argv, *few, "--budgets", "20", "1"])
    printed = capsys.readouterr()
    assert "is below the smallest network" in printed.err and "| full model |" not in printed.out
