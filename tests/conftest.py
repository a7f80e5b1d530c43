"""Fixtures of several test files."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

# One thread per worker; set before torch is imported, and for the programs that tests start.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def golden() -> Callable[[str], Path]:
    """Path of a file of reference tensors by its name; skips where these are not at hand."""

    def path(name: str) -> Path:
        file = Path(__file__).resolve().parents[2] / "shared" / "golden" / f"{name}.safetensors"
        if not file.is_file():
            pytest.skip(f"needs reference tensors, ../shared/golden/{file.name} from the repository's root")
        return file

    return path
