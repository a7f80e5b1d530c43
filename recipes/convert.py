"""Turn the authors' checkpoint files into folders that timm loads: safetensors, with provenance, licence and a check.

    python recipes/convert.py vit_resnas_small.pth --model vit_resnas_small --license cc-by-nc-4.0 \\
        --source https://github.com/yilunliao/vit-search --output converted/vit_resnas_small
    python recipes/convert.py SReT_T.pth --model sret_tiny --license mit --source …
    python recipes/convert.py S24_224.pth --model cait_s24_224 --license apache-2.0 --source …
    python recipes/convert.py net.pth --model vit_resnas --model-args '{"network_def": "((4,24),…)", "img_size": 224}'

Reads the released layouts of ViT-ResNAS, SReT and CaiT (and any other that the architecture's own timm code reads),
wrapped or not; of a file with averaged weights (`model_ema`), those, unless `--weights model`. Only tensors and plain
options are unpickled (torch's `weights_only`): a file that would run code is refused. Say whose licence the weights
are under: it is recorded and shown, never guessed.

Checked before the folder appears: every tensor fits the architecture; the logits of the model filled from the
checkpoint and of the model loaded from the folder are equal, bit by bit, on an input that is stored with them; with
`--reference` (a safetensors file with `input` and `logits` from the authors' code) they are the authors' to 1e-4.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import timm
import torch
from common import HelpFormatter, RunError, main_guard
from safetensors import SafetensorError
from safetensors.torch import load_file

from timm_resnas.hub import GOLDEN, check_golden, filter_fn_of, load, save_pretrained

WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")
TOLERANCE = 1e-4


def read_checkpoint(path: Path, weights: str | None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The weights in an authors' file, and what it says about them.

    Raises:
        RunError: It is not there, would run code, or holds no weights of that name.
    """
    if not path.is_file():
        raise RunError(f"there is no file {path}")
    try:
        # released files hold their command's options, which are plain data
        with torch.serialization.safe_globals([argparse.Namespace]):
            data = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # damaged files raise anything, some of it without a text
        why = (str(e) or type(e).__name__).splitlines()[0]
        raise RunError(f"{path} is no checkpoint of tensors that can be read safely: {why}") from None
    if not isinstance(data, dict):
        raise RunError(f"{path} holds a {type(data).__name__}, expected a checkpoint's dict")
    found = [w for w in WRAPPERS if isinstance(data.get(w), dict)]
    if weights is not None and weights not in found:
        raise RunError(f"{path} holds no {weights!r}; it has: {', '.join(found) or 'bare weights'}")
    name = weights or (found[0] if found else None)
    state = data[name] if name else data
    tensors = {k.removeprefix("module."): v for k, v in state.items() if isinstance(v, torch.Tensor)}
    if not tensors:
        raise RunError(f"{path} holds no tensors" + (f" under {name!r}" if name else ""))
    facts = {"weights": name or "the whole file"}
    if isinstance(data.get("epoch"), int):
        facts["epoch"] = data["epoch"]
    return tensors, facts


def digest(path: Path) -> str:
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(f)


def _digest(f: Any) -> str:
    found = hashlib.sha256()
    while chunk := f.read(1 << 24):
        found.update(chunk)
    return found.hexdigest()


def build(args: argparse.Namespace, tensors: dict[str, torch.Tensor]) -> torch.nn.Module:
    """The model with the checkpoint's weights.

    Raises:
        RunError: The architecture does not exist, or the weights are not its own.
    """
    if not timm.is_model(args.model):
        near = ", ".join(timm.list_models(f"*{args.model.split('_')[0]}*")[:8])
        raise RunError(f"unknown model {args.model!r}" + (f"; similar: {near}" if near else ""))
    try:
        model = timm.create_model(args.model, pretrained_cfg_overlay={"license": args.license}, **read_model_args(args))
        # strictly: timm's own way of loading would leave out a head of another size
        model.load_state_dict(filter_fn_of(args.model)(dict(tensors), model))
    except (RuntimeError, ValueError, KeyError, TypeError) as e:
        if isinstance(e, RunError):
            raise
        text = " ".join(str(e).split())
        raise RunError(f"{args.checkpoint} does not fit {args.model}: {text:.400}") from None
    if getattr(model, "patch_head", None) is not None and "patch_head.weight" not in tensors:
        raise RunError(f"{args.checkpoint} has no patch_head; leave patch_head out of --model-args")
    return model.eval()


