"""Hostile and damaged folders: refused quickly, in little memory."""

import json
import os
import pickle
import re
import shutil
import sys
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from hub_client import ROOT, fetch, run_python
from safetensors.torch import load_file, save_file

from timm_resnas.hub import CONFIG, WEIGHTS, HubError, bounds, checks, load, push, save_pretrained
from timm_resnas.hub.bounds import bounded

# the client's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def header(tensors, data=b"", length=None):
    text = json.dumps(tensors).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def args(**changes):
    return lambda config: config["model_args"].update(changes)


def cfg(**changes):
    return lambda config: config["pretrained_cfg"].update(changes)


def top(**changes):
    return lambda config: config.update(changes)


def vit(**model_args):
    return top(architecture="vit_tiny_patch16_224", model_args=model_args)


def tiny_vit(**model_args):
    def change(config):
        config.update(architecture="tiny_vit_5m_224", model_args=model_args)
        config["pretrained_cfg"]["fixed_input_size"] = False

    return change


WIDE = [[4, 65536], *[[1, [65536, 1000, 64], [65536, 65536], 1]] * 500, [2, 65536, 65536]]


DEEP = "[" * 100_000

# name: (what is done to config.json, or its text; what stands in model.safetensors; what the message says)


HOSTILE = {
    "wide network": (args(network_def=WIDE), None, "more than 8,000,000,000 parameters|a tensor of"),
    "terabyte of classes": (args(num_classes=10**12), None, "num_classes"),
    "huge width": (args(network_def="((4,99999999),(2,99999999,10))"), None, "must be between 1 and 65536"),
    "negative width": (args(network_def="((4,-8),(2,-8,10))"), None, "must be between 1 and 65536"),
    "width as text": (args(network_def=[[4, "24"], [2, "24", 10]]), None, "must be an integer"),
    "network_def as code": (args(network_def="__import__('os').mkdir('evil-was-here')"), None, "not a nested tuple"),
    "network_def as a bomb": (args(network_def="(" * 60_000), None, "not a nested tuple"),
    "huge image": (args(img_size=10**9), None, "img_size"),
    "patches without end": (
        args(img_size=4096, patch_size=1, network_def="((0,65536),(2,65536,1))"),
        None,
        "a tensor of",
    ),
    "space of a million": (
        top(
            architecture="vit_resnas_supernet", model_args={"space": {"network_def": WIDE, "num_channels_to_keep": []}}
        ),
        None,
        "num_channels_to_keep",
    ),
    "deep timm model": (vit(depth=65536), None, "more than 5,000 layers|more than 8,000,000,000"),
    "wide timm model": (vit(embed_dim=65535, num_heads=1), None, "parameters|a tensor of"),
    "one large table": (
        top(architecture="swin_tiny_patch4_window7_224", model_args={"window_size": 128, "img_size": 4096}),
        None,
        "a tensor of",
    ),
    "tables beside the weights": (
        top(architecture="swin_tiny_patch4_window7_224", model_args={"window_size": 32, "img_size": 1024}),
        None,
        "tables of [0-9,]+ bytes",
    ),
    "table that is filled in a loop": (
        tiny_vit(window_sizes=[7, 100, 14, 7]),
        None,
        "a tensor of 100,000,000 numbers",
    ),
    "unknown argument": (args(colour="red"), None, "cannot be built"),
    "classifier that would be left out": (top(num_classes=11), None, "num_classes is 11, but model_args make"),
    "builder's argument": (args(pretrained_cfg_overlay={"file": "/etc/passwd"}), None, "not for a config.json to set"),
    "checkpoint path": (args(checkpoint_path="../../secret.pth"), None, "not for a config.json to set"),
    "other file": (cfg(hf_hub_filename="../../secret.bin"), None, "hf_hub_filename is not for a config.json to set"),
    "own loader": (cfg(custom_load="hf"), None, "custom_load is not for a config.json"),
    "unknown key": (cfg(run="rm -rf"), None, "unknown keys"),
    "image that is too large": (cfg(input_size=[4096, 4096, 4096]), None, "too large; at most"),
    "image of many channels": (cfg(input_size=[600, 32, 32]), None, "too large; at most"),
    "crop that enlarges": (cfg(crop_pct=1e-9), None, "crop_pct must be a number from 0.05 to 4"),
    "test crop that enlarges": (cfg(test_crop_pct=0), None, "test_crop_pct must be a number from 0.05 to 4"),
    "crop of a large image": (
        lambda config: config["pretrained_cfg"].update(input_size=[3, 4096, 4096], crop_pct=0.1),
        None,
        "would resize images to 40,960 pixels; at most 8,192",
    ),
    "mean of another length": (cfg(mean=[0.5, 0.5]), None, "mean has 2 numbers, expected one for each of 3 channels"),
    "mean that is empty": (cfg(mean=[]), None, "mean has 0 numbers"),
    "std of another length": (cfg(std=[0.5] * 4), None, "std has 4 numbers"),
    "negative std": (cfg(std=[0.5, -0.5, 0.5]), None, "std must be at least 0.0001"),
    "tiny std": (cfg(std=[1e-30] * 3), None, "std must be at least 0.0001"),
    "large mean": (cfg(mean=[1e9] * 3), None, "mean must be a list of numbers"),
    "unknown interpolation": (cfg(interpolation="cubist"), None, "interpolation must be one of bicubic"),
    "unknown crop mode": (cfg(crop_mode="random"), None, "crop_mode must be one of border"),
    "licence as a list": (cfg(license=["mit"]), None, "license must be a text"),
    "infinite mean": ('{"architecture": "vit_resnas", "pretrained_cfg": {"mean": [Infinity]}}', None, "not JSON"),
    "zero std": (cfg(std=[0, 0, 0]), None, "std must be at least 0.0001"),
    "no such architecture": (top(architecture="os.system"), None, "not registered with timm"),
    "architecture with a path": (top(architecture="../../../etc/passwd"), None, "not registered with timm"),
    "architecture missing": ("{}", None, "architecture must be the name"),
    "a list": ("[1, 2]", None, "must hold a JSON object"),
    "nested bomb": (DEEP, None, "nested too deeply"),
    "nested within limits of Python": ('{"a":' * 500 + "1" + "}" * 500, None, "nested too deeply"),
    "too many values": ("[" + "0," * 300_000 + "0]", None, "more than 200,000 values"),
    "large file": (" " * (5 << 20), None, "has 5,242,880 bytes"),
    "number of 10,000 digits": ('{"architecture": ' + "9" * 10_000 + "}", None, "not JSON|architecture must be"),
    "not text": (b"\xff\xfe\x00", None, "not UTF-8"),
    "pickle in disguise": (None, pickle.dumps(Evil()), "it is a pickle"),
    "zip in disguise": (None, b"PK\x03\x04" + bytes(100), "it is a pickle"),
    "no weights at all": (None, b"", "damaged or cut off"),
    "cut off": (None, "half", "not a safetensors file"),
    "header of an exabyte": (None, header({}, length=1 << 60), "damaged or cut off"),
    "header over the limit": (None, header({"a": "x" * (9 << 20)}), "has a header of|at most"),
    "offsets outside": (
        None,
        header({"head.bias": {"dtype": "F32", "shape": [10], "data_offsets": [0, 1 << 50]}}),
        "not a safetensors file",
    ),
    "shape and size differ": (
        None,
        header({"head.bias": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 40]}}, bytes(40)),
        "not a safetensors file",
    ),
    "negative shape": (
        None,
        header({"head.bias": {"dtype": "F32", "shape": [-10], "data_offsets": [0, 40]}}, bytes(40)),
        "not a safetensors file",
    ),
    "not a number": (None, "nan", r"not finite \(NaN or infinite\) in head.weight"),
    "missing keys": (None, "missing", "lacks head.bias"),
    "other keys": (None, "other", "has extra.weight that the network lacks"),
    "wrong shape": (None, "shape", r"head.bias has shape \[11\], the network needs \[10\]"),
    "integers": (None, "integers", "head.weight is stored as I32"),
    "negative variance": (
        top(architecture="test_resnet", model_args={"num_classes": 4}),
        "variance",
        "negative variances in bn1.running_var",
    ),
    "large table for small weights": (
        vit(embed_dim=24, depth=1, num_heads=1, img_size=4096, patch_size=2, num_classes=10),
        "small vit",
        "numbers, too few for the network",
    ),
    "far too large": (None, "large", "at most [0-9,]+ are expected for this network"),
}


