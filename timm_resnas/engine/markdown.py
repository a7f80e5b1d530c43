"""Sections that the reports of all kinds of searches share."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ..arch import Arch
from ..nas.cost import describe_layers
from ..nas.space import SearchSpace

__all__ = ["network", "provenance"]


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
