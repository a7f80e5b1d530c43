"""What ``import timm_resnas`` brings, in which order, and when."""

import subprocess
import sys

import pytest

OPTIONAL = ("accelerate", "datasets", "matplotlib", "sklearn", "pymoo", "onnx", "onnxruntime")
HEAVY = ("torch", "timm", "huggingface_hub", "yaml", *OPTIONAL)  # timm brings yaml


@pytest.fixture
def run(python):
    """Runs code in a process of its own, where torch is imported already; its errors are the test's."""

    def in_process(code: str) -> None:
        done = python.run(code)
        assert done.returncode == 0, done.stderr

    return in_process


def run_alone(code: str) -> None:
    """As `run`, where nothing is imported yet."""
    done = subprocess.run([sys.executable, "-W", "error::ImportWarning", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


REGISTERED = f"""
import sys, timm
names = {{"vit_resnas_tiny", "vit_resnas_supernet", "sret_tiny", "exmobilevit_576", "cait_study"}}
assert names <= set(timm.list_models()), names - set(timm.list_models())
assert not [f for f in sys.meta_path if type(f).__module__.startswith("timm_resnas")]
assert not [m for m in {OPTIONAL} if m in sys.modules], [m for m in {OPTIONAL} if m in sys.modules]
for name, module in list(sys.modules.items()):
    if name.partition(".")[0] in ("timm", "timm_resnas"):
        assert not type(module.__spec__.loader).__module__.startswith("timm_resnas"), name
        parent, _, child = name.rpartition(".")
        assert not parent or getattr(sys.modules[parent], child, None) is not None, name
"""


@pytest.mark.parametrize(
    "first",
    [
        "import timm, timm_resnas",
        # a spec that is looked for without an import does not use up the finder
        "import timm_resnas, importlib.util as u; assert u.find_spec('timm').loader.get_code('timm'); import timm",
        "import timm_resnas; from timm.models import create_model; create_model('sret_tiny', device='meta')",
        "import timm_resnas.nas.space as s; assert s.SearchSpace.preset('micro')",
        "import timm_resnas.models.sret",
        "import timm_resnas as t; t.models.vit_resnas, t.Arch, t.ArchError, t.load, t.push, t.save_pretrained",
    ],
)
def test_models_are_registered_whatever_comes_first(run, first):
    run(f"{first}\n{REGISTERED}")


def test_alone_it_imports_neither_torch_nor_timm():
    run_alone(
        f"""
import sys, importlib
import timm_resnas, timm_resnas.engine.settings, timm_resnas.engine.options
importlib.reload(timm_resnas)
assert {{"Arch", "ArchError", "load", "push", "save_pretrained", "__version__"}} <= set(dir(timm_resnas))
assert isinstance(timm_resnas.__version__, str)
try:
    timm_resnas.nothing
except AttributeError as e:
    assert "nothing" in str(e)
else:
    raise AssertionError
assert not [m for m in {HEAVY} if m in sys.modules], [m for m in {HEAVY} if m in sys.modules]
assert sum(type(f).__module__ == "timm_resnas._register" for f in sys.meta_path) == 1
"""
    )


@pytest.mark.parametrize(("first", "broken"), [("timm", "timm_resnas.models.sret"), ("timm_resnas.nas.space", "torch")])
def test_a_failed_import_says_why_and_can_be_tried_again(run, first, broken):
    (run_alone if broken == "torch" else run)(
        f"""
import sys, importlib
import timm_resnas
sys.modules[{broken!r}] = None  # Python's way to forbid an import
for _ in range(2):
    try:
        importlib.import_module({first!r})
    except ImportError as e:
        assert {broken!r} in str(e), e
    else:
        raise AssertionError("imported")
    assert {first!r} not in sys.modules
del sys.modules[{broken!r}]
importlib.import_module({first!r})
{REGISTERED}"""
    )


def test_threads_that_import_at_once(run):
    run(
        f"""
import sys, importlib, threading
import timm_resnas
errors, start = [], threading.Barrier(3)
def load(name):
    start.wait()
    try:
        importlib.import_module(name)
    except BaseException as e:
        errors.append((name, e))
threads = [threading.Thread(target=load, args=(n,)) for n in ("timm", "timm", "timm.models")]
for t in threads: t.start()
for t in threads: t.join()
assert not errors, errors
{REGISTERED}"""
    )
