"""A run's folder: its lock, what is damaged in it, its checkpoints, and how a program ends below a launcher."""

import os
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from recipe_server import ROOT, Recipe, wait_until
from torch import nn

from recipes import search, supernet
from recipes import train as recipe
from timm_resnas.engine.checkpoints import Checkpoints, check_weights
from timm_resnas.engine.options import option, parse
from timm_resnas.engine.run import (
    Deadline,
    Run,
    RunError,
    atomic_write,
    cli_errors,
    dataset_name,
    read_json,
    run_name,
)
from timm_resnas.engine.settings import RunOptions, SearchOptions

ALONE = types.SimpleNamespace(is_main_process=True, num_processes=1, wait_for_everyone=lambda: None)


@dataclass(frozen=True)
class Options(RunOptions):
    """of the test"""

    epochs: int = option(3, "training epochs")


def made(folder, **given):
    return Run(Options(output=str(folder), name="run", **given), ALONE, "")


@pytest.fixture
def run(tmp_path):
    run = made(tmp_path)
    run.begin()
    return run


# -- the folder -------------------------------------------------------------------------------------------------------


def test_a_run_is_continued_with_the_same_options(tmp_path):
    first = made(tmp_path)
    assert not first.resumed and not (tmp_path / "run").exists()  # nothing is written before all is checked
    first.begin()
    del first
    assert made(tmp_path, threads=4).resumed
    with pytest.raises(RunError, match=r"holds a run with other options: seed 0 \(now 1\), epochs 3 \(now 5\)\. Give"):
        made(tmp_path, epochs=5, seed=1)


def test_only_one_run_at_a_time(run, tmp_path):
    owner = f"process {os.getpid()} on .*, since {time.strftime('%Y')}-.. ?.*"
    with pytest.raises(RunError, match=rf"{run.folder} is in use by {owner}; wait until it ends, end it, or give"):
        made(tmp_path)
    other = Run(Options(output=str(tmp_path), name="other"), ALONE, "")  # another folder is free
    other.begin()


def test_a_lock_ends_with_its_process(tmp_path, recipe_server):
    space = str(Path(__file__).with_name("nano.json"))
    options = ["--cpu", "--threads", "1", "--space", space, "--img-size", "16", "--num-archs", "2", "--epochs", "90"]
    runs = Recipe(recipe_server, "supernet", options)
    pid = runs.start(tmp_path / "run")
    wait_until((tmp_path / "run" / "config.yaml").exists, pid, tmp_path / "run.log")
    assert runs.wait(runs.start(tmp_path / "run")) == 2
    (line,) = re.findall("^supernet.py: error: .*$", Path(tmp_path / "run.log").read_text(), re.M)
    assert f"is in use by process {pid} on " in line
    runs.kill(pid)
    pid = runs.start(tmp_path / "run", "--checkpoint-steps", "1")
    wait_until(lambda: list((tmp_path / "run").glob("state/training/step-*.pt")), pid, tmp_path / "run.log")
    runs.kill(pid)


@pytest.mark.parametrize("text", ["[[1], [3]]\n", "[[1], [2]", ""])
def test_damaged_parts_are_named(text, tmp_path):
    run = made(tmp_path)
    assert run.cached("data.json", lambda: [[1], [2]]) == [[1], [2]]
    run.begin()
    del run
    run = made(tmp_path)
    assert run.cached("data.json", lambda: pytest.fail("it is kept")) == [[1], [2]]
    (run.state / "data.json").write_text(text)
    with pytest.raises(RunError, match=f"{run.state / 'data.json'} is damaged: it is not what this run wrote"):
        run.cached("data.json", list)


@pytest.mark.parametrize("data", [b"", b"- 3\n", b"a: [", b"\xff\xfe", b"[" * 3000])
def test_a_damaged_configuration_is_named(data, tmp_path):
    made(tmp_path).begin()
    (tmp_path / "run" / "config.yaml").write_bytes(data)
    with pytest.raises(RunError, match=f"{tmp_path / 'run' / 'config.yaml'} is damaged"):
        made(tmp_path)


