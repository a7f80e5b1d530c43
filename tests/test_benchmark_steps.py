"""benchmark_training.py steps: step rules at equal CPU time, on few images."""

import json
from types import SimpleNamespace

import pytest
from accelerate import Accelerator
from PIL import Image

from recipes import benchmark_training
from timm_resnas.engine.run import Run
from timm_resnas.engine.settings import SupernetOptions
from timm_resnas.engine.supernet import prepare
from timm_resnas.nas.sampling import SelectedSampler
from timm_resnas.nas.space import SearchSpace


def test_rules_take_turns_and_results_are_kept(tmp_path, capsys, monkeypatch):
    measure = benchmark_training.Rule.time

    def time(self, rounds):  # an epoch of nasvit as long as two of the others
        assert 0 < measure(self, rounds) < float("inf")
        return 2.0 if self.training.options.step == "nasvit" else 1.0

    monkeypatch.setattr(benchmark_training.Rule, "time", time)
    for part, count in (("train", 14), ("test", 2)):
        for label, level in (("dark", 40), ("light", 160)):
            (tmp_path / part / label).mkdir(parents=True)
            for i in range(count):
                Image.new("RGB", (16, 16), (level + 4 * i, level, level)).save(tmp_path / part / label / f"{i}.png")
    file = tmp_path / "steps.jsonl"
    argv = ["steps", "--dataset", f"imagefolder:{tmp_path}", "--img-size", "16", "--batch-size", "8", "--epochs", "4"]
    scaled = "groups+sampler=sandwich+switchable-scale=0.5"
    argv += ["--rules", "groups", "nasvit:4", scaled, "--count", "2", "--rounds", "1", "--seeds", "1", "--alone", "3"]
    argv += ["--val-per-class", "4", "--json", str(file)]
    benchmark_training.main(argv)
    first = capsys.readouterr().out
    (record,) = [json.loads(line) for line in file.read_text().splitlines()]
    groups, nasvit = (record["rules"][name] for name in ("groups", "nasvit:4"))
    assert groups["epochs"] == 4 and nasvit["epochs"] == 2 and record["rules"][scaled]["epochs"] == 4
    assert all(0 <= r[k] <= 1 for r in (groups, nasvit) for k in ("smallest", "random", "largest"))
    assert f"| nasvit:4 | {nasvit['epochs']} | {nasvit['seconds']:.0f} | {nasvit['smallest']:.4f} ± nan |" in first
    benchmark_training.main(argv)
    again = capsys.readouterr().out
    assert "seed 0" not in again and again.splitlines() == first.splitlines()[-len(again.splitlines()) :]
    assert len(record["alone"]) == len(record["params"]) == 3 == len(groups["inherited"])
    assert all(0 <= a <= 1 for a in record["alone"]) and f"| {scaled} | " in first
    assert "trained alone: " in first and "the number of parameters ranks them by" in first


@pytest.mark.parametrize(
    "rule", ["group", "groups:", "nasvit:x", "groups+sampling=x", "groups+sampler=", "groups+epochs=3"]
)
def test_a_rule_that_is_none(rule, capsys):
    with pytest.raises(SystemExit):
        benchmark_training.main(["steps", "--rules", rule])
    assert f"--rules {rule}: expected one of groups, single" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rule", "space", "message"),
    [
        ("groups+sampler=foo", "micro", "--sampler: invalid choice: 'foo'"),
        ("groups+switchable_scale=-3", "micro", "--switchable-scale"),
        ("single+num_archs=3", "micro", "--step single trains one sub-network a step, not --num-archs 3"),
        ("groups+switchable_scale=1", "efficientformer_micro", "--switchable-scale is for spaces of ViT-ResNAS"),
        ("groups:50", "micro", "--batch-size 50 is not a multiple of --num-archs 4"),
        ("groups", "micro", "--rules has an entry twice"),
        ("single:5000", "micro", "--rules single:5000: 5000 images are more than the 959 to train on"),
    ],
)
def test_options_of_a_rule_are_checked_before_the_work(rule, space, message, capsys):
    with pytest.raises(SystemExit):
        benchmark_training.main(["steps", "--rules", "groups", rule, "--space", space])
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--count", "--rounds", "--seeds", "--epochs"])
def test_numbers_of_a_benchmark(option, capsys):
    with pytest.raises(SystemExit):
        benchmark_training.main(["steps", option, "0"])
    assert f"{option} must be at least 1" in capsys.readouterr().err


def test_a_step_is_timed_on_more_batches_than_an_epoch_has(tmp_path):
    options = SupernetOptions(
        step="single", batch_size=512, cpu=True, epochs=4, output=str(tmp_path), name="run", img_size=[16]
    )
    run = Run(options, accelerator := Accelerator(cpu=True), "")
    data = prepare(options, run)
    assert len(data.train) < 2 * options.batch_size
    assert 0 < benchmark_training.Rule(options, accelerator, run, data).time(2) < float("inf")


def test_a_run_that_trained_no_supernet_has_none_to_compare(tmp_path, monkeypatch, capsys):
    (tmp_path / "config.yaml").write_text("supernet: elsewhere/supernet\n")
    monkeypatch.setattr(benchmark_training, "open_run", lambda folder: (SupernetOptions(), None, None))
    with pytest.raises(SystemExit):
        benchmark_training.main(["inherited", str(tmp_path)])
    assert "trained no supernet; give the run that trained the one" in capsys.readouterr().err


def test_what_is_selected_once_is_not_timed(tmp_path, monkeypatch):
    """Or a rule would get fewer epochs for what it does once."""
    options = SupernetOptions(sampler="selected", cpu=True, epochs=4, output=str(tmp_path), name="run")
    made = []
    monkeypatch.setattr(SelectedSampler, "archs", lambda self, *where: made.append(where))
    run = SimpleNamespace(sampler=SelectedSampler(SearchSpace.preset("micro"), 4))
    monkeypatch.setattr(benchmark_training, "SupernetTraining", lambda *_: run)
    monkeypatch.setattr(benchmark_training, "create_supernet", lambda *_: None)
    rule = benchmark_training.Rule(options, None, None, None)
    assert made == [(4, 0)] and rule.seconds == 0


def test_options_of_a_rule():
    found = benchmark_training.options_of("nasvit:16+switchable-scale=1e-4+clip_others=0", 64)
    assert found == {"step": "nasvit", "batch_size": 16, "switchable_scale": 1e-4, "clip_others": 0.0}


def test_correlation_of_ranks():
    assert benchmark_training.rank([3, 1, 2], [0.9, 0.1, 0.5]) == 1
    assert benchmark_training.rank([3, 1, 2], [0.1, 0.9, 0.5]) == -1
