"""A searchable family in one file: a plain ViT of one width, with heads and hidden units per block, blocks removable.

It stands in tests to show that nothing else has to know a family; see test_second_family.py.
"""

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
from timm.layers import Attention, Mlp
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

from timm_resnas.arch import Arch, ArchError, Layer, attention, mlp
from timm_resnas.nas.packs import Pack, pre_norm_block, pre_norm_block_one
from timm_resnas.nas.space import Gene, Position, SearchSpace
from timm_resnas.nas.supernet import Supernet
from timm_resnas.nas.units import pre_norm_units

DIM, HEAD_DIM, DEPTH, PATCH = 32, 8, 4, 8


@dataclass(frozen=True)
class Block:
    num_heads: int
    mlp_hidden: int
    exists: bool = True
    dim: ClassVar[int] = DIM

    @property
    def attn_dim(self) -> int:
        return self.num_heads * HEAD_DIM


def ends(tokens: int, in_chans: int, num_classes: int) -> tuple[Layer, Layer]:
    work = DIM * in_chans * PATCH**2
    stem = Layer.of(
        "stem", tokens=tokens, in_chans=in_chans, macs=work * (tokens - 1), params=work + DIM * (tokens + 2)
    )
    head = Layer.of("head", num_classes=num_classes, macs=DIM * num_classes, params=(DIM + 1) * num_classes + 2 * DIM)
    return stem, head


