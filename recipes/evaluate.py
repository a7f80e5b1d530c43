"""Evaluate a classifier: top-1, top-5, loss, calibration error, speed.

    python recipes/evaluate.py --model runs/digits-vit_resnas/best --dataset digits
    python recipes/evaluate.py --model hf-hub:<id> --dataset imagefolder:<ImageNet> --img-size 288 --crop-pct 1.0
    python recipes/evaluate.py --model vit_resnas_tiny --pretrained-path released.pth --real-labels \
        --dataset imagefolder:<ImageNet>
    accelerate launch --multi_gpu --num_processes 8 recipes/evaluate.py --model … --dataset … --amp bf16 --json -

The model is a name that has pretrained weights, a run's folder, any folder that timm saved, or a Hub id. Images are
prepared as the model's own configuration says, unless options say otherwise; at another --img-size position embeddings
are resampled. `--split` takes `test`, `train`, or the name of any other split or folder of the data set.

Classes are matched by name where model and data set both name theirs: a data set with some of the model's classes
(ImageNet-A, ImageNet-R, mini-ImageNet with their WordNet folder names) is scored on these alone. `--valid-labels` does
so by number: a file with one of the model's class numbers per line, in the order of the data set's classes, or the name
of a list that timm has (imagenet_a, imagenet_r, mini_imagenet). `--real-labels` scores ImageNet's validation images by
the reassessed labels of arXiv 2006.07159 (timm's; or a JSON file of that form): right is any of an image's labels,
images without one are left out.

The calibration error is the expected one: 15 bins of equal width by confidence, mean difference of confidence and
accuracy, weighted by images. Speed is batch size by the median seconds of a full batch's forward pass, the first one
not counted; data loading is not part of it.

Errors: an unknown model or folder, a model without weights, an image size it cannot have, classes that do not fit;
each is one message.
"""

import json
import sys
from pathlib import Path
from typing import Any

from timm_resnas.engine.options import parse
from timm_resnas.engine.settings import EvaluateOptions


def main(argv: list[str] | None = None) -> dict[str, Any]:
    options = parse(EvaluateOptions, argv, __doc__)
    # torch is imported from here on, so that --help answers at once
    import numpy as np

    from timm_resnas.data import eval_batches, eval_transform
    from timm_resnas.engine import evaluate as job
    from timm_resnas.engine.models import open_prepared
    from timm_resnas.engine.processes import start
    from timm_resnas.engine.run import Progress, RunError, atomic_write, check_output, cli_errors

    with cli_errors("evaluate.py"):
        if options.model is None:
            raise RunError("--model is missing: a name, a folder or hf-hub:<id>")
        file = None if options.json in (None, "-") else Path(options.json)
        if file is not None:
            check_output(file)
        accelerator = start(options)
        model, config = open_prepared(options)
        model = model.to(accelerator.device)
        found = job.open_part(options)
        part, config["background"] = found.dataset, found.background
        real = None
        if options.real_labels is not None:
            real = job.read_real_labels(options.real_labels, part)
            part = part.remove_columns("label").add_column("label", np.arange(len(part)))  # labels are images' numbers
            classes = None
        elif options.valid_labels is not None:
            classes = job.read_valid_labels(options.valid_labels, model, found.num_classes)
        else:
            classes = job.matched_classes(model, found.class_names)
        batches = eval_batches(
            part,
            eval_transform(config),
            options.batch_size,
            memory_limit=0,  # one pass
            num_workers=options.workers,
            rank=accelerator.process_index,
            world=accelerator.num_processes,
            device=accelerator.device,
        )
        with Progress(len(batches), "evaluate", accelerator.is_local_main_process) as bar:
            scores = job.evaluate(accelerator, model, batches, classes=classes, real=real, timed=True, report=bar)
        result = {
            "model": options.model,
            "params": sum(p.numel() for p in model.parameters()),
            "dataset": options.dataset,
            "split": found.split,
            "images_in_split": found.total,
            "classes": found.num_classes if real is None else model.num_classes,
            "labels": "data" if real is None else "real",
            **{k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
            "batch_size": options.batch_size,
            "unreadable": len(batches.corrupt),
            **scores,
        }
        if accelerator.is_main_process:
            if options.json == "-":
                print(json.dumps(result, indent=1))
            else:
                for note in found.notes:
                    print(f"note: {note}")
                height, width = result["input_size"][1:]
                print(
                    f"{options.model} on {options.dataset}, {found.split}: {len(part)} of {found.total} images, "
                    f"{height} x {width} px"
                )
                print(job.format_scores(scores))
                if file is not None:
                    with atomic_write(file) as fresh:
                        fresh.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            sys.stdout.flush()
        return result


if __name__ == "__main__":
    main()
