"""Sections that the reports of all kinds of searches share."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from ..arch import Arch
from ..nas.cost import describe_layers, format_cost
from ..nas.space import SearchSpace

__all__ = ["LABELS", "family", "network", "provenance"]

LABELS = {"macs": "MACs", "params": "params", "memory": "memory", "latency_ms": "latency"}


def family(results: Mapping[str, Any], costs: Sequence[str], images: int, picture: str) -> list[str]:
    """The lines on the networks of pareto/: a front's points, or the chain of a slimming.

    Args:
        results: Their ``front``, with ``score`` in correct answers.
        costs: What accuracy is set against.
        images: That candidates were scored on.
        picture: Its name in the run's folder.
    """
    against = " and ".join(LABELS[name] for name in costs)
    shown = [name for name in dict.fromkeys((*costs, *LABELS)) if name in results["front"][0]]
    lines = [f"## Front of accuracy against {against}", ""]
    if results.get("search") == "slimming":
        lines = [
            f"## The chain: accuracy against {against}",
            "",
            "The networks that slimming went through, from the cheapest up to where it began, with inherited weights. "
            "Each step is the one that lost least for its gain; what was rejected is in the picture.",
            "",
        ]
    lines += ["| folder | " + " | ".join(LABELS[name] for name in shown) + " | validation |"]
    lines += ["|---|" + "---|" * (len(shown) + 1)]
    for k, p in enumerate(results["front"], start=1):
        priced = " | ".join(format_cost(name, p[name]) for name in shown)
        lines.append(f"| pareto/{k} | {priced} | {p['score'] / images:.4f} |")
    return [*lines, "", f"![score against {LABELS[costs[0]]}]({picture})", ""]


def network(results: Mapping[str, Any], *pictures: str) -> list[str]:
    """The lines on the best network: its layers, and the record that makes it again."""
    arch, model_args = Arch.from_record(results["best"]), SearchSpace.from_dict(results["space_dict"]).model_args
    record = json.dumps(arch.canonical().record())
    lines = ["## The network", ""]
    for picture in pictures:
        lines += [picture, ""]
    return [*lines, describe_layers(arch.layers(**model_args)), "", "```", record, "```", ""]


def provenance(results: Mapping[str, Any], time: str, *more: str) -> list[str]:
    """The lines on how a result was made, with the versions of packages."""
    processes = f"{results['processes']} process{'es' * (results['processes'] > 1)}"
    return [
        "## How it was made",
        "",
        f"- command: `{results['command']}`",
        *more,
        f"- seed {results['seed']}, {processes}, {time}",
        "- " + ", ".join(f"{k} {v}" for k, v in results["versions"].items()),
        "",
    ]