@dataclass(frozen=True)
class PlainVitArch(Arch):
    model: ClassVar[str] = "plain_vit"
    blocks: tuple[Block, ...]

    def args(self):
        return {"widths": [[b.num_heads, b.mlp_hidden] if b.exists else [0, 0] for b in self.blocks]}

    @classmethod
    def from_args(cls, args):
        widths = args.get("widths")
        if not isinstance(widths, list | tuple) or not all(len(w) == 2 for w in widths):
            raise ArchError(f"widths must be pairs of num_heads and mlp_hidden, got {widths!r:.60}")
        return cls(tuple(Block(h, f) if h else Block(DIM // HEAD_DIM, 4 * DIM, False) for h, f in widths))

    def layers(self, img_size=32, in_chans=3, num_classes=10, **_):
        tokens = np.prod(np.array(img_size) // PATCH).item() ** (1 if isinstance(img_size, tuple | list) else 2) + 1
        stem, head = ends(tokens, in_chans, num_classes)
        pairs = [
            (attention(tokens, DIM, b.num_heads, HEAD_DIM), mlp(tokens, DIM, b.mlp_hidden))
            for b in self.blocks
            if b.exists
        ]
        return (stem, *(layer for pair in pairs for layer in pair), head)

    def canonical(self):
        return replace(self, blocks=tuple(b for b in self.blocks if b.exists))


class PlainVitSpace(SearchSpace):
    family, arch_type, supernet = "plain_vit", PlainVitArch, "plain_vit_supernet"

    def __init__(self, heads=(4, 3, 2, 1), hidden=(128, 96, 64, 32), **model_args):
        self.choices = {"heads": list(heads), "hidden": list(hidden)}
        model_args = {"img_size": (32, 32), "in_chans": 3, "num_classes": 10, **model_args}
        tokens = np.prod(np.array(model_args["img_size"]) // PATCH).item() + 1
        stem, head = ends(tokens, model_args["in_chans"], model_args["num_classes"])
        genes, positions = [], [Position((), lambda: stem), Position((), lambda: head)]
        for b in range(DEPTH):
            exists = 3 * b + 2
            genes += [
                Gene(n, c, presence=exists, stage=b)
                for n, c in (("num_heads", tuple(heads)), ("mlp_hidden", tuple(hidden)))
            ]
            genes.append(Gene("exists", (True, False)[: 1 + b % 2], kind="presence"))
            positions.append(Position((3 * b, exists), lambda h, e: attention(tokens, DIM, h, HEAD_DIM) if e else None))
            positions.append(Position((3 * b + 1, exists), lambda f, e: mlp(tokens, DIM, f) if e else None))
        super().__init__(genes, positions, model_args)

    def choices_dict(self):
        return self.choices

    @classmethod
    def from_choices(cls, data, model_args):
        return cls(**data, **model_args)

    def decode(self, rows):
        values = [[gene.choices[i] for gene, i in zip(self.genes, row, strict=True)] for row in rows]
        return [PlainVitArch(tuple(Block(*v[i : i + 3]) for i in range(0, len(v), 3))) for v in values]

    def encode(self, arch):
        values = [
            v for b in arch.blocks for v in ((b.num_heads, b.mlp_hidden, b.exists) if b.exists else (None, None, False))
        ]
        if len(values) != len(self.genes):
            raise ValueError(f"the space's networks have {DEPTH} blocks, this one {len(arch.blocks)}")
        return np.array(
            [0 if v is None else g.choices.index(v) for g, v in zip(self.genes, values, strict=True)], np.int8
        )


PlainVitSpace.presets = {"plain_vit": PlainVitSpace}


class PlainVit(VisionTransformer):
    def __init__(self, widths, **kwargs):
        super().__init__(patch_size=PATCH, embed_dim=DIM, depth=len(widths), num_heads=DIM // HEAD_DIM, **kwargs)
        for block, (heads, hidden) in zip(self.blocks, widths, strict=True):
            block.attn = Attention(DIM, heads, attn_head_dim=HEAD_DIM, qkv_bias=True)
            block.mlp = Mlp(DIM, hidden)


class PlainVitSupernet(Supernet, PlainVit):
    def __init__(self, space="plain_vit", **kwargs):
        space = SearchSpace.create(space)
        super().__init__(**space.largest.args(), **{**space.model_args, **kwargs})
        self.set_space(space)

    def check_fit(self, arch):
        if len(arch.blocks) != DEPTH or any(b.num_heads > 4 or b.mlp_hidden > 128 for b in arch.blocks):
            raise ArchError("it does not fit")

    def shared(self, x):
        return self.norm_pre(self._pos_embed(self.patch_embed(x)))

    def forward_groups(self, h, archs, mode):
        packs = [Pack(tuple(range(len(archs))), h)]
        for i, block in enumerate(self.blocks):
            packs = pre_norm_block(block, packs, [arch.blocks[i] for arch in archs])
        return self.forward_head(self.norm(packs[0].x))

    def forward_one(self, h, arch):
        for block, widths in zip(self.blocks, arch.blocks, strict=True):
            h = pre_norm_block_one(block, h, widths) if widths.exists else h
        return self.forward_head(self.norm(h))

    def units(self):
        return tuple(unit for i, block in enumerate(self.blocks) for unit in pre_norm_units(f"blocks.{i}", block))

    def own_key(self, arch, key):
        present = [i for i, b in enumerate(arch.blocks) if b.exists]
        head, _, rest = key.removeprefix("blocks.").partition(".")
        return f"blocks.{present[int(head)]}.{rest}" if key.startswith("blocks.") else key

    def stand_alone(self, arch):
        return arch.canonical(), {k: self.space.model_args[k] for k in ("img_size", "in_chans", "num_classes")}


cfg = dict(input_size=(3, 32, 32), num_classes=10, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0, fixed_input_size=True)
cfg.update(first_conv="patch_embed.proj", classifier="head", pool_size=None, interpolation="bicubic")
default_cfgs = generate_default_cfgs({"plain_vit": dict(cfg), "plain_vit_supernet": dict(cfg)})


@register_model
def plain_vit(pretrained=False, **kwargs):
    kwargs.setdefault("widths", [[4, 128]] * DEPTH)
    return build_model_with_cfg(PlainVit, "plain_vit", pretrained, **kwargs)


@register_model
def plain_vit_supernet(pretrained=False, **kwargs):
    return build_model_with_cfg(PlainVitSupernet, "plain_vit_supernet", pretrained, **kwargs)
