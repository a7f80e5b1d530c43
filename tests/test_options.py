"""Options from dataclasses: flags, YAML files, help, ranges; defaults that results were published with."""

import dataclasses
import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from recipe_server import RECIPES, ROOT

from recipes import search, train
from timm_resnas.engine.options import fixed_options, option, parse
from timm_resnas.engine.settings import EvaluateOptions, SearchOptions, SupernetOptions, TrainOptions


@dataclass(frozen=True)
class Shared:
    """shared"""

    config: str | None = option(None, "defaults", free=True)
    name: str | None = option(None, "a name", free=True)


@dataclass(frozen=True)
class Options(Shared):
    """of the test"""

    where: str = option(None, "a place", positional=True)
    epochs: int = option(30, "training epochs, 100% of them", range="[1, inf)", basic=True)
    share: float = option(0.5, "a share", range="[0, 1)")
    rate: float | None = option(None, "a rate", range="(0, 1]")
    sides: list[int] | None = option(None, "image sides", nargs="*", range="[1, inf)")
    scale: list[float] | None = option(None, "two numbers", nargs=2, range="(0, 1]")
    items: list[str] = option([], "texts", nargs="*")
    amp: str = option("no", "precision", choices=("no", "bf16"))
    real: str | None = option(None, "labels", nargs="?", const="timm")
    ema: bool = option(False, "average")
    sync: bool = option(True, "synchronise", free=True)


def read(*argv):
    return parse(Options, ["here", *argv])


def refused(capsys, *argv, options=Options):
    """The error, which is one line."""
    with pytest.raises(SystemExit) as end:
        parse(options, ["here", *argv] if options is Options else list(argv))
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line.partition(": error: ")[2]


# -- flags ------------------------------------------------------------------------------------------------------------


def test_defaults():
    options = read()
    assert options == Options(where="here")
    assert (options.epochs, options.items, options.sides, options.ema, options.sync) == (30, [], None, False, True)
    read("--items", "a").items.append("b")
    assert read().items == []  # a list of its own for each parse
    with pytest.raises(dataclasses.FrozenInstanceError):
        options.epochs = 3


def test_flags():
    given = ["--epochs", "3", "--share", "0", "--sides", "16", "32", "--scale", "0.5", "1", "--items", "a=1", "b=x y"]
    options = read(*given, "--amp", "bf16", "--ema", "--no-sync", "--real")
    assert (options.where, options.epochs, options.share, options.sides) == ("here", 3, 0.0, [16, 32])
    assert (options.scale, options.items, options.amp) == ([0.5, 1.0], ["a=1", "b=x y"], "bf16")
    assert (options.ema, options.sync, options.real) == (True, False, "timm")
    assert read("--sides", "--items").sides == [] and read("--real", "file").real == "file"
    assert isinstance(read("--share", "0").share, float)


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--epochs", "0"], "argument --epochs: must be in [1, inf), got 0"),
        (["--epochs", "many"], "argument --epochs: must be an integer, got 'many'"),
        (["--epochs", "1.5"], "argument --epochs: must be an integer, got '1.5'"),
        (["--share", "1"], "argument --share: must be in [0, 1), got 1"),
        (["--share", "-0.1"], "argument --share: must be in [0, 1), got -0.1"),
        (["--share", "nan"], "argument --share: must be a finite number, got nan"),
        (["--share", "inf"], "argument --share: must be a finite number, got inf"),
        (["--share", "1e400"], "argument --share: must be a finite number, got 1e400"),
        (["--share", "half"], "argument --share: must be a number, got 'half'"),
        (["--rate", "0"], "argument --rate: must be in (0, 1], got 0"),
        (["--sides", "16", "-1"], "argument --sides: must be in [1, inf), got -1"),
        (["--scale", "0.5"], "argument --scale: expected 2 arguments"),
        (["--scale", "0.5", "nan"], "argument --scale: must be a finite number, got nan"),
        (["--amp", "fp8"], "argument --amp: invalid choice: 'fp8'"),
        (["--speed", "3"], "unrecognized arguments: --speed 3"),
        (["--config", "/nowhere.yaml"], "--config /nowhere.yaml: No such file or directory"),
    ],
)
def test_wrong_flags_are_one_line(argv, message, capsys):
    assert refused(capsys, *argv).startswith(message)


