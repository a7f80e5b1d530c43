"""The settings of every job, with their reasons: what `options.parse` makes flags, YAML keys and help of.

``basic`` ones are what people set first; ``free`` ones may change when a run is continued. Like `options`, this module
imports neither torch nor timm.
"""

from __future__ import annotations

from dataclasses import dataclass

from .options import option

__all__ = [
    "ConvertOptions",
    "EvaluateOptions",
    "ExportOptions",
    "LatencyOptions",
    "PublishOptions",
    "SearchOptions",
    "SupernetOptions",
    "TRAINING_FREE",
    "UNSCORED",
    "TrainOptions",
]

DATASETS = "digits, fashion-mnist:<dir>, imagefolder:<dir> or hf:<id or folder>"
PRECISIONS = ("float32", "bfloat16", "float16", "amp_bfloat16", "amp")
TRAINING_FREE = ("dss", "dss_raw", "dss_released", "snip", "synflow", "naswot", "params", "macs")
UNSCORED = ("slim-masks", "uniform")  # ways to cut --model that score no candidates
RUNTIMES = ("torch", "onnxruntime")
COUNT, SHARE, POSITIVE, NOT_NEGATIVE = "[1, inf)", "[0, 1]", "(0, inf)", "[0, inf)"


@dataclass(frozen=True)
class ProcessOptions:
    """processes"""

    config: str | None = option(
        None, "a file of defaults; flags override them", metavar="FILE.yaml", basic=True, free=True
    )
    seed: int = option(0, "decides every random choice", range="[0, 4294967295]", basic=True)
    cpu: bool = option(False, "do not use an accelerator", free=True)
    amp: str = option("no", "mixed precision", choices=("no", "bf16", "fp16"))
    threads: int = option(
        0, "CPU threads per process, 0: cores / local processes; on a busy machine 1 is often fastest",
        range="[0, 1024]", basic=True, free=True,
    )  # fmt: skip


@dataclass(frozen=True)
class RunOptions(ProcessOptions):
    """run"""

    output: str = option("runs", "where runs are kept", metavar="DIR", free=True)
    name: str | None = option(
        None,
        "the run's folder in --output (default: by data, model and what was changed)",
        basic=True,
        free=True,
    )
    log_with: str | None = option(
        None, "also log to a tracker of Accelerate (tensorboard, wandb, …)", metavar="TRACKER", free=True
    )


@dataclass(frozen=True)
class DataOptions:
    """data"""

    dataset: str = option("digits", DATASETS, basic=True)
    workers: int = option(0, "data loading processes", range="[0, 256]", free=True)
    label_key: str | None = option(None, "column of the labels, where there are several", metavar="COLUMN")
    image_key: str | None = option(None, "column of the images, where there are several", metavar="COLUMN")
    train_split: str | None = option(None, "name of the part to train on (default: found)", metavar="PART")
    test_split: str | None = option(None, "name of the part to test on (default: found)", metavar="PART")
    hf_config: str | None = option(None, "configuration of a hf: data set that has several", metavar="NAME")
    background: str | None = option(
        None, "colour behind transparent pictures, a name or #rrggbb (default: white, or the model's)", metavar="COLOUR"
    )


@dataclass(frozen=True)
class AugmentOptions:
    """augmentation (timm's names; what is not given suits the data)"""

    scale: list[float] | None = option(None, "area of the random crop", metavar=("MIN", "MAX"), nargs=2, range="(0, 1]")
    ratio: list[float] | None = option(None, "its aspect ratio", metavar=("MIN", "MAX"), nargs=2, range=POSITIVE)
    shift: int | None = option(
        None, "random shifts instead of the random crop; 0: the crop", metavar="PIXELS", range="[0, 4096]"
    )
    hflip: float | None = option(None, "probability of a horizontal flip", metavar="P", range=SHARE)
    vflip: float | None = option(None, "probability of a vertical flip", metavar="P", range=SHARE)
    color_jitter: float | None = option(None, "strength; without effect beside --aa", metavar="X", range=NOT_NEGATIVE)
    aa: str | None = option(None, "auto-augment, such as rand-m9-mstd0.5-inc1", metavar="NAME")
    reprob: float | None = option(None, "probability of random erasing", metavar="P", range=SHARE)
    remode: str | None = option(None, "what random erasing fills in", choices=("const", "rand", "pixel"))


