"""Programs in processes of their own, and recipes as a user runs them, without importing torch for each of them."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "recipes"

# A process that has imported what its programs need, and forks a process for each program that it reads.
SERVER = """
import json, os, sys, traceback
exec(sys.argv[1])
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
    os.chdir(job["cwd"])
    os.environ.clear()
    os.environ.update(job["env"])
    for number, path in enumerate((os.devnull, job["out"], job["err"])):
        os.dup2(os.open(path, os.O_CREAT | os.O_RDWR | os.O_APPEND), number)
    sys.argv = ["-c", *job["args"]]
    code = 0
    try:
        exec(job["code"], {"__name__": "__main__"})
    except SystemExit as e:
        code = e.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush(), sys.stderr.flush()
    os._exit(code)
"""


class ForkServer:
    """Python programs, each in a process of its own that need not import what all of them do.

    Args:
        imports: Statements that run once, before any program.
    """

    def __init__(self, imports):
        self.imports, self.process = imports, None

    def ask(self, **job):
        if self.process is None:  # only where a test needs it
            path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
            self.process = subprocess.Popen(
                [sys.executable, "-W", "error::ImportWarning", "-c", SERVER, self.imports],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path},
            )
        self.process.stdin.write(json.dumps(job) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def start(self, code, *args, env, out, err, cwd=ROOT):
        """Start a program, as ``python -c code args``; returns its process's id."""
        return self.ask(code=code, args=args, env=env, out=str(out), err=str(err), cwd=str(cwd))

    def wait(self, pid):
        """Exit status of a program, negative for a signal."""
        return self.ask(wait=pid)

    def run(self, code, *args, env=None):
        """Run a program to its end, as `subprocess.run` does that captures text; ``env`` is the whole environment."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder) / "out", Path(folder) / "err"
            status = self.wait(self.start(code, *args, env=dict(os.environ) if env is None else env, out=out, err=err))
            return subprocess.CompletedProcess(code, status, out.read_text(), err.read_text())

    def close(self):
        if self.process is not None:
            self.process.stdin.close()
            self.process.stdout.close()
            self.process.wait()


def program(recipe):
    """A recipe as a program of a `ForkServer`."""
    return f"import sys; from recipes.{recipe} import main; main(sys.argv[1:])"


class Recipe:
    """Starts runs of a recipe; a run's folder is given, what it prints goes to <folder>.log.

    Args:
        server: The fixture `recipe_server`.
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
        log = f"{folder}.log"
        return self.server.start(program(self.recipe), *argv, env={**os.environ, **env}, out=log, err=log)

    def start_two(self, folder, *options):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        common = dict(WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        common["GLOO_SOCKET_IFNAME"] = "lo"
        return [self.start(folder, *options, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(2)]

    def wait(self, pid):
        return self.server.wait(pid)

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
