"""Publishing, over a real HTTP Hub on the loopback interface with the real client."""

import copy
import threading

import pytest
import timm
import torch
from hub_client import ROOT, fetch, run_python, send

import timm_resnas
from timm_resnas.hub import (
    CONFIG,
    GOLDEN,
    WEIGHTS,
    HubError,
    push,
    strip_paths,
)

# the client's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


FRESH = """
import json, sys
import timm, timm_resnas, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file

names = sys.argv[1:]
for name in names:
    model = timm.create_model("hf-hub:" + name, pretrained=True).eval()
    stored = load_file(hf_hub_download(name, "test_tensors.safetensors"))
    with torch.no_grad():
        assert torch.equal(model(stored["input"].float()), stored["logits"]), name
        if hasattr(model, "extract"):
            small = model.extract(model.space.smallest)
            assert torch.equal(small(stored["input"].float()), stored["logits_smallest"])
            child = model.space.sample(__import__("numpy").random.default_rng(0))
            assert model.space.contains(child) and model.extract(child)(stored["input"].float()).shape == (2, 10)
print("equal", type(model).__name__, model.pretrained_cfg["label_names"])
"""


def test_fresh_process_with_plain_timm_gives_the_stored_logits(remote, folder, python, tmp_path):
    torch.manual_seed(1)
    supernet = timm.create_model("vit_resnas_supernet", space="micro").eval()
    send(remote, folder)
    send(remote, supernet, "alice/super", label_names=list("abcdefghij"))
    fewer = timm_resnas.reduce_tokens(timm.create_model("test_vit", num_classes=10), "ats").eval()
    send(remote, fewer, "alice/tokens", label_names=list("abcdefghij"))
    done = run_python(python, FRESH, remote.env(tmp_path / "home"), "alice/net", "alice/tokens", "alice/super")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"equal VitResNasSupernet {list('abcdefghij')}"


def test_push_is_one_commit_and_skips_what_is_there(remote, folder):
    first = send(remote, folder)
    repo = remote.repo("alice/net")
    assert repo["branches"] == {"main": first.commit} and len(repo["commits"]) == 2
    assert remote.files("alice/net") == ["README.md", CONFIG, WEIGHTS, GOLDEN]
    again = send(remote, folder)
    assert again.commit == first.commit
    assert len(remote.log("PUT")) == 2  # the large files, once each


def test_revision_tag_private_and_pull_request(remote, folder, net, tmp_path):
    send(remote, folder, private=True)
    send(remote, net, revision="pareto-1", tag="v1", files={"search/history.jsonl": ROOT / "LICENSE"})
    repo = remote.repo("alice/net")
    assert repo["private"] and repo["tags"]["v1"] == repo["branches"]["pareto-1"] != repo["branches"]["main"]
    branch = repo["commits"][repo["branches"]["pareto-1"]]
    assert repo["commits"][branch["parent"]]["files"] == [".gitattributes"]  # not on top of another model
    send(remote, net, revision="pareto-1", tag="v1", files={"search/history.jsonl": ROOT / "LICENSE"})  # the same again
    with pytest.raises(HubError, match="tag v1 of alice/net names another commit"):
        send(remote, folder, text="New.", tag="v1")
    with pytest.raises(HubError, match="no repository alice/net that this token may read"):
        fetch(remote, tmp_path)
    assert fetch(remote, tmp_path, revision="v1", token="hf_alice", check=True) is not None

    send(remote, folder, "alice/open")
    before = remote.repo("alice/open")["branches"]["main"]
    request = send(remote, folder, "alice/open", token="hf_bob", create_pr=True, text="A better card.")
    assert request.url.endswith("/alice/open/discussions/1")
    assert remote.repo("alice/open")["branches"]["main"] == before
    assert fetch(remote, tmp_path, "alice/open", revision="refs/pr/1", check=True) is not None


def test_update_removes_what_an_earlier_push_left(remote, folder, tmp_path):
    send(remote, folder, files={"search/old.jsonl": ROOT / "LICENSE"})
    remote.put("alice/net", {"notes.txt": b"mine", "pytorch_model.bin": b"\x80\x04."})
    send(remote, folder, text="Again.", files={"search/new.jsonl": ROOT / "LICENSE"})
    assert remote.files("alice/net") == ["README.md", CONFIG, WEIGHTS, "notes.txt", "search/new.jsonl", GOLDEN]


