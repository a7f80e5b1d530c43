"""In which forms models run, and how far their logits are from PyTorch's in float32.

    python recipes/forms.py                                   # every model of this package: hours on a CPU
    python recipes/forms.py "sret_*" vit_resnas --forms onnx,compile --json forms.json

One row per model, one column per form, in each cell the largest difference of logits at batch sizes 1 and 3 divided by
the largest logit; or the error. Weights are random. Forms: see `timm_resnas.engine.forms`; the default is torch's ways
out (both ONNX exporters, torch.export, TorchScript, torch.compile in one graph), bfloat16 and channels last. ONNX needs
the extra `export`. The status is 1 where a form failed: there was an error, or a number that is not finite; it says
nothing of how large a difference is. Where oneDNN refuses bfloat16 on a CPU, the environment variable
ONEDNN_MAX_CPU_ISA=AVX512_CORE makes torch compute it in another way.
"""

import argparse
import gc
import json
import math
import sys
from pathlib import Path

import timm
import torch

import timm_resnas  # noqa: F401  (registers the models)
from timm_resnas.engine.forms import check_form, form_of
from timm_resnas.engine.run import RunError, atomic_write, check_output, cli_errors

DEFAULT_FORMS = ("onnx", "onnx_legacy", "export", "torchscript", "compile", "bfloat16", "channels_last")


def parse_args(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help="names that timm knows, with wildcards (default: this package's)")
    parser.add_argument("--forms", default=",".join(DEFAULT_FORMS), help="separated by commas (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table here, after each model")
    return parser.parse_args(argv)


def names_of(patterns: list[str]) -> list[str]:
    """Names that fit, in order."""
    if not patterns:
        names = timm.list_models()
        return [n for n in names if timm.model_entrypoint(n).__module__.startswith("timm_resnas.")]
    found = {pattern: timm.list_models(pattern) for pattern in patterns}
    if unknown := [pattern for pattern, names in found.items() if not names]:
        raise RunError(f"timm knows no model {' or '.join(unknown)}; python -m timm_resnas lists this package's")
    return list(dict.fromkeys(name for names in found.values() for name in names))


@torch.inference_mode()
def difference(name: str, form: str) -> float | str:
    """The cell of a model and a form."""

    def create() -> torch.nn.Module:
        torch.manual_seed(0)
        return timm.create_model(name)

    size = timm.get_pretrained_cfg(name).input_size
    batches = [torch.randn(n, *size, generator=torch.Generator().manual_seed(n)) for n in (1, 3)]
    expected = [create().eval()(x) for x in batches]
    try:
        with torch.inference_mode(False):  # exporters and compilers do not take its tensors
            run = form_of(create, form, torch.zeros(2, *size))
        found = [run(x.clone()).float() for x in batches]
    except Exception as e:  # of any kind: the reason is what the cell shows
        lines = [line.strip() for line in str(e).splitlines() if line.strip()]
        return f"{type(e).__name__}: {lines[0] if lines else ''}"[:120]
    finally:
        torch.compiler.reset()
        gc.collect()
    shares = [(a - b).abs().max() / b.abs().max() for a, b in zip(found, expected, strict=True)]
    largest = torch.stack(shares).max().item()  # NaN if one is
    return largest if math.isfinite(largest) else "not finite"


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    forms = [check_form(form) for form in args.forms.split(",")]
    names = names_of(args.models)
    if args.json:
        check_output(args.json)
    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, timm {timm.__version__}, CPU")
    print(f"| model | {' | '.join(forms)} |\n|{'---|' * (len(forms) + 1)}")
    table: dict[str, dict[str, float | str]] = {}
    for name in names:
        table[name] = {form: difference(name, form) for form in forms}
        cells = [cell if isinstance(cell, str) else f"{cell:.0e}" for cell in table[name].values()]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
        if args.json:
            with atomic_write(args.json) as file:
                file.write_text(json.dumps(table, indent=2))
    failed = sum(isinstance(cell, str) for row in table.values() for cell in row.values())
    print(f"{len(names)} models, {len(forms)} forms: {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    with cli_errors("forms.py"):
        main()
