"""Publishing a real, small search of the digits, and what others do with it."""

import functools
import json
import re
import time
from pathlib import Path

import huggingface_hub
import pytest
from accelerate.state import AcceleratorState, PartialState
from hub_client import run_python
from hub_server import ask_for_no_agents, running
from recipe_server import program
from safetensors.torch import load_file, save_file

from recipes import publish, search
from timm_resnas.engine import publish as engine_publish
from timm_resnas.hub import CONFIG, GOLDEN, WEIGHTS, load, push

ROOT = Path(__file__).resolve().parents[1]
# the client's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

QUICK = [
    *("--cpu", "--threads", "1", "--eval-every", "1", "--warmup-epochs", "0", "--population", "6"),
    *("--iterations", "2", "--parents", "4", "--mutations", "2", "--crossovers", "2"),
    *("--num-random", "2", "--num-any-cost", "3"),
]
FEW = ["--num-random", "0", "--num-any-cost", "0", "--iterations", "1"]


@pytest.fixture(scope="module")
def server():
    with running() as hub_server:
        yield hub_server


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a finished search."""
    folder = tmp_path_factory.mktemp("runs")
    options = [
        *("--img-size", "16", "--epochs", "1", "--arch-warmup-epochs", "0", "--batch-size", "80", "--num-archs", "2"),
    ]
    search.main([*QUICK, *options, "--output", str(folder), "--name", "run"])
    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    return folder / "run"


@pytest.fixture
def remote(server, tmp_path, monkeypatch):
    server.reset()
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    ask_for_no_agents(monkeypatch)
    monkeypatch.setenv("HF_TOKEN", "hf_alice")
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(engine_publish, "push", functools.partial(push, endpoint=server.url))
    return server


def fetch(remote, tmp_path, name, **more):
    return load(f"hf-hub:{name}", endpoint=remote.url, cache_dir=tmp_path / "cache", check=True, **more)


READER = """
import json, sys
import timm, timm_resnas, torch
from huggingface_hub import hf_hub_download
from safetensors.torch import load_file
from timm_resnas.data import eval_batches, eval_transform, load_splits
from timm_resnas.nas.evaluate import count_correct

model = timm.create_model("hf-hub:alice/digits", pretrained=True).eval()
stored = load_file(hf_hub_download("alice/digits", "test_tensors.safetensors"))
with torch.no_grad():
    assert torch.equal(model(stored["input"].float()), stored["logits"])