@dataclass(frozen=True)
class CheckpointOptions:
    """checkpoints"""

    checkpoint_minutes: float = option(15, "checkpoints within long epochs", metavar="N", range=NOT_NEGATIVE, free=True)
    checkpoint_steps: int = option(
        0, "the same by steps; 0: by minutes only", metavar="N", range=NOT_NEGATIVE, free=True
    )


@dataclass(frozen=True)
class SupernetOptions(CheckpointOptions, AugmentOptions, DataOptions, RunOptions):
    """supernet"""

    space: str | None = option(None, "search space: a preset's name or a .json file (default: micro)", basic=True)
    img_size: list[int] | None = option(
        None, "side, or height and width (default: the space's)", metavar="N", range=COUNT, basic=True
    )
    val_per_class: int = option(50, "images of each class that the search scores on", range=COUNT)
    val_fraction: float = option(1 / 3, "the same for classes of under 5 times as many", range="(0, 1)")
    epochs: int = option(12, "training epochs", range=COUNT, basic=True)
    batch_size: int = option(64, "images per step, over all processes and passes", range=COUNT, basic=True)
    step: str = option(
        "groups",
        "what a step trains: a sub-network on each group of the batch (ViT-ResNAS), a single one (AutoFormer), on the "
        "whole batch the largest and, taught by it, the smallest and others (sandwich), the same with AlphaNet's "
        "divergence and gradients freed of conflicts (nasvit), or all paths of each block, mixed (paths: "
        "EfficientFormer)",
        choices=("groups", "single", "sandwich", "nasvit", "paths"),
        basic=True,
    )
    num_archs: int | None = option(
        None,
        "sub-networks per step, over all processes and passes; of sandwich and nasvit each on the whole batch "
        "(default: 4; --step single: 1)",
        range=COUNT,
    )
    accumulate: int = option(1, "passes that a process cuts its part of a step into", metavar="N", range=COUNT)
    sampler: str = option(
        "balanced",
        "of --step groups: balanced draws (the paper's), the largest, the smallest and balanced draws, or draws among "
        "few networks of all sizes that SynFlow selects untrained (PreNAS's idea)",
        choices=("balanced", "sandwich", "selected"),
    )
    teacher: str | None = option(
        None,
        "what the largest network learns from in place of labels (sandwich, nasvit): a model with weights, as a name, "
        "a folder or hf-hub:<id>",
        metavar="MODEL",
    )
    teacher_path: str | None = option(None, "the teacher's weights, where its name has none", metavar="FILE")
    temperature: float = option(1.0, "divides the teacher's logits (NASViT: 0.2)", metavar="T", range=POSITIVE)
    clip_others: float | None = option(
        None,
        "largest norm of the gradient of all but the largest network (--step nasvit, default: the paper's 1; 0: any)",
        metavar="NORM",
        range=NOT_NEGATIVE,
    )
    project_epoch: int | None = option(
        None,
        "first epoch, from 0, in which gradients are freed of conflicts (--step nasvit, default: after a quarter, as "
        "the paper's 101 of 400)",
        metavar="N",
        range=NOT_NEGATIVE,
    )
    path_noise: str = option(
        "uniform",
        "of --step paths, added to the paths' parameters: U(0, 1) (as printed), Gumbel's, or none",
        choices=("uniform", "gumbel", "none"),
    )
    path_temperature: float = option(1.0, "of --step paths: of the softmax over paths", metavar="T", range=POSITIVE)
    switchable_scale: float | None = option(
        None,
        "scale both branches of each block by numbers of their own for each depth and width, which begin here (NASViT: "
        "1e-4); folded into the weights of what is found (default: no scales)",
        metavar="INIT",
        range=POSITIVE,
    )
    mode: str = option(
        "sliced", "several sub-networks: each through its slices, or masked (the paper's)", choices=("sliced", "masked")
    )
    arch_warmup_epochs: int = option(
        12, "epochs over which choices open, from the largest only to all; channels are sorted", range=NOT_NEGATIVE
    )
    lr: float = option(2e-3, "highest learning rate", range=POSITIVE, basic=True)
    min_lr: float = option(1e-5, "learning rate at the end of the cosine", range=NOT_NEGATIVE)
    warmup_epochs: float = option(1, "epochs of learning rate warm-up", range=NOT_NEGATIVE)
    warmup_lr: float = option(1e-6, "learning rate that warm-up starts from", range=NOT_NEGATIVE)
    weight_decay: float = option(0.05, "AdamW's; not on biases, norms, tokens, positions", range=NOT_NEGATIVE)
    decay_pos_embed: bool = option(False, "weight decay on position embeddings as well (as the released code)")
    clip_grad: float | None = option(None, "largest norm of the gradient; 0: any", metavar="NORM", range=NOT_NEGATIVE)
    drop_path: float = option(0.0, "stochastic depth rate of the last block", range="[0, 1)")
    smoothing: float = option(0.1, "label smoothing", range="[0, 1)")
    token_labeling: bool = option(False, "mix images by cells, and train a second classifier on the tokens (paper's)")
    patch_weight: float = option(1.0, "weight of the tokens' loss in token labelling", metavar="X", range=NOT_NEGATIVE)
    sync_bn: bool = option(
        True, "batch norm over all processes (CUDA only; not of sub-networks that have statistics of their own)"
    )
    eval_every: int = option(3, "how often sub-networks are evaluated", metavar="EPOCHS", range=COUNT, free=True)
    calibration: int = option(
        512,
        "training images on which sub-networks' batch statistics are computed; with --model those by which units are "
        "ranked and layers repaired",
        metavar="N",
        range=COUNT,
    )


