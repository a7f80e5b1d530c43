"""Models in timm's own format: save them, publish them on the Hugging Face Hub, load them back.

A model's folder or repository holds

    config.json                as timm writes it; what is ours stands in the block ``timm_resnas``, which timm ignores
    model.safetensors          the weights
    test_tensors.safetensors   an input and the logits that belong to it
    README.md                  in a repository: the model card
    export/                    where recipes/export.py made them: ONNX files, and how they compare with PyTorch
"""

from .card import escape_markdown, note_exports
from .checks import CONFIG, EXPORTS, GOLDEN, WEIGHTS
from .errors import HubError
from .load import fetch, load, read_file
from .push import EVIDENCE, PushResult, push, strip_paths
from .save import save_pretrained
from .weights import check_golden, check_tensors, filter_fn_of, sha256_of

__all__ = [
    "CONFIG",
    "EVIDENCE",
    "EXPORTS",
    "GOLDEN",
    "WEIGHTS",
    "HubError",
    "PushResult",
    "check_golden",
    "check_tensors",
    "escape_markdown",
    "fetch",
    "filter_fn_of",
    "load",
    "note_exports",
    "push",
    "read_file",
    "save_pretrained",
    "sha256_of",
    "strip_paths",
]