transform = eval_transform(timm.data.resolve_model_data_config(model))
print(*count_correct(model, eval_batches(load_splits("digits").test, transform)))
"""


def test_what_others_do_with_a_published_search(remote, run, python, tmp_path, capsys):
    publish.main([str(run), "--repo", "alice/digits", "--supernet", "--license", "apache-2.0"])
    printed = capsys.readouterr().out
    assert "[2/2]" in printed and "timm.create_model('hf-hub:alice/digits', pretrained=True)" in printed

    # a reader with an empty cache and no token: stored logits bit by bit, and the accuracy of the report
    reader = remote.env(tmp_path / "reader")
    done = run_python(python, READER, reader)
    assert done.returncode == 0, done.stderr
    results = json.loads((run / "results.json").read_text())
    assert done.stdout.split() == [str(results["best"]["test"]), str(results["test_images"])]

    # another search, in the published supernet
    where = ["--output", str(tmp_path), "--name", "again", "--supernet", "hf-hub:alice/digits-supernet"]
    done = run_python(python, program("search"), reader, *QUICK, *where, "--budget", "macs=30%", *FEW)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "again" / "best" / WEIGHTS).is_file() and not (tmp_path / "again" / "supernet").exists()


def test_front_as_revisions(remote, run, tmp_path, capsys):
    publish.main([str(run), "--repo", "alice/digits", "--front", "revisions", "--supernet", "--license", "mit"])
    points = sorted((run / "pareto").iterdir(), key=lambda p: int(p.name))
    repo = remote.repo("alice/digits")
    assert set(repo["branches"]) == {"main", *(f"pareto-{k}" for k in range(1, len(points) + 1))}
    macs = []
    for k, point in enumerate(points, start=1):
        model = fetch(remote, tmp_path, "alice/digits", revision=f"pareto-{k}")
        config = json.loads((point / CONFIG).read_text())
        assert sum(p.numel() for p in model.parameters()) == config["timm_resnas"]["params"]
        macs.append(config["timm_resnas"]["macs"])
        assert "search/history.jsonl" not in remote.files("alice/digits", f"pareto-{k}")
    assert macs == sorted(macs)
    best = remote.files("alice/digits")
    assert {f"search/{n}" for n in ("pareto.png", "progress.png", "history.jsonl", "results.json")} < set(best)
    supernet = fetch(remote, tmp_path, "alice/digits-supernet")
    assert supernet.space.contains(supernet.space.smallest)
    assert "training_data.json" in remote.files("alice/digits-supernet")

    # config.json says which commit of the supernet the weights are from; the same command then changes nothing
    path = huggingface_hub.hf_hub_download("alice/digits", CONFIG, endpoint=remote.url, cache_dir=tmp_path)
    info = json.loads(Path(path).read_text())["timm_resnas"]
    head = remote.repo("alice/digits-supernet")["branches"]["main"]
    assert info["supernet"] == f"hf-hub:alice/digits-supernet@{head}"
    sent = len(remote.log("PUT"))
    capsys.readouterr()
    publish.main([str(run), "--repo", "alice/digits", "--front", "revisions", "--supernet", "--license", "mit"])
    assert remote.repo("alice/digits")["branches"] == repo["branches"] and len(remote.log("PUT")) == sent


def test_card_has_what_the_run_measured(remote, run, tmp_path):
    publish.main([str(run), "--repo", "alice/digits", "--license", "apache-2.0", "--text", "For the museum."])
    path = huggingface_hub.hf_hub_download("alice/digits", "README.md", endpoint=remote.url, cache_dir=tmp_path)
    card = huggingface_hub.ModelCard.load(path)
    results = json.loads((run / "results.json").read_text())
    found = {r.dataset_split: r for r in card.data.eval_results}
    assert found["test"].metric_value == round(results["best"]["test"] / 360, 5)
    assert found["test"].dataset_name == "digits" and found["test"].source_url.startswith(remote.url)
    val = found["validation part of the search"]
    assert val.metric_value == round(results["best"]["score"] / results["val_images"], 5)
    files = remote.files("alice/digits")
    links = [x for x in re.findall(r"\]\(([^)]+)\)", card.text) if not x.startswith("http")]
    assert len(links) >= 4 and set(links) <= set(files)
    assert f"{results['best']['macs']:,}" in card.text and "For the museum." in card.text
    pictures = [x for x in links if x.endswith(".png")]
    data = Path(huggingface_hub.hf_hub_download("alice/digits", pictures[0], endpoint=remote.url, cache_dir=tmp_path))
    assert data.read_bytes().startswith(b"\x89PNG")
    # nothing of this machine
    for name in files:
        if name.endswith((".json", ".jsonl", ".md")):
            text = Path(
                huggingface_hub.hf_hub_download("alice/digits", name, endpoint=remote.url, cache_dir=tmp_path)
            ).read_text()
            assert str(run.parent) not in text and str(ROOT) not in text, name


def test_front_as_repositories_and_a_models_folder(remote, run, tmp_path):
    publish.main([str(run), "--repo", "lab/digits", "--front", "repositories", "--private"])
    count = len(list((run / "pareto").iterdir()))
    for k in range(1, count + 1):
        assert remote.repo(f"lab/digits-pareto-{k}")["private"]
    publish.main([str(run / "pareto" / "1"), "--repo", "alice/one", "--tag", "v1"])
    assert remote.files("alice/one") == ["README.md", CONFIG, WEIGHTS, GOLDEN, "training_data.json"]
    assert fetch(remote, tmp_path, "alice/one", revision="v1") is not None


def test_interrupted_publishing_goes_on(remote, run, capsys):
    remote.fail("POST .*/alice/digits/commit/", status=503, times=1000)
    command = [str(run), "--repo", "alice/digits", "--supernet"]
    with pytest.raises(SystemExit) as e:
        publish.main(command)
    assert e.value.code == 2
    assert "publish.py: error: the Hub refuses to write to alice/digits (HTTP 503)" in capsys.readouterr().err
    sent = len(remote.log("PUT"))
    assert remote.files("alice/digits") == [] and WEIGHTS in remote.files("alice/digits-supernet")
    remote.mend()
    publish.main(command)
    assert len(remote.log("PUT")) == sent and WEIGHTS in remote.files("alice/digits")


def test_dry_run_sends_nothing(remote, run, capsys, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    publish.main([str(run), "--repo", "alice/digits", "--front", "revisions", "--supernet", "--dry-run"])
    printed = capsys.readouterr().out
    assert remote.log() == []
    assert f"{(run / 'best' / WEIGHTS).stat().st_size:,}  {WEIGHTS}" in printed
    assert "alice/digits-supernet (main)" in printed and "alice/digits (pareto-1)" in printed
    assert "nothing was sent" in printed and "model-index" in printed


def test_errors_are_one_sentence(remote, run, tmp_path, capsys, monkeypatch):
    (tmp_path / "empty").mkdir()
    remote.put("alice/taken", {"someone.bin": b"1"})
    for options, message in (
        ([str(tmp_path / "none"), "--repo", "alice/x"], "there is no folder"),
        ([str(tmp_path / "empty"), "--repo", "alice/x"], "expected the folder of a finished run or of a model"),
        ([str(run), "--repo", "digits"], "expected owner/name"),
        ([str(run), "--repo", "bob/digits"], "may not write to bob/digits"),
        ([str(run), "--repo", "alice/taken"], "the name is taken"),
        ([str(run / "best"), "--repo", "alice/x", "--front", "revisions"], "holds no pareto/"),
        ([str(run / "best"), "--repo", "alice/x", "--supernet"], "holds no supernet/"),
        ([str(run), "--repo", "alice/x", "--front", "revisions", "--tag", "v1"], "there are several"),
    ):
        with pytest.raises(SystemExit) as e:
            publish.main(options)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert e.value.code == 2 and message in error, error
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(SystemExit):
        publish.main([str(run), "--repo", "alice/x"])
    assert "hf auth login" in capsys.readouterr().err
    assert remote.repo("alice/x") is None


def test_weights_that_changed_are_not_published(remote, run, tmp_path, capsys):
    other = tmp_path / "best"
    other.mkdir()
    for file in (run / "best").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    weights = load_file(other / WEIGHTS)
    weights["head.bias"] += 0.1
    save_file(weights, other / WEIGHTS)
    with pytest.raises(SystemExit):
        publish.main([str(other), "--repo", "alice/x"])
    assert "its sha256 differs from the one in config.json" in capsys.readouterr().err
    assert remote.repo("alice/x") is None
