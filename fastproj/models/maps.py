"""The feature maps of an encoder, stage by stage: what detection and segmentation see of it."""

import math
from collections import OrderedDict

import torch
from torch import Tensor, nn
from torchvision.models.resnet import ResNet

from fastproj.core.errors import InputError
from fastproj.models.encoders import Encoder
from fastproj.models.frozen import frozen

STAGES = ("layer1", "layer2", "layer3", "layer4")  # a ResNet's
SIDE = 128  # pixels, of the image that is tried


class FeatureMaps(nn.Module):
    """Images (B, 3, h, w) -> {"0": (B, c, h/stride, w/stride), "1": …}, from fine to coarse.

    (Our CIFAR stem pads by 2: its maps are a cell larger.)

    ``encoder`` is taken over: its modules stay the same objects, and those behind the last map are
    dropped. Its maps are those of its own forward pass:

    - a ResNet's (ours, torchvision's, timm's): ``layer1`` to ``layer4``;
    - timm's other models: what ``features_only`` gives, the last map of each stride, four at most.
      A ViT has one map, of its last block; one built for a fixed size is built again, so that it
      takes any (``dynamic_img_size``);
    - torchvision's convolutional models: the last map of each stride of their ``features``.

    ``until``: the stage of a ResNet that is the last one, ``layer3`` for example; ``rest`` is then
    the one behind it. ``channels`` and ``strides``: of each map. Raises ``InputError`` for any
    other encoder.
    """

    def __init__(self, encoder: nn.Module, until: str | None = None) -> None:
        super().__init__()
        self._rest: tuple[nn.Module, ...] = ()  # not a part: whoever takes it has its weights
        self.body: nn.Module
        self.channels, self.strides = list[int](), list[int]()
        self.kind, self.indices = "children", list[int]()
        if all(hasattr(encoder, stage) for stage in STAGES):
            self._take_resnet(encoder, until or STAGES[-1])
        elif until is not None:
            raise InputError(
                f"{type(encoder).__name__} is no ResNet, whose last stage is the head of a C4 "
                "detector: give --detector.head fpn"
            )
        elif hasattr(encoder, "forward_intermediates"):
            self._take_timm(encoder)
        elif isinstance(features := getattr(encoder, "features", None), nn.Sequential):
            self._take_features(features)
        else:
            raise InputError(
                f"{type(encoder).__name__} gives no feature maps: it has neither a ResNet's "
                "layer1 to layer4, nor timm's forward_intermediates, nor torchvision's features; "
                "torchvision's ViTs are in timm too (timm:vit_base_patch16_224)"
            )

    @property
    def rest(self) -> nn.Module | None:
        """The stage behind the last map, where ``until`` left one."""
        return self._rest[0] if self._rest else None

    def forward(self, images: Tensor) -> "OrderedDict[str, Tensor]":
        return OrderedDict((str(i), found) for i, found in enumerate(self._maps(images)))

    def _maps(self, images: Tensor) -> list[Tensor]:
        if self.kind == "timm":
            return self.body.forward_intermediates(  # type: ignore[operator]
                images, indices=self.indices, intermediates_only=True
            )
        found = []
        for number, layer in enumerate(self.body.children()):
            images = layer(images)
            if number in self.indices:
                found.append(images)
        return found

    def _take_resnet(self, encoder: nn.Module, until: str) -> None:
        stages = STAGES[: STAGES.index(until) + 1]
        layers = OrderedDict[str, nn.Module]()
        for name, child in encoder.named_children():
            layers[name] = child
            if name == until:
                break
        self.body = nn.Sequential(layers)
        self.indices = [list(layers).index(stage) for stage in stages]
        if until != STAGES[-1]:
            self._rest = (getattr(encoder, STAGES[len(stages)]),)
        self._measure(SIDE)
        if not isinstance(encoder, Encoder | ResNet):  # another forward pass may do more
            self._compare(encoder, stages)

    def _take_timm(self, model: nn.Module) -> None:
        if getattr(model, "dynamic_img_size", None) is False and hasattr(model, "pos_embed"):
            model = _of_any_size(model)
        info = [(stage["num_chs"], stage["reduction"]) for stage in model.feature_info]  # type: ignore[union-attr]
        last = {stride: index for index, (_, stride) in enumerate(info)}
        self.indices = sorted(last.values())[-4:]
        self.kind, self.body = "timm", model
        model.prune_intermediate_layers(self.indices, prune_norm=True)  # type: ignore[operator]
        self._measure(4 * math.lcm(*(info[index][1] for index in self.indices)))

    def _take_features(self, features: nn.Sequential) -> None:
        self.body = features
        self.indices = list(range(len(features)))
        self._measure(SIDE)
        last = {stride: index for index, stride in enumerate(self.strides)}
        self.indices = sorted(last.values())[-4:]
        self.channels = [self.channels[index] for index in self.indices]
        self.strides = [self.strides[index] for index in self.indices]

    @torch.no_grad()
    def _measure(self, side: int) -> None:
        """Channels and strides, of an image of ``side`` pixels."""
        try:
            with frozen(self):
                maps = self._maps(torch.zeros(1, 3, side, side))
        except Exception as error:  # of another library: whatever it raises
            reason = " ".join(str(error).split()) or type(error).__name__
            raise InputError(
                f"the encoder does not take images of any size, as detection needs ({reason}): "
                "give a convolutional one, or a ViT"
            ) from error
        for found in maps:
            if found.ndim != 4 or found.shape[2] != found.shape[3]:
                raise InputError(
                    f"a map of an image of {side} pixels is {tuple(found.shape)}, not "
                    "(1, c, h, h): this encoder cannot be a detector's trunk"
                )
        self.channels = [found.shape[1] for found in maps]
        self.strides = [round(side / found.shape[2]) for found in maps]

    @torch.no_grad()
    def _compare(self, encoder: nn.Module, stages: tuple[str, ...]) -> None:
        """Raises ``InputError`` where the encoder's own forward pass gives other maps."""
        own: list[Tensor] = []
        hooks = [
            getattr(encoder, stage).register_forward_hook(lambda *call: own.append(call[2]))
            for stage in stages
        ]
        images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
        with frozen(encoder):
            encoder(images)
            for hook in hooks:
                hook.remove()
            ours = self._maps(images)
        if not all(torch.allclose(a, b, atol=1e-5) for a, b in zip(own, ours, strict=True)):
            raise InputError(
                f"{type(encoder).__name__} has layer1 to layer4 and does more than run its parts "
                "in their order: it cannot be a detector's trunk"
            )


def _of_any_size(model: nn.Module) -> nn.Module:
    """timm's model ``model`` again, with the very same weights, for images of any size.

    Raises ``InputError`` for one that timm does not build by its name alone.
    """
    import timm

    try:
        name = str(model.pretrained_cfg["architecture"])  # type: ignore[index]
        size = model.patch_embed.img_size  # type: ignore[union-attr]
        again = timm.create_model(name, num_classes=0, img_size=size, dynamic_img_size=True)
        again.load_state_dict(model.state_dict(), assign=True)
    except Exception as error:  # other arguments than the name's: no such name, other weights
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"{type(model).__name__} takes images of one size, and timm cannot build it again for "
            f"any by its name ({reason}): build it with dynamic_img_size=True"
        ) from error
    return again
