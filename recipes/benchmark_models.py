"""Compare the inference speed of timm models, and of forms of them, in one process.

The models take turns, so that a busy machine slows all of them alike: read the ratios, not the absolute numbers.

    python recipes/benchmark_models.py sret_tiny sret_tiny_unsliced --baseline deit_tiny_patch16_224
    python recipes/benchmark_models.py exmobilevit_928 --baseline mobilevit_s --img-size 256
    python recipes/benchmark_models.py vit_resnas_small --baseline deit_base_patch16_224 --forms eager,onnx,compile
    python recipes/benchmark_models.py sret_small --baseline deit_small_patch16_224 --device cuda \
        --forms bfloat16+channels_last+compile
    python recipes/benchmark_models.py deit_small_patch16_224 "vit_tokens base=deit_small_patch16_224 keep_ratios=0.7" \
        "vit_tokens base=deit_small_patch16_224 method=ats blocks=[3,6,9] max_tokens=0.7"

A model is its name, and its arguments where they are not the default ones, as one text.

Prints, per model and form: parameters; MACs of an image (convolutions, linear layers, attention products); images per
second, the median of rounds with the slowest and the fastest; their ratio to the baseline's in the first form, the
median over rounds; milliseconds of an image alone; and peak memory, which is what a process takes for the model and a
batch beyond torch itself (on a GPU, what torch allocates). Each round times one batch and one image of every model and
form. `--json` writes the same to a file, `--picture` draws images per second against MACs. Forms: see
`timm_resnas.engine.forms`; those of ONNX need the extra `export` and a CPU.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import timm
import torch

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.engine.forms import Run, check_form, form_of
from timm_resnas.engine.models import parse_kwargs
from timm_resnas.engine.run import RunError, atomic_write, check_output, cli_errors
from timm_resnas.nas.count import count_macs, macs_vary


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="names that timm knows, and arguments: 'name key=value …'")
    parser.add_argument("--baseline", help="model that ratios refer to (default: the first one)")
    parser.add_argument("--forms", default="eager", help="separated by commas (default: %(default)s)")
    parser.add_argument("--img-size", type=int, help="side of the images (default: each model's own)")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7, help="timed batches per model and form")
    parser.add_argument("--warmup", type=int, default=1, help="batches per model and form before timing")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="count the process's CPU seconds, not elapsed ones: steadier where other jobs run (with --threads 1)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results here")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="images per second against MACs, a PNG")
    parser.add_argument("--memory-of", nargs=2, metavar=("MODEL", "FORM"), help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> list[str]:
    """The forms; what would fail after the work fails here."""
    args.baseline = args.baseline or args.models[0]
    args.models = list(dict.fromkeys([args.baseline, *args.models]))
    if unknown := [name for name, *_ in map(str.split, args.models) if not timm.is_model(name)]:
        raise RunError(f"timm knows no model {' or '.join(unknown)}; python -m timm_resnas lists this package's")
    if args.cpu_time and args.device != "cpu":
        raise RunError("--cpu-time needs --device cpu")
    if args.rounds < 1 or args.batch_size < 2:
        raise RunError(f"--rounds {args.rounds}, --batch-size {args.batch_size}: at least 1 round, 2 images a batch")
    forms = [check_form(form) for form in args.forms.split(",")]
    if args.device != "cpu" and any("onnx" in form for form in forms):
        raise RunError(f"the forms of ONNX run on a CPU; leave them out with --device {args.device}")
    for name, *given in map(str.split, args.models):
        parse_kwargs(name, given)
    for path in (args.json, args.picture):
        if path is not None:
            check_output(path)
    return forms


def create(text: str, args: argparse.Namespace) -> torch.nn.Module:
    """The model at the size of the images."""
    name, *given = text.split()
    size, fixed = args.img_size, timm.get_pretrained_cfg_value(name, "fixed_input_size")
    kwargs = parse_kwargs(text, given) | (dict(img_size=size) if size and fixed else {})
    model = timm.create_model(name, device=args.device, **kwargs)
    if size and not fixed and hasattr(model, "set_input_size"):
        model.set_input_size(img_size=(size, size))  # or position embeddings would be resampled in each call
    return model


def input_size(model: torch.nn.Module, args: argparse.Namespace) -> tuple[int, int, int]:
    channels, height, width = model.pretrained_cfg["input_size"]
    return (channels, args.img_size, args.img_size) if args.img_size else (channels, height, width)


def make_run(name: str, form: str, args: argparse.Namespace) -> tuple[Run, torch.Tensor]:
    """The model in a form, and a batch for it."""
    size = input_size(create(name, args), args)
    images = torch.randn(args.batch_size, *size, device=args.device)
    return form_of(lambda: create(name, args), form, images), images


def memory(name: str, form: str, args: argparse.Namespace) -> int:
    """Peak of a process, in bytes; in a process of its own."""
    if args.device != "cpu":
        run, images = make_run(name, form, args)
        with torch.inference_mode():
            run(images)
            torch.cuda.reset_peak_memory_stats()
            run(images)
        return torch.cuda.max_memory_allocated()
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    run, images = make_run(name, form, args)
    with torch.inference_mode():
        run(images)  # what compiling took is not what running takes
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        run(images)
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) - before


def measure(args: argparse.Namespace, forms: list[str]) -> dict[tuple[str, str], tuple[list[float], list[float]]]:
    """Seconds of a batch and of an image, by round, of each model and form."""
    clock = time.process_time if args.cpu_time else time.perf_counter
    synchronize = torch.cuda.synchronize if args.device != "cpu" else lambda: None
    runs = {(name, form): make_run(name, form, args) for name in args.models for form in forms}
    seconds: dict[tuple[str, str], tuple[list[float], list[float]]] = {key: ([], []) for key in runs}
    with torch.inference_mode():
        for i in range(args.warmup + args.rounds):
            for key, (run, images) in runs.items():
                for batch, kept in zip((images, images[:1]), seconds[key], strict=True):
                    synchronize()
                    start = clock()
                    run(batch)
                    synchronize()
                    if i >= args.warmup:
                        kept.append(clock() - start)
    return seconds


def describe(name: str, form: str, args: argparse.Namespace, argv: list[str]) -> dict:
    """What is known of a model and form beside speed."""
    model = create(name, args)
    command = [sys.executable, __file__, *argv, "--memory-of", name, form]
    done = subprocess.run(command, capture_output=True, text=True)
    return dict(
        model=name,
        form=form,
        params=sum(p.numel() for p in model.parameters()),
        macs=count_macs(model, input_size(model, args)),
        macs_vary=macs_vary(model),  # with the image; macs are then the most
        memory=int(done.stdout) if done.returncode == 0 else None,  # None: the system does not tell it
    )


def table(rows: list[dict]) -> str:
    lines = ["| model | form | params | MACs | img/s (slowest to fastest) | ratio | ms of an image | memory |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for r in rows:
        memory = "" if r["memory"] is None else f"{r['memory'] / 2**20:.0f} MiB"
        macs = f"{'≤ ' * r['macs_vary']}{r['macs'] / 1e9:.2f} G"
        lines.append(
            f"| {r['model']} | {r['form']} | {r['params'] / 1e6:.2f} M | {macs} "
            f"| {r['images_per_second']:.1f} ({r['slowest']:.1f} to {r['fastest']:.1f}) | {r['ratio']:.3f} "
            f"| {r['latency_ms']:.1f} | {memory} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> dict:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    forms = check(args)
    if args.threads:
        torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    if args.memory_of:
        print(memory(*args.memory_of, args))
        return {}
    seconds = measure(args, forms)
    base = seconds[args.baseline, forms[0]][0]
    rows = []
    for (name, form), (batches, singles) in seconds.items():
        speed = dict(
            images_per_second=args.batch_size / statistics.median(batches),
            slowest=args.batch_size / max(batches),
            fastest=args.batch_size / min(batches),
            ratio=statistics.median(b / s for b, s in zip(base, batches, strict=True)),
            latency_ms=1e3 * statistics.median(singles),
        )
        rows.append({**describe(name, form, args, argv), **speed})
    print(table(rows))
    report = dict(
        device=torch.cuda.get_device_name(args.device) if args.device != "cpu" else "cpu",
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        timm=timm.__version__,
        clock="cpu" if args.cpu_time else "wall",
        baseline=args.baseline,
        batch_size=args.batch_size,
        rounds=args.rounds,
        rows=rows,
    )
    if args.json:
        with atomic_write(args.json) as file:
            file.write_text(json.dumps(report, indent=2))
    if args.picture:
        from timm_resnas.engine.plots import draw_speed

        draw_speed(args.picture, report)
    return report


if __name__ == "__main__":
    with cli_errors("benchmark_models.py"):
        main()
