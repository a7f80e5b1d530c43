"""What a search's report says, from made-up results."""

import pytest

from timm_resnas.engine.report import improving, results_table, train_command
from timm_resnas.engine.search import distinct_points
from timm_resnas.models.network_def import NetworkDef
from timm_resnas.nas.cost import Budget, describe_layers
from timm_resnas.nas.pareto import ParetoSearch
from timm_resnas.nas.space import SearchSpace


def point(macs, score):
    return {"macs": macs, "score": score}


def test_points_that_a_user_would_tell_apart():
    front = [point(100, 5), point(101, 6), point(101.9, 7), point(140, 8), point(143, 9)]
    assert distinct_points(front, "macs") == [point(101.9, 7), point(140, 8), point(143, 9)]
    assert distinct_points([point(100, 5), point(103, 6)], "macs") == [point(100, 5), point(103, 6)]
    assert distinct_points([], "macs") == []
    far = [{**p, "params": 2**k} for k, p in enumerate(front)]
    assert distinct_points(far, "params") == far


def record(epoch, largest):
    return {"epoch": epoch, "accuracy": {"largest": largest}}


def test_a_supernet_that_was_still_learning():
    assert improving([record(3, 0.80), record(6, 0.81)]) is None
    assert improving([record(3, 0.80)]) is None
    text = improving([record(3, 0.48), record(6, 0.525)])
    assert "0.480 to 0.525 in its last 3 epochs" in text and "--epochs" in text


def test_results_name_the_latency_that_a_table_predicts():
    one = {"macs": 6e6, "params": 4e5, "score": 30, "test": 12}
    images = {"val_images": 100, "test_images": 40}
    table = results_table({"best": one, "largest": one, "random": [], **images})
    assert table.splitlines()[2].split() == "| best | 6M | 400K | 0.3000 | 0.3000 |".split()
    one = {**one, "latency_ms": 1.5}
    table = results_table({"best": one, "largest": one, "random": [one, {**one, "latency_ms": 2.5}], **images})
    assert table.splitlines()[0].split()[7:9] == ["latency", "|"] and "| 1.5 ms " in table.splitlines()[3]
    assert "| 2 ms " in table.splitlines()[4] and len({len(line) for line in table.splitlines()}) == 1


def test_the_command_takes_all_images():
    assert "--val-per-class 0" in train_command("runs/x", "digits") and "--model runs/x/best" in train_command(
        "runs/x", ""
    )


def test_layers_as_a_table():
    arch = NetworkDef.from_network_def(
        (
            (5, 4, 2),
            (1, (4, 3, 2), (4, 7), 1),
            (1, (4, 1, 2), (4, 7), 1),
            (3, 4, 6),
            (1, (6, 1, 2), (6, 9), 0),
            (2, 6, 3),
        )
    )
    layers = arch.layers(img_size=16, patch_size=8, in_chans=1)
    rows = describe_layers(layers).splitlines()
    assert len(rows) == 2 + 4  # stem, two blocks, reduction, head
    assert "| 2 attention, 2 mlp | dim 4, head_dim 2, num_heads 3 1, tokens 5, hidden 7 |" in rows[3]
    total = sum(int(row.split("|")[3].replace(",", "")) for row in rows[2:])
    assert total == arch.costs(img_size=16, patch_size=8, in_chans=1)["macs"]


def test_costs_that_decide_nothing_are_said():
    mini, micro = SearchSpace.preset("mini"), SearchSpace.preset("micro")
    budget = Budget(macs=60e6, memory=10**7)
    assert mini.idle_limits(budget) == {"memory": 995_328.0}
    assert micro.idle_limits(budget) == {}
    with pytest.raises(
        ValueError, match="all networks of the space have memory 995.33 KB, which cannot be an objective"
    ):
        ParetoSearch(mini, objectives=("memory",))
    ParetoSearch(micro, objectives=("memory",))
