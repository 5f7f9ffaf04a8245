"""The model card of an exported encoder: Markdown with YAML front matter, as Hugging Face has it.

A card is published: it names files, not the folders of the machine that made them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import Tensor, nn
from torchvision import models

from fastproj.evaluation.onnx import OPSET, TOLERANCE
from fastproj.evaluation.pretrained import Pretrained
from fastproj.evaluation.results import Row

LICENSE = "unknown"  # Hugging Face's word for it
# What of a run's settings says nothing about the weights.
LEFT_OUT = ("run.name", "run.dir", "run.device", "run.resume", "data.", "train.", "eval.")
STEMS = {
    "imagenet": "torchvision's own stem",
    "cifar": "the CIFAR stem: a 3×3 convolution with stride 1 and padding {}, no max-pooling",
}


@dataclass(frozen=True)
class Facts:
    """What a card says beside the encoder itself.

    ``name``: of the model. ``size``: side of the training crops, pixels. ``num_features``: width of
    the features. ``settings``: the run's, ``section.name`` -> value. ``recipe``: its name, if any.
    ``data``: name of the training set, and its number of images where that is known. ``rows``: the
    scores of these very weights. ``onnx``: the largest difference that ``save_onnx`` found; None
    where there is no ONNX file. ``environment``: that of the training; ``versions``: those that
    wrote the export.
    """

    name: str
    size: int
    num_features: int
    settings: Mapping[str, Any]
    recipe: str | None
    data: str
    images: int | None
    rows: Sequence[Row]
    onnx: float | None
    environment: Mapping[str, Any]
    versions: Mapping[str, str | None]


def model_card(pretrained: Pretrained, facts: Facts) -> str:
    """The text of the card, ``README.md``."""
    return "\n".join(
        (
            _front_matter(facts), _head(pretrained, facts), _table(pretrained, facts),
            _loading(pretrained, facts), _accuracy(facts), _settings(facts), _versions(facts),
        )
    )  # fmt: skip


def load_code(pretrained: Pretrained) -> dict[str, str]:
    """Python that loads ``model.safetensors`` with each library that can: library -> code.

    Each defines ``model``, which maps normalized images (N, 3, h, w) to features (N, d).
    timm is there for its own models; torchvision and timm are there where torchvision has a model
    of the encoder's name with the same weights apart from its classifier and the CIFAR stem.
    """
    name, stem = pretrained.encoder, pretrained.stem
    ours = (
        "from fastproj.evaluation.pretrained import load_pretrained\n\n"
        'model = load_pretrained("model.safetensors").build().eval()\n'
    )
    if name.startswith("timm:"):
        timm = f'timm.create_model("{name.partition(":")[2]}", num_classes=0{_size(pretrained)})'
        return {
            "timm": "import timm\nfrom safetensors.torch import load_file\n\n"
            f'model = {timm}\nmodel.load_state_dict(load_file("model.safetensors"))\n'
            "model.eval()\n",
            "fastproj": ours,
        }
    if not _is_torchvisions(name, stem, pretrained.weights):
        return {"fastproj": ours}
    change = ""
    if stem == "cifar":
        change = (
            f"model.conv1 = nn.Conv2d(3, 64, 3, padding={_padding(pretrained)}, bias=False)"
            "  # the CIFAR stem\nmodel.maxpool = nn.Identity()\n"
        )
    load = 'model.load_state_dict(load_file("model.safetensors"))\nmodel.eval()\n'
    torchvision = (
        f"from safetensors.torch import load_file\nfrom torch import nn\n"
        f"from torchvision.models import {name}\n\n"
        f"model = {name}()\n{change}model.fc = nn.Identity()\n{load}"
    )
    timm = (
        f'import timm\n\nmodel = timm.create_model("{name}", num_classes=0, '
        'checkpoint_path="model.safetensors")\nmodel.eval()\n'
    )
    if stem == "cifar":  # create_model has no such stem, so the weights come afterwards
        timm = (
            f"import timm\nfrom safetensors.torch import load_file\nfrom torch import nn\n\n"
            f'model = timm.create_model("{name}", num_classes=0)\n{change}{load}'
        )
    return {"torchvision": torchvision, "timm": timm, "fastproj": ours}


def _size(pretrained: Pretrained) -> str:
    """The argument that builds a model of timm for images of this size, where it has a choice."""
    import timm

    try:
        timm.create_model(
            pretrained.encoder.partition(":")[2], num_classes=0, img_size=pretrained.size
        )
    except TypeError:
        return ""
    return f", img_size={pretrained.size}"


def _is_torchvisions(name: str, stem: str | None, weights: Mapping[str, Tensor]) -> bool:
    if name not in models.list_models(module=models):
        return False
    theirs = models.get_model(name, weights=None).state_dict()
    wanted = {n: t.shape for n, t in theirs.items() if not n.startswith("fc.")}
    if stem == "cifar":
        wanted["conv1.weight"] = weights["conv1.weight"].shape
    return wanted == {n: t.shape for n, t in weights.items()}


def _padding(pretrained: Pretrained) -> int:
    """Of the CIFAR stem's convolution; it does not show in the weights."""
    first = pretrained.build().get_submodule("conv1")
    assert isinstance(first, nn.Conv2d) and isinstance(first.padding, tuple)
    return first.padding[0]


