"""Authors' checkpoint files into folders; the reference tensors are in the released layouts."""

import argparse
import json
import os
import pickle
import re
from pathlib import Path

import convert
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from timm_resnas.hub import CONFIG, GOLDEN, WEIGHTS, load, push, sha256_of

URL = "https://example.org/weights"


def released(path):
    """State dict, reference file's tensors and configuration."""
    tensors = load_file(path)
    state = {k.removeprefix("state_dict/"): v for k, v in tensors.items() if k.startswith("state_dict/")}
    with safe_open(path, "pt") as f:
        meta = f.metadata()
    return state, tensors, json.loads(meta.get("meta") or meta["config"])


def vit_resnas_args(c):
    return "vit_resnas", {
        "network_def": c["network_def"],
        "img_size": c["img_size"],
        "distill_token": c["distill_token"],
        "patch_head": c["patch_output"],
    }


def sret_args(c):
    names = ("base_dims", "recursive_num", "groups1", "groups2", "mlp_ratio", "np_mlp_ratio", "num_classes", "in_chans")
    renamed = {"img_size": c["image_size"], "depths": c["depth"], "num_heads": c["heads"], "patch_size": 8}
    return "sret", {**{k: c[k] for k in names if k in c}, **renamed}


def cait_args(c):
    names = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "num_classes")
    return "cait_xs24_224", {k: c[k] for k in names}


LAYOUTS = {
    "vit_resnas_a": vit_resnas_args,
    "vit_resnas_b": vit_resnas_args,
    "vit_resnas_d": vit_resnas_args,
    "sret_a": sret_args,
    "cait_a": cait_args,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_released_layout_becomes_a_folder_with_the_authors_logits(name, golden, tmp_path, capsys):
    state, tensors, config = released(golden(name))
    model, args = LAYOUTS[name](config)
    file = tmp_path / "released.pth"
    wrapped = {"model": {f"module.{k}": v for k, v in state.items()}, "epoch": 299}
    torch.save({**wrapped, "args": argparse.Namespace(lr=0.1)}, file)
    reference = tmp_path / "reference.safetensors"
    save_file({k: tensors[k] for k in ("input", "logits")}, reference)
    out = tmp_path / "converted" / name
    command = [str(file), "--model", model, "--model-args", json.dumps(args), "--license", "cc-by-nc-4.0"]
    convert.main([*command, "--source", URL, "--output", str(out), "--reference", str(reference)])
    assert "logits before and after are equal" in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir()) == [CONFIG, WEIGHTS, GOLDEN]
    assert sorted(p.name for p in out.parent.iterdir()) == [name]  # nothing unfinished is left

    # without our loader, as anybody would
    net = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(net(tensors["input"]), tensors["logits"], rtol=0, atol=1e-4)
    info = json.loads((out / CONFIG).read_text())["timm_resnas"]
    source = info["converted_from"]
    assert info["license"] == "cc-by-nc-4.0" and info["reference"]["largest_difference"] <= 1e-4
    assert (source["url"], source["file"], source["epoch"], source["weights"]) == (URL, "released.pth", 299, "model")
    assert source["sha256"] == sha256_of(file)
    card = push(out, "alice/net", dry_run=True).card
    assert "license: cc-by-nc-4.0" in card and source["sha256"] in card and "model-index" not in card
    assert URL in card


NETWORK = "((4,24),(1,(24,2,16),(24,48),1),(3,24,40),(1,(40,3,16),(40,96),1),(2,40,10))"
ARGS = json.dumps({"network_def": NETWORK, "img_size": 28})
FIXED = ["--model", "vit_resnas", "--model-args", ARGS, "--license", "mit", "--source", URL]


@pytest.fixture
def states():
    """Two networks' weights in the released layout: ours renamed back."""
    found = []
    for seed in range(2):
        torch.manual_seed(seed)
        net = timm.create_model("vit_resnas", network_def=NETWORK, img_size=28)
        state = {k.replace("head.", "cls_head."): v for k, v in net.state_dict().items()}
        state["tokens"] = state.pop("cls_token")
        found.append(state)
    return found


def test_averaged_weights_are_preferred(states, tmp_path):
    torch.save({"model": states[0], "model_ema": states[1]}, tmp_path / "both.pth")
    for options, expected in (([], states[1]), (["--weights", "model"], states[0])):
        out = tmp_path / f"out{len(options)}"
        convert.main([str(tmp_path / "both.pth"), *FIXED, "--output", str(out), *options])
        assert torch.equal(load(out).head.weight, expected["cls_head.weight"])


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil-was-here",)


def test_refusals(states, tmp_path, capsys):
    good, evil, bare = tmp_path / "good.pth", tmp_path / "evil.pth", tmp_path / "list.pth"
    torch.save(states[0], good)
    evil.write_bytes(pickle.dumps({"model": Evil()}, protocol=2))
    torch.save([1, 2], bare)
    (tmp_path / "empty.pth").touch()
    short = {k: v for k, v in states[0].items() if k != "norm.bias"}
    torch.save(short, tmp_path / "short.pth")
    wrong = tmp_path / "wrong.safetensors"
    save_file({"input": torch.zeros(1, 3, 28, 28), "logits": torch.zeros(1, 10)}, wrong)
    (tmp_path / "there").mkdir()
    out = ["--output", str(tmp_path / "out")]
    for options, message in (
        ([str(tmp_path / "none.pth"), *FIXED, *out], "there is no file"),
        ([str(evil), *FIXED, *out], "cannot be read safely|that can be read safely"),
        ([str(tmp_path / "empty.pth"), *FIXED, *out], "can be read safely: EOFError"),
        ([str(bare), *FIXED, *out], "holds a list"),
        ([str(tmp_path / "short.pth"), *FIXED, *out], 'Missing key.*"norm.bias"'),
        ([str(good), *FIXED, "--weights", "model_ema", *out], "holds no 'model_ema'"),
        ([str(good), *FIXED, "--model", "vit_nothing", *out], "unknown model 'vit_nothing'"),
        ([str(good), *FIXED, "--model-args", "[1]", *out], "must be a JSON object"),
        (
            [str(good), *FIXED, "--model-args", json.dumps({**json.loads(ARGS), "patch_head": True}), *out],
            "no patch_head",
        ),
        ([str(good), *FIXED, "--reference", str(wrong), *out], "the logits differ from those of"),
        ([str(good), *FIXED, "--output", str(tmp_path / "there")], "there exists"),
    ):
        with pytest.raises(SystemExit) as e:
            convert.main(options)
        error = capsys.readouterr().err.strip()
        assert e.value.code == 2 and re.search(message, error) and len(error.splitlines()) == 1, error
    assert not (tmp_path / "out").exists() and not Path("evil-was-here").exists()
    with pytest.raises(SystemExit):
        convert.main([str(good), "--model", "vit_resnas", "--source", URL])
    assert "--license" in capsys.readouterr().err


def test_a_whole_file_and_timm_s_own_layout(states, tmp_path):
    net = timm.create_model("test_vit")
    torch.save(net.state_dict(), tmp_path / "vit.pth")
    options = ["--model", "test_vit", "--license", "mit", "--source", URL]
    convert.main([str(tmp_path / "vit.pth"), *options])
    assert torch.equal(load(tmp_path / "vit", check=True).head.weight, net.head.weight)
