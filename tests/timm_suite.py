"""timm's own model tests on the names that this package registers.

    python tests/timm_suite.py                                # all of them: hours on a CPU
    python tests/timm_suite.py "sret_*" "vit_res*"            # names, with wildcards
    python tests/timm_suite.py --pytest "-n 2 -k fx -v" "*"   # options of pytest

The tests are those of the source distribution of the installed timm, from the package index (pip's settings hold). They
choose models by name and by module; here `timm.list_models`, which they ask for both, knows our names alone: none is
left out for its module, and our token models count as timm's do. Nothing else is changed. Exits with pytest's status.
"""

import argparse
import fnmatch
import os
import shlex
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import pytest
import timm
import torch

import timm_resnas  # noqa: F401  (registers the models)

VARIABLE = "TIMM_RESNAS_SUITE_NAMES"  # hands the names to pytest's workers
TOKEN_MODELS = "vit_*"  # in the patterns by which timm's tests know token models
_list_models = timm.list_models


def our_names(patterns: list[str]) -> list[str]:
    """Registered names that fit a pattern."""
    names = [n for n in _list_models() if timm.model_entrypoint(n).__module__.startswith("timm_resnas.")]
    return [n for n in names if any(fnmatch.fnmatch(n, p) for p in patterns)]


def is_token_model(name: str) -> bool:
    """Whether features are tokens [B, N, C], not maps."""
    model = timm.create_model(name, device="meta").eval()
    images = torch.zeros(1, *timm.get_pretrained_cfg(name).input_size, device="meta")
    return model.forward_features(images).ndim == 3


def list_models(filter="", module="", pretrained=False, exclude_filters="", **_):
    """In place of `timm.list_models`, for timm's tests."""
    chosen, left_out = ([f] if isinstance(f, str) else list(f) for f in (filter or "*", exclude_filters or ()))
    names = os.environ[VARIABLE].split()
    tokens = {n for n in names if TOKEN_MODELS in [*chosen, *left_out] and is_token_model(n)}

    def fits(name: str, patterns: list[str]) -> bool:
        return (TOKEN_MODELS in patterns and name in tokens) or any(fnmatch.fnmatch(name, p) for p in patterns)

    names = [n for n in names if fits(n, chosen) and not fits(n, left_out)]
    return [n for n in names if not pretrained or timm.get_pretrained_cfg(n).has_weights]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests of timm's own models are left out."""
    names = set(os.environ[VARIABLE].split())
    ours = [i for i in items if getattr(i, "callspec", None) and i.callspec.params.get("model_name") in names]
    config.hook.pytest_deselected(items=[i for i in items if i not in ours])
    items[:] = ours


def pytest_configure() -> None:
    """Before the tests are imported."""
    timm.list_models = list_models


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=["*"], help="patterns of registered names (default: all)")
    parser.add_argument(
        "--pytest", default="-q -rfE -W ignore", metavar="OPTIONS", help="options of pytest (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    if not (names := our_names(args.names)):
        parser.error(f"no registered name fits {' or '.join(args.names)}")
    with tempfile.TemporaryDirectory() as folder:
        pip = f"-m pip download --quiet --no-deps --no-binary :all: timm=={timm.__version__}"
        subprocess.run([sys.executable, *pip.split()], cwd=folder, check=True)
        (archive,) = Path(folder).glob("timm-*.tar.gz")
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
        root = Path(folder, archive.name.removesuffix(".tar.gz"))
        tests = [sys.executable, "-m", "pytest", "-p", Path(__file__).stem, "tests/test_models.py"]
        path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
        print(f"timm {timm.__version__}, {len(names)} names: {' '.join(names)}", flush=True)
        env = {**os.environ, "PYTHONPATH": path, VARIABLE: " ".join(names)}
        return subprocess.run([*tests, *shlex.split(args.pytest)], cwd=root, env=env).returncode


if __name__ == "__main__":
    sys.exit(main())
