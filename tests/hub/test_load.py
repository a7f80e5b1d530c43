"""Loading, over a real HTTP Hub on the loopback interface with the real client."""

import json
import logging
import shutil
import sys
import threading
import time

import pytest
import timm
import torch
from hub_client import fetch, run_python, send
from safetensors.torch import load_file, save_file

from timm_resnas.hub import (
    CONFIG,
    GOLDEN,
    WEIGHTS,
    HubError,
    check_golden,
    check_tensors,
    load,
    push,
    read_file,
    save_pretrained,
)
from timm_resnas.hub import fetch as fetch_folder

# the client's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


def test_load_gives_the_model_that_was_pushed(remote, net, folder, tmp_path):
    pushed = send(remote, folder, info={"note": "searched"})
    loaded = fetch(remote, tmp_path, check=True)
    for key, value in net.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key
    assert loaded.pretrained_cfg["label_names"] == list("0123456789")
    # everything from the one commit, whatever the branch points to meanwhile
    resolved = {line.split("/")[4] for line in remote.log("GET .*/resolve/.*safetensors")}
    assert resolved == {pushed.commit}
    config = json.loads(read_file(f"hf-hub:alice/net@{pushed.commit}", CONFIG, endpoint=remote.url, cache_dir=tmp_path))
    assert config["timm_resnas"]["note"] == "searched"
    assert read_file("hf-hub:alice/net", "nothing.json", endpoint=remote.url, cache_dir=tmp_path) is None


def test_a_push_in_between_does_not_mix_commits(remote, net, folder, tmp_path):
    old = send(remote, folder).commit
    remote.fail("HEAD .*/main/config.json", kind="slow", seconds=0.5)
    found = []
    thread = threading.Thread(target=lambda: found.append(fetch(remote, tmp_path, check=True)))
    thread.start()
    while not remote.log("HEAD .*/main/config.json"):
        pass
    remote.put("alice/net", {CONFIG: b"{}", WEIGHTS: b"", GOLDEN: b""})
    thread.join()
    assert torch.equal(found[0].head.weight, net.head.weight)
    assert {line.split("/")[4] for line in remote.log("GET .*/resolve/.*safetensors")} == {old}


def test_saved_arguments_are_overridden(remote, folder, tmp_path):
    send(remote, folder)
    model = fetch(remote, tmp_path, num_classes=3, drop_path_rate=0.1, img_size=56)
    assert model(torch.zeros(1, 3, 56, 56)).shape == (1, 3)
    with pytest.raises(HubError, match="leave out num_classes"):
        fetch(remote, tmp_path, num_classes=3, check=True)


LOAD_FAILURES = {
    "info": ("GET /api/models/", {"status": 503}),
    "info reset": ("GET /api/models/", {"kind": "reset"}),
    "config": ("GET .*/config.json", {"status": 503}),
    "head": ("HEAD .*/model.safetensors", {"kind": "reset"}),
    "weights refused": ("GET .*/model.safetensors", {"status": 503}),
    "weights reset": ("GET .*/model.safetensors", {"kind": "reset"}),
    "weights cut off": ("GET .*/model.safetensors", {"kind": "truncate"}),
    "config cut off": ("GET .*/config.json", {"kind": "truncate"}),
    "slow": ("GET .*/model.safetensors", {"kind": "slow", "seconds": 0.2}),
}


@pytest.mark.parametrize("match, fault", LOAD_FAILURES.values(), ids=LOAD_FAILURES)
def test_load_survives_a_failure(remote, net, folder, tmp_path, match, fault):
    send(remote, folder)
    remote.fail(match, **fault)
    model = fetch(remote, tmp_path, check=True)
    assert remote.unused() == []
    assert torch.equal(model.head.weight, net.head.weight)