def test_a_missing_positional(capsys):
    with pytest.raises(SystemExit):
        parse(Options, [])
    assert capsys.readouterr().err.strip().endswith("error: the following arguments are required: where")


# -- YAML -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def config(tmp_path):
    def write(text):
        path = tmp_path / "some.yaml"
        path.write_text(text) if isinstance(text, str) else path.write_bytes(text)
        return ["--config", str(path)]

    return write


def test_a_file_sets_defaults_and_flags_override(config):
    text = "epochs: 5\nshare: 1e-3\nsides: [16, 32]\nscale: [0.2, 1]\nema: true\nrate: null\nname: 7\namp: bf16\n"
    options = read(*config(text), "--epochs", "7")
    assert (options.epochs, options.share, options.sides, options.scale) == (7, 1e-3, [16, 32], [0.2, 1.0])
    assert (options.ema, options.rate, options.name, options.amp) == (True, None, "7", "bf16")
    assert read(*config("")) == dataclasses.replace(read(), config=config("")[1])
    given = parse(SearchOptions, [*config("mutation-prob: 0.5\npopulation: 5\ncpu: true\n"), "--population", "7"])
    assert (given.population, given.mutation_prob, given.cpu) == (7, 0.5, True)


@pytest.mark.parametrize(
    "text, message",
    [
        ("epocs: 5", "has unknown options: epocs; known: amp, "),
        ("3: 5", "has unknown options: 3"),
        ("config: other.yaml", "has unknown options: config"),
        ("epochs: many", "epochs must be an integer, got 'many'"),
        ("epochs: 2.5", "epochs must be an integer, got 2.5"),
        ("epochs: true", "epochs must be an integer, got True"),
        ("epochs: null", "epochs needs a value, got none"),
        ("epochs: 0", "epochs must be in [1, inf), got 0"),
        ("epochs: .nan", "epochs must be an integer, got nan"),
        ("share: .nan", "share must be a finite number, got nan"),
        ("share: -.inf", "share must be a finite number, got -inf"),
        ("share: 2", "share must be in [0, 1), got 2"),
        ("share: [0.5]", "share must be one value, got [0.5]"),
        ("sides: 16", "sides must be a list, got 16"),
        ("sides: [16, x]", "sides must be an integer, got 'x'"),
        ("scale: [0.5]", "scale takes 2 values, got 1"),
        ("ema: 3", "ema must be true or false, got 3"),
        ("ema: null", "ema needs a value, got none"),
        ("amp: int3", "amp must be one of no, bf16, got 'int3'"),
        ("name: true", "name must be a text, got True"),
        ("name: {a: 1}", "name must be a text, got {'a': 1}"),
        ("items: [[a]]", "items must be a text, got ['a']"),
        ("- 3", "must hold 'option: value' lines, got list"),
        ("a: [", "is not YAML"),
        ("a: !!python/object/apply:os.getcwd []", "is not YAML"),
        ("[" * 5000, "is not YAML"),
        (b"epochs: \xff", "is not a text file"),
    ],
)
def test_wrong_files_are_one_line_that_names_them(text, message, config, capsys):
    given = config(text)
    error = refused(capsys, *given)
    assert error.startswith(f"--config {given[1]}") and message in error


def test_a_folder_is_not_a_file(tmp_path, capsys):
    assert refused(capsys, "--config", str(tmp_path)) == f"--config {tmp_path}: Is a directory"


# -- help, and what decides results -----------------------------------------------------------------------------------