def _front_matter(facts: Facts) -> str:
    about: dict[str, Any] = {
        "library_name": "fastproj",
        "pipeline_tag": "image-feature-extraction",
        "tags": ["self-supervised-learning", "pytorch", "safetensors"]
        + ["onnx"] * (facts.onnx is not None)
        + [str(facts.settings["objective.name"])],
        "metrics": ["accuracy"],
    }
    if facts.images is not None and facts.data != "folder":  # the name of a public set
        about["datasets"] = [facts.data]
    if facts.rows:
        about["model-index"] = [
            {"name": facts.name, "results": [_result(row) for row in facts.rows]}
        ]
    return (
        "---\n"
        f"license: {LICENSE}  # yours to state: the license of the training data may decide it\n"
        f"{_yaml(about)}---\n"
    )


def _result(row: Row) -> dict[str, Any]:
    """One score in the form that the Hub reads, accuracies in per cent."""
    tuned = str(row.protocol["probe"].get("encoder", "")).startswith("trained")
    state = "fine-tuned" if tuned else "frozen"
    return {
        "task": {"type": "image-classification", "name": f"{row.probe} probe, {state} encoder"},
        "dataset": {"name": row.data, "type": row.data, "split": "val"},
        "metrics": [
            {"type": "accuracy", "name": f"{name}, per cent", "value": round(100 * value, 2)}
            for name, value in row.metrics.items()
            if name in ("top1", "top5")
        ],
    }


def _head(pretrained: Pretrained, facts: Facts) -> str:
    return (
        f"# {facts.name}\n\n"
        f"A {pretrained.encoder} encoder, pre-trained on {facts.data} without a classifier "
        f"({facts.settings['objective.name']}) by fastproj. It maps images to features "
        f"(N, {facts.num_features}); the projection head of the training is not part of it.\n"
    )


def _table(pretrained: Pretrained, facts: Facts) -> str:
    settings = facts.settings
    stem = f"for images of {pretrained.size} × {pretrained.size} pixels"
    if pretrained.stem is not None:
        stem = STEMS[pretrained.stem]
    if pretrained.stem == "cifar":
        stem = stem.format(_padding(pretrained))
    counted = sum(p.numel() for p in pretrained.build().parameters())
    megabytes = sum(tensor.nbytes for tensor in pretrained.weights.values()) / 1e6
    images = f", {facts.images:,} images" if facts.images else ""
    content = f"; SHA-256 of the samples {pretrained.data}" if pretrained.data else ""
    rows = {
        "encoder": f"{pretrained.encoder}, {stem}",
        "size": f"{counted:,} parameters, {megabytes:.1f} MB",
        "features": str(facts.num_features),
        "images": f"RGB; trained on crops of {facts.size} × {facts.size} pixels",
        "normalization": f"(pixel / 255 − mean) / std, mean {_rounded(pretrained.mean)}, "
        f"std {_rounded(pretrained.std)}",
        "training data": f"{facts.data}{images}{content}",
        "recipe": facts.recipe or "none, settings alone",
        "objective": ", ".join(
            f"{value}" if name == "objective.name" else f"{name.partition('.')[2]} {value}"
            for name, value in settings.items()
            if name.startswith("objective.")
        ),
        "trained": f"{pretrained.epoch:,} of {settings['optim.epochs']:,} epochs, "
        f"{pretrained.step:,} steps of {settings['optim.batch_size']:,} images",
        "license": f"{LICENSE}: not stated yet",
    }
    return _markdown(("", ""), list(rows.items()))