@dataclass(frozen=True)
class SearchOptions(SupernetOptions):
    """search"""

    model: str | None = option(
        None,
        "shrink this trained vision transformer instead: a timm name, a folder or hf-hub:<id>",
        metavar="MODEL",
        basic=True,
    )
    finetune_epochs: int = option(
        8, "epochs that a shrunk network is fine-tuned, taught by the full one, at a fifth of --lr; 0: none",
        range=NOT_NEGATIVE, basic=True,
    )  # fmt: skip
    elastic_epochs: int = option(
        0,
        "epochs that narrower networks of --model are trained at once, with the full one and taught by it, before the "
        "search: then one run serves every budget",
        metavar="N",
        range=NOT_NEGATIVE,
    )
    keep_ratios: list[float] = option(
        [],
        "with --model: shares of the patches that may go on from a quarter, half and three quarters of the depth, such "
        "as 1 0.9 0.7 0.5; tokens are then searched with heads and hidden units (default: all stay)",
        metavar="R",
        nargs="*",
        range="(0, 1]",
        basic=True,
    )
    score: str | None = option(
        None,
        "of candidates: correct answers, likelihood of the labels, or agreement with the full network (default: "
        "accuracy; with --model agreement); or a score of networks that are not trained: TF-TAS's indicator (dss, with "
        "raw weights, as its program has it), snip, synflow, naswot, or as a control params or macs",
        choices=("accuracy", "likelihood", "agreement", *TRAINING_FREE),
        basic=True,
    )
    epochs: int | None = option(
        None, "training epochs (default: 12; with --model 8 of the full model, 0: none)", range=NOT_NEGATIVE, basic=True
    )
    batch_size: int | None = option(
        None, "images per step, over all processes and passes (default: 64; with --model 32)", range=COUNT, basic=True
    )
    lr: float | None = option(
        None, "highest learning rate (default: 2e-3; with --model 1e-4)", range=POSITIVE, basic=True
    )
    val_fraction: float | None = option(
        None, "the same for classes of under 5 times as many (default: a third; with --model 0.15)", range="(0, 1)"
    )
    budget: str | None = option(
        None,
        "upper limits, candidates use at least 97.5% of the first: macs=1.8G,params=40M, a share macs=40%, or none "
        "(default: macs=20%, with --model 50%, for pareto none)",
        basic=True,
    )
    search: str = option(
        "evolution",
        "how candidates are made; slimming: from the largest network down, by the step that loses least for its gain; "
        "slim-masks: of --model, by masks that are trained with it (ViT-Slim), no candidates; uniform: of --model, "
        "the same share of every block, as a control",
        choices=("evolution", "random", "pareto", "slimming", *UNSCORED),
        basic=True,
    )
    max_minutes: float | None = option(
        None,
        "end the search in good order after this time, training included (never before generation 1)",
        metavar="N",
        range=POSITIVE,
        basic=True,
        free=True,
    )
    supernet: str | None = option(
        None, "a trained supernet: its folder, or hf-hub:owner/name", metavar="WHERE", basic=True
    )
    allow_pickle: bool = option(False, "read a supernet's pickled weights (weights_only)", free=True)
    allow_leak: bool = option(False, "score on images that the supernet was trained on, if need be")
    latency_table: str | None = option(None, "of recipes/latency.py, for latency budgets and fronts", metavar="FILE")
    objectives: str = option("macs", "what --search pareto sets against accuracy: macs,params,memory,latency")
    gain: str | None = option(
        None,
        "what a step of --search slimming gains: a cost, or EfficientFormerV2's score of size and latency (default: "
        "what the budget names first)",
        choices=("macs", "params", "memory", "latency", "mes"),
    )
    slim_step: float = option(
        0.02,
        "least gain of a step of --search slimming, as a share of the largest network; 0: each next smaller choice",
        metavar="SHARE",
        range=SHARE,
    )
    together: int = option(1, "best steps of --search slimming that are taken at once", metavar="N", range=COUNT)
    mask_epochs: int = option(8, "epochs that --search slim-masks trains the model and its masks", range=COUNT)
    mask_attention: str = option(
        "entries",
        "masks of attention: on entries of each head, on heads, or on entries alike in all heads",
        choices=("entries", "heads", "uniform"),
    )
    mask_prices: list[float] | None = option(
        None, "of attention and MLP masks (default: the paper's 2e-4 5e-5)", metavar="X", range=NOT_NEGATIVE
    )
    mask_tokens: float | None = option(
        None,
        "also mask tokens, and keep this share of their masks; more tokens stay, for what a later block uses is kept "
        "before it",
        metavar="SHARE",
        range="(0, 1]",
    )
    mask_lr: float | None = option(
        None,
        "learning rate of masks (default: above --lr where steps are few, so that masks can go as far as in the paper)",
        metavar="X",
        range=POSITIVE,
    )
    population: int | None = option(
        None, "random candidates of generation 1 (paper: 500; default: 100, with --model 60)", metavar="N", range=COUNT
    )
    iterations: int | None = option(
        None, "generations, the first one included (paper: 20; default: 6, with --model 4)", metavar="N", range=COUNT
    )
    parents: int = option(25, "best candidates that the next are made of (paper: 75)", range=COUNT)
    mutations: int = option(20, "mutated candidates per generation (paper: 75)", range=NOT_NEGATIVE)
    crossovers: int = option(20, "crossed candidates per generation (paper: 75)", range=NOT_NEGATIVE)
    mutation_prob: float | None = option(
        None,
        "probability of each gene to mutate (default: the paper's 0.3, with --model 0.1, for pareto two genes)",
        range="(0, 1]",
    )
    prescreen: float = option(
        0.0,
        "score on this share of the images first, on the rest only what may still become a parent; 0: off",
        metavar="SHARE",
        range="[0, 1)",
    )
    channels_last: bool = option(False, "memory format of the convolutions while scoring", free=True)
    num_random: int = option(20, "random networks of the budget to compare with", range=NOT_NEGATIVE)
    num_any_cost: int = option(40, "random networks of any cost, for the front", range=NOT_NEGATIVE)


