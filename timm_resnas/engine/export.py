"""Exporting a model: its files, what they compute, how fast they are, and what is said of them."""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from ..data import EvalBatches, eval_batches, eval_transform
from ..hub import CONFIG, EXPORTS, WEIGHTS, note_exports, sha256_of, strip_paths
from ..nas.onnx import INPUT, ExportError, open_session, package, to_onnx, to_program
from ..nas.timing import Conditions, repeat_call, repeats
from .evaluate import chosen_background, matched_classes, open_part
from .models import class_names_of, model_source, open_prepared
from .run import Progress, RunError, atomic_write
from .settings import ExportOptions

__all__ = ["BytesInput", "export", "quantise", "report"]

ONNX, INT8, PT2 = "model.onnx", "model-int8.onnx", "model.pt2"
TOLERANCE = 1e-3  # of the largest logit: what rounding in another order makes of float32

Runtimes = dict[str, Callable[[np.ndarray], np.ndarray]]


class BytesInput(nn.Module):
    """A model that takes pixels as they are in files: uint8 [B, C, H, W] -> logits.

    Args:
        model: Takes normalised images.
        mean: Of each channel, values 0 to 1.
        std: The same.
    """

    def __init__(self, model: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor(std)[:, None, None], persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.model((x.to(torch.float32) / 255 - self.mean) / self.std)


# -- what is exported -------------------------------------------------------------------------------------------------


def open_source(options: ExportOptions) -> tuple[nn.Module, dict[str, Any], Path | None, str | None]:
    """The model, the preprocessing of its images; its folder where it is one, the sha256 of its weights in there.

    Raises:
        RunError: There is no such model, or it has no weights.
    """
    source = model_source(options.model)
    folder = Path(source.partition(":")[2]) if source.startswith("local-dir:") else None
    if options.update_card and folder is None:
        raise RunError("--update-card is for a model's folder; this model is none")
    own = options.pretrained and options.pretrained_path is None
    if options.update_card and not own:
        raise RunError("--update-card is for the folder's own weights; leave out --pretrained-path and --no-pretrained")
    changed = [k for k in ("img_size", "model_kwargs", "crop_pct", "crop_mode", "interpolation") if getattr(options, k)]
    if options.update_card and changed:
        raise RunError(f"--update-card is for the model as its folder says; leave out --{changed[0].replace('_', '-')}")
    if own and ":" not in source:
        cfg = timm.get_pretrained_cfg(source)
        if cfg is None or not cfg.has_weights:
            raise RunError(
                f"{source} has no pretrained weights; give a folder, hf-hub:<id> or --pretrained-path FILE, or "
                f"--no-pretrained to see how fast it is with random ones"
            )
    # before they are read: whoever replaces them from here on has other weights than the files
    weights = sha256_of(folder / WEIGHTS) if own and folder is not None and (folder / WEIGHTS).is_file() else None
    model, config = open_prepared(options, options.pretrained)
    if not model.num_classes:
        raise RunError(f"{options.model} has no classifier; export a model that was saved with one")
    config["background"] = chosen_background(options)
    return model.eval().requires_grad_(False), config, folder, weights


def metadata(model: nn.Module, config: Mapping[str, Any], uint8: bool) -> dict[str, str]:
    """What a program that has only the ONNX file needs to know; lists are JSON."""
    known = {"input_dtype": "uint8" if uint8 else "float32", "input_layout": "NCHW"}
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode", "background")
    known |= {k: config[k] for k in names if k in config}
    if names := class_names_of(model):
        known["label_names"] = list(names)
    known["architecture"] = model.pretrained_cfg.get("architecture", type(model).__name__)
    return {k: v if isinstance(v, str) else json.dumps(v) for k, v in known.items()}


def quantise(source: Path, target: Path) -> None:
    """Dynamic int8 by ONNX Runtime: linear layers' weights per channel, their inputs as they come; the rest stays.

    Weights are unsigned, which no processor saturates at; the products inside attention have no weights.
    """
    package("onnxruntime")
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    with tempfile.TemporaryDirectory() as scratch:
        # folds transposes, behind which weights would not be found
        ready = Path(scratch) / "ready.onnx"
        quant_pre_process(str(source), str(ready), skip_symbolic_shape=True)
        quantize_dynamic(
            str(ready),
            str(target),
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=QuantType.QUInt8,
        )
    proto, original = onnx.load(str(target)), onnx.load(str(source))
    del proto.metadata_props[:]  # the quantiser's own notes
    proto.metadata_props.extend(original.metadata_props)
    if not any(node.op_type in ("MatMulInteger", "DynamicQuantizeMatMul") for node in proto.graph.node):
        raise RunError("--int8 dynamic found no linear layer to quantise in this model")
    target.write_bytes(proto.SerializeToString())


# -- what it computes -------------------------------------------------------------------------------------------------


def largest_difference(a: np.ndarray, b: np.ndarray) -> float:
    """Between logits, as a share of the largest of the first."""
    return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1e-12))


