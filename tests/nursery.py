"""Runs a recipe as a user does, killed or not, in one process or two, without paying for its imports each time."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

RECIPES = Path(__file__).resolve().parents[1] / "recipes"

# A process that has imported the recipe and forks one that runs it, for each line of options that it reads.
NURSERY = """
import importlib, json, os, sys, traceback
sys.path.insert(0, sys.argv[1])
import matplotlib.backends.backend_agg
recipe = importlib.import_module(sys.argv[2])
recipe.load_splits("digits")  # imports what it needs
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
        recipe.main(job["argv"])
    except SystemExit as e:
        code = e.code
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code or 0)
"""


class Nursery:
    """Starts runs of a recipe; a run's folder is given, its output goes to <folder>.log.

    Args:
        recipe: The recipe's module; it has `main(argv)` and `load_splits`.
        options: Options of every run.
    """

    def __init__(self, recipe: str, options: list[str]):
        self.options = options
        self.process = subprocess.Popen(
            [sys.executable, "-c", NURSERY, str(RECIPES), recipe],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    def ask(self, **job):
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, folder, *options, **env):
        argv = [*self.options, "--output", str(folder.parent), "--name", folder.name, *options]
        return self.ask(argv=argv, env=env, log=f"{folder}.log")

    def start_two(self, folder, *options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        common["GLOO_SOCKET_IFNAME"] = "lo"
        return [self.start(folder, *options, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]

    def wait(self, pid):
        return self.ask(wait=pid)

    def run(self, folder, *options):
        assert self.wait(self.start(folder, *options)) == 0, Path(f"{folder}.log").read_text()

    def run_two(self, folder, *options):
        assert [self.wait(p) for p in self.start_two(folder, *options)] == [0, 0], Path(f"{folder}.log").read_text()

    def close(self):
        self.process.stdin.close()
        self.process.stdout.close()
        self.process.wait()


def checkpoints(folder):
    return sorted((folder / "state" / "training").glob("step-*.pt"))


def wait_for_step(folder, step, pid):
    """Until a checkpoint of this step or a later one is there."""
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        found = checkpoints(folder)
        if found and int(found[-1].stem[5:]) >= step:
            return
        os.kill(pid, 0)  # it runs
        time.sleep(0.005)
    raise TimeoutError(Path(f"{folder}.log").read_text())
