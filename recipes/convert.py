"""Turn the authors' checkpoint files into folders that timm loads: safetensors, with provenance, licence and a check.

    python recipes/convert.py vit_resnas_small.pth --model vit_resnas_small --license cc-by-nc-4.0 \
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

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import ConvertOptions


def main(argv: list[str] | None = None) -> None:
    options = parse(ConvertOptions, argv, __doc__)
    from timm_resnas.engine.convert import convert
    from timm_resnas.engine.run import cli_errors

    with cli_errors("convert.py"):
        convert(options)


if __name__ == "__main__":
    main()