def check(runtimes: Runtimes, images: np.ndarray, batch_sizes: tuple[int, int]) -> dict[str, dict[str, float]]:
    """Difference of each runtime's logits from the first's at these batch sizes.

    Raises:
        RunError: One that is not quantised computes something else.
    """
    reference, *others = runtimes
    found: dict[str, dict[str, float]] = {}
    for size in batch_sizes:
        x = images[:size]
        expected = runtimes[reference](x)
        if not np.isfinite(expected).all():
            raise RunError("the model's logits are not finite; nothing can be compared with them")
        for name in others:
            got = largest_difference(expected, runtimes[name](x))
            if not name.endswith("int8") and not got <= TOLERANCE:
                raise RunError(
                    f"{name} does not compute what PyTorch does: at batch size {size}, logits differ by {got:.2g} of "
                    f"the largest. Nothing was written"
                )
            found.setdefault(name, {})[str(size)] = got
    return found


def score(
    runtimes: Runtimes, batches: EvalBatches, classes: list[int] | None, prepare: Callable[[torch.Tensor], np.ndarray]
) -> dict[str, dict[str, Any]]:
    """Correct answers of each runtime, and in how many it agrees with the first."""
    counts = {name: np.zeros(2, int) for name in runtimes}
    images = 0
    with Progress(len(batches), "accuracy") as bar:
        for x, y in batches:
            x, labels = prepare(x), y.numpy()
            images += len(x)
            first = None
            for name, run in runtimes.items():
                logits = run(x)
                answer = (logits if classes is None else logits[:, classes]).argmax(axis=1)
                first = answer if first is None else first
                counts[name] += (answer == labels).sum(), (answer == first).sum()
            bar()
    return {n: {"images": images, "correct": int(c), "agreement": float(a / images)} for n, (c, a) in counts.items()}


# -- how fast it is ---------------------------------------------------------------------------------------------------


def race(
    runtimes: Runtimes, x: np.ndarray, num_threads: int, rounds: int, min_run_time: float
) -> dict[str, dict[str, float]]:
    """Milliseconds of each runtime in interleaved rounds: fastest repeat, and how often it is as fast as the first.

    The speedup is the median over the rounds, of the ratios of their fastest repeats: what else runs on the machine
    slows both.
    """
    number, fastest = {}, {name: [] for name in runtimes}
    for i in range(rounds + 1):
        for name, run in runtimes.items():
            ms, _ = repeat_call(lambda run=run: run(x), number.get(name, 1), num_threads)
            if i:
                fastest[name].append(float(ms.min()))
            else:
                number[name] = repeats(min_run_time, float(ms.min()) / 1e3)
    first = fastest[next(iter(runtimes))]
    return {
        name: {
            "ms": round(min(ms), 6),
            "median_ms": round(float(np.median(ms)), 6),
            "speedup": round(float(np.median(np.divide(first, ms))), 4),
        }
        for name, ms in fastest.items()
    }


# -- the job ----------------------------------------------------------------------------------------------------------


