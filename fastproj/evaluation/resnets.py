"""ResNets that show in their weights: torchvision's and lightly's need no name."""

from torch import nn
from torchvision.models.resnet import BasicBlock, Bottleneck, ResNet

from fastproj.evaluation.weights import Group
from fastproj.models.architectures import Architecture
from fastproj.models.encoders import from_torchvision


def is_resnet(group: Group) -> bool:
    """Whether ``group`` has the names of torchvision's or lightly's ResNet, 64 channels wide."""
    conv = group.tensors.get("conv1.weight")
    return conv is not None and conv.shape[:2] == (64, 3) and all(_blocks(group))


def of_resnet(group: Group) -> Architecture:
    """The ResNet that ``group`` has the weights of.

    A 3×3 ``conv1`` means the CIFAR stem. Its padding does not show in the weights: it is 1 where
    the names are those of lightly's own ResNet, and otherwise 2, as in solo-learn. The stem says
    what size its images have: 32 or 224 pixels.
    """
    tensors, blocks = group.tensors, _blocks(group)
    bottleneck = "layer1.0.conv3.weight" in tensors
    stem = "cifar" if tensors["conv1.weight"].shape[-1] == 3 else "imagenet"
    padding = 1 if group.lightly else 2
    resnet = ResNet(Bottleneck if bottleneck else BasicBlock, blocks)
    encoder = from_torchvision(resnet, stem, padding)
    if group.layout.startswith("lightly's"):
        encoder.relu = nn.Identity()  # a function in lightly's forward, lost among the children
    depth = 2 + sum(blocks) * (3 if bottleneck else 2)
    about = {"name": f"ResNet-{depth}", "stem": stem}
    if stem == "cifar":
        return Architecture(encoder, about | {"padding": padding}, size=32)
    return Architecture(encoder, about, size=224)


def _blocks(group: Group) -> list[int]:
    """Blocks of the four stages."""
    return [
        len({name.split(".")[1] for name in group.tensors if name.startswith(f"layer{stage}.")})
        for stage in range(1, 5)
    ]
