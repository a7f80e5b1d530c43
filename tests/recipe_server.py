"""Runs recipes as a user does, killed or not, in one process or two, without importing torch for every run."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"

# A process that has imported what recipes need, and forks a process for each run that it reads.
SERVER = """
import importlib, json, os, sys, traceback
import matplotlib.backends.backend_agg
from timm_resnas.data import load_splits
for name in ("evaluate", "report", "search", "shrink", "supernet", "train"):
    importlib.import_module(f"timm_resnas.engine.{name}")
load_splits("digits")  # imports what it needs
for line in sys.stdin:
    job = json.loads(line)
    if "wait" in job:
        status = os.waitpid(job["wait"], 0)[1]
        print(os.waitstatus_to_exitcode(status), flush=True)
        continue
    pid = os.fork()
    if pid:
        print(pid, flush=True)
        continue
    os.environ.update(job["env"])
    log = os.open(job["log"], os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1), os.dup2(log, 2)
    code = 0
    try:
        importlib.import_module(f"recipes.{job['recipe']}").main(job["argv"])
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)
"""


class RecipeServer:
    """A fork server for all recipes of a test process; see the fixture `recipe_server`."""

    def __init__(self):
        self.process = None

    def ask(self, **job):
        if self.process is None:  # only where a test needs it
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            self.process = subprocess.Popen(
                [sys.executable, "-c", SERVER],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            )
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


class Recipe:
    """Starts runs of a recipe; a run's folder is given, what it prints goes to <folder>.log.

    Args:
        server: The fork server.
        recipe: The recipe's name.
        options: Options of every run.
        named: Whether a run has --output and --name.
    """

    def __init__(self, server, recipe, options, named=True):
        self.server, self.recipe, self.options, self.named = server, recipe, options, named

    def start(self, folder, *options, **env):
        folder.parent.mkdir(parents=True, exist_ok=True)
        argv = [*self.options, *options]
        if self.named:
            argv += ["--output", str(folder.parent), "--name", folder.name]
        return self.server.ask(recipe=self.recipe, argv=argv, env=env, log=f"{folder}.log")

    def start_two(self, folder, *options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        common["GLOO_SOCKET_IFNAME"] = "lo"
        return [self.start(folder, *options, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]

    def wait(self, pid):
        """Exit status of a run, negative for a signal."""
        return self.server.ask(wait=pid)

    def kill(self, *pids):
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        for pid in pids:
            assert self.wait(pid) == -signal.SIGKILL

    def run(self, folder, *options):
        """Run to the end; returns what the folder's log holds."""
        status = self.wait(self.start(folder, *options))
        log = Path(f"{folder}.log").read_text()
        assert status == 0, log
        return log

    def run_two(self, folder, *options):
        statuses = [self.wait(p) for p in self.start_two(folder, *options)]
        log = Path(f"{folder}.log").read_text()
        assert statuses == [0, 0], log
        return log


def parts(folder):
    """Indices that a run trains on, and those that it validates or scores on."""
    kept = json.loads((folder / "state" / "data.json").read_text())
    return kept["train"], kept["val"]


def checkpoints(folder):
    return sorted((folder / "state" / "training").glob("step-*.pt"))


def wait_until(what, pid, log):
    """Until ``what()`` is true, while the process runs."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        if what():
            return
        if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
            break
        time.sleep(0.003)
    raise AssertionError(Path(log).read_text())


def wait_for_step(folder, step, pid):
    """Until a checkpoint of this step or a later one is there."""
    wait_until(lambda: any(int(p.stem[5:]) >= step for p in checkpoints(folder)), pid, f"{folder}.log")