@dataclass(frozen=True)
class ModelOptions:
    """model"""

    model: str | None = option(
        None,
        "a name that timm.create_model knows, a folder that a recipe or timm saved (or local-dir:<folder>), or "
        "hf-hub:<id>",
        basic=True,
    )
    model_kwargs: list[str] = option([], "arguments of the model, such as in_chans=1", metavar="NAME=VALUE", nargs="*")
    pretrained_path: str | None = option(None, "weights from this file, as if they were its own", metavar="FILE")
    allow_pickle: bool = option(False, "read a folder's or repository's pickled weights (weights_only)", free=True)
    img_size: list[int] | None = option(
        None, "side, or height and width (default: the model's)", metavar="N", range=COUNT, basic=True
    )
    crop_pct: float | None = option(None, "centre crop, as a share of the resized image", metavar="X", range="(0, 1]")
    crop_mode: str | None = option(None, "how an image becomes that crop", choices=("center", "squash", "border"))
    interpolation: str | None = option(None, "of resizing", choices=("bilinear", "bicubic", "nearest"))


@dataclass(frozen=True)
class TeacherOptions:
    """teacher"""

    teacher: str | None = option(
        None, "a model with weights: a name, a folder or hf-hub:<id>", metavar="MODEL", basic=True
    )
    teacher_path: str | None = option(None, "the teacher's weights, where its name has none", metavar="FILE")
    distill: str = option(
        "soft-label",
        "the teacher's probabilities alone (SReT), its decisions beside labels (CaiT), its probabilities beside "
        "labels (timm), or a distillation token (DeiT)",
        choices=("soft-label", "hard", "logit", "token"),
    )
    distill_type: str = option("hard", "of --distill token", choices=("hard", "soft"))
    distill_weight: float = option(0.5, "the teacher's; labels: the rest", metavar="X", range=SHARE)
    temperature: float = option(1.0, "divides logits in distillation", metavar="T", range=POSITIVE)