def _loading(pretrained: Pretrained, facts: Facts) -> str:
    parts = ["## Load\n"]
    for library, code in load_code(pretrained).items():
        parts.append(f"{library}:\n\n```python\n{code}```\n")
    if facts.onnx is not None:
        size = ", height and width too" if pretrained.any_size else ""
        parts.append(
            f"ONNX (opset {OPSET}; the batch may be any{size}), here in ONNX Runtime:\n\n"
            "```python\nimport onnxruntime\n\n"
            'session = onnxruntime.InferenceSession("model.onnx")\n'
            '(features,) = session.run(None, {"images": images})'
            "  # float32 (N, 3, h, w), normalized\n```\n\n"
            f"Its features of 4 random images differ from torch's by {facts.onnx:.1e} at most "
            f"(allowed: {TOLERANCE:g}).\n"
        )
    return "\n".join(parts)


def _accuracy(facts: Facts) -> str:
    if not facts.rows:
        return "## Accuracy\n\nThese weights have not been evaluated.\n"
    lines, protocols = [], {}
    for row in facts.rows:
        data, depth = row.protocol["data"], row.protocol["features"]["depth"]
        lines.append(
            (
                row.data, depth, row.probe, f"{row.metrics['top1']:.2%}",
                f"{row.metrics['top5']:.2%}", f"{data['train']['images']:,}",
                f"{data['val']['images']:,}",
            )
        )  # fmt: skip
        protocols[f"{row.data}, {depth}, {row.probe}"] = row.protocol
    head = ("data", "features", "probe", "top-1", "top-5", "training images", "val images")
    table = _markdown(head, lines)
    return (
        "## Accuracy\n\nOf probes on the frozen encoder's features (finetune trains the encoder "
        "too), one run (n = 1):\n\n"
        f"{table}\nThe protocol of each:\n\n```yaml\n{_yaml(protocols)}```\n"
    )


def _settings(facts: Facts) -> str:
    sections: dict[str, Any] = {}
    for name, value in facts.settings.items():
        section, dot, short = name.partition(".")
        if not dot:
            sections[section] = value
        elif not name.startswith(LEFT_OUT):
            sections.setdefault(section, {})[short] = value
    return f"## Settings\n\n```yaml\n{_yaml(sections)}```\n"


def _versions(facts: Facts) -> str:
    trained, exported = facts.environment.get("packages", {}), facts.versions
    rows = [
        (name, trained.get(name) or "", exported.get(name) or "")
        for name in dict.fromkeys([*trained, *exported])
        if trained.get(name) or exported.get(name)
    ]
    commit = (facts.environment.get("git") or {}).get("commit")
    rows.insert(0, ("commit of fastproj", commit or "", ""))
    hardware = ", ".join(facts.environment.get("gpus") or [facts.environment.get("cpu") or ""])
    rows.append(("hardware", hardware, ""))
    return "## Versions\n\n" + _markdown(("", "in training", "in the export"), rows)


def _markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rounded(values: Sequence[float]) -> str:
    return ", ".join(f"{value:.4f}" for value in values)


def _plain(value: Any) -> Any:
    """What YAML holds; of a path, its last part."""
    if isinstance(value, Mapping):
        return {
            key: Path(inner).name if key == "file" and inner else _plain(inner)
            for key, inner in value.items()
        }
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    return value


def _yaml(value: Mapping[str, Any]) -> str:
    """As YAML, lists of numbers on one line."""
    return yaml.safe_dump(
        _plain(value), sort_keys=False, allow_unicode=True, width=100, default_flow_style=None
    )