def test_load_says_what_is_wrong(remote, folder, tmp_path):
    remote.put("alice/empty", {"notes.txt": b""})
    remote.put("alice/pickle", {CONFIG: (folder / CONFIG).read_bytes(), "pytorch_model.bin": b"\x80\x04."})
    for name, more, message in (
        ("alice/none", {}, "no repository alice/none that this token may read"),
        ("alice/empty", {}, "holds no config.json"),
        ("alice/empty", dict(revision="v9"), "alice/empty has no branch, tag or commit v9"),
        ("alice/pickle", {}, "only pytorch_model.bin, a pickle"),
        ("../../etc", {}, "cannot be a repository's name"),
        ("alice/net@a", dict(revision="b"), "two revisions"),
    ):
        with pytest.raises(HubError, match=message):
            fetch(remote, tmp_path, name, **more)
    with pytest.raises(HubError, match="a repository is written 'hf-hub:alice/net'"):
        load("alice/net")
    with pytest.raises(HubError, match="there is no folder"):
        load("local-dir:nowhere")
    with pytest.raises(HubError, match="not the plain name"):
        read_file(folder, "../secret.txt")


def test_unreachable_hub_and_the_cache(remote, folder, tmp_path, caplog):
    pushed = send(remote, folder)
    fetch(remote, tmp_path, check=True)
    caplog.clear()
    nowhere = dict(endpoint="http://127.0.0.1:9")
    with caplog.at_level(logging.WARNING):
        for name in ("hf-hub:alice/net", f"hf-hub:alice/net@{pushed.commit}"):
            assert load(name, cache_dir=tmp_path / "cache", check=True, **nowhere) is not None
    assert "the Hub cannot be reached" in caplog.text
    with pytest.raises(HubError, match="config.json of alice/net is not in the cache, and the Hub cannot be reached"):
        load("hf-hub:alice/net", cache_dir=tmp_path / "empty", **nowhere)


OFFLINE = """
import sys
from timm_resnas.hub import HubError, load
load("hf-hub:alice/net", cache_dir=sys.argv[1], check=True)
try:
    load("hf-hub:alice/net", cache_dir=sys.argv[2])
except HubError as e:
    print(e)
"""


def test_offline_mode(remote, folder, python, tmp_path):
    send(remote, folder)
    fetch(remote, tmp_path, check=True)
    asked = len(remote.log())
    env = {**remote.env(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = run_python(python, OFFLINE, env, str(tmp_path / "cache"), str(tmp_path / "empty"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == (
        "config.json of alice/net is not in the cache, and the Hub is not asked in offline mode (HF_HUB_OFFLINE); "
        "load it once with a connection"
    )
    assert len(remote.log()) == asked


def test_check_notices_other_weights(folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in folder.iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / WEIGHTS)
    weights["head.weight"][0, 0] += 0.1
    save_file(weights, other / WEIGHTS)
    with pytest.raises(HubError, match="its sha256 differs from the one in config.json"):
        load(other)
    config = json.loads((other / CONFIG).read_text())
    del config["timm_resnas"]["sha256"]  # as folders of before, and of others, have none
    (other / CONFIG).write_text(json.dumps(config))
    load(other)
    with pytest.raises(HubError, match="logits of the loaded model differ from the stored ones by 0.1|by 0.0"):
        load(other, check=True)
    (other / GOLDEN).unlink()
    with pytest.raises(HubError, match=f"holds no {GOLDEN}"):
        load(other, check=True)


@pytest.mark.parametrize(
    "name", ["vit_resnas", "vit_resnas_supernet", "sret", "cait_study", "exmobilevit_576", "test_vit", "test_resnet"]
)
def test_every_family_comes_back(name, tmp_path):
    args = {"img_size": 64, "patch_size": 8} if name == "vit_resnas" else {}
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5, **args).train()
    save_pretrained(model, tmp_path / name, files={"data.json": "[1]"})
    assert model.training
    loaded = load(tmp_path / name, check=True)
    assert check_golden(loaded, tmp_path / name / GOLDEN) == 0.0
    assert read_file(tmp_path / name, "data.json") == "[1]"
    assert (tmp_path / name / GOLDEN).stat().st_size < 1_000_000


# -- weights of another kind ------------------------------------------------------------------------------------------


def copy_without_digest(folder, target):
    """The folder as one that was saved before digests were."""
    shutil.copytree(folder, target)
    config = json.loads((target / CONFIG).read_text())
    config["timm_resnas"].pop("sha256", None)
    (target / CONFIG).write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(
    "dtype, message",
    [
        (torch.int32, r"head.weight is stored as I32, the network needs floating-point numbers \(float32\)"),
        (torch.bool, "head.weight is stored as BOOL, the network needs floating-point"),
        (torch.uint8, "head.weight is stored as U8, a type that weights do not have"),
        (torch.float8_e4m3fn, "head.weight is stored as F8_E4M3, a type that weights do not have"),
        (torch.complex64, "head.weight is stored as C64, a type that weights do not have"),
        (torch.float64, None),
        (torch.float16, None),
        (torch.bfloat16, None),
    ],
)
def test_types_of_weights(folder, net, tmp_path, dtype, message):
    other = copy_without_digest(folder, tmp_path / "m")
    tensors = load_file(other / WEIGHTS)
    tensors["head.weight"] = tensors["head.weight"].to(dtype)
    save_file(tensors, other / WEIGHTS)
    if message is None:
        assert torch.equal(load(other).head.weight, net.head.weight.to(dtype).float())
        return
    with pytest.raises(HubError, match=message):
        load(other)
    with pytest.raises(HubError, match=message):
        fetch_folder(str(other))


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=4).eval()
    return save_pretrained(model, tmp_path_factory.mktemp("resnet") / "m")


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(running_var=torch.tensor(-1e-3)), "negative variances in bn1.running_var"),
        (dict(running_var=torch.tensor(float("nan"))), r"not finite \(NaN or infinite\) in bn1.running_var"),
        (dict(running_mean=torch.tensor(float("inf"))), r"not finite \(NaN or infinite\) in bn1.running_mean"),
    ],
)
def test_statistics_of_batch_norm(resnet, tmp_path, change, message):
    other = copy_without_digest(resnet, tmp_path / "m")
    tensors = load_file(other / WEIGHTS)
    for name, value in change.items():
        tensors[f"bn1.{name}"][0] = value
    save_file(tensors, other / WEIGHTS)
    for read in (load, fetch_folder):
        with pytest.raises(HubError, match=message):
            read(str(other))


