"""Compare the inference speed of timm models in one process.

The models take turns, so that a busy machine slows all of them alike: read the ratios, not the absolute numbers.

    python recipes/benchmark_models.py sret_tiny sret_tiny_unsliced --baseline deit_tiny_patch16_224
    python recipes/benchmark_models.py exmobilevit_928 --baseline mobilevit_s --img-size 256
    python recipes/benchmark_models.py sret_small --baseline deit_small_patch16_224 --device cuda --amp-dtype bfloat16
    python recipes/benchmark_models.py deit_small_patch16_224 "vit_tokens base=deit_small_patch16_224 keep_ratios=0.7" \
        "vit_tokens base=deit_small_patch16_224 method=ats blocks=[3,6,9] max_tokens=0.7"

A model is its name, and its arguments where they are not the default ones, as one text.

Prints, per model: parameters, MACs at batch 1 (convolutions, linear layers, attention products), median images per
second with the slowest and fastest round, and the ratio of medians to the baseline. `--json` writes the same to a file.
Each round times one batch of every model, after warm-up rounds that are not counted.
"""

import argparse
import json
import statistics
import time

import timm
import torch

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.engine.models import parse_kwargs
from timm_resnas.engine.run import cli_errors
from timm_resnas.nas.count import count_macs


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Interleaved inference benchmark of timm models.")
    parser.add_argument(
        "models", nargs="+", help="names that timm.create_model knows, and arguments: 'name key=value …'"
    )
    parser.add_argument("--baseline", help="model that ratios refer to (default: the first one)")
    parser.add_argument("--img-size", type=int, help="side of the images (default: each model's own)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed batches per model")
    parser.add_argument("--warmup", type=int, default=1, help="batches per model before timing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU seconds, not elapsed ones: steadier where other jobs run (with --threads 1)",
    )
    parser.add_argument("--amp-dtype", choices=("bfloat16", "float16"), help="autocast to this type")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--json", metavar="FILE", help="also write the results here")
    args = parser.parse_args(argv)
    if args.cpu_time and args.device != "cpu":
        parser.error("--cpu-time needs --device cpu.")
    args.baseline = args.baseline or args.models[0]
    args.models = list(dict.fromkeys([args.baseline, *args.models]))
    return args


def build(text: str, img_size: int | None, batch_size: int, device: torch.device):
    name, *given = text.split()
    fixed = timm.get_pretrained_cfg_value(name, "fixed_input_size")
    kwargs = parse_kwargs(text, given) | (dict(img_size=img_size) if img_size and fixed else {})
    model = timm.create_model(name, device=device, **kwargs).eval().requires_grad_(False)
    if img_size and not fixed and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(img_size, img_size))  # or position embeddings would be resampled in each call
    channels, height, width = model.pretrained_cfg["input_size"]
    size = (img_size, img_size) if img_size else (height, width)
    return model, torch.randn(batch_size, channels, *size, device=device)


def main(argv: list[str] | None = None) -> dict:
    args = parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    device = torch.device(args.device)
    clock = time.process_time if args.cpu_time else time.perf_counter
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    autocast = torch.autocast(
        device.type, dtype=getattr(torch, args.amp_dtype or "bfloat16"), enabled=args.amp_dtype is not None
    )

    runs = {}
    for name in args.models:
        model, images = build(name, args.img_size, args.batch_size, device)
        if args.channels_last:
            model, images = model.to(memory_format=torch.channels_last), images.to(memory_format=torch.channels_last)
        runs[name] = (model, images, [])

    with torch.inference_mode(), autocast:
        for i in range(args.warmup + args.rounds):
            for model, images, seconds in runs.values():
                synchronize()
                start = clock()
                model(images)
                synchronize()
                if i >= args.warmup:
                    seconds.append(clock() - start)

    base = statistics.median(runs[args.baseline][2])
    results = {}
    print(f"{'model':32} {'params M':>9} {'MACs M':>9} {'img/s':>9} {'slowest':>9} {'fastest':>9} {'ratio':>7}")
    for name, (model, images, seconds) in runs.items():
        row = dict(
            params=sum(p.numel() for p in model.parameters()),
            macs=count_macs(model, tuple(images.shape[1:])),
            images_per_second=args.batch_size / statistics.median(seconds),
            slowest=args.batch_size / max(seconds),
            fastest=args.batch_size / min(seconds),
            ratio=base / statistics.median(seconds),
        )
        results[name] = row
        print(
            f"{name:32} {row['params'] / 1e6:9.2f} {row['macs'] / 1e6:9.1f} {row['images_per_second']:9.1f} "
            f"{row['slowest']:9.1f} {row['fastest']:9.1f} {row['ratio']:7.3f}"
        )
    report = dict(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        clock="cpu" if args.cpu_time else "wall",
        baseline=args.baseline,
        batch_size=args.batch_size,
        rounds=args.rounds,
        models=results,
    )
    if args.json:
        with open(args.json, "w") as file:
            json.dump(report, file, indent=2)
    return report


if __name__ == "__main__":
    with cli_errors("benchmark_models.py"):
        main()
