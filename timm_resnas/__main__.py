"""Look at the models, or let one name what is on pictures.

    python -m timm_resnas                                    # the models that this package registers
    python -m timm_resnas 'sret*' '*_supernet'               # those of such names
    python -m timm_resnas predict runs/digits-micro/best digit.png
    python -m timm_resnas predict hf-hub:owner/name photos/*.jpg
    python -m timm_resnas predict vit_small_patch16_224 cat.jpg

Without a command: parameters, multiply-accumulates of one image of the default size, and paper of each model, or of
those whose names match.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

__all__ = ["main"]


def main(argv: Sequence[str] | None = None) -> None:
    """The program; `argv` defaults to its arguments. Errors end it with one sentence and status 2."""
    parser = argparse.ArgumentParser(
        prog="python -m timm_resnas", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command")
    predict = commands.add_parser("predict", help="the likeliest classes of each image")
    predict.add_argument("model", help="a folder, hf-hub:owner/name, or a name that timm knows")
    predict.add_argument("images", nargs="+", metavar="image", help="files")
    given = list(sys.argv[1:] if argv is None else argv)
    names = given if given and given[0] not in commands.choices and not given[0].startswith("-") else []
    args = parser.parse_args([] if names else given)
    try:
        for line in _models(names) if args.command is None else _predict(args.model, args.images):
            print(line, flush=True)
    except (ValueError, OSError) as e:
        print(f"timm_resnas: {e}", file=sys.stderr)
        raise SystemExit(2) from None


def _models(patterns: Sequence[str]) -> Iterator[str]:
    import timm
    import torch
    from timm.models import model_entrypoint

    from .nas.count import count_macs

    names = [n for n in timm.list_models(patterns) if model_entrypoint(n).__module__.partition(".")[0] == __package__]
    if not names:
        raise ValueError(f"no model of this package is called {' or '.join(patterns)}; without a name, all are listed")
    yield f"{'model':25} {'input':>13} {'params':>8} {'MACs':>8}  paper"
    for name in names:
        with torch.device("meta"):  # shapes only
            model = timm.create_model(name)
        cfg = model.pretrained_cfg
        params, macs = sum(p.numel() for p in model.parameters()), count_macs(model, cfg["input_size"])
        size = " x ".join(map(str, cfg["input_size"]))
        paper = "  ".join(text for text in (cfg.get("paper_ids"), cfg.get("paper_name")) if text)
        yield f"{name:25} {size:>13} {params / 1e6:6.1f} M {macs / 1e9:6.2f} G  {paper}".rstrip()


def _predict(name: str, files: Sequence[str]) -> Iterator[str]:
    import torch
    from timm.data import resolve_model_data_config

    from .data import eval_transform
    from .data.images import decode

    for file in files:
        if not Path(file).is_file():
            raise ValueError(f"there is no image {file}")
    model = _load(name).eval()
    if not model.num_classes:
        raise ValueError(f"{name} has no classifier; take a model that was saved with one")
    names = _class_names(model)
    transform = eval_transform(resolve_model_data_config(model))
    unreadable = []
    for file in files:
        try:
            image = decode({"path": file, "bytes": None}, transform.mode)
        except Exception as e:  # Pillow's plugins raise nearly anything on broken files
            unreadable.append(f"{file} cannot be read as an image ({' '.join(str(e).split())})")
            continue
        with torch.inference_mode():
            probs = model(transform.normalize(transform(image)[None])).float().softmax(-1)[0]
        yield file
        for prob, i in zip(*(t.tolist() for t in probs.topk(min(5, len(probs)))), strict=True):
            yield f"  {prob:6.1%}  {names[i] if names else f'class {i}'}"
    if unreadable:
        raise ValueError("; ".join(unreadable))


def _load(name: str) -> nn.Module:
    import timm

    from .hub import load

    if Path(name).is_dir() or not timm.is_model(name):
        return load(name)
    try:
        cfg = timm.models.get_pretrained_cfg(name)
        if cfg is not None and cfg.has_weights:
            return timm.create_model(name, pretrained=True)
    except Exception as e:  # an unknown tag, or whatever the Hub's client raises
        raise ValueError(f"the weights of {name} cannot be loaded: {' '.join(str(e).split()):.300}") from None
    raise ValueError(f"{name} has no pretrained weights; give a folder that a recipe saved, or hf-hub:owner/name")


def _class_names(model: nn.Module) -> list[str] | None:
    """What the model was saved with, else ImageNet's where it has as many classes, else None.

    WordNet ids, as the folders of ImageNet are called, become words.
    """
    from timm.data import ImageNetInfo, infer_imagenet_subset

    names, subset = model.pretrained_cfg.get("label_names"), infer_imagenet_subset(model)
    if not names:
        return ImageNetInfo(subset).label_descriptions() if subset else None
    known = ImageNetInfo().label_descriptions(as_dict=True)
    words = known if known.keys() >= set(names) else model.pretrained_cfg.get("label_descriptions") or {}
    return [words.get(name, name) for name in names]


if __name__ == "__main__":
    main()