def read_model_args(args: argparse.Namespace) -> dict[str, Any]:
    try:
        given = json.loads(args.model_args)
    except ValueError as e:
        raise RunError(f"--model-args is not JSON: {e}") from None
    if not isinstance(given, dict):
        raise RunError("--model-args must be a JSON object of the model's arguments")
    return given


def logits(model: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(x)


def compare(model: torch.nn.Module, reference: Path) -> float:
    """Largest difference from the logits that the authors' code computed.

    Raises:
        RunError: It is above the tolerance, or the file does not hold input and logits.
    """
    try:
        stored = load_file(reference)
        x, expected = stored["input"].float(), stored["logits"].float()
    except (OSError, SafetensorError, KeyError) as e:
        raise RunError(f"{reference} must be a safetensors file with input and logits ({e})") from None
    got = logits(model, x)
    if got.shape != expected.shape:
        raise RunError(f"{reference}: logits have shape {list(expected.shape)}, the model's {list(got.shape)}")
    worst = (got - expected).abs().max().item()
    if not worst <= TOLERANCE:
        raise RunError(f"the logits differ from those of {reference} by {worst:.3g}, more than {TOLERANCE:g}")
    return worst


def convert(args: argparse.Namespace) -> None:
    output = args.output or args.checkpoint.with_name(args.checkpoint.stem)
    if output.exists():
        raise RunError(f"{output} exists; give another --output")
    tensors, facts = read_checkpoint(args.checkpoint, args.weights)
    model = build(args, tensors)
    source = {"file": args.checkpoint.name, "sha256": digest(args.checkpoint), "url": args.source, **facts}
    info = {"converted_from": source, "license": args.license}
    if args.reference:
        difference = compare(model, args.reference)
        info["reference"] = {"file": args.reference.name, "largest_difference": difference}
        print(f"logits are those of {args.reference} to {difference:.2g}")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output.name}-", dir=output.parent) as scratch:
        folder = save_pretrained(model, Path(scratch) / output.name, info=info)
        if not (folder / GOLDEN).is_file():
            raise RunError(f"{args.model} does not compute images of its own input size; see the message above")
        again = load(folder, check=True).eval()
        if check_golden(again, folder / GOLDEN) != 0:
            raise RunError("the logits before and after saving are not equal; nothing was written")
        folder.rename(output)
    params = sum(p.numel() for p in model.parameters())
    print(f"{args.checkpoint} ({len(tensors)} tensors, {facts['weights']}) -> {output}: {params:,} parameters")
    left = [k for k in tensors if k.startswith("patch_head.")] if getattr(model, "patch_head", 0) is None else []
    if left:
        print(f"left out, used in training only (patch_head=true keeps it): {', '.join(left)}")
    print("logits before and after are equal")
    print(f"\n    import timm, timm_resnas\n    model = timm.create_model('local-dir:{output}', pretrained=True)")


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="the authors' file")
    parser.add_argument("--model", required=True, metavar="NAME", help="architecture, as timm names it")
    parser.add_argument("--model-args", default="{}", metavar="JSON", help="arguments of the architecture")
    parser.add_argument("--license", required=True, metavar="ID", help="licence of the weights: cc-by-nc-4.0, mit, …")
    parser.add_argument("--source", required=True, metavar="URL", help="where the file is from")
    parser.add_argument("--output", type=Path, metavar="DIR", help="folder (default: beside the file, by its name)")
    parser.add_argument("--weights", choices=WRAPPERS, help="which weights of the file (default: averaged, if any)")
    parser.add_argument("--reference", type=Path, metavar="FILE", help="input and logits from the authors' code")
    return parser


def main(argv: list[str] | None = None) -> None:
    args = make_parser().parse_args(argv)
    with main_guard("convert.py"):
        convert(args)


if __name__ == "__main__":
    main()