@pytest.mark.parametrize("data", [b"", b"{", b"\xff", b"[" * 300_000])
def test_json_that_cannot_be_read_is_named(data, tmp_path):
    path = tmp_path / "some.json"
    with pytest.raises(RunError, match=f"{path}: No such file"):
        read_json(path)
    path.write_bytes(data)
    with pytest.raises(RunError, match=f"{path} is damaged: it is not JSON") as error:
        read_json(path)
    assert len(str(error.value)) < 300


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(KeyError), atomic_write(path) as fresh:
        fresh.write_text("half")
        raise KeyError
    assert path.read_text() == "old"
    with atomic_write(path) as fresh:
        fresh.write_text("new")
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("text", ["[]", "{}", '{"test": 3}', "{"])
def test_damaged_results_of_a_training_are_named(text, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0\n")
    (tmp_path / "run" / "results.json").write_text(text)
    with pytest.raises(SystemExit) as end:
        recipe.main(["--cpu", "--threads", "1", "--output", str(tmp_path), "--name", "run"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and f"{tmp_path / 'run' / 'results.json'} is damaged" in line


def test_names():
    assert [dataset_name(d) for d in ("digits", "imagefolder:/a/photos", "hf:owner/set")] == [
        *("digits", "imagefolder-photos", "hf-set")
    ]


TINY = str(ROOT / "recipes" / "configs" / "vit_resnas_tiny_supernet.yaml")
SMALL = str(ROOT / "recipes" / "configs" / "vit_resnas_small.yaml")


@pytest.mark.parametrize(
    "program, argv, name",
    [
        (search, "", "digits-micro"),
        (search, "--epochs 12 --threads 3 --max-minutes 5 --workers 2", "digits-micro"),  # a default, free ones
        (search, "--epochs 20 --seed 3", "digits-micro-seed=3-epochs=20"),
        (search, "--seed 3 --epochs 20", "digits-micro-seed=3-epochs=20"),
        (search, "--budget macs=40%,params=2M", "digits-micro-budget=macs40pct+params2M"),
        (search, "--lr 2e-3 --min-lr 1e-6 --img-size 28 32", "digits-micro-img_size=28+32-min_lr=1e-06"),
        (search, "--clip-grad 1 --no-sync-bn --dataset hf:a/b", "hf-b-micro-clip_grad=1-sync_bn=false"),
        (search, "--supernet runs/mine/supernet/ --search random", "digits-mine-supernet-search=random"),
        (search, "--supernet hf-hub:owner/net --space a/b.json", "digits-owner-net-b"),
        (supernet, "--sampler sandwich", "digits-micro-supernet-sampler=sandwich"),
        (supernet, f"--config {TINY} --dataset imagefolder:i", "imagefolder-i-vit_resnas_tiny-supernet"),
        (supernet, f"--config {TINY} --epochs 120 --lr 0.002", "digits-vit_resnas_tiny-supernet-lr=0.002"),
        (recipe, "", "digits-vit_resnas"),
        (recipe, "--seed 3", "digits-vit_resnas-seed=3"),
        (recipe, "--model runs/digits-micro/best --pretrained", "digits-digits-micro-pretrained=true"),
        (recipe, f"--config {SMALL} --dataset digits --val-per-class 25", "digits-vit_resnas_small-val_per_class=25"),
        (recipe, f"--config {SMALL} --dataset digits --model cait_xs24_224", "digits-cait_xs24_224-vit_resnas_small"),
    ],
)  # fmt: skip
def test_a_run_is_named_after_what_was_changed(program, argv, name, tmp_path, capsys):
    """Each recipe looks for its run in that folder: the error names what is damaged there."""
    (tmp_path / name).mkdir()
    (tmp_path / name / "config.yaml").write_text("damaged")
    with pytest.raises(SystemExit):
        program.main(["--cpu", *argv.split(), "--output", str(tmp_path)])
    assert f"{tmp_path / name / 'config.yaml'} is damaged" in capsys.readouterr().err


def named(*argv):
    return run_name(parse(SearchOptions, list(argv)), ("digits", "micro"), shown=("dataset",))


def test_names_that_do_not_show_all_end_with_a_digest():
    tables = [named("--latency-table", table) for table in ("a/b.json", "a_b.json", "a:b.json")]
    assert tables[1] == "digits-micro-latency_table=a_b.json" and len(set(tables)) == 3
    for table in (tables[0], tables[2]):
        assert re.fullmatch(r"digits-micro-latency_table=a_b\.json-[0-9a-f]{8}", table)
    names = ("seed", "epochs", "batch-size", "num-archs", "population", "iterations", "parents")
    many = [f"--{name}=77" for name in names]
    long = [named(*many, "--mutations", n) for n in "123"]
    shown = "digits-micro-seed=77-epochs=77-batch_size=77-num_archs=77-population=77-iterations=77"  # whole pairs
    assert all(re.fullmatch(rf"{shown}-[0-9a-f]{{8}}", name) for name in long)
    assert len(set(long)) == 3 and long[0] == named(*many, "--mutations", "1")
    deep = run_name(parse(SearchOptions, ["--seed", "3"]), ("digits", "x" * 200), shown=())
    assert re.fullmatch(r"digits-x{43}-seed=3-[0-9a-f]{8}", deep)


def test_a_run_is_named_after_its_configuration(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("epochs: 5\nworkers: 2\n")
    assert named("--config", str(file)) == "digits-micro-mine"
    assert named("--config", str(file), "--epochs", "12") == "digits-micro-mine-epochs=12"
    kept = tmp_path / "digits-micro-seed=3" / "config.yaml"  # a run's own continues it
    kept.parent.mkdir()
    kept.write_text("seed: 3\n")
    assert named("--config", str(kept)) == "digits-micro-seed=3"
    assert named("--config", str(kept), "--epochs", "7") == "digits-micro-seed=3-epochs=7"


def test_a_deadline(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    clock, free = Deadline(0.5), Deadline()
    now[0] = 125.0
    assert clock.seconds() == 25 and not clock.over() and not clock.over(extra=5) and clock.over(extra=5.1)
    now[0] = 131.0
    assert clock.over() and not free.over(extra=1e9)


# -- checkpoints ------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoints(run):
    kept = Checkpoints(ALONE, run)
    for step in (5, 10, 15):
        kept.save(step, {"raw": {"w": torch.full((50,), float(step))}})
    return kept


def test_the_last_two_are_kept(checkpoints):
    names = ("step-000000010", "step-000000015")
    assert {p.name for p in checkpoints.folder.iterdir()} == {f"{n}.{end}" for n in names for end in ("pt", "sha256")}
    state = checkpoints.newest()
    assert state["step"] == 15 and state["raw"]["w"].eq(15).all()


def damage(path, how):
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[data.index(torch.tensor(15.0).numpy().tobytes())] ^= 1  # a weight: torch.load would not notice
    elif how == "short":
        data = data[:-100]
    elif how == "empty":
        data = b""
    path.write_bytes(data)
    if how == "no digest":
        path.with_suffix(".sha256").unlink()


@pytest.mark.parametrize("how", ["flipped", "short", "empty", "no digest"])
def test_a_damaged_checkpoint_gives_way_to_the_one_before(how, checkpoints, capsys):
    newest = checkpoints.folder / "step-000000015.pt"
    damage(newest, how)
    state = checkpoints.newest()
    assert state["step"] == 10 and state["raw"]["w"].eq(10).all()
    line = f"note: {newest} is damaged (its digest is not what was written); continuing from the one before\n"
    assert capsys.readouterr().out == line and not newest.exists()


def test_a_checkpoint_under_another_name_is_not_trusted(checkpoints, capsys):
    for end in ("pt", "sha256"):
        (checkpoints.folder / f"step-000000015.{end}").rename(checkpoints.folder / f"step-000000020.{end}")
    assert checkpoints.newest()["step"] == 10
    assert "is damaged (it holds step 15)" in capsys.readouterr().out


def test_a_checkpoint_that_would_run_code(checkpoints, capsys):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(checkpoints.folder / "ran"),)

    checkpoints.save(25, {"raw": Evil()})
    assert checkpoints.newest()["step"] == 15
    assert "step-000000025.pt is damaged" in capsys.readouterr().out and not (checkpoints.folder / "ran").exists()


def test_all_damaged(checkpoints):
    for path in checkpoints.folder.glob("*.pt"):
        damage(path, "short")
    assert checkpoints.newest() is None


def test_weights_that_are_not_finite():
    net = nn.Linear(2, 2)
    check_weights(net, 1)
    with torch.no_grad():
        net.bias[1] = torch.inf
    with pytest.raises(RunError, match="weights are not finite at step 7; start another run .* lower --lr"):
        check_weights(net, 7)


# -- how a program ends -----------------------------------------------------------------------------------------------


def test_errors_are_one_line(capsys, monkeypatch, tmp_path):
    def ends(error):
        with pytest.raises(SystemExit) as end, cli_errors("some.py"):
            raise error
        return end.value.code, capsys.readouterr().err

    assert ends(RunError("what is wrong")) == (2, "some.py: error: what is wrong\n")
    assert ends(ImportError("no pymoo")) == (2, "some.py: error: no pymoo\n")
    assert ends(OSError(28, "No space left on device", "/a/file")) == (
        *(2, "some.py: error: /a/file: No space left on device\n"),
    )
    assert ends(ValueError()) == (2, "some.py: error: ValueError\n")
    code, said = ends(KeyboardInterrupt())
    assert code == 130 and said == "some.py: interrupted; the same command continues the run\n"
    with pytest.raises(KeyError), cli_errors("some.py"):  # a fault of ours keeps its traceback
        raise KeyError
    monkeypatch.setenv("TIMM_RESNAS_DEBUG", "1")
    with pytest.raises(RunError), cli_errors("some.py"):
        raise RunError


def test_an_output_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = ["--cpu", "--threads", "1", "--model", "vit_resnas", "--img-size", "28", "--output", str(tmp_path / "file")]
    with pytest.raises(SystemExit) as end:
        recipe.main([*given, "--name", "run"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.startswith("train.py: error: ") and str(tmp_path / "file") in line


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_output(tmp_path, capsys):
    (tmp_path / "runs").mkdir(mode=0o500)
    with pytest.raises(SystemExit) as end:
        recipe.main(["--cpu", "--threads", "1", "--output", str(tmp_path / "runs"), "--name", "run"])
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2 and line.endswith(f"{tmp_path / 'runs' / 'run'}: Permission denied")


LAUNCHED = """
import sys, time
from timm_resnas.engine.launcher import end_with_launcher, fail

end_with_launcher()
if sys.argv[1] == "wait":
    print("ready", flush=True)
    time.sleep(100)
elif sys.argv[1] == "fail":
    fail("some.py", "error: what is wrong")  # as cli_errors does, which needs torch
else:
    from timm_resnas.engine.run import RunError, cli_errors

    with cli_errors("some.py"):
        raise RunError("what is wrong")
"""


PROGRAM = [str(Path(sys.executable).with_name("accelerate")), "launch"]
MODULE = ["-m", "accelerate.commands.launch"]


def launch(tmp_path, launcher, *given):
    (tmp_path / "some.py").write_text(LAUNCHED)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, *launcher, str(tmp_path / "some.py"), *given]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": path}
    )


needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@needs_linux
@pytest.mark.parametrize("processes", [1, 2])
def test_the_launcher_adds_nothing_to_an_error(processes, tmp_path):
    several = ["--multi_gpu", "--num_processes", "2"] if processes == 2 else []
    process = launch(tmp_path, [*PROGRAM, *several], "error" if processes == 1 else "fail")
    _, err = process.communicate(timeout=100)
    ours = [line for line in err.splitlines() if "Traceback" in line or "error" in line.lower()]
    assert ours == ["some.py: error: what is wrong"] and process.returncode != 0


@needs_linux
def test_the_trainer_ends_with_its_launcher(tmp_path):
    process = launch(tmp_path, MODULE, "wait")
    assert process.stdout.readline() == "ready\n"
    (child,) = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=20)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not Path(f"/proc/{child}").exists()