@dataclass(frozen=True)
class ReduceOptions:
    """fewer tokens"""

    reduce_tokens: str | None = option(
        None,
        "drop or merge tokens of a timm ViT: DynamicViT's predictors, with its losses (from trained weights); ATS; "
        "PatchMerger",
        choices=("dynamicvit", "ats", "patchmerger"),
        basic=True,
    )
    reduce_kwargs: list[str] = option(
        [],
        "options of the method: locations=[3,6,9] keep_ratios=0.7, max_tokens=98, …",
        metavar="NAME=VALUE",
        nargs="*",
    )
    ratio_weight: float = option(2.0, "DynamicViT: of the shares that are kept", metavar="X", range=NOT_NEGATIVE)
    backbone_lr: float = option(0.01, "DynamicViT: learning rate of all but the predictors, a share", range=SHARE)
    freeze_epochs: int = option(
        5, "DynamicViT: epochs in which only predictors are trained", metavar="N", range=NOT_NEGATIVE
    )


@dataclass(frozen=True)
class MixOptions:
    """mixing"""

    mix: str = option(
        "none",
        "timm's Mixup and CutMix, or CutMix on the token grid and Mixup with a label for every token",
        choices=("none", "mixup", "token"),
    )
    mixup_alpha: float = option(0.8, "of Mixup's Beta distribution", metavar="X", range=NOT_NEGATIVE)
    cutmix_alpha: float = option(1.0, "of CutMix's (--mix mixup)", metavar="X", range=NOT_NEGATIVE)
    mix_prob: float = option(1.0, "of mixing a batch (--mix mixup)", metavar="P", range=SHARE)
    mix_switch_prob: float = option(0.5, "of CutMix (--mix mixup)", metavar="P", range=SHARE)
    mix_off_epochs: int = option(0, "do not mix in the last N epochs", metavar="N", range=NOT_NEGATIVE)
    patch_weight: float = option(1.0, "of the token loss (--mix token)", metavar="X", range=NOT_NEGATIVE)
    fix_edges: bool = option(False, "let boxes touch all edges alike (--mix token)")
    smoothing: float = option(0.1, "label smoothing", metavar="X", range="[0, 1)")


