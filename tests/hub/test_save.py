"""Writing a model's folder: what is saved is what loads, and says where it is from."""

import json
import os
import stat

import pytest
import timm
import torch
from safetensors.torch import load_file

from timm_resnas.hub import CONFIG, GOLDEN, WEIGHTS, HubError, load, save, save_pretrained, sha256_of


def read(folder):
    return json.loads((folder / CONFIG).read_text())


def logits(model, size=160):
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        return model.eval()(x)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10).eval()


def test_save_does_not_replace_what_is_no_model(net, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(HubError, match="holds no config.json"):
        save_pretrained(net, tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


# -- what is saved is what loads --------------------------------------------------------------------------------------


def replaced_head(model):
    model.head = torch.nn.Linear(64, 7)


def replaced_block(model):
    model.blocks[1] = torch.nn.Identity()


def other_activation(model):
    model.blocks[0].mlp.act = torch.nn.Tanh()


def not_finite(model):
    with torch.no_grad():
        model.head.weight[3, 3] = float("nan")


def on_meta(model):
    model.to("meta")


CHANGES = {
    replaced_head: r"head.bias has shape \[7\], the network needs \[10\]",
    replaced_block: "lacks blocks.1.attn.proj.bias",
    other_activation: "the folder's model gives other logits",
    not_finite: r"not finite \(NaN or infinite\) in head.weight",
    on_meta: "on the meta device",
}


@pytest.mark.parametrize("change, message", CHANGES.items(), ids=[c.__name__ for c in CHANGES])
def test_a_model_that_would_not_come_back_leaves_the_old_folder(vit, tmp_path, change, message):
    folder = save_pretrained(vit, tmp_path / "m")
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    change(vit)
    with pytest.raises(HubError, match=message) as e:
        save_pretrained(vit, folder)
    assert "\n" not in str(e.value) and f".{folder.name}-" not in str(e.value)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_a_classifier_changed_timms_way_comes_back(vit, tmp_path):
    vit.reset_classifier(7)
    assert torch.equal(logits(load(save_pretrained(vit, tmp_path / "m"), check=True)), logits(vit))


def test_label_names(vit, tmp_path):
    folder = save_pretrained(vit, tmp_path / "m", label_names=range(10))
    assert load(folder).pretrained_cfg["label_names"] == [str(n) for n in range(10)]
    for names, message in (
        (range(9), "9 names for a model of 10 classes"),
        ([None] * 10, "must be texts or integers, got None"),
        ("0123456789", "must be texts or integers, got '0123456789'"),
        ([True] * 10, "must be texts or integers, got True"),
    ):
        with pytest.raises(HubError, match=message):
            save_pretrained(vit, folder, label_names=names)


@pytest.mark.parametrize(
    "name, args",
    [
        ("sret_tiny", dict(class_token=True, img_size=64)),
        ("sret_tiny", dict(global_pool="max", img_size=64)),
        ("test_vit", dict(class_token=False, global_pool="avg")),
        ("test_vit", dict(global_pool="avg")),
        ("test_resnet", dict(global_pool="max")),
    ],
)
def test_arguments_that_decide_others_are_kept(tmp_path, name, args):
    model = timm.create_model(name, num_classes=5, **args).eval()
    loaded = load(save_pretrained(model, tmp_path / "m"), check=True)
    size = args.get("img_size", 160)
    assert logits(loaded, size).shape == (2, 5)
    assert torch.equal(logits(loaded, size), logits(model, size))


def test_pooling_that_was_changed_later_is_kept(vit, tmp_path):
    vit.reset_classifier(4, global_pool="avg")
    assert torch.equal(logits(load(save_pretrained(vit, tmp_path / "m"), check=True)), logits(vit))


def test_saving_draws_no_numbers(vit, tmp_path):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    save_pretrained(vit, tmp_path / "m")
    assert torch.equal(torch.rand(3), expected)


def test_modes_of_frozen_parts_stay(vit, tmp_path):
    vit.train()
    vit.blocks[0].eval()
    before = [m.training for m in vit.modules()]
    save_pretrained(vit, tmp_path / "m")
    assert [m.training for m in vit.modules()] == before and len(set(before)) == 2


def test_a_very_large_model_is_compared_by_its_shapes(vit, tmp_path, monkeypatch):
    monkeypatch.setattr(save, "_READ_BACK", 10)
    monkeypatch.setattr(save, "load", None)
    save_pretrained(vit, tmp_path / "m")
    replaced_head(vit)
    with pytest.raises(HubError, match="head.bias has shape"):
        save_pretrained(vit, tmp_path / "m")


# -- wrapped, laid out otherwise, in other precision ------------------------------------------------------------------


def part_compiled(model):
    parts = model.blocks if hasattr(model, "blocks") else model.layer1
    parts[0] = torch.compile(parts[0], backend="eager")
    return model


WRAPPERS = {
    "channels_last": lambda m: m.to(memory_format=torch.channels_last),
    "compiled": lambda m: torch.compile(m, backend="eager"),
    "part compiled": part_compiled,
    "DataParallel": torch.nn.DataParallel,
    "compiled DataParallel": lambda m: torch.compile(torch.nn.DataParallel(m), backend="eager"),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)
@pytest.mark.parametrize("name", ["test_vit", "test_resnet"])
def test_wrapped_models_are_saved(tmp_path, name, wrap):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=10).eval()
    expected = logits(model)
    state = {k: v.clone() for k, v in model.state_dict().items()}
    folder = save_pretrained(wrap(model), tmp_path / "m")
    loaded = load(folder, check=True)
    torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-5)
    for key, value in loaded.state_dict().items():
        assert torch.equal(value, state[key]), key


