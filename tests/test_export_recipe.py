"""Exporting a model: the same answers in other runtimes, a folder that others run without PyTorch, what is refused."""

import json
import re
import shutil
import subprocess
import sys
import time

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
from hub_server import ask_for_no_agents, running
from test_evaluate_recipe import TINY

from recipes import export as recipe
from timm_resnas.data import eval_batches, eval_transform, load_splits
from timm_resnas.engine import export as job
from timm_resnas.engine.run import RunError
from timm_resnas.hub import CONFIG, EXPORTS, WEIGHTS, HubError, note_exports, push, save_pretrained, sha256_of
from timm_resnas.nas.evaluate import count_correct
from timm_resnas.nas.onnx import INPUT, ExportError, open_session

# the client's own way to send a file
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")

QUICK = ["--threads", "1", "--rounds", "2", "--min-run-time", "0.001"]


@pytest.fixture(scope="module")
def digits():
    """Training and test images, in the network's size."""
    config = {"input_size": (3, 16, 16), "crop_pct": 1.0, "mean": (0.3, 0.3, 0.3), "std": (0.4, 0.4, 0.4)}
    splits = load_splits("digits")
    transform = eval_transform({"interpolation": "bicubic", "crop_mode": "center", **config})
    return config, *(eval_batches(part, transform) for part in (splits.train, splits.test))


@pytest.fixture(scope="module")
def model(digits):
    """Random features, and a classifier that is their ridge regression on the digits."""
    config, train, _ = digits
    torch.manual_seed(0)
    net = timm.create_model("vit_resnas", network_def=TINY, patch_size=4, img_size=16).eval()
    with torch.no_grad():
        x, y = (torch.cat(parts) for parts in zip(*train, strict=True))
        features = net.forward_head(net.forward_features(x), pre_logits=True).double()
        features = torch.cat([features, torch.ones(len(x), 1)], dim=1)
        gram = features.T @ features + 0.1 * torch.eye(features.shape[1])
        weights = torch.linalg.solve(gram, features.T @ torch.eye(10, dtype=torch.float64)[y]).float()
        net.head.weight.copy_(weights[:-1].T)
        net.head.bias.copy_(weights[-1])
    net.pretrained_cfg.update(config)
    return net


@pytest.fixture(scope="module")
def exported(model, digits, tmp_path_factory):
    """The folder after a run of the recipe, and what it returned."""
    folder = tmp_path_factory.mktemp("model") / "best"
    save_pretrained(model, folder, label_names=list("0123456789"), data_config=digits[0])
    given = ["--dataset", "digits", "--uint8", "--int8", "dynamic", "--update-card"]
    return folder, recipe.main([str(folder), *given, "--batch-size", "7", *QUICK])


def test_runtimes_answer_as_pytorch_does(exported, model, digits):
    folder, results = exported
    correct, images = count_correct(model, digits[2])
    rows = {row["name"]: row for row in results["runtimes"]}
    assert list(rows) == ["PyTorch", "ONNX Runtime", "ONNX Runtime, int8", "torch.export"]
    assert images == 360 and correct > 180  # the fit knows most of them
    for name in ("PyTorch", "ONNX Runtime"):
        assert (rows[name]["correct"], rows[name]["images"], rows[name]["agreement"]) == (correct, images, 1.0)
    eight = rows["ONNX Runtime, int8"]
    assert abs(eight["correct"] - correct) < 40 and 0.8 < eight["agreement"] <= 1
    assert max(rows["ONNX Runtime"]["differences"].values()) < 1e-4 < max(eight["differences"].values()) < 0.5
    assert set(rows["ONNX Runtime"]["differences"]) == {"1", "7"}
    assert max(rows["torch.export"]["differences"].values()) < 1e-5
    assert results["files"]["model-int8.onnx"]["bytes"] < results["files"]["model.onnx"]["bytes"]
    assert json.loads((folder / EXPORTS / "results.json").read_text()) == results
    names = {"model.onnx", "model-int8.onnx", "model.pt2", "results.json", "report.md"}
    assert {p.name for p in (folder / EXPORTS).iterdir()} == names
    report = (folder / EXPORTS / "report.md").read_text()
    assert f"{correct / images:.4f}" in report and "360 images of digits, test" in report
    assert all(row[key]["ms"] > 0 for row in rows.values() if "correct" in row for key in ("latency", "throughput"))