@dataclass(frozen=True)
class TrainOptions(
    CheckpointOptions, TeacherOptions, ReduceOptions, MixOptions, AugmentOptions, DataOptions, ModelOptions, RunOptions
):
    """training"""

    pretrained: bool = option(False, "start from the model's weights: its folder's, the Hub's", basic=True)
    drop_path: float | None = option(None, "stochastic depth rate", metavar="P", range="[0, 1)")
    grad_checkpointing: bool = option(False, "compute activations twice, to save memory")
    val_per_class: int = option(
        25,
        "images of each class, cut from the training part, that weights are chosen on; 0: take the last epoch's",
        metavar="N",
        range=NOT_NEGATIVE,
    )
    val_fraction: float = option(0.1, "the same for classes of under 5 times as many images", range="(0, 1)")
    streaming: bool = option(
        False,
        "read the training part of hf:<id> while it is trained on, without storing it (with --val-per-class 0)",
    )
    num_train: int | None = option(None, "images of a stream that does not say how many", metavar="N", range=COUNT)
    stream_shards: int | None = option(
        None, "files of a stream that are read side by side; a multiple of processes", metavar="N", range=COUNT
    )
    mean: list[float] | None = option(None, "of pixels (default: the model's or data's)", metavar="X", range=SHARE)
    std: list[float] | None = option(None, "of pixels (default: the model's or data's)", metavar="X", range="(0, 10]")
    multi_scale: list[int] | None = option(
        None,
        "sides of training images, one drawn for each step; larger ones in smaller batches",
        metavar="N",
        nargs="*",
        range=COUNT,
    )
    epochs: int = option(30, "training epochs", range=COUNT, basic=True)
    batch_size: int = option(64, "images per step, over all processes and passes", range=COUNT, basic=True)
    accumulate: int = option(1, "passes that a process cuts its part of a step into", metavar="N", range=COUNT)
    recursions: list[int] | None = option(
        None, "recursion depths to train at once (SReT only)", metavar="R", nargs="*", range=COUNT
    )
    opt: str = option("adamw", "timm's name of an optimizer")
    opt_kwargs: list[str] = option([], "its further arguments", metavar="NAME=VALUE", nargs="*")
    momentum: float = option(0.9, "where the optimizer has it", range="[0, 1)")
    weight_decay: float = option(0.05, "not on biases, norms, tokens, positions", range=NOT_NEGATIVE)
    decay_pos_embed: bool = option(False, "weight decay on position embeddings as well")
    layer_decay: float | None = option(
        None, "learning rate of a layer, by that of the next", metavar="X", range="(0, 1]"
    )
    lr: float | None = option(None, "highest learning rate (default: by --lr-base)", range=POSITIVE, basic=True)
    lr_base: float = option(5e-4, "highest learning rate at --lr-base-size; it is linear in the batch", range=POSITIVE)
    lr_base_size: int = option(512, "batch size that --lr-base is for", metavar="N", range=COUNT)
    sched: str = option(
        "cosine",
        "timm's schedule of the learning rate",
        choices=("cosine", "tanh", "poly", "step", "multistep", "wsd", "constant"),
    )
    min_lr: float = option(1e-5, "learning rate at its end; not scaled by batch size", range=NOT_NEGATIVE)
    warmup_epochs: float = option(1, "epochs of linear warm-up, a part of --epochs", range=NOT_NEGATIVE)
    warmup_lr: float = option(1e-6, "learning rate that it starts from; not scaled", range=NOT_NEGATIVE)
    clip_grad: float | None = option(
        None, "largest gradient, as --clip-mode measures it; 0: any", metavar="X", range=NOT_NEGATIVE
    )
    clip_mode: str = option("norm", "of gradient clipping", choices=("norm", "value", "agc"))
    ema: bool = option(False, "average the weights over steps, and evaluate these as well")
    ema_decay: float = option(0.9998, "share of the old average per step", metavar="X", range="[0, 1)")
    ema_warmup: bool = option(False, "average over fewer steps at first")
    sync_bn: bool = option(False, "batch norm over all processes (CUDA only)")
    eval_every: int = option(1, "how often to validate", metavar="EPOCHS", range=COUNT)
    keep: int = option(1, "how many of the best weights to keep in kept/", metavar="N", range=COUNT, free=True)


