"""Loading, over a real HTTP Hub on the loopback interface with the real client."""

import json
import logging
import threading

import pytest
import timm
import torch
from hub_client import fetch, run_python, send
from safetensors.torch import load_file, save_file

from timm_resnas.hub import CONFIG, GOLDEN, WEIGHTS, HubError, check_golden, load, read_file, save_pretrained

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


def test_offline_mode(remote, folder, tmp_path):
    send(remote, folder)
    fetch(remote, tmp_path, check=True)
    asked = len(remote.log())
    env = {**remote.env(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    done = run_python(OFFLINE, env, str(tmp_path / "cache"), str(tmp_path / "empty"))
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