def export(options: ExportOptions) -> dict[str, Any]:
    """Write the files that the options ask for, compare them with PyTorch, and say what was found.

    Returns:
        What results.json holds.

    Raises:
        RunError: The model or the data cannot be used, or what was written is not the model.
        ExportError: The exporter refuses the model.
        ImportError: A package of the extra ``export`` is missing.
    """
    for name in ("onnx", "onnxscript", "onnxruntime"):
        package(name)
    if options.batch_size < 2:
        raise RunError("--batch-size must be at least 2: latency is measured with one image, throughput with a batch")
    if options.threads:
        torch.set_num_threads(options.threads)
    model, config, folder, weights = open_source(options)
    output = _output(options, folder)
    part, classes, batches = None, None, None
    if options.dataset is not None:
        part = open_part(options)
        classes = matched_classes(model, part.class_names)
        dataset = part.dataset
        if options.max_images and options.max_images < len(dataset):
            dataset = dataset.select(np.linspace(0, len(dataset) - 1, options.max_images).round().astype(int))
        batches = eval_batches(dataset, eval_transform(config), options.batch_size, num_workers=options.workers)

    # the same images for all: as bytes, and as the network takes them
    size, mean, std = (tuple(config[k]) for k in ("input_size", "mean", "std"))
    wrapper = BytesInput(model, mean, std).eval()
    example = torch.zeros(2, *size, dtype=torch.uint8) if options.uint8 else torch.zeros(2, *size)
    whole = wrapper if options.uint8 else model
    shift, scale = (np.asarray(v, np.float32)[:, None, None] for v in (mean, std))

    def prepare(x: torch.Tensor) -> np.ndarray:
        """What is fed, from normalised images."""
        pixels = x.numpy()
        return np.clip((pixels * scale + shift) * 255, 0, 255).round().astype(np.uint8) if options.uint8 else pixels

    if batches is None:
        noise = np.random.default_rng(0).integers(0, 256, (options.batch_size, *size), np.uint8)
        images = prepare(torch.from_numpy((noise.astype(np.float32) / 255 - shift) / scale))
    else:
        images = prepare(next(iter(batches))[0])
        images = np.resize(images, (options.batch_size, *size))  # repeated where there are fewer

    @torch.inference_mode()
    def in_torch(x: np.ndarray) -> np.ndarray:
        return whole(torch.from_numpy(x)).numpy()

    runtimes: Runtimes = {"PyTorch": in_torch}
    files: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="timm-resnas-") as scratch:
        threads = torch.get_num_threads()

        def add(name: str, file: str) -> None:
            session = open_session(files[file], num_threads=threads)
            runtimes[name] = lambda x: session.run(None, {INPUT: x})[0]

        print(f"{options.model}: exporting for ONNX", flush=True)
        files[ONNX] = Path(scratch) / ONNX
        proto = to_onnx(whole, example, metadata(model, config, options.uint8))
        files[ONNX].write_bytes(proto.SerializeToString())
        add("ONNX Runtime", ONNX)
        if options.int8 == "dynamic":
            files[INT8] = Path(scratch) / INT8
            quantise(files[ONNX], files[INT8])
            add("ONNX Runtime, int8", INT8)
        sizes = (1, options.batch_size)
        differences = check(runtimes, images, sizes)
        program, refused = {}, None
        if options.torch_export:
            try:
                graph = _torch_export(whole, example, Path(scratch) / PT2)
            except ExportError as e:  # what ONNX has is whole without it
                refused = str(e)
                print(f"no {PT2}: {refused}", flush=True)
            else:
                files[PT2] = Path(scratch) / PT2
                program = check({"PyTorch": in_torch, "torch.export": graph}, images, sizes)
        scores = {} if batches is None else score(runtimes, batches, classes, prepare)
        print(f"measuring: {len(runtimes)} runtimes take turns, {options.rounds} rounds at batch 1 and {sizes[1]}")
        timing = (threads, options.rounds, options.min_run_time)
        latency, throughput = (race(runtimes, images[:n], *timing) for n in sizes)
        of = {"PyTorch": None, "ONNX Runtime": ONNX, "ONNX Runtime, int8": INT8}
        rows = []
        for name in runtimes:
            row: dict[str, Any] = {"name": name, "file": of[name]}
            if name in differences:
                row["differences"] = differences[name]
            if name in scores:
                row |= scores[name]
            row["latency"], row["throughput"] = latency[name], throughput[name]
            row["throughput"]["images_per_second"] = round(1e3 * sizes[1] / throughput[name]["ms"], 2)
            rows.append(row)
        if program:
            rows.append({"name": "torch.export", "file": PT2, "differences": program["torch.export"]})
        conditions = Conditions.here(batch_size=sizes[1], num_threads=threads, runtime="onnxruntime")
        found = {
            "model": options.model,
            "architecture": model.pretrained_cfg.get("architecture"),
            "weights": weights,
            "input": {"dtype": "uint8" if options.uint8 else "float32", "size": list(size)},
            "dataset": options.dataset,
            "split": part and part.split,
            "random_weights": not (options.pretrained or options.pretrained_path),
            "conditions": vars(conditions),
            "files": {n: {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for n, p in files.items()},
            "runtimes": rows,
            "refused": {PT2: refused} if refused else {},
        }
        results = strip_paths(found)  # they are published
        output.mkdir(parents=True, exist_ok=True)
        (output / "results.json").unlink(missing_ok=True)  # it would vouch for files that it does not know
        for name, path in files.items():
            with atomic_write(output / name) as fresh:
                fresh.write_bytes(path.read_bytes())
        for name in {INT8, PT2} - set(files):  # of an earlier export, perhaps of other weights
            (output / name).unlink(missing_ok=True)
    text = report(results)
    for name, content in (("results.json", json.dumps(results, indent=1) + "\n"), ("report.md", text)):
        with atomic_write(output / name) as fresh:
            fresh.write_text(content, encoding="utf-8")
    print("\n" + "\n".join(_table(results)) + f"\n\nfiles and report: {output}")
    if options.update_card:
        note_exports(folder, results)
        print(f"noted in {folder / CONFIG}, from which the model card is made")
    return results


def _output(options: ExportOptions, folder: Path | None) -> Path:
    """The folder to write to; inside the model's own, where it is one.

    Raises:
        RunError: It cannot be written, or holds something else.
    """
    if options.output is not None:
        output = Path(options.output)
    elif folder is not None:
        output = folder / EXPORTS
    else:
        output = Path("runs") / f"{options.model.rpartition(':')[2].replace('/', '-')}-export"
    if output.exists() and not output.is_dir():
        raise RunError(f"{output} is a file; give the name of a folder as --output")
    known = {ONNX, INT8, PT2, "results.json", "report.md"}
    there = sorted(p.name for p in output.iterdir()) if output.exists() else []
    if others := [n for n in there if n not in known and not n.startswith(".")]:
        raise RunError(f"{output} holds something else than an export: {others[0]}; give another --output")
    if options.update_card and output != folder / EXPORTS:
        raise RunError(f"--update-card is for files in {folder / EXPORTS}; leave out --output")
    above = next(p for p in output.resolve().parents if p.exists())
    if not os.access(output if output.exists() else above, os.W_OK):
        raise RunError(f"{output} cannot be written: permission denied")
    return output


def _torch_export(model: nn.Module, example: torch.Tensor, path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """Write a program of torch.export for any batch size, and read it back: images -> logits.

    Raises:
        ExportError: torch.export refuses the model.
    """
    buffer = io.BytesIO()
    torch.export.save(to_program(model, example), buffer)
    path.write_bytes(buffer.getvalue())
    module = torch.export.load(io.BytesIO(buffer.getvalue())).module()  # what was just written, nobody else's
    return torch.inference_mode()(lambda x: module(torch.from_numpy(x)).numpy())


def _table(results: Mapping[str, Any]) -> list[str]:
    """The runtimes side by side, as Markdown that reads well in a terminal."""
    batch, scored = results["conditions"]["batch_size"], results["dataset"] is not None
    head = ["runtime", "size", "logits differ", *(["accuracy", "same answer"] if scored else [])]
    head += ["ms, batch 1", "faster", f"images/s, batch {batch}", "faster"]
    rows = [head]
    for row in results["runtimes"]:
        size = results["files"].get(row["file"], {}).get("bytes")
        cells = [row["name"], f"{size / 1e6:.2f} MB" if size else "-"]
        cells.append(f"{max(row['differences'].values()):.1e}" if "differences" in row else "-")
        if scored:
            known = "correct" in row
            cells.append(f"{row['correct'] / row['images']:.4f}" if known else "-")
            cells.append(f"{row['agreement']:.4f}" if known else "-")
        for key, value in (("latency", "ms"), ("throughput", "images_per_second")):
            timed = row.get(key)
            cells += (
                [f"{timed[value]:,.{4 if key == 'latency' else 0}f}", f"{timed['speedup']:.2f}x"]
                if timed
                else ["-"] * 2
            )
        rows.append(cells)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows]
    return [lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]]


