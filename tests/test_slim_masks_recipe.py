"""search.py --model … --search slim-masks: a trained timm ViT is cut where its masks say; their training task."""

import json

import numpy as np
import pytest
import timm
import torch
from recipe_server import Recipe, wait_until
from safetensors.torch import load_file

import timm_resnas
from recipes import report as report_recipe
from recipes import search as recipe
from timm_resnas.families.slim_masks import MaskedViT
from timm_resnas.nas.count import count_macs
from timm_resnas.tasks import SLIM_PRICES, SlimMaskTask

QUICK = [
    *(
        "--cpu",
        "--threads",
        "1",
        "--search",
        "slim-masks",
        "--budget",
        "macs=60%",
        "--epochs",
        "0",
        "--num-random",
        "2",
    ),
    *("--mask-epochs", "2", "--finetune-epochs", "1", "--warmup-epochs", "0", "--calibration", "64"),
    *("--batch-size", "128", "--checkpoint-steps", "3"),
]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small ViT with the digits' classes, as it was initialised."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", img_size=32, num_classes=10)
    folder = tmp_path_factory.mktemp("base") / "best"
    config = {"input_size": [3, 32, 32]}
    return timm_resnas.save_pretrained(model, folder, label_names=list(map(str, range(10))), data_config=config)


@pytest.fixture(scope="module")
def runs(recipe_server, base):
    return Recipe(recipe_server, "search", [*QUICK, "--model", str(base)])


@pytest.fixture(scope="module")
def finished(runs, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    runs.run(folder)
    return folder


def results_of(folder):
    return json.loads((folder / "results.json").read_text())


def test_what_comes_out(finished):
    results = results_of(finished)
    limit, networks = results["budget"]["macs"], results["networks"]
    assert 0.9 * limit < results["best"]["macs"] <= limit and results["candidates"] == 0
    best = timm.create_model(f"local-dir:{finished / 'best'}", pretrained=True)
    assert count_macs(best, (3, 32, 32)) == results["best"]["macs"] == networks["found, fine-tuned"]["macs"]
    assert networks["found, by masks"]["macs"] == results["best"]["macs"] < networks["full model"]["macs"]
    widths = results["best"]["args"]["widths"]
    assert len({tuple(own[:2]) for own in widths}) > 1  # one threshold, not the same cut everywhere
    assert json.loads((finished / "best" / "config.json").read_text())["architecture"] == "vit_elastic"
    text = (finished / "report.md").read_text()
    assert "Masks on attention and MLP were trained with the model for 2 epochs" in text and "candidates" not in text
    assert (finished / "widths.png").stat().st_size > 0 and not (finished / "history.jsonl").exists()
    (finished / "report.md").unlink()
    report_recipe.main([str(finished)])
    assert (finished / "report.md").read_text() == text


def test_killed_it_ends_with_the_same_network(runs, finished, tmp_path):
    folder = tmp_path / "killed"
    moments = [
        lambda: any((folder / "masks" / "state").glob("training/*")),
        lambda: any((folder / "finetune" / "state").glob("training/*")),
    ]
    for moment in moments:
        pid = runs.start(folder)
        wait_until(moment, pid, f"{folder}.log")
        runs.kill(pid)
    runs.run(folder)
    assert results_of(folder)["best"] == results_of(finished)["best"]
    weights, expected = (load_file(f / "best" / "model.safetensors") for f in (folder, finished))
    assert all(torch.equal(weights[name], expected[name]) for name in expected)


def test_two_processes(runs, tmp_path):
    """Gradients are summed in another order, so that masks differ in their last digits."""
    given = ["--mask-attention", "uniform", "--mask-epochs", "1", "--finetune-epochs", "0", "--num-random", "0"]
    runs.run_two(tmp_path / "two", *given)
    results = results_of(tmp_path / "two")
    assert results["processes"] == 2 and results["best"]["macs"] <= results["budget"]["macs"]


def test_with_fewer_tokens(runs, tmp_path):
    folder = tmp_path / "run"
    given = ["--img-size", "64", "--mask-tokens", "0.5", "--budget", "macs=50%", "--mask-epochs", "1"]
    runs.run(folder, *given, "--num-random", "0")
    results = results_of(folder)
    best = timm.create_model(f"local-dir:{folder / 'best'}", pretrained=True).eval()
    assert json.loads((folder / "best" / "config.json").read_text())["architecture"] == "vit_tokens"
    tokens = results["best"]["tokens"]
    with torch.no_grad():
        assert best.forward_features(torch.randn(1, 3, 64, 64)).shape[1] == tokens[-1] < 17
    assert count_macs(best, (3, 64, 64)) == results["best"]["macs"] == results["networks"]["found, fine-tuned"]["macs"]
    assert 0.9 * results["budget"]["macs"] < results["best"]["macs"] <= results["budget"]["macs"]
    assert f"Tokens of its blocks: {tokens[0]}, " in (folder / "report.md").read_text()


def test_limits_that_random_networks_miss(runs, tmp_path):
    """Masks keep the second limit by less of the first; no random network is in the first one's band then."""
    given = ["--budget", "macs=60%,params=40%", "--mask-epochs", "1", "--finetune-epochs", "0"]
    runs.run(tmp_path / "run", *given)
    assert results_of(tmp_path / "run")["random"] == []


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--budget", "none"], "cuts a network down to a --budget"),
        (["--budget", "macs=13.8%"], "the smallest network of masks, of one unit in each layer, has macs"),
        (["--budget", "macs=1%"], "is below the smallest network of the space"),
        (["--budget", "macs=101%"], "is above the largest network of the space"),
        (
            ["--budget", "macs=35%", "--mask-prices", "0", "1e-4"],
            "but attention, whose masks are not trained, has",
        ),
        (["--mask-prices", "0", "0"], "--mask-prices are two numbers"),
        (["--elastic-epochs", "1"], "--elastic-epochs is of searches that score candidates"),
        (["--keep-ratios", "1", "0.7"], "--keep-ratios is of searches that score candidates"),
        (["--slim-step", "0.1"], "--slim-step is of --search slimming"),
        (["--search", "evolution"], "--mask-epochs is of --search slim-masks"),
    ],
)
def test_wrong_input_is_one_message_before_any_work(given, message, base, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        recipe.main([*QUICK, "--model", str(base), *given, "--output", str(tmp_path), "--name", "run"])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("search.py")]
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_masks_need_a_trained_model(tmp_path, capsys):
    with pytest.raises(SystemExit):
        recipe.main(["--cpu", "--search", "slim-masks", "--output", str(tmp_path), "--name", "run"])
    assert "name it by --model" in capsys.readouterr().err


