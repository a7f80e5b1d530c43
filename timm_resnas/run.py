"""Run a script with the models of timm_resnas registered, such as those of timm's repository.

    python -m timm_resnas.run train.py --model vit_resnas_tiny --data-dir imagenet
    torchrun --nproc-per-node 8 -m timm_resnas.run validate.py --model sret_tiny --checkpoint model.safetensors

The script sees its own arguments and imports what lies beside it, as if Python ran it without this module.
"""

import runpy
import sys
from pathlib import Path

import timm_resnas  # noqa: F401  (registers the models as soon as the script imports timm)

__all__ = ["main"]


def main() -> None:
    """Run the script that the first argument names; the others are its own."""
    args = sys.argv[1:]
    if not args or args[0] in ("-h", "--help"):
        print("usage: python -m timm_resnas.run SCRIPT.py [ARGUMENTS]", file=sys.stdout if args else sys.stderr)
        raise SystemExit(0 if args else 2)
    script = Path(args[0])
    if not script.is_file():
        print(f"timm_resnas.run: there is no script {args[0]}", file=sys.stderr)
        raise SystemExit(2)
    sys.argv = args
    if not getattr(sys.flags, "safe_path", False):
        sys.path[0] = str(script.resolve().parent)  # where `python script.py` finds what lies beside the script
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main()