def test_the_files_say_what_they_take(exported):
    known = open_session(exported[0] / EXPORTS / "model-int8.onnx").get_modelmeta().custom_metadata_map
    assert json.loads(known["label_names"]) == list("0123456789") and json.loads(known["input_size"]) == [3, 16, 16]
    assert (json.loads(known["mean"]), json.loads(known["std"])) == ([0.3] * 3, [0.4] * 3)
    assert (known["input_dtype"], known["input_layout"], known["architecture"]) == ("uint8", "NCHW", "vit_resnas")
    assert set(known) >= {"interpolation", "crop_pct", "crop_mode"} and not [k for k in known if k.startswith("onnx")]


def test_float_images_are_taken_normalised(model, digits, tmp_path):
    """Into a folder of its own, without what was not asked for."""
    save_pretrained(model, tmp_path / "m", data_config=digits[0])
    given = ["--no-torch-export", "--output", str(tmp_path / "out"), "--max-images", "40", "--dataset", "digits"]
    results = recipe.main([str(tmp_path / "m"), *given, "--batch-size", "4", *QUICK])
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", "results.json", "report.md"}
    assert results["input"] == {"dtype": "float32", "size": [3, 16, 16]} and results["runtimes"][1]["images"] == 40
    x = next(iter(digits[2]))[0]
    (got,) = open_session(tmp_path / "out" / "model.onnx").run(None, {INPUT: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(got), model(x).detach(), rtol=1e-4, atol=1e-4)


def test_what_goes_wrong_on_the_way(model, digits, tmp_path, monkeypatch):
    """torch.export refuses; the folder's weights are replaced meanwhile; the export before was stopped, and one is."""
    folder = save_pretrained(model, tmp_path / "m", data_config=digits[0])
    before, weights = (folder / WEIGHTS).read_bytes(), sha256_of(folder / WEIGHTS)
    open_prepared, write = job.open_prepared, job.atomic_write
    (folder / EXPORTS).mkdir()
    (folder / EXPORTS / ".model.onnx.new").write_bytes(b"a part")

    def refuse(*_):
        raise ExportError("torch.export cannot export a Net: it branches")

    def replaced(*given):
        opened = open_prepared(*given)
        (folder / WEIGHTS).write_bytes(b"others")
        return opened

    monkeypatch.setattr(job, "to_program", refuse)
    monkeypatch.setattr(job, "open_prepared", replaced)
    results = recipe.main([str(folder), "--background", "#102030", "--batch-size", "2", *QUICK])
    assert results["weights"] == weights and results["model"] == "m" and str(tmp_path) not in json.dumps(results)
    assert {p.name for p in (folder / EXPORTS).iterdir()} == {"model.onnx", "results.json", "report.md"}
    report = (folder / EXPORTS / "report.md").read_text().splitlines()
    assert "No model.pt2: torch.export cannot export a Net: it branches" in report
    known = open_session(folder / EXPORTS / "model.onnx").get_modelmeta().custom_metadata_map
    assert known["background"] == "#102030"

    def stopped(path):
        if path.name == "results.json":
            raise OSError("stopped")
        return write(path)

    (folder / WEIGHTS).write_bytes(before)
    monkeypatch.setattr(job, "open_prepared", open_prepared)
    monkeypatch.setattr(job, "atomic_write", stopped)
    with pytest.raises(SystemExit):
        recipe.main([str(folder), "--no-torch-export", "--batch-size", "2", *QUICK])
    assert not (folder / EXPORTS / "results.json").exists()


# -- published --------------------------------------------------------------------------------------------------------


READER = """
import json, re, sys
import numpy as np, onnxruntime

folder, data = sys.argv[1:]
card = open(f"{folder}/README.md", encoding="utf-8").read()
stated = float(re.search(r"\\| ONNX Runtime \\|[^|]*\\| ([0-9.]+) \\|", card)[1])
session = onnxruntime.InferenceSession(f"{folder}/export/model.onnx", providers=["CPUExecutionProvider"])
names = json.loads(session.get_modelmeta().custom_metadata_map["label_names"])
data = np.load(data)
(logits,) = session.run(None, {"images": data["images"]})
answers = [names[i] for i in logits.argmax(axis=1)]
accuracy = np.mean([a == str(label) for a, label in zip(answers, data["labels"])])
assert data["images"].dtype == np.uint8 and not {"torch", "timm", "timm_resnas", "onnx"} & set(sys.modules)
print(stated, round(float(accuracy), 4))
"""


def test_a_published_folder_is_run_by_onnx_runtime_and_numpy_alone(exported, digits, tmp_path, monkeypatch):
    """It classifies images with the accuracy that the card states."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    ask_for_no_agents(monkeypatch)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with running() as server:
        push(exported[0], "alice/digits", endpoint=server.url, token="hf_alice")
        sent = set(server.files("alice/digits"))
        for name in ("README.md", f"{EXPORTS}/model.onnx"):
            huggingface_hub.hf_hub_download(
                "alice/digits", name, endpoint=server.url, token="hf_alice", local_dir=tmp_path / "there"
            )
    onnx = {f"{EXPORTS}/{name}" for name in ("model.onnx", "model-int8.onnx", "results.json", "report.md")}
    assert sent >= onnx | {CONFIG, WEIGHTS, "README.md"} and not [name for name in sent if name.endswith(".pt2")]

    x, y = (torch.cat(parts) for parts in zip(*digits[2], strict=True))
    pixels = ((x * 0.4 + 0.3) * 255).round().to(torch.uint8)
    np.savez(tmp_path / "images.npz", images=pixels.numpy(), labels=y.numpy())
    done = subprocess.run(
        [sys.executable, "-c", READER, str(tmp_path / "there"), str(tmp_path / "images.npz")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    stated, accuracy = map(float, done.stdout.split())
    assert stated == accuracy > 0.5


def test_files_of_other_weights_are_not_published(exported, tmp_path):
    folder = shutil.copytree(exported[0], tmp_path / "m")
    assert f"{EXPORTS}/model.onnx" in push(folder, "alice/net", dry_run=True).files
    results = json.loads((folder / EXPORTS / "results.json").read_text())
    (folder / EXPORTS / "results.json").write_text(json.dumps({**results, "weights": "0" * 64}))
    with pytest.raises(HubError, match=r"was not made from .*; run recipes/export.py again, or remove it"):
        push(folder, "alice/net", dry_run=True)
    (folder / EXPORTS / "results.json").unlink()  # as an export that was stopped
    with pytest.raises(HubError, match=r"was not made from"):
        push(folder, "alice/net", dry_run=True)
    shutil.rmtree(folder / EXPORTS)
    sent = push(folder, "alice/net", dry_run=True)
    assert not [n for n in sent.files if n.startswith(EXPORTS)] and "Other runtimes" not in sent.card


def test_only_files_that_were_measured_are_published(exported, tmp_path):
    """A card tells of the files beside it, not of those of an earlier export."""
    folder = shutil.copytree(exported[0], tmp_path / "m")
    onnx, results = folder / EXPORTS / "model.onnx", folder / EXPORTS / "results.json"
    onnx.write_bytes(onnx.read_bytes() + b" ")
    with pytest.raises(HubError, match=r"model.onnx is not a file that .*results.json tells of; run recipes/export.py"):
        push(folder, "alice/net", dry_run=True)
    found = json.loads(results.read_text())
    found["files"]["model.onnx"]["sha256"] = sha256_of(onnx)
    results.write_text(json.dumps(found))  # as an export without --update-card
    sent = push(folder, "alice/net", dry_run=True)
    assert f"{EXPORTS}/model.onnx" in sent.files and "Other runtimes" not in sent.card
    (folder / "README.md").write_text("# Mine\n\n## Other runtimes\n\nOf before.\n\n## Terms\n\nNone.\n")
    sent = push(folder, "alice/net", dry_run=True)
    assert sent.card == "# Mine\n\n## Terms\n\nNone.\n" and sent.files["README.md"] == len(sent.card)
    note_exports(folder, found)
    assert "Other runtimes" in push(folder, "alice/net", dry_run=True).card


def test_a_card_that_is_there_gets_the_new_numbers(exported, tmp_path):
    folder, results = shutil.copytree(exported[0], tmp_path / "m"), json.loads(json.dumps(exported[1]))
    made = push(folder, "alice/net", dry_run=True).card
    section = made[made.index("## Other runtimes") :]
    (folder / "README.md").write_text("# Mine\n\nA word.\n\n## Terms\n\nNone.\n")
    for correct in (100, 200):
        results["runtimes"][1]["correct"] = correct
        note_exports(folder, results)
    card = (folder / "README.md").read_text()
    assert card.startswith("# Mine\n\nA word.\n\n## Terms\n\nNone.\n\n## Other runtimes\n")
    assert card.count("## Other runtimes") == 1 and "0.5556" in card and "0.2778" not in card
    assert push(folder, "alice/net", dry_run=True).card == card
    # in the middle of a card, only the section is replaced
    (folder / "README.md").write_text(f"# Mine\n\n{section.partition('Measured on')[0]}\n\n## Terms\n\nNone.\n")
    note_exports(folder, exported[1])
    card = (folder / "README.md").read_text()
    assert re.findall(r"(?m)^#+ .*", card) == ["# Mine", "## Other runtimes", "## Terms"] and "Measured on" in card
    info = json.loads((folder / CONFIG).read_text())["timm_resnas"]
    assert info["export"]["runtimes"][1]["accuracy"] == f"{exported[1]['runtimes'][1]['correct'] / 360:.4f}"
    assert info["sha256"] and timm.create_model(f"local-dir:{folder}", pretrained=True)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_another_function_is_refused():
    x = np.arange(12, dtype=np.float32).reshape(4, 3)
    with pytest.raises(RunError, match=r"B does not compute what PyTorch does: at batch size 4.*Nothing was written"):
        job.check({"PyTorch": lambda x: x, "B": lambda x: x + 0.1 * (len(x) > 1)}, x, (1, 4))
    with pytest.raises(RunError, match="not finite"):
        job.check({"PyTorch": lambda x: x * np.nan, "B": lambda x: x}, np.float32([[1.0, 2.0]]), (1,))
    found = job.check({"PyTorch": lambda x: x, "int8": lambda x: x + 1}, x, (1, 4))
    assert found == {"int8": {"1": 0.5, "4": pytest.approx(1 / 11)}}


def test_speedups_are_of_the_same_round(monkeypatch):
    """A machine that is three times as slow in one round changes neither the fastest time nor the ratio."""
    times = iter([9, 9, 4, 2, 12, 6, 4.4, 2])
    monkeypatch.setattr(job, "repeat_call", lambda call, number, threads: (np.array([next(times)] * number), 0.0))
    found = job.race({"a": None, "b": None}, None, 1, rounds=3, min_run_time=0.0)
    assert found["a"] == {"ms": 4, "median_ms": 4.4, "speedup": 1.0}
    assert found["b"] == {"ms": 2, "median_ms": 2, "speedup": 2.0}


@pytest.mark.parametrize(
    "given, message",
    [
        (["vit_resnas_tiny"], "vit_resnas_tiny has no pretrained weights; give a folder.*--no-pretrained"),
        (["vit_resnas_tiny", "--update-card"], "--update-card is for a model's folder"),
        (["FOLDER", "--update-card", "--no-pretrained"], "--update-card is for the folder's own weights"),
        (["vit_resnas_tinny"], "did you mean vit_resnas_tiny"),
        (["FOLDER", "--batch-size", "1"], "--batch-size must be at least 2"),
        (["FOLDER", "--output", "FOLDER"], "holds something else than an export: config.json;"),
        (["FOLDER", "--update-card", "--img-size", "32"], "as its folder says; leave out --img-size"),
        (["FOLDER", "--output", "NEW", "--update-card"], "leave out --output"),
        (["FOLDER", "--dataset", "imagefolder:nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_said_before_any_work(given, message, exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "to_onnx", lambda *_: pytest.fail("exported"))
    given = [{"FOLDER": str(exported[0]), "NEW": str(tmp_path / "new")}.get(word, word) for word in given]
    with pytest.raises(SystemExit) as end:
        recipe.main(given)
    said = capsys.readouterr().err
    assert end.value.code == 2 and re.search(message, said) and said.count("error") == 1