def test_help(capsys):
    shown = {}
    for flag in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as end:
            parse(Options, [flag], "What it does.")
        assert end.value.code == 0
        shown[flag] = capsys.readouterr().out
    few, all_ = shown["--help"], shown["--help-all"]
    for text in shown.values():
        assert "What it does." in text and "--epochs" in text and "100% of them (default: 30)" in text
    assert "--share" not in few.partition("What it does.")[2] and "--help-all shows every option" in few
    assert "--share" in all_ and "of the test:" in all_ and "shared:" in all_ and "--no-ema" in all_


def test_what_decides_results():
    assert set(fixed_options(read())) == {f.name for f in dataclasses.fields(Options)} - {"config", "name", "sync"}


@pytest.mark.parametrize(
    "recipe", ["convert", "evaluate", "latency", "publish", "report", "search", "supernet", "train"]
)
def test_help_of_a_recipe_does_not_import_torch(recipe):
    code = f"""
import runpy, sys
sys.argv = ["{recipe}.py", "--help"]
try:
    runpy.run_path({str(RECIPES / f"{recipe}.py")!r}, run_name="__main__")
except SystemExit as end:
    assert end.code == 0
assert not {{"torch", "timm", "accelerate", "datasets"}} & set(sys.modules), "imported"
"""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    given = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=given)
    assert done.returncode == 0 and "usage" in done.stdout, done.stderr


# Of the recipes before there were options classes (commit 3e99999).
DEFAULTS = {
    SupernetOptions: dict(
        **dict(seed=0, threads=0, amp="no", dataset="digits", val_per_class=50, val_fraction=1 / 3, epochs=12),
        **dict(batch_size=64, num_archs=None, accumulate=1, sampler="balanced", mode="sliced", arch_warmup_epochs=12),
        **dict(lr=2e-3, min_lr=1e-5, warmup_epochs=1, warmup_lr=1e-6, weight_decay=0.05, clip_grad=None),
        **dict(decay_pos_embed=False, drop_path=0.0, smoothing=0.1, token_labeling=False, patch_weight=1.0),
        **dict(sync_bn=True, eval_every=3, checkpoint_minutes=15, checkpoint_steps=0, workers=0),
    ),
    SearchOptions: dict(
        **dict(search="evolution", population=100, iterations=6, parents=25, mutations=20, crossovers=20),
        **dict(mutation_prob=None, objectives="macs", prescreen=0.0, num_random=20, num_any_cost=40),
        **dict(max_minutes=None, allow_leak=False, allow_pickle=False, channels_last=False, epochs=12, lr=2e-3),
    ),
    TrainOptions: dict(
        **dict(pretrained=False, val_per_class=25, val_fraction=0.1, epochs=30, batch_size=64, opt="adamw"),
        **dict(momentum=0.9, weight_decay=0.05, layer_decay=None, lr=None, lr_base=5e-4, lr_base_size=512),
        **dict(sched="cosine", min_lr=1e-5, warmup_epochs=1, warmup_lr=1e-6, clip_grad=None, clip_mode="norm"),
        **dict(ema=False, ema_decay=0.9998, ema_warmup=False, sync_bn=False, eval_every=1, keep=1, mix="none"),
        **dict(mixup_alpha=0.8, cutmix_alpha=1.0, mix_prob=1.0, mix_switch_prob=0.5, mix_off_epochs=0),
        **dict(smoothing=0.1, distill="soft-label", distill_type="hard", distill_weight=0.5, temperature=1.0),
    ),
    EvaluateOptions: dict(batch_size=256, dataset="digits", amp="no", seed=0, threads=0, workers=0),
}


@pytest.mark.parametrize("options", DEFAULTS)
def test_defaults_of_published_results(options):
    found = parse(options, [])
    found = vars(search.resolve(found) if options is SearchOptions else found)
    assert {name: found[name] for name in DEFAULTS[options]} == DEFAULTS[options]


def test_what_other_options_decide():
    def resolved(*argv):
        options = search.resolve(parse(SearchOptions, list(argv)))
        return options.space, options.budget

    assert resolved() == ("micro", "macs=20%")
    assert resolved("--search", "pareto") == ("micro", "none")
    assert resolved("--supernet", "there", "--budget", "macs=1M") == (None, "macs=1M")


