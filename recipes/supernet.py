"""Train a supernet: one set of weights, many sub-networks.

    accelerate launch recipes/supernet.py                                     # digits, micro space, a CPU, minutes
    accelerate launch recipes/supernet.py --dataset imagefolder:photos --space mini --epochs 200 --amp bf16
    accelerate launch --multi_gpu --num_processes 8 recipes/supernet.py \
        --config recipes/configs/vit_resnas_tiny_supernet.yaml --dataset imagefolder:imagenet
    accelerate launch --multi_gpu --num_processes 2 recipes/supernet.py --cpu          # several processes on a CPU
    accelerate launch recipes/supernet.py --step nasvit

`--step` says what a step trains. By default, `groups`, it cuts the batch into groups and trains one sub-network on each
(paper: arXiv 2109.00642, section 3.3). The groups may lie in one process or in several (`--num-archs` counts them all),
and go through the net at once or, to save memory, in `--accumulate` passes: the same sub-networks see the same images,
only batch norm's statistics are those of a pass in its process (of all processes on CUDA, `--sync-bn`). At the start of
each epoch of `--arch-warmup-epochs` channels are put in order of importance, moments of the optimizer along with them.
With `--token-labeling` images are mixed by cells of the last stage's grid, and a second classifier learns what each
cell shows (paper). `--sampler selected` draws among few networks of all sizes, selected by SynFlow before training
(after PreNAS, ICML 2023).

`--step single` trains one sub-network at a time on the whole batch (AutoFormer, arXiv 2107.00651). `--step sandwich`
trains `--num-archs` on the whole batch: the largest by labels or by a `--teacher`, and by its probabilities the
smallest and others (arXiv 1903.05134). `--step nasvit` (NASViT, ICLR 2022) teaches these by AlphaNet's divergence,
clips their gradient (`--clip-others`), and from `--project-epoch` on frees the largest network's gradient, parameter by
parameter, of what conflicts with theirs. With either, `loss` is the largest network's, an image costs a pass through
each network, `--accumulate` passes differ only in batch norm's statistics, and processes exchange gradients once a
step. `--step paths`, with `--space efficientformer` or `efficientformer_micro`, trains the largest network with all
paths of each block mixed, the weights of the mixture along (EfficientFormer, arXiv 2206.01191; `--path-noise`,
`--path-temperature`): at the end it prints how probable each path is, and `supernet/paths.json` keeps it.

`--switchable-scale 0.1` multiplies both branches of each block by scales that each depth and width of a sub-network has
for itself, and that begin at 0.1 (NASViT's switchable scaling; ViT-ResNAS and AutoFormer). What is extracted from such
a supernet has them in its weights, and is the plain network otherwise.

The images that a search will score candidates on are cut from the training set first, recorded in the run's
`state/data.json`, and never trained on; the test images are not looked at.

A run's folder (runs/digits-micro-supernet, or runs/digits-micro-supernet-seed=3-epochs=20 where options were changed)
holds `config.yaml`, `supernet/` (config.json and model.safetensors, for `timm.create_model`, and training_data.json,
which tells a later search what it was trained on), `training.jsonl` (loss and accuracy of the largest, the smallest and
some random sub-networks), `training.png` and `state/`. Killed at any moment and started with the same command, a run
continues from its last checkpoint and ends with the same weights: batches, augmentation, sub-networks, drop path and
learning rate are functions of the seed and the step. Another number of processes may continue it.

Errors, each said before anything is trained: an unknown space or dataset, an image size that the total stride does
not divide, groups that do not divide the batch or the processes, options that the step rule does not have, options
other than the run was started with. A loss that is not finite ends the run with the last good checkpoint in place.
"""

import dataclasses
from pathlib import Path

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import SupernetOptions


def main(argv: list[str] | None = None) -> None:
    options = parse(SupernetOptions, argv, __doc__)
    options = dataclasses.replace(options, space=options.space or "micro")
    # torch is imported from here on, so that --help answers at once
    from timm_resnas.engine.processes import start
    from timm_resnas.engine.run import Run, cli_errors, dataset_name, run_name
    from timm_resnas.engine.supernet import prepare, train_supernet

    with cli_errors("supernet.py"):
        accelerator = start(options)
        parts = (dataset_name(options.dataset), Path(options.space).stem, "supernet")
        run = Run(options, accelerator, run_name(options, parts, shown=("dataset", "space")))
        data = prepare(options, run)
        run.begin()
        train_supernet(options, accelerator, run, data)
        run.print(f"done: {run / 'supernet'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
