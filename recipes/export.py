"""Export a model for other runtimes, see that it computes the same there, and how fast it is.

    python recipes/export.py runs/digits-micro/best --dataset digits --uint8 --int8 dynamic --update-card
    python recipes/export.py hf-hub:owner/name --dataset imagefolder:photos --threads 4
    python recipes/export.py vit_small_patch16_224 --no-torch-export
    python recipes/export.py vit_resnas_small --no-pretrained              # how fast it would be
    python recipes/publish.py runs/digits-micro --repo owner/name          # sends the ONNX files along

Writes, into export/ in the model's folder (for a name or a Hub id into runs/<name>-export, or `--output`):

    model.onnx        by torch.onnx's exporter over torch.export, which onnxscript's optimiser tidies; any batch size.
                      Takes `images` [B, C, H, W] and gives `logits` [B, classes]. Its metadata hold input_size, mean,
                      std, crop and the class names, as JSON, for programs that have nothing but the file
    model-int8.onnx   `--int8 dynamic`: the same by onnxruntime's quantiser, linear layers in 8 bits
    model.pt2         by torch.export, for PyTorch without the model's code. Its reader unpickles: load your own only.
                      Left out, with the reason in the report, where torch.export refuses the model
    results.json, report.md

With `--uint8` all of them take pixels as they are in files, 0 to 255, and normalise them in the graph.

Each file is run on the same images as PyTorch, at batch sizes 1 and `--batch-size`; nothing is written where float32
logits differ by more than 0.1% of the largest. `--dataset` gives the images (else noise), and then every runtime
answers all of its test part: accuracy, and what 8 bits cost. PyTorch (eager) and ONNX Runtime take turns in `--rounds`
rounds, latency at batch 1, throughput at `--batch-size`, on the CPU.

`--update-card` writes the numbers into the folder's config.json, from which recipes/publish.py makes the model card,
and into a card that lies there already. It is for the model as the folder describes it: not with other weights,
--img-size, --model-kwargs or another crop. Without it, a published card tells nothing of the new files.

Not needed: onnxslim, since ONNX Runtime optimises the graph when it opens it (a fifth fewer nodes in the files of
vit_resnas_tiny and sret_tiny, the same logits to the bit, 1.01 times as fast); torchao, which quantises for PyTorch.

Errors: no such model, a model without weights or classifier, classes that do not fit, a model that the exporter
refuses, a package of the extra `export` that is missing (`pip install 'timm_resnas[export]'`).
"""

from typing import Any

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import ExportOptions


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(ExportOptions, argv, __doc__)
    # torch is imported from here on, so that --help answers at once
    from timm_resnas.engine.export import export
    from timm_resnas.engine.run import cli_errors

    with cli_errors("export.py"):
        return export(options)


if __name__ == "__main__":
    main()