def report(results: Mapping[str, Any]) -> str:
    """The report's text."""
    here, shape = results["conditions"], " x ".join(map(str, results["input"]["size"]))
    scored = next((r for r in results["runtimes"] if "images" in r), None)
    lines = [
        f"# {results['architecture']} in other runtimes",
        "",
        f"Images: {results['input']['dtype']}, {shape}, any number of them"
        + (", pixels as in files." if results["input"]["dtype"] == "uint8" else ", normalised.")
        + (" **The weights are random.**" if results["random_weights"] else ""),
        "",
        *_table(results),
        "",
        "Differences of logits are shares of the largest logit, the larger of those at batch 1 and "
        f"{here['batch_size']}, from PyTorch; times are the fastest of all rounds, in which the runtimes take turns; "
        "how many times faster than PyTorch is the median over these rounds.",
        "",
    ]
    if scored:
        lines += [
            f"Accuracy on {scored['images']} images of {results['dataset']}, {results['split']}. Same answer: share of "
            "these images for which PyTorch answers alike.",
            "",
        ]
    for name, why in results["refused"].items():
        lines += [f"No {name}: {why}", ""]
    lines += [
        f"{here['device_name']}, {here['num_threads']} thread{'s' * (here['num_threads'] > 1)}; torch {here['torch']}, "
        f"ONNX Runtime {here['onnxruntime']} ({here['provider']}).",
        "",
    ]
    return "\n".join(lines)