def test_lost_answer_to_an_update_that_deletes(remote, folder):
    send(remote, folder, files={"search/old.jsonl": ROOT / "LICENSE"})
    remote.fail("POST .*/commit/", kind="reset_after")
    again = send(remote, folder, text="Again.")
    assert remote.unused() == [] and remote.repo("alice/net")["branches"]["main"] == again.commit
    assert remote.files("alice/net") == ["README.md", CONFIG, WEIGHTS, GOLDEN]


def test_paths_of_this_machine_are_cut_and_addresses_stay():
    for value, expected in {
        "/home/me/photos": "photos",
        "imagefolder:/home/me/photos": "imagefolder:photos",
        "/home/me/a:b/photos": "photos",
        "--output=/home/me/runs": "--output=runs",
        "--dataset=imagefolder:~/photos": "--dataset=imagefolder:photos",
        "file:///home/me/net.pth": "file:net.pth",
        "https://example.org/authors/weights": "https://example.org/authors/weights",
        "hf-hub:owner/name@main": "hf-hub:owner/name@main",
        "runs/digits/supernet": "runs/digits/supernet",
    }.items():
        assert strip_paths({"a": [value]}) == {"a": [expected]}


def test_dry_run_asks_nobody(remote, folder):
    planned = push(folder, "alice/net", endpoint=remote.url, dry_run=True, files={"search/a.txt": ROOT / "LICENSE"})
    assert remote.log() == [] and planned.commit is None
    assert planned.files[WEIGHTS] == (folder / WEIGHTS).stat().st_size
    assert set(planned.files) == {"README.md", CONFIG, WEIGHTS, GOLDEN, "search/a.txt"}
    assert f"{planned.files[WEIGHTS]:,}  {WEIGHTS}" in str(planned)


PUSH_FAILURES = {
    "no repository yet": ("POST /api/repos/create", {"status": 503}),
    "who is there": ("GET /api/models/alice/net", {"status": 502}),
    "card": ("POST /api/validate-yaml", {"status": 503}),
    "preupload": ("POST .*/preupload/", {"status": 503}),
    "preupload reset": ("POST .*/preupload/", {"kind": "reset"}),
    "batch": ("POST .*/objects/batch", {"status": 500}),
    "upload refused": ("PUT /_large/", {"status": 503}),
    "upload cut off": ("PUT /_large/", {"kind": "reset"}),
    "upload too fast": ("PUT /_large/", {"status": 429, "headers": {"Retry-After": "0"}}),
    "upload, no answer": ("PUT /_large/", {"kind": "reset_after"}),
    "commit refused": ("POST .*/commit/", {"status": 503}),
    "commit reset": ("POST .*/commit/", {"kind": "reset"}),
    "commit done, no answer": ("POST .*/commit/", {"kind": "reset_after"}),
    "slow": ("POST .*/commit/", {"kind": "slow", "seconds": 0.2}),
}


@pytest.mark.parametrize("match, fault", PUSH_FAILURES.values(), ids=PUSH_FAILURES)
def test_push_survives_a_failure(remote, folder, tmp_path, match, fault):
    remote.fail(match, **fault)
    pushed = send(remote, folder)
    assert remote.unused() == []
    repo = remote.repo("alice/net")
    assert repo["branches"]["main"] == pushed.commit and len(repo["commits"]) == 2
    assert fetch(remote, tmp_path, check=True) is not None


@pytest.mark.parametrize("match", ["POST /api/repos/create", "POST .*/preupload/", "PUT /_large/", "POST .*/commit/"])
def test_push_that_fails_leaves_what_was_there(remote, folder, net, tmp_path, match):
    old = send(remote, folder).commit
    other = copy.deepcopy(net)
    with torch.no_grad():
        other.head.weight.add_(1)
    remote.fail(match, status=503, times=1000)
    with pytest.raises(HubError) as e:
        send(remote, other)
    assert "\n" not in str(e.value) and "HTTP 503" in str(e.value)
    assert remote.repo("alice/net")["branches"]["main"] == old
    assert torch.equal(fetch(remote, tmp_path, check=True).head.weight, net.head.weight)