@dataclass(frozen=True)
class EvaluateOptions(DataOptions, ModelOptions, ProcessOptions):
    """evaluation"""

    split: str | None = option(
        None, "test, train or another part (default: the test part; a data set without parts whole)", basic=True
    )
    batch_size: int = option(256, "images per batch of a process", range=COUNT, basic=True)
    valid_labels: str | None = option(None, "the model's class numbers that the data has", metavar="FILE_OR_NAME")
    real_labels: str | None = option(
        None, "ImageNet's reassessed labels (timm's, or JSON)", metavar="FILE", nargs="?", const="timm"
    )
    json: str | None = option(None, "write the scores there; - prints nothing else", metavar="FILE", basic=True)


@dataclass(frozen=True)
class ExportOptions(DataOptions, ModelOptions):
    """export"""

    config: str | None = option(None, "a file of defaults; flags override them", metavar="FILE.yaml", basic=True)
    model: str = option(
        None,
        "a folder that a recipe or timm saved, hf-hub:<id>, or a name that timm.create_model knows",
        positional=True,
    )
    pretrained: bool = option(True, "with the model's weights; without, random ones", basic=True)
    output: str | None = option(
        None, "folder of the files (default: export/ in the model's, or runs/<name>-export)", metavar="DIR", basic=True
    )
    dataset: str | None = option(
        None, f"images to compare on and to score: {DATASETS} (default: noise, no accuracy)", basic=True
    )
    split: str | None = option(None, "test, train or another part (default: as evaluate.py)", basic=True)
    max_images: int | None = option(
        None, "score on this many images, evenly spaced (default: all)", metavar="N", range=COUNT, basic=True
    )
    uint8: bool = option(False, "take pixels as bytes: normalising is a part of what is exported", basic=True)
    int8: str = option("no", "also a quantised ONNX file", choices=("no", "dynamic"), basic=True)
    torch_export: bool = option(True, "also a program of torch.export (.pt2)", basic=True)
    update_card: bool = option(False, "write the numbers into the model's card", basic=True)
    batch_size: int = option(32, "images of a batch, for throughput and the second comparison", range=COUNT, basic=True)
    threads: int = option(0, "CPU threads, 0: torch's default", range="[0, 1024]", basic=True)
    rounds: int = option(15, "times that each runtime is measured, in turns", range=COUNT)
    min_run_time: float = option(0.1, "seconds of each, but at least three repeats", range=POSITIVE)


