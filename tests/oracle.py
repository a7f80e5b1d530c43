"""Reference tensors of the papers' code, from the small files in tests/golden; its README.md has the format."""

import json
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

GOLDEN = Path(__file__).resolve().parent / "golden"
DRAW = {"normal": torch.randn, "uniform": torch.rand}


def draw(seed, tensors):
    """Numbers that torch draws one tensor after the other, scaled and shifted.

    Raises:
        RuntimeError: Torch draws other numbers than those that the reference was computed with.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, kind, scale, shift, shape, first in tensors:
        value = DRAW[kind](shape, generator=generator) * scale
        value = value + shift if shift else value
        if abs(value.flatten()[0].item() - first) > 1e-5:
            raise RuntimeError(f"seed {seed} no longer draws {name}: expected {first} first, got {value.flatten()[0]}")
        yield name, value


def restore(source, target):
    """Write the reference file whose part that can be drawn or copied was left out of `source`."""
    with safe_open(source, "pt") as file:
        tensors = {k: file.get_tensor(k) for k in file.keys()}
        metadata = file.metadata()
    for group in json.loads(metadata.pop("drawn")):
        tensors.update(draw(**group))
    for name, other in json.loads(metadata.pop("copies", "{}")).items():
        tensors[name] = tensors[other].clone()
    for name, (other, dim, index) in json.loads(metadata.pop("moved", "{}")).items():
        tensors[name] = tensors[other].index_select(dim, torch.tensor(index))
    save_file(tensors, target, metadata)
