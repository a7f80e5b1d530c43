"""``python -m timm_resnas`` and ``python -m timm_resnas.run``."""

import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from timm.data import ImageNetInfo, create_transform, resolve_model_data_config

import timm_resnas
from timm_resnas import __main__ as program
from timm_resnas.nas import count


def listed(capsys, *patterns):
    program.main(patterns)
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "input", "params", "MACs", "paper"]
    rows = {line.split()[0]: line for line in lines}
    assert len(rows) == len(lines)
    return rows


def test_models_are_listed_with_costs_and_papers(capsys):
    rows = listed(capsys, "vit_resnas_t*", "exmobilevit_576", "*cait_s*")  # *cait_s* are timm's as well
    assert "3 x 224 x 224   40.8 M   1.78 G  arXiv:2109.00642" in rows["vit_resnas_tiny"]  # the README's numbers
    assert "3 x 256 x 256    5.5 M   2.00 G  arXiv:2309.01310" in rows["exmobilevit_576"]
    ours = [
        name for name in timm.list_models("*cait_s*") if "timm_resnas" in timm.models.model_entrypoint(name).__module__
    ]
    assert set(rows) == {"vit_resnas_tiny", "vit_resnas_tiny_supernet", "exmobilevit_576", *ours}


def test_all_models_are_listed(capsys, monkeypatch):
    """What a name costs is shown by the test before."""
    created = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name: created("vit_resnas"))
    monkeypatch.setattr(count, "count_macs", lambda model, size: 0)
    rows = listed(capsys)
    assert {"vit_resnas_small_supernet", "cait_study", "sret_tiny", "uninet_b6"} <= set(rows)
    home = {name: timm.models.model_entrypoint(name).__module__ for name in timm.list_models()}
    assert set(rows) == {name for name, module in home.items() if module.startswith("timm_resnas.")}


def test_a_name_of_no_model(capsys):
    with pytest.raises(SystemExit) as error:
        program.main(["vit_small_patch16_224", "nothing*"])
    said = "timm_resnas: no model of this package is called vit_small_patch16_224 or nothing*; without a name, all are "
    assert error.value.code == 2 and capsys.readouterr().err == f"{said}listed\n"


@pytest.fixture
def picture(tmp_path):
    path = tmp_path / "picture.png"
    Image.effect_noise((40, 50), 60).convert("RGB").save(path)
    return path


def saved(folder, **kwargs):
    """A model with random weights, written to a folder."""
    torch.manual_seed(0)
    model = timm.create_model("vit_resnas", num_classes=kwargs.pop("num_classes"))
    torch.nn.init.normal_(model.head.weight, std=1.0)  # answers that differ
    timm_resnas.save_pretrained(model, folder, **kwargs)
    return folder


def expected(folder, picture):
    """Probabilities by timm alone."""
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model))
    with torch.no_grad():
        return model(transform(Image.open(picture).convert("RGB"))[None]).softmax(-1)[0]


def test_predict_prints_the_five_likeliest_classes_of_a_folders_model(tmp_path, picture, capsys):
    names = [f"kind {i}" for i in range(7)]
    folder = saved(tmp_path / "model", num_classes=7, label_names=names)
    other = tmp_path / "other.jpg"
    Image.new("L", (64, 33), 200).save(other)  # grey
    program.main(["predict", str(folder), str(picture), str(other)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == str(picture) and lines[6] == str(other) and len(lines) == 12
    probs, index = expected(folder, picture).topk(5)
    assert lines[1:6] == [f"  {p:6.1%}  {names[i]}" for p, i in zip(probs.tolist(), index.tolist(), strict=True)]


def test_predict_turns_wordnet_ids_into_words(tmp_path, picture, capsys):
    folder = saved(tmp_path / "model", num_classes=2, label_names=["n01440764", "n02123045"])
    program.main(["predict", str(folder), str(picture)])
    words = {line.split("  ")[-1] for line in capsys.readouterr().out.splitlines()[1:]}
    assert words == {"tench, Tinca tinca", "tabby, tabby cat"}


def test_predict_loads_the_weights_of_a_name(tmp_path, picture, capsys, monkeypatch):
    """Those that its default configuration names, here a file instead of a repository."""
    folder = saved(tmp_path / "model", num_classes=1000)
    cfg = timm.models._registry._model_pretrained_cfgs["vit_resnas"]
    monkeypatch.setattr(cfg, "file", str(folder / "model.safetensors"))
    program.main(["predict", "vit_resnas", str(picture)])
    probs, index = expected(folder, picture).topk(5)
    lines = [
        f"  {p:6.1%}  {ImageNetInfo().index_to_description(i)}"
        for p, i in zip(probs.tolist(), index.tolist(), strict=True)
    ]
    assert capsys.readouterr().out.splitlines() == [str(picture), *lines]


@pytest.mark.parametrize(("classes", "name_of"), [(1000, ImageNetInfo().index_to_description), (6, "class {}".format)])
def test_predict_names_classes_that_the_model_does_not(tmp_path, picture, capsys, classes, name_of):
    folder = saved(tmp_path / "model", num_classes=classes)
    program.main(["predict", str(folder), str(picture)])
    best = expected(folder, picture).argmax().item()
    assert capsys.readouterr().out.splitlines()[1].endswith(f"  {name_of(best)}")


def test_predict_says_what_is_wrong(tmp_path, picture, capsys):
    folder = saved(tmp_path / "model", num_classes=3)
    broken = tmp_path / "broken.png"
    broken.write_bytes(picture.read_bytes()[:200])
    for args, message in (
        (["vit_resnas_tiny", str(picture)], "vit_resnas_tiny has no pretrained weights"),
        (["vit_resnas_tin", str(picture)], "'vit_resnas_tin' is neither"),
        ([str(folder), str(picture), "missing.png"], "there is no image missing.png"),
        (["vit_resnas_tiny.nothing", str(picture)], "the weights of vit_resnas_tiny.nothing cannot be loaded"),
        ([str(folder), str(broken)], f"{broken} cannot be read as an image"),
    ):
        with pytest.raises(SystemExit) as error:
            program.main(["predict", *args])
        said = capsys.readouterr()
        assert error.value.code == 2 and message in said.err and said.err.count("\n") == 1 and not said.out


def test_run_runs_a_script_with_our_models(python, tmp_path):
    (tmp_path / "beside.py").write_text("NUMBER = 7")
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\n"
        "assert 'timm' not in sys.modules\n"
        "import beside, timm\n"
        "if __name__ == '__main__':\n"
        "    print(sys.argv, beside.NUMBER, timm.is_model('vit_resnas_tiny'), __file__)\n"
        "    sys.exit(3)\n"
    )
    code = "import runpy; runpy.run_module('timm_resnas.run', run_name='__main__', alter_sys=True)"  # as python -m does
    done = python.run(code, str(script), "--model", "a b")
    assert done.stdout == f"{[str(script), '--model', 'a b']} 7 True {script}\n", done.stderr
    assert done.returncode == 3
    command = [sys.executable, "-m", "timm_resnas.run", "missing.py"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "timm_resnas.run: there is no script missing.py\n")
