"""Fixtures of several test files."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from recipe_server import ForkServer

# One thread per worker; set before torch is imported, and for the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


RECIPES_NEED = """
import importlib, sys
import matplotlib.backends.backend_agg
from matplotlib.figure import Figure
from timm_resnas.data import load_splits
from timm_resnas.engine import baseline, plots
# What every run ends with takes a second: fewer trees, and pictures stay blank, which tests have report.py draw.
baseline.TREES = 10
plots.save = lambda figure, path: Figure(figsize=figure.get_size_inches()).savefig(path, dpi=130, format="png")
for name in ("evaluate", "report", "search", "shrink", "supernet", "train"):
    importlib.import_module(f"timm_resnas.engine.{name}")
load_splits("digits")  # imports what it needs
sys.modules["timm_resnas.engine.shrink"].ROUNDS = 1  # no test looks at the latencies of a report
"""


@pytest.fixture(scope="session")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Path of a file of reference tensors by its name; skips where these are not at hand."""
    from oracle import GOLDEN, restore

    folder = tmp_path_factory.mktemp("golden")

    def path(name: str) -> Path:
        restored = folder / f"{name}.safetensors"
        if restored.is_file():
            return restored
        if (GOLDEN / restored.name).is_file():
            restore(GOLDEN / restored.name, restored)
            return restored
        file = Path(__file__).resolve().parents[2] / "shared" / "golden" / restored.name
        if not file.is_file():
            pytest.skip(f"needs reference tensors, ../shared/golden/{file.name} from the repository's root")
        return file

    return path


def serve(imports: str) -> Iterator[ForkServer]:
    server = ForkServer(imports)
    yield server
    server.close()


@pytest.fixture(scope="session")
def python() -> Iterator[ForkServer]:
    """New Python processes that have imported torch and torchvision, which takes seconds, and nothing else of ours."""
    yield from serve("import torch, torchvision")


@pytest.fixture(scope="session")
def recipe_server() -> Iterator[ForkServer]:
    """New Python processes that have imported what recipes need."""
    yield from serve(RECIPES_NEED)


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Each recipe that runs in the test's own process starts Accelerate as a program does."""
    yield
    if "accelerate.state" in sys.modules:
        state = sys.modules["accelerate.state"]
        state.AcceleratorState._reset_state(reset_partial_state=True)
        state.PartialState._reset_state()