def make_hostile(folder, target, change, weights):
    target.mkdir(parents=True)
    config = json.loads((folder / CONFIG).read_text())
    del config["timm_resnas"]["sha256"]  # as folders of others are
    if callable(change):
        change(config)
    data = change if isinstance(change, str | bytes) else json.dumps(config)
    (target / CONFIG).write_bytes(data if isinstance(data, bytes) else data.encode())
    good = (folder / WEIGHTS).read_bytes()
    tensors = load_file(folder / WEIGHTS)
    if weights == "half":
        good = good[: len(good) // 2]
    elif weights == "nan":
        tensors["head.weight"][3, 3] = float("nan")
    elif weights == "missing":
        del tensors["head.bias"]
    elif weights == "other":
        tensors["extra.weight"] = torch.zeros(3)
    elif weights == "shape":
        tensors["head.bias"] = torch.zeros(11)
    elif weights == "integers":
        tensors["head.weight"] = tensors["head.weight"].int()
    elif weights == "variance":
        tensors = timm.create_model("test_resnet", num_classes=4).state_dict()
        tensors["bn1.running_var"] -= 2
        (target / CONFIG).write_text(json.dumps({**config, "num_classes": 4, "pretrained_cfg": {"num_classes": 4}}))
    elif weights == "small vit":
        small = dict(embed_dim=24, depth=1, num_heads=1, img_size=32, patch_size=2, num_classes=10)
        tensors = timm.create_model("vit_tiny_patch16_224", **small).state_dict()
    if isinstance(weights, bytes):
        good = weights
    if weights in ("integers", "variance", "small vit", "nan", "missing", "other", "shape"):
        save_file(tensors, target / WEIGHTS)
        return
    with (target / WEIGHTS).open("wb") as f:
        f.write(good)
        if weights == "large":
            f.truncate(1 << 40)  # sparse


VICTIM = """
import json, resource, sys, time
from pathlib import Path
import timm, timm_resnas
from timm_resnas.hub import HubError, load

root = Path(sys.argv[1])
load(root / "good")
begin = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = {}
for name in json.loads(sys.argv[2]):
    start = time.process_time()
    try:
        load(root / name)
        message = None
    except HubError as e:
        message = str(e)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - begin) / 1024
    found[name] = message, time.process_time() - start, grown
print(json.dumps(found))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="measures memory as Linux counts it")
def test_hostile_folders_are_refused_quickly_and_in_little_memory(folder, python, tmp_path):
    make_hostile(folder, tmp_path / "good", None, None)
    for name, (change, weights, _) in HOSTILE.items():
        make_hostile(folder, tmp_path / name, change, weights)
    done = run_python(python, VICTIM, {}, str(tmp_path), json.dumps(list(HOSTILE)))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout)
    for name, (_, _, message) in HOSTILE.items():
        said, seconds, grown = found[name]
        assert said is not None, f"{name} was loaded"
        assert re.search(message, said), f"{name}: {said}"
        assert "\n" not in said and len(said) < 600, said
        assert grown < 200, f"{name}: {grown:.0f} MB"
        assert seconds < 10, f"{name}: {seconds:.1f} s"  # 2 s are the aim; other jobs may be running
    assert not Path("evil-was-here").exists() and not (ROOT / "evil-was-here").exists()


def test_hostile_repository_costs_no_download(remote, folder, tmp_path):
    config = json.loads((folder / CONFIG).read_text())
    config["model_args"]["network_def"] = WIDE
    remote.put("bob/wide", {CONFIG: json.dumps(config).encode(), WEIGHTS: (folder / WEIGHTS).read_bytes()})
    remote.put("bob/fat", {CONFIG: (folder / CONFIG).read_bytes(), WEIGHTS: bytes(12 << 20)})
    with pytest.raises(HubError, match="parameters|a tensor of"):
        fetch(remote, tmp_path, "bob/wide")
    with pytest.raises(HubError, match="12,582,912 bytes; at most"):
        fetch(remote, tmp_path, "bob/fat")
    assert remote.log(f"GET .*{WEIGHTS}") == []


def test_limit_is_the_callers(folder):
    with pytest.raises(HubError, match=r"more than 1,000 parameters \(max_params\)"):
        load(folder, max_params=1000)


def test_guard_leaves_other_code_alone(folder):
    with pytest.raises(HubError):
        load(folder, max_params=10)
    torch.nn.Linear(100, 100)  # the hooks are gone
    assert torch.zeros(3000, 3000).numel() == 9_000_000  # and so is the mode


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.arange(1 << 34, device="cpu"),
        lambda: torch.zeros(1 << 20, 1 << 14, device="cpu"),
        lambda: torch.ones(1, device="cpu").repeat(1 << 34),
        lambda: torch.ones(1 << 17, 1, device="cpu") * torch.ones(1, 1 << 17, device="cpu"),
        lambda: torch.randperm(1 << 34, generator=torch.Generator(), device="cpu"),
        lambda: torch.stack(torch.meshgrid([torch.arange(1 << 17, device="cpu")] * 2, indexing="ij")),
    ],
)
def test_tables_of_a_constructor_are_bounded_before_they_are_made(make):
    with pytest.raises(HubError, match="a tensor of 1[67],|a tensor of 34,"), bounded("here", 1000):
        make()


def test_pickles_are_read_on_request_only(folder, net, tmp_path):
    (tmp_path / CONFIG).write_bytes((folder / CONFIG).read_bytes())
    torch.save(net.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(HubError, match="a pickle, which can run code"):
        load(tmp_path)
    assert torch.equal(load(tmp_path, allow_pickle=True).head.weight, net.head.weight)
    for data in (pickle.dumps(Evil(), protocol=2), b"", b"\x80", b"junk"):
        (tmp_path / "pytorch_model.bin").write_bytes(data)
        with pytest.raises(HubError, match="cannot be loaded") as e:
            load(tmp_path, allow_pickle=True)
        assert "\n" not in str(e.value)
    assert not Path("evil-was-here").exists()


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224", "swin_tiny_patch4_window7_224", "convnext_tiny", "cait_m36_224"]
)
def test_honest_timm_models_pass(name):
    """The limits are for what nobody means; they must not refuse models of this world."""
    config = checks.Config("config.json", name, {}, {}, {}, {})
    model = checks.build_on_meta(config)
    assert all(p.is_meta for p in model.parameters())


# -- constructors that nobody knows -----------------------------------------------------------------------------------


def endless():
    while True:
        pass


def endless_and_deaf():
    begin = time.thread_time()
    while time.thread_time() - begin < 4:
        try:
            time.perf_counter()
        except BaseException:
            pass


def hungry():
    kept = []
    while True:
        kept.append([0] * 10_000)


def hungry_at_once():
    return [0] * (1 << 48)


@pytest.mark.parametrize(
    "work, message",
    [
        (endless, "takes longer than 0.3 s to build"),
        (endless_and_deaf, "takes longer than 0.3 s to build"),
        (hungry, "needs more than 50 MB of memory"),
        (hungry_at_once, "needs too much memory"),
    ],
)
def test_any_constructor_is_ended(monkeypatch, work, message):
    monkeypatch.setattr(bounds, "_MAX_SECONDS", 0.3 if work is not hungry else 60)
    monkeypatch.setattr(bounds, "_MAX_BYTES", 50 << 20)
    begin = time.thread_time()
    with pytest.raises(HubError, match=message), bounded("here", 1000):
        work()
    assert time.thread_time() - begin < 8
    assert not [t for t in threading.enumerate() if t.name == "bounded"]
    for _ in range(1000):  # nothing arrives later
        time.perf_counter()


@pytest.mark.skipif(sys.platform != "linux", reason="the limit is Linux's")
def test_a_large_allocation_at_once_is_refused(python):
    code = """
import resource
from timm_resnas.hub import HubError
from timm_resnas.hub.bounds import bounded
before = resource.getrlimit(resource.RLIMIT_AS)
try:
    with bounded("here", 1000):
        bytearray(3 << 30)
except HubError as e:
    print(e)
bytearray(1)
assert resource.getrlimit(resource.RLIMIT_AS) == before
"""
    done = run_python(python, code, {})
    assert "needs too much memory to build" in done.stdout, done.stderr


def test_huge_positions_are_refused_before_they_are_made(tmp_path):
    """A file of two megabytes that asks for position embeddings of 3 x 4096 x 4096 images."""
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=10)
    folder = save_pretrained(model, tmp_path / "m")
    config = json.loads((folder / CONFIG).read_text())
    config["model_args"].update(img_size=4096, patch_size=4)
    (folder / CONFIG).write_text(json.dumps(config))
    before = sum(t.numel() for t in model.state_dict().values())
    with pytest.raises(HubError, match=f"holds {before:,} numbers, too few for the network that config.json describes"):
        load(folder)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS, "test_tensors.safetensors", "notes.txt"])
@pytest.mark.parametrize("kind", ["link", "pipe"])
@pytest.mark.skipif(os.name != "posix", reason="links and pipes of POSIX")
def test_only_files_that_lie_in_the_folder_are_published(folder, tmp_path, name, kind):
    secret = tmp_path / "secret.txt"
    secret.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"secret")
    other = tmp_path / "m"
    shutil.copytree(folder, other)
    (other / name).unlink(missing_ok=True)
    if kind == "link":
        (other / name).symlink_to(secret)
    else:
        os.mkfifo(other / name)
    with pytest.raises(HubError, match=f"{name} is {'a link' if kind == 'link' else 'not a regular file'}; only files"):
        push(other, "alice/net", dry_run=True)


@pytest.mark.skipif(os.name != "posix", reason="pipes of POSIX")
def test_a_pipe_is_not_read(folder, tmp_path):
    os.mkfifo(tmp_path / CONFIG)
    with pytest.raises(HubError, match="config.json is not a regular file"):
        checks.read_config(tmp_path / CONFIG)
    with pytest.raises(HubError, match="holds no config.json"):
        load(tmp_path)


def test_one_value_of_mean_serves_all_channels(folder, tmp_path):
    make_hostile(folder, tmp_path / "m", cfg(mean=[0.5], std=[0.25]), None)
    assert load(tmp_path / "m").pretrained_cfg["mean"] == [0.5]