@dataclass(frozen=True)
class LatencyOptions:
    """latency"""

    config: str | None = option(None, "a file of defaults; flags override them", metavar="FILE.yaml", basic=True)
    output: str = option("latency.json", "the table", metavar="FILE", basic=True)
    space: str = option("micro", "search space: a preset's name, or a .json file of one", basic=True)
    supernet: str | None = option(
        None, "take the space of a supernet: its folder, or hf-hub:…", metavar="WHERE", basic=True
    )
    img_size: list[int] | None = option(
        None, "side, or height and width (default: the space's)", metavar="N", range=COUNT, basic=True
    )
    in_chans: int | None = option(None, "channels of an image (default: the space's)", metavar="N", range=COUNT)
    num_classes: int | None = option(None, "classes (default: the space's)", metavar="N", range=NOT_NEGATIVE)
    device: str = option("cpu", "where to measure", choices=("cpu", "cuda"), basic=True)
    threads: int = option(1, "CPU threads, 0: torch's default", range="[0, 1024]", basic=True)
    batch_size: int = option(32, "images per forward", range=COUNT, basic=True)
    precision: str = option("float32", "of weights, or autocast (amp)", choices=PRECISIONS, basic=True)
    runtime: str = option(
        "torch", "what runs the networks; onnxruntime: their ONNX graphs, on the cpu", choices=RUNTIMES, basic=True
    )
    rounds: int = option(10, "times that each network is measured", range=COUNT)
    min_run_time: float = option(0.1, "seconds of each, but at least three repeats", range=POSITIVE)
    calibration: int = option(8, "networks that the table's line is fitted on", range=COUNT)
    verify: int = option(30, "networks to compare with the prediction; 0: none", range=NOT_NEGATIVE)
    seed: int = option(0, "decides the random networks", range=NOT_NEGATIVE)


@dataclass(frozen=True)
class PublishOptions:
    """publishing"""

    run: str = option(None, "folder of a finished run, or of a model", positional=True)
    repo: str | None = option(None, "repository; made if need be", metavar="OWNER/NAME", basic=True)
    revision: str | None = option(None, "branch of the repository (default: main)", metavar="BRANCH", basic=True)
    front: str = option("no", "publish pareto/, and how", choices=("no", "revisions", "repositories"), basic=True)
    supernet: bool = option(False, "publish supernet/ as OWNER/NAME-supernet", basic=True)
    private: bool = option(False, "make private repositories", basic=True)
    pull_request: bool = option(False, "open a pull request instead of committing")
    tag: str | None = option(None, "git tag for the commits")
    tags: list[str] = option([], "tags of the model card", metavar="TAG", nargs="*")
    license: str | None = option(
        None, "licence of the weights, as the Hub knows it: apache-2.0, …", metavar="ID", basic=True
    )
    text: str | None = option(None, "a paragraph of yours for the card", basic=True)
    token: str | None = option(None, "access token (default: that of `hf auth login` or HF_TOKEN)")
    overwrite: bool = option(False, "commit to a repository that holds something else", basic=True)
    dry_run: bool = option(False, "send nothing, print what would be sent", basic=True)


CHECKPOINT_WRAPPERS = ("model_ema", "state_dict_ema", "model", "state_dict")


@dataclass(frozen=True)
class ConvertOptions:
    """conversion"""

    checkpoint: str = option(None, "the authors' file", positional=True)
    model: str | None = option(None, "architecture, as timm names it", metavar="NAME", basic=True)
    model_args: str = option("{}", "arguments of the architecture", metavar="JSON", basic=True)
    license: str | None = option(None, "licence of the weights: cc-by-nc-4.0, mit, …", metavar="ID", basic=True)
    source: str | None = option(None, "where the file is from", metavar="URL", basic=True)
    output: str | None = option(None, "folder (default: beside the file, by its name)", metavar="DIR", basic=True)
    weights: str | None = option(
        None, "which weights of the file (default: averaged, if any)", choices=CHECKPOINT_WRAPPERS, basic=True
    )
    reference: str | None = option(None, "input and logits from the authors' code", metavar="FILE", basic=True)
