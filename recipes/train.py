"""Train or fine-tune any model of timm or timm_resnas: a name, a search's `best/`, any saved folder, a Hub id.

    accelerate launch recipes/train.py                                       # recipes/configs/digits.yaml, a CPU
    accelerate launch recipes/train.py --model runs/digits-micro/best --dataset digits          # from scratch
    accelerate launch recipes/train.py --model runs/digits-micro/best --pretrained --lr 2e-4    # inherited weights
    accelerate launch recipes/train.py --model runs/photos/best --pretrained --img-size 128 --dataset imagefolder:photos
    accelerate launch recipes/train.py --model runs/photos/best --pretrained --dataset imagefolder:photos \
        --reduce-tokens ats --reduce-kwargs max_tokens=0.7
    accelerate launch --multi_gpu --num_processes 8 recipes/train.py \
        --config recipes/configs/vit_resnas_tiny.yaml --dataset imagefolder:imagenet

`recipes/configs/` has a file for each model, with its paper's numbers. What there is: timm's augmentations, optimizers
and schedules; learning rate by batch size (`--lr-base`), layer-wise decay of it; gradient clipping and accumulation;
weight averaging (`--ema`); drop path; Mixup and CutMix, or token-level mixing with token labels (`--mix token`); a
teacher (`--teacher`, `--distill`); several recursion depths at once (`--recursions`); fewer tokens in a timm ViT
(`--reduce-tokens`: DynamicViT with its losses and learning rates, ATS, PatchMerger); batches of several image sizes
(`--multi-scale`); fine-tuning at another resolution (`--img-size`, position embeddings are resampled); bf16 and fp16;
one process or many.

Which weights are taken is never decided on test images. With a validation part, cut from the training images by seed
(`--val-per-class`), it is the epoch and the weights, raw or averaged, of highest validation accuracy, and the best
`--keep` are kept; without (0), it is the last epoch's, averaged ones if there are any. The test images are
looked at once, when training is over, by a random forest on small pixels and colours as well: where the network does
not beat it, the run says so, and what would help.

A run's folder (runs/digits-vit_resnas, or runs/digits-vit_resnas-seed=3-epochs=20 where options were changed) holds
`config.yaml`, `best/` (config.json and model.safetensors, for `timm.create_model`), `kept/`,
`training.jsonl`, `training.png`, `results.json` and `state/`. Killed at any moment and started with the same command, a
run continues from its last checkpoint and ends with the same weights: batches, augmentation, mixing, drop path and
learning rate are functions of the seed and the step. Another number of processes may continue it, unless
--multi-scale makes other batches for it.

Errors, each said before anything is trained: an unknown model, folder or data set, weights that do not fit, an image
size that the model cannot have, a batch that processes and passes do not divide, options that contradict each other or
those the run was started with. A loss that is not finite ends the run with the last good checkpoint in place.
"""

import sys
from pathlib import Path
from typing import Any

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import TrainOptions

DEFAULT_CONFIG = Path(__file__).parent / "configs" / "digits.yaml"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if not any(a.split("=")[0] in ("--model", "--config") for a in argv):
        argv = ["--config", str(DEFAULT_CONFIG), *argv]
    options = parse(TrainOptions, argv, __doc__)
    # torch is imported from here on, so that --help answers at once
    from timm_resnas.data import eval_batches, eval_transform
    from timm_resnas.engine import train as job
    from timm_resnas.engine.evaluate import format_scores
    from timm_resnas.engine.processes import start
    from timm_resnas.engine.run import Run, RunError, cli_errors, dataset_name, read_json, run_name
    from timm_resnas.nas.count import count_macs, macs_vary

    with cli_errors("train.py"):
        accelerator = start(options)
        job.check_options(options, accelerator.num_processes)
        # runs/<name>/best and hub ids: the last part that says something
        parts = [p for p in Path(options.model.partition(":")[2] or options.model).parts if p != "best"]
        name = run_name(options, [dataset_name(options.dataset), *parts[-1:]], shown=("dataset", "model"))
        run = Run(options, accelerator, name)
        if run.resumed and (run / "results.json").exists():
            try:
                scores = format_scores(read_json(run / "results.json")["test"]["best"])
            except (LookupError, TypeError):
                raise RunError(f"{run / 'results.json'} is damaged; give this run another --name") from None
            run.print(f"trained before: {run / 'best'}  test {scores}")
            return
        model, data = job.prepare(options, run)

        def batches(part: Any, config: dict[str, Any], indices: list[int] | None = None) -> Any:
            return eval_batches(
                part,
                eval_transform(config),
                indices=indices,
                num_workers=options.workers,
                rank=accelerator.process_index,
                world=accelerator.num_processes,
                device=accelerator.device,
            )

        val = batches(data.splits.train, data.config, data.val) if data.val else None
        training = job.ModelTraining(options, accelerator, run, model, data, val)
        run.begin()
        scaled = f" ({options.lr_base:g} x {options.batch_size} / {options.lr_base_size})" if options.lr is None else ""
        macs, size = count_macs(model, tuple(data.config["input_size"])), data.config["input_size"]
        run.print(
            f"{options.model}: {sum(p.numel() for p in model.parameters()):,} parameters, "
            f"{'at most ' * macs_vary(model)}{macs / 1e6:,.1f} MMACs at "
            f"{size[1]} x {size[2]}; {data.num_train} images to train on, {len(data.val)} to choose weights by, "
            f"{len(data.splits.test)} to test\n"
            f"{options.epochs} epochs of {training.steps} steps of {options.batch_size} images, learning rate up to "
            f"{job.learning_rate(options):g}{scaled}"
            + (f"; continues at step {training.state.step} of {training.total}" if training.state.step else "")
        )
        training.run_epochs()
        job.finish(training, macs, batches)
        run.print(f"done: {run / 'best'}")
        accelerator.end_training()


if __name__ == "__main__":
    main()