def test_counters_stored_as_numbers_are_refused(resnet, tmp_path):
    other = copy_without_digest(resnet, tmp_path / "m")
    tensors = load_file(other / WEIGHTS)
    tensors["bn1.num_batches_tracked"] = tensors["bn1.num_batches_tracked"].float()
    save_file(tensors, other / WEIGHTS)
    with pytest.raises(HubError, match=r"num_batches_tracked is stored as F32, the network needs integers \(int64\)"):
        load(other)


def test_check_tensors_of_a_state_in_memory(resnet):
    model = timm.create_model("test_resnet", num_classes=4)
    state = load(resnet).state_dict()
    check_tensors(state, "here", model.state_dict())
    check_tensors({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, "here", model.state_dict())
    bias = state["fc.bias"]
    for value, message in (
        (bias.int(), "fc.bias is stored as int32, the network needs floating-point"),
        (bias.bool(), "fc.bias is stored as bool"),
        (bias.to(torch.complex64), "fc.bias is stored as complex64"),
        (bias[:3], r"fc.bias has shape \[3\], the network needs \[4\]"),
        (bias / 0, "not finite"),
    ):
        with pytest.raises(HubError, match=f"here.*{message}"):
            check_tensors({**state, "fc.bias": value}, "here", model.state_dict())
    with pytest.raises(HubError, match="here does not hold the network's weights: it lacks fc.bias"):
        check_tensors({k: v for k, v in state.items() if k != "fc.bias"}, "here", model.state_dict())
    with pytest.raises(HubError, match="of a type that weights do not have in fc.bias"):
        check_tensors({"fc.bias": bias.to(torch.complex64)}, "here")


def test_digest_is_compared_where_there_is_one(folder, tmp_path):
    other = tmp_path / "m"
    shutil.copytree(folder, other)
    data = bytearray((other / WEIGHTS).read_bytes())
    data[-1] ^= 1  # one bit of one weight
    (other / WEIGHTS).write_bytes(data)
    with pytest.raises(HubError, match="its sha256 differs from the one in config.json"):
        load(other)
    with pytest.raises(HubError, match="its sha256 differs"):
        push(other, "alice/net", dry_run=True)
    assert load(copy_without_digest(other, tmp_path / "old")) is not None


def test_both_spellings_of_timm(remote, folder, net, tmp_path):
    send(remote, folder)
    for prefix in ("hf_hub:", "HF-HUB:", "Hf_Hub:"):
        model = load(f"{prefix}alice/net", endpoint=remote.url, cache_dir=tmp_path / "cache")
        assert torch.equal(model.head.weight, net.head.weight)


# -- a Hub that answers otherwise -------------------------------------------------------------------------------------

ODD = {
    "empty object": (dict(kind="answer", text="{}"), "answer about alice/net cannot be understood"),
    "null": (dict(kind="answer", text="null"), "answer about alice/net cannot be understood"),
    "list": (dict(kind="answer", text="[]"), "answer about alice/net cannot be understood"),
    "text": (dict(kind="answer", text="<html>Log in</html>"), "answer about alice/net cannot be understood"),
    "nothing": (dict(kind="answer", text=""), "answer about alice/net cannot be understood"),
    "number of siblings": (dict(kind="answer", text='{"id": "a/b", "siblings": 3}'), "cannot be understood"),
    "redirects": (dict(status=302, headers={"Location": "/api/models/alice/net"}), "redirects without end"),
    "forbidden": (dict(status=403), r"does not let this token read alice/net \(HTTP 403\)"),
    "too many": (dict(status=429), r"the Hub answers HTTP 429 \(too many requests: wait"),
    "broken": (dict(status=500), r"the Hub answers HTTP 500 \(Internal Server Error\)"),
    "busy": (dict(status=503), r"the Hub answers HTTP 503 \(Service Unavailable\)"),
    "teapot": (dict(status=418), "HTTP 418"),
}


@pytest.mark.parametrize("fault, message", ODD.values(), ids=ODD)
def test_odd_answers_about_a_repository(remote, folder, tmp_path, fault, message):
    send(remote, folder)
    remote.fail("GET /api/models/alice/net", times=1000, **fault)
    with pytest.raises(HubError, match=message) as e:
        fetch(remote, tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400 and "reached" not in str(e.value)


@pytest.mark.parametrize("fault, message", ODD.values(), ids=ODD)
def test_odd_answers_to_a_push(remote, folder, fault, message):
    send(remote, folder)
    remote.fail("GET /api/models/alice/net", times=1000, **fault)
    message = message.replace("does not let this token read alice/net .*", "may not write").split(r" \(")[0]
    with pytest.raises(HubError) as e:
        send(remote, folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400 and "reached" not in str(e.value)


@pytest.mark.parametrize(
    "fault, message",
    [
        (dict(status=403), "answers HTTP 403 .access is forbidden"),
        (dict(status=429), "answers HTTP 429 .too many requests"),
        (dict(status=500), "answers HTTP 500"),
        (dict(status=302, headers={"Location": "/alice/net/resolve/main/config.json"}), "redirects without end"),
    ],
)
def test_odd_answers_about_a_file(remote, folder, tmp_path, fault, message):
    send(remote, folder)
    remote.fail("(GET|HEAD) .*/resolve/", times=1000, **fault)
    with pytest.raises(HubError, match=message) as e:
        fetch(remote, tmp_path)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400 and "reached" not in str(e.value)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_a_download_brings_no_more_than_was_said(remote, folder, tmp_path, name):
    send(remote, folder)
    remote.fail(f"GET .*/resolve/.*{name}", kind="flood", chunks=2000, times=1000)
    with pytest.raises(HubError, match="brings more than the [0-9,]+ bytes that are expected"):
        fetch(remote, tmp_path)
    kept = sum(p.stat().st_size for p in (tmp_path / "cache").rglob("*") if p.is_file())
    assert kept < 64 << 20


def test_a_download_takes_no_longer_than_it_should(remote, folder, tmp_path, monkeypatch):
    send(remote, folder)
    monkeypatch.setattr(sys.modules["timm_resnas.hub.load"], "_PATIENCE", 0.5)
    monkeypatch.setattr(sys.modules["timm_resnas.hub.load"], "_SLOWEST", 1e9)
    remote.fail("GET .*/resolve/.*config.json", kind="drip", chunks=500, times=1000)
    begin = time.monotonic()
    with pytest.raises(HubError, match="config.json did not arrive within 1 s|within 0 s"):
        fetch(remote, tmp_path)
    assert time.monotonic() - begin < 8
