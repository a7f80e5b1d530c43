"""Feature maps under torchvision's detector with a feature pyramid and its segmentation head: a training step each."""

import pytest
import timm
import torch
from torch import nn
from torchvision.models.detection import RetinaNet
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.segmentation.fcn import FCN, FCNHead
from torchvision.ops import FeaturePyramidNetwork

import timm_resnas  # noqa: F401  (registers the models)

WIDTHS = [[1, 96], [2, 64], [0, 128], [2, 0], [1, 40], [2, 33]]
# a model, arguments with which it takes images of any size, what divides their sides, taps
MODELS = {
    "vit_resnas": (dict(dynamic_img_size=True), 56, (0, 1, 2)),
    "vit_elastic": (dict(base="test_vit", widths=WIDTHS, dynamic_img_size=True), 16, (1, 3, 5)),
    "sret_tiny": (dict(), 32, (0, 1, 2)),
    "exmobilevit_576": (dict(), 32, (2, 3, 4)),
}
every_model = pytest.mark.parametrize("name", MODELS)


class Maps(nn.Module):
    """A backbone of timm as torchvision's heads take one: a feature pyramid's maps, or the last map alone."""

    def __init__(self, name: str, pyramid: int | None = None):
        super().__init__()
        kwargs, self.stride, taps = MODELS[name]
        self.body = timm.create_model(name, features_only=True, out_indices=taps, **kwargs)
        channels = self.body.feature_info.channels()
        self.fpn = None if pyramid is None else FeaturePyramidNetwork(channels, pyramid)
        self.out_channels = pyramid or channels[-1]

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        maps = self.body(x)
        return {"out": maps[-1]} if self.fpn is None else self.fpn({str(i): y for i, y in enumerate(maps)})


def train_a_step(model: nn.Module, loss) -> tuple[float, float]:
    """Losses before and after one step of gradient descent; every parameter of the backbone has to take part."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    before = loss()
    before.backward()
    unused = [n for n, p in model.backbone.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert unused == []
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    with torch.no_grad():
        return before.item(), loss().item()


@every_model
def test_detector_with_feature_pyramid(name):
    """Of two images of different sizes, padded to what the model's stride divides."""
    torch.manual_seed(0)
    backbone = Maps(name, pyramid=16)
    anchors = AnchorGenerator(sizes=((16,), (32,), (64,)), aspect_ratios=((1.0,),) * 3)
    model = RetinaNet(backbone, num_classes=2, anchor_generator=anchors, min_size=96, max_size=160)
    model.transform.size_divisible = backbone.stride
    images = [torch.rand(3, 90, 140), torch.rand(3, 120, 100)]
    boxes = [torch.tensor([[10.0, 20, 60, 70], [70, 10, 130, 80]]), torch.tensor([[5.0, 5, 50, 40]])]
    targets = [dict(boxes=b, labels=torch.ones(len(b), dtype=torch.long)) for b in boxes]
    before, after = train_a_step(model.train(), lambda: sum(model(images, targets).values()))
    assert after < before
    with torch.no_grad():
        found = model.eval()(images)
    assert len(found) == 2 and all(len(f["boxes"]) == len(f["scores"]) for f in found)


@every_model
def test_segmentation_head(name):
    """Of images that are not square."""
    torch.manual_seed(0)
    backbone = Maps(name)
    model = FCN(backbone, FCNHead(backbone.out_channels, 3)).train()
    side = 112 if backbone.stride == 56 else 64
    images, labels = torch.rand(2, 3, side, 2 * side), torch.randint(0, 3, (2, side, 2 * side))

    def loss():
        return nn.functional.cross_entropy(model(images)["out"], labels)

    before, after = train_a_step(model, loss)
    assert after < before
    assert model(images)["out"].shape == (2, 3, side, 2 * side)