# -- the task ----------------------------------------------------------------------------------------------------------


def masked(tokens=False):
    torch.manual_seed(0)
    return MaskedViT(timm.create_model("test_vit", img_size=32, num_classes=10), tokens=tokens)


def test_the_loss_is_the_criterions_and_the_prices():
    net = masked(tokens=True)
    with torch.no_grad():
        net.mlp["0"][0, 0, :3] = torch.tensor([-2.0, 0.5, 0.0])
    task = SlimMaskTask(net, verbose=False)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    found = task(x, y)
    heads, width, hidden = 2, 32, 192
    entries, units, tokens = 6 * heads * width, 6 * hidden - 0.5, 6 * 5 * float(np.tanh(3))
    loss = torch.nn.functional.cross_entropy(net(x), y)
    expected = loss + 2e-4 * entries + 5e-5 * units + 1e-4 * tokens
    torch.testing.assert_close(found["loss"], expected)
    torch.testing.assert_close(found["task_loss"], loss.detach())
    torch.testing.assert_close(found["price_mlp"], torch.tensor(units))
    assert SLIM_PRICES == {"attention": 2e-4, "mlp": 5e-5, "tokens": 1e-4}


def test_a_price_of_zero_freezes_masks_and_a_high_one_wins():
    net = masked()
    task = SlimMaskTask(net, prices={"mlp": 1.0}, verbose=False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.01)
    x, y = torch.randn(4, 3, 32, 32), torch.arange(4)
    for _ in range(5):
        optimizer.zero_grad()
        task(x, y)["loss"].backward()
        optimizer.step()
    assert all(m.eq(1).all() and m.grad is None for m in net.attention.values())
    torch.testing.assert_close(
        torch.cat([m.flatten() for m in net.mlp.values()]).mean(), torch.tensor(0.95), atol=5e-3, rtol=0
    )


def test_what_the_task_refuses():
    with pytest.raises(ValueError, match="VisionTransformer has no masks"):
        SlimMaskTask(timm.create_model("test_vit"), verbose=False)
    for prices in ({"heads": 1.0}, {"mlp": -1.0}):
        with pytest.raises(ValueError, match="prices are numbers of at least 0"):
            SlimMaskTask(masked(), prices=prices, verbose=False)