def test_half_precision_is_checked_as_others_load_it(vit, tmp_path):
    folder = save_pretrained(vit.bfloat16(), tmp_path / "m")
    assert load_file(folder / WEIGHTS)["head.weight"].dtype == torch.bfloat16
    loaded = load(folder, check=True)
    assert loaded.head.weight.dtype == torch.float32 and torch.equal(loaded.head.weight, vit.head.weight.float())


def test_tied_weights_are_saved(vit, tmp_path):
    vit.blocks[1].mlp.fc1.weight = vit.blocks[0].mlp.fc1.weight
    loaded = load(save_pretrained(vit, tmp_path / "m"), check=True)
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, vit.blocks[0].mlp.fc1.weight)


# -- the files --------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="modes of POSIX")
@pytest.mark.parametrize("umask, file, folder", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)])
def test_access_is_what_the_umask_says(vit, tmp_path, umask, file, folder):
    before = os.umask(umask)
    try:
        saved = save_pretrained(vit, tmp_path / "m", files={"notes.txt": "x"})
    finally:
        os.umask(before)
    modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in saved.iterdir()}
    assert modes == dict.fromkeys([CONFIG, WEIGHTS, GOLDEN, "notes.txt"], file)
    assert stat.S_IMODE(saved.stat().st_mode) == folder


def test_digest_of_the_weights_is_in_the_configuration(vit, tmp_path):
    folder = save_pretrained(vit, tmp_path / "m", info={"params": 1})
    assert read(folder)["timm_resnas"]["sha256"] == {WEIGHTS: sha256_of(folder / WEIGHTS)}


# -- where the weights are from ---------------------------------------------------------------------------------------


def test_nothing_is_said_of_weights_that_these_are_not(vit, tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", num_classes=3, img_size=32)
    assert model.pretrained_cfg["tag"] == "augreg_in21k_ft_in1k" and model.pretrained_cfg["license"] == "apache-2.0"
    folder = save_pretrained(model, tmp_path / "m")
    cfg = read(folder)["pretrained_cfg"]
    gone = {"tag", "license", "origin_url", "url", "file", "hf_hub_id", "source", "description", "notes"}
    assert not gone & cfg.keys() and "augreg" not in (folder / CONFIG).read_text()
    loaded = load(folder).pretrained_cfg
    assert not loaded.get("tag") and not loaded.get("license") and not loaded.get("hf_hub_id")
    assert model.pretrained_cfg["tag"] == "augreg_in21k_ft_in1k"  # the model in memory is left alone


def test_the_licence_is_the_callers(vit, tmp_path):
    folder = save_pretrained(vit, tmp_path / "m", info={"license": "cc-by-4.0"})
    assert read(folder)["pretrained_cfg"]["license"] == "cc-by-4.0"


def test_papers_of_an_architecture_stay_and_those_of_weights_do_not(tmp_path, monkeypatch):
    ours = save_pretrained(timm.create_model("exmobilevit_576", num_classes=3), tmp_path / "ours")
    assert read(ours)["pretrained_cfg"]["paper_ids"] == "arXiv:2309.01310"
    model = timm.create_model("test_vit")
    model.pretrained_cfg["paper_ids"] = "arXiv:2106.10270"  # of one recipe; the architecture's other weights have none
    monkeypatch.setattr(timm, "list_models", lambda *a, **k: ["test_vit.r160_in1k", "test_vit.other"])
    cfgs = {"test_vit.r160_in1k": "arXiv:2106.10270", "test_vit.other": None}
    monkeypatch.setattr(
        save, "get_pretrained_cfg", lambda name: timm.models.PretrainedCfg(paper_ids=cfgs[name], paper_name=None)
    )
    assert "paper_ids" not in read(save_pretrained(model, tmp_path / "m"))["pretrained_cfg"]


def test_what_it_was_trained_on_from(vit, tmp_path):
    folder = save_pretrained(vit, tmp_path / "m", base_model=True)
    assert read(folder)["timm_resnas"]["base_model"] == {"name": "timm/test_vit.r160_in1k", "license": "apache-2.0"}
    again = load(folder)
    save_pretrained(again, tmp_path / "again", base_model=True)
    assert read(tmp_path / "again")["timm_resnas"]["base_model"] == {"name": str(folder)}
    with pytest.raises(HubError, match="has no pretrained weights; give their name"):
        save_pretrained(timm.create_model("exmobilevit_576"), tmp_path / "x", base_model=True)