WRONG = [
    (["--min-lr", "nan"], "--min-lr: must be a finite number, got nan"),
    (["--smoothing", "2"], "--smoothing: must be in [0, 1), got 2"),
    (["--drop-path", "2"], "--drop-path: must be in [0, 1), got 2"),
    (["--threads", "-1"], "--threads: must be in [0, 1024], got -1"),
    (["--warmup-epochs", "-3"], "--warmup-epochs: must be in [0, inf), got -3"),
    (["--clip-grad", "-1"], "--clip-grad: must be in [0, inf), got -1"),
    (["--lr", "inf"], "--lr: must be a finite number, got inf"),
    (["--seed", "-1"], "--seed: must be in [0, 4294967295], got -1"),
    (["--batch-size", "0"], "--batch-size: must be in [1, inf), got 0"),
    (["--eval-every", "0"], "--eval-every: must be in [1, inf), got 0"),
    (["--checkpoint-minutes", "nan"], "--checkpoint-minutes: must be a finite number, got nan"),
    (["--reprob", "1.5"], "--reprob: must be in [0, 1], got 1.5"),
]


@pytest.mark.parametrize("options", [SearchOptions, TrainOptions])
@pytest.mark.parametrize("argv, message", WRONG)
def test_numbers_without_sense(options, argv, message, capsys):
    assert refused(capsys, *argv, options=options) == f"argument {message}"


@pytest.mark.parametrize(
    "options, argv, message",
    [
        (SearchOptions, ["--max-minutes", "nan"], "--max-minutes: must be a finite number, got nan"),
        (SearchOptions, ["--max-minutes", "0"], "--max-minutes: must be in (0, inf), got 0"),
        (SearchOptions, ["--population", "0"], "--population: must be in [1, inf), got 0"),
        (SearchOptions, ["--mutation-prob", "7"], "--mutation-prob: must be in (0, 1], got 7"),
        (SearchOptions, ["--prescreen", "1"], "--prescreen: must be in [0, 1), got 1"),
        (SearchOptions, ["--num-archs", "0"], "--num-archs: must be in [1, inf), got 0"),
        (SearchOptions, ["--accumulate", "0"], "--accumulate: must be in [1, inf), got 0"),
        (SearchOptions, ["--patch-weight", "-1"], "--patch-weight: must be in [0, inf), got -1"),
        (SupernetOptions, ["--val-per-class", "0"], "--val-per-class: must be in [1, inf), got 0"),
        (TrainOptions, ["--ema-decay", "1"], "--ema-decay: must be in [0, 1), got 1"),
        (TrainOptions, ["--temperature", "0"], "--temperature: must be in (0, inf), got 0"),
        (TrainOptions, ["--mean", "0.5", "nan", "0.5"], "--mean: must be a finite number, got nan"),
        (EvaluateOptions, ["--crop-pct", "0"], "--crop-pct: must be in (0, 1], got 0"),
    ],
)
def test_numbers_without_sense_of_one_job(options, argv, message, capsys):
    assert refused(capsys, *argv, options=options) == f"argument {message}"


@pytest.mark.parametrize("recipe", [search, train])
def test_nothing_is_begun(recipe, config, tmp_path, capsys):
    given = config("weight-decay: null")
    with pytest.raises(SystemExit) as end:
        recipe.main([*given, "--output", str(tmp_path / "runs")])
    assert end.value.code == 2 and not (tmp_path / "runs").exists()
    assert capsys.readouterr().err.strip().endswith(f"--config {given[1]}: weight-decay needs a value, got none")


def test_every_option_has_help_and_every_number_a_range():
    for options in (SearchOptions, TrainOptions, EvaluateOptions):
        for field in dataclasses.fields(options):
            assert field.metadata["help"], field.name
            if any(kind in str(field.type) for kind in ("int", "float")):
                assert field.metadata["range"], field.name
            json.dumps(field.default if field.default is not dataclasses.MISSING else field.default_factory())
