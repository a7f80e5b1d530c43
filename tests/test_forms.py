"""Forms in which a model runs, and the recipes that compare them."""

import json

import pytest
import timm
import torch
from torch.testing import assert_close

import timm_resnas  # noqa: F401  (registers the models)
from recipes import benchmark_models, forms
from timm_resnas.engine.forms import check_form, form_of

VIT = ("vit_resnas", 56, dict(img_size=56))


@pytest.mark.parametrize(
    ("name", "side", "kwargs", "form"),
    [
        (*VIT, "eager"),
        (*VIT, "torchscript"),
        (*VIT, "channels_last+export"),
        (*VIT, "bfloat16"),
        # torch's older exporter needs pooling to known sizes, batches from the input, no autograd functions
        ("exmobilevit_576", 64, {}, "onnx_legacy"),
        ("autoformer", 32, dict(img_size=32, patch_size=16), "onnx_legacy"),
        ("reformer_tiny", 32, dict(img_size=32, patch_size=4, embed_dim=24, depth=2, bucket_size=16), "onnx_legacy"),
    ],
)
def test_a_form_computes_what_the_model_does(name, side, kwargs, form):
    if form.startswith("onnx"):
        pytest.importorskip("onnxruntime")

    def create():
        torch.manual_seed(0)
        return timm.create_model(name, num_classes=5, **kwargs)

    run, model = form_of(create, form, torch.zeros(2, 3, side, side)), create().eval()
    tolerance = dict(rtol=0.1, atol=0.02) if "bfloat16" in form else dict(rtol=1e-4, atol=1e-5)
    for batch in (1, 3):
        x = torch.randn(batch, 3, side, side)
        with torch.no_grad():
            assert_close(run(x).float(), model(x), **tolerance)


@pytest.mark.parametrize(
    ("form", "message"),
    [
        ("fast", "'fast' is no form; expected parts of bfloat16, channels_last and one of eager"),
        ("compile+onnx", "one of"),
        ("bfloat16+bfloat16", "one of"),
        ("bfloat16+onnx", "ONNX Runtime computes in float32"),
    ],
)
def test_wrong_forms_are_refused(form, message):
    with pytest.raises(ValueError, match=message):
        check_form(form)


def test_the_table_of_forms_has_differences_and_reasons(tmp_path, capsys, monkeypatch):
    def refuse(model):
        raise RuntimeError("\n  no such operator\nmore")

    monkeypatch.setattr(torch.jit, "script", refuse)
    file = tmp_path / "forms.json"
    with pytest.raises(SystemExit) as status:
        forms.main(["test_vit", "--forms", "torchscript,channels_last,bfloat16", "--json", str(file)])
    assert status.value.code == 1
    row = json.loads(file.read_text())["test_vit"]
    assert row["torchscript"] == "RuntimeError: no such operator"
    assert row["channels_last"] < 1e-4 < row["bfloat16"] < 0.1
    *_, line, last = capsys.readouterr().out.splitlines()
    assert line.startswith("| test_vit | RuntimeError: no such operator | ")
    assert last == "1 models, 3 forms: 1 failed"
    with pytest.raises(ValueError, match="timm knows no model no_such_"):
        forms.main(["no_such_*"])


def test_a_number_that_is_not_finite_is_a_failure(capsys, monkeypatch):
    """Also where only the second batch has one."""

    def form_of(create, form, images):
        return lambda x: torch.full((len(x), 1000), 0.0 if len(x) == 1 else float("nan"))

    monkeypatch.setattr(forms, "form_of", form_of)
    with pytest.raises(SystemExit) as status:
        forms.main(["test_vit", "--forms", "eager"])
    assert status.value.code == 1
    assert capsys.readouterr().out.splitlines()[-2:] == ["| test_vit | not finite |", "1 models, 1 forms: 1 failed"]


def test_benchmark_of_models(tmp_path, capsys, python, monkeypatch):
    def run(command, **_):  # memory is that of a new process, which need not import torch
        code = "import runpy, sys; del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')"
        return python.run(code, *command[1:])

    monkeypatch.setattr(benchmark_models.subprocess, "run", run)
    file, picture = tmp_path / "speed.json", tmp_path / "speed.png"
    args = ["vit_resnas", "--baseline", "test_vit", "--img-size", "112"]
    args += ["--batch-size", "2", "--rounds", "2", "--threads", "1", "--json", str(file), "--picture", str(picture)]
    report = benchmark_models.main(args)
    assert json.loads(file.read_text()) == report and picture.read_bytes().startswith(b"\x89PNG")
    rows = {(r["model"], r["form"]): r for r in report["rows"]}
    assert list(rows) == [("test_vit", "eager"), ("vit_resnas", "eager")]
    assert rows["test_vit", "eager"]["ratio"] == 1
    for (name, _), row in rows.items():
        model = timm.create_model(name, img_size=112)
        assert row["params"] == sum(p.numel() for p in model.parameters())
        assert row["slowest"] <= row["images_per_second"] <= row["fastest"] and row["latency_ms"] > 0
        assert row["memory"] is None or row["memory"] > 4 * row["params"]
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("| model | form |") and len(lines) == 4


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no_such_model"], "timm knows no model no_such_model"),
        (["test_vit", "--forms", "onnx", "--device", "cuda"], "run on a CPU"),
        (["test_vit", "--json", "nowhere/x.json"], "there is no folder nowhere"),
        (["test_vit", "--batch-size", "1"], "2 images a batch"),
    ],
)
def test_benchmark_says_what_is_wrong(args, message):
    with pytest.raises(ValueError, match=message):
        benchmark_models.main(args)