def test_interrupted_upload_goes_on(remote, folder):
    remote.fail("POST .*/commit/", status=503, times=1000)
    with pytest.raises(HubError):
        send(remote, folder)
    assert remote.files("alice/net") == []
    sent = len(remote.log("PUT"))
    remote.mend()
    send(remote, folder)
    assert len(remote.log("PUT")) == sent == 2
    assert WEIGHTS in remote.files("alice/net")


def test_readers_see_the_old_commit_or_the_new(remote, folder, net):
    send(remote, folder)
    old = remote.repo("alice/net")["branches"]["main"]
    remote.fail("POST .*/commit/", kind="slow", seconds=0.3)
    seen, stop = set(), threading.Event()

    def watch():
        while not stop.is_set():
            repo = remote.repo("alice/net")
            head = repo["branches"]["main"]
            seen.add((head, tuple(repo["commits"][head]["files"])))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        new = send(remote, net, files={"search/history.jsonl": ROOT / "LICENSE"}).commit
    finally:
        stop.set()
        thread.join()
    by_commit = dict(seen)
    assert set(by_commit) <= {old, new} and len(by_commit) == len(seen) and old in by_commit
    assert all({CONFIG, WEIGHTS, GOLDEN} < set(files) for files in by_commit.values())


MESSAGES = {
    "no token": (dict(token=None), "access token .*hf auth login"),
    "wrong token": (dict(token="hf_wrong"), "access token"),
    "reader": (dict(token="hf_reader"), "may not write to alice/net: it needs write permission"),
    "not mine": (dict(name="bob/net"), "must own 'bob'"),
    "bad name": (dict(name="../net"), "cannot be a repository's name"),
    "no owner": (dict(name="net"), "expected owner/name"),
    "taken": (dict(name="alice/taken"), "the name is taken: alice/taken holds something"),
    "public": (dict(name="alice/taken", private=True), "is public"),
    "nowhere": (dict(endpoint="http://127.0.0.1:9"), "the Hub cannot be reached to write to alice/net"),
    "request without repository": (dict(name="alice/none", create_pr=True), "no repository alice/none"),
    "request on a branch": (dict(create_pr=True, revision="other"), "pull requests on main only"),
    "outside": (dict(files={"../evil": ROOT / "LICENSE"}), "cannot be the name"),
    "missing": (dict(files={"search/x": ROOT / "nothing"}), "there is no file"),
    "not plain": (dict(info={"x": object()}), "JSON-plain"),
}


@pytest.mark.parametrize("more, message", MESSAGES.values(), ids=MESSAGES)
def test_push_says_what_is_wrong(remote, folder, more, message):
    remote.put("alice/taken", {"weights.bin": b"someone's"})
    with pytest.raises(HubError, match=message) as e:
        send(remote, folder, **more)
    assert "\n" not in str(e.value) and len(str(e.value)) < 400
    assert not [line for line in remote.log("POST .*/commit/")]


def test_overwrite_commits_over_what_is_there(remote, folder, tmp_path):
    remote.put("alice/taken", {"weights.bin": b"someone's"})
    send(remote, folder, "alice/taken", overwrite=True)
    assert fetch(remote, tmp_path, "alice/taken", check=True) is not None


@pytest.mark.parametrize("text", ["{}", "null", "[]", "<html>"])
@pytest.mark.parametrize(
    "match",
    ["POST /api/repos/create", "GET /api/models/", "POST .*/preupload/", "POST .*/objects/batch", "POST .*/commit/"],
)
def test_odd_answers_are_one_sentence(remote, folder, match, text):
    remote.fail(match, kind="answer", text=text, times=1000)
    with pytest.raises(HubError) as e:
        send(remote, folder)
    assert "\n" not in str(e.value) and len(str(e.value)) < 450
    assert "the Hub's answer about alice/net" in str(e.value) or "the Hub's client refuses" in str(e.value)


def test_redirects_without_end(remote, folder):
    remote.fail(".*", status=307, headers={"Location": "/api/repos/create"}, times=1000)
    with pytest.raises(HubError, match="redirects without end"):
        send(remote, folder)
