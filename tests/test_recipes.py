"""Recipes: what they set against the papers' tables, what their heads say, and that they run."""

import importlib.util
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.models.projector import build_projector
from fastproj.objective import build_objective
from fastproj.prepare.encode import Store
from fastproj.runs import checkpoint, journal
from fastproj.settings import PREPARE, RUN, Settings, load, stored
from fastproj.train import train
from fastproj.training.build import build_augmentations, build_crops
from tests.support.betons import digit_like, write

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "rcfg").glob("*.yaml"))
SETS = {"cifar10": "CIFAR-10", "cifar100": "CIFAR-100", "in100": "ImageNet-100"}
KINDS = ("", "regularized", "discretized", "sparse")
PAPERS = [(data, method, kind) for data in SETS for method in ("", "barlow") for kind in KINDS]


def name(path: Path) -> str:
    return path.stem


def read(stem: str, *argv: str) -> Settings:
    return load(RUN, ["--cfg", str(ROOT / "rcfg" / f"{stem}.yaml"), *argv], "test", "")


def chain(path: Path) -> list[Path]:
    """The recipe, its base, the base's base, found without fastproj."""
    base = yaml.safe_load(path.read_text()).get("base")
    return [path, *(chain(path.parent / base) if base else [])]


def own(path: Path) -> set[str]:
    """The settings that one file gives, by their full names, found without fastproj."""
    sections = yaml.safe_load(path.read_text())
    sections.pop("base", None)
    return {f"{section}.{name}" for section, values in sections.items() for name in values}


def views(settings: Settings, size: int = 0) -> list[tuple[float, ...]]:
    """Of each view of a crop size: jitter's chance and strengths, gray, blur, solarize, flip."""
    beton: Any = SimpleNamespace(manifest=SimpleNamespace(mean=[0.5] * 3, std=[0.5] * 3))
    chosen = build_augmentations(settings, beton, build_crops(settings, 0))[size]
    return [
        (v.jitter_prob, v.brightness, v.contrast, v.saturation, v.hue,
         v.gray_prob, v.blur_prob, v.solarize_prob, v.flip_prob) for v in chosen.views
    ]  # fmt: skip


def head(settings: Settings) -> tuple[list[tuple[int, ...]], int]:
    """Shapes of the projector's weights on ResNet-18's 512 features; how many BN layers it has."""
    chosen = settings.projector
    with torch.device("meta"):
        projector = build_projector(
            chosen.kind, 512, latents=chosen.latents, k=chosen.k, levels=chosen.levels,
            output_norm=chosen.output_norm, **chosen.options,
        )  # fmt: skip
    norms = sum(isinstance(layer, torch.nn.BatchNorm1d) for layer in projector.modules())
    return [tuple(p.shape) for p in projector.parameters() if p.ndim > 1], norms


# The papers' settings, typed from their sources and not from the recipes.

# run: batch, lr for 256 samples, the online probe's lr, epochs [Projector_Theory's scripts]
PRETRAINING = {
    ("cifar", ""): (256, 0.4, 0.1, 200),
    ("cifar", "barlow"): (256, 0.3, 0.15, 200),
    ("in", ""): (128 * 2, 0.3, 0.1, 100),
    ("in", "barlow"): (256 * 2, 0.3, 0.1, 100),
}
COMMON = {
    "model.encoder": "resnet18", "model.sync_bn": True, "model.bn_per_view": True,
   
    "optim.optimizer": "lars", "optim.momentum": 0.9, "optim.trust_coefficient": 0.02,
    "optim.weight_decay": 1e-4, "optim.warmup_epochs": 10, "optim.warmup_lr": 3e-5,
    "views.scale_min": 0.08, "views.scale_max": 1, "views.local_crops": 0,
    "projector.dropout": 0, "superfluous.noise": "none", "sparsehead.weight": (0.0,),
}  # fmt: skip
MLP = {"cifar": [(2048, 512), (256, 2048)], "in": [(4096, 512), (512, 4096)]}
STRONG = (0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.5, 0.0, 0.5)
MILD = (0.8, 0.4, 0.4, 0.2, 0.1, 0.2)
PAPERS_VIEWS = {
    ("cifar", ""): [STRONG, STRONG],
    ("in", ""): [STRONG, STRONG],
    ("cifar", "barlow"): [(*MILD, 0.0, 0.0, 0.5), (*MILD, 0.0, 0.2, 0.5)],
    ("in", "barlow"): [(*MILD, 1.0, 0.0, 0.5), (*MILD, 0.1, 0.2, 0.5)],
}


def stem(*parts: str) -> str:
    return "_".join(filter(None, parts))


@pytest.mark.parametrize(("data", "method", "kind"), PAPERS, ids=[stem(*p) for p in PAPERS])
def test_a_papers_recipe_has_the_papers_settings(data: str, method: str, kind: str) -> None:
    settings = read(stem(data, method, kind))
    size = "in" if data == "in100" else "cifar"
    optim, flat = settings.optim, settings.flat()
    assert PRETRAINING[size, method] == (
        optim.batch_size, optim.lr, optim.probe_lr, optim.epochs
    )  # fmt: skip
    absent = {"projector.dropout"} if (method, kind) == ("", "sparse") else set()
    assert {key: flat[key] for key in COMMON.keys() - absent} == {
        key: value for key, value in COMMON.items() if key not in absent
    }
    assert not absent & flat.keys()  # a sparse layer alone has no hidden units
    assert views(settings) == PAPERS_VIEWS[size, method]
    assert settings.views.size == {"cifar": 32, "in": 224}[size]
    assert settings.model.stem == {"cifar": "cifar", "in": "imagenet"}[size]
    assert settings.data.train == f"data/{data}/train.beton"
    assert settings.data.val == f"data/{data}/val.beton"

    objective = settings.objective
    if method == "barlow":
        assert objective.name == "barlow"
        assert objective.options == {"off_diagonal": 0.0051, "scale": 0.1}
        weights, norms = [(2048, 512), (2048, 2048), (2048, 2048)], 2
    else:
        assert (objective.name, objective.options) == ("simclr", {"temperature": 0.2})
        weights, norms = MLP[size], 0
    if kind == "sparse" and method == "barlow":  # half of the MLP, then encoder and decoder
        weights, norms = [(2048, 512), (100_000, 2048), (100_000, 2048)], 1
    elif kind == "sparse":
        weights = [(100_000, 512), (100_000, 512)]
    assert head(settings) == (weights, norms)
    assert kind != "sparse" or settings.projector.k == 1000
    levels = {"": 30, "barlow": 3}[method] if kind == "discretized" else None
    assert settings.projector.levels == levels
    weight = {"cifar": 1e-4, "in": 1e-2}[size] if kind == "regularized" else 0.0
    assert settings.matrix_information.weight == (weight,)
    assert settings.matrix_information.alpha == 2


# points over the default projector [the paper; its reviews]
GAINS = {
    "cifar10_regularized": "+0.26", "cifar10_discretized": "+1.03", "cifar100_discretized": "+2.04",
    "in100_discretized": "+1.02", "cifar10_sparse": "+0.69", "cifar100_sparse": "+3.87",
    "in100_sparse": "+1.12", "cifar10_barlow_regularized": "+0.32",
    "cifar100_barlow_sparse": "+3.99",
}  # fmt: skip
# accuracies in percent: solo-learn's tables (its SimCLR and Barlow Twins stand beside the paper's
# defaults), InfoCL's, DirectCLR's
ACCURACIES = {
    "cifar10": ["90.74"], "cifar100": ["65.78"], "in100": ["77.64"],
    "cifar10_barlow": ["92.10"], "cifar100_barlow": ["70.90"], "in100_barlow": ["80.38"],
    "cifar10_byol": ["92.58"], "cifar10_simsiam": ["90.51"], "cifar10_mocov2plus": ["92.94"],
    "cifar10_mocov3": ["93.10"], "cifar10_vicreg": ["92.07"], "cifar10_swav": ["89.17"],
    "cifar10_supcon": ["93.82"],
    "cifar100_byol": ["70.46"], "cifar100_simsiam": ["66.04"], "cifar100_mocov2plus": ["69.89"],
    "cifar100_mocov3": ["68.83"], "cifar100_vicreg": ["68.54"], "cifar100_swav": ["64.88"],
    "cifar100_supcon": ["70.38"],
    "in100_byol": ["80.16", "80.32"], "in100_simsiam": ["74.54", "78.72"],
    "in100_mocov2plus": ["78.20", "79.28"], "in100_mocov3": ["80.36", "80.36"],
    "in100_vicreg": ["79.22", "79.40"], "in100_swav": ["74.04", "74.28"],
    "in100_supcon": ["84.40"],
    "cifar10_directclr": ["62.7"], "cifar100_directclr": ["62.7"], "in100_directclr": ["62.7"],
    "cifar10_superinfo": ["85.76", "86.20"], "cifar10_superinfo_noise": ["85.76"],
    "stl10_superinfo": ["78.74"],
}  # fmt: skip


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_head_states_the_published_figure_and_no_other(path: Path, maker: Any) -> None:
    published = maker.read_head(path).items["Published"]
    assert re.findall(r"[+]\d+\.\d+", published) == [GAINS[n] for n in [path.stem] if n in GAINS]
    found = re.findall(r"(?<![+\d.])\d\d\.\d+", published)
    assert found == ACCURACIES.get(path.stem, [])
    assert found or path.stem in GAINS or published.startswith("none")


# solo-learn, scripts/pretrain/cifar: optimizer, lr, online probe's lr, weight decay; the projector
ASYMMETRIC = [(*MILD, 0.0, 0.0, 0.5), (*MILD, 0.0, 0.2, 0.5)]
WEAK = [(0.8, 0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.0, 0.5)] * 2
SOLO: dict[str, tuple[Any, ...]] = {
    "byol": ("lars", 1.0, 0.1, 1e-5, [(4096, 512), (256, 4096)], 1, ASYMMETRIC),
    "simsiam": ("sgd", 0.5, 0.1, 1e-5, [(2048, 512), (2048, 2048), (2048, 2048)], 3, WEAK),
    "mocov2plus": ("sgd", 0.3, 0.3, 1e-4, [(2048, 512), (256, 2048)], 0, WEAK),
    "mocov3": ("lars", 0.3, 0.3, 1e-6, [(4096, 512), (256, 4096)], 2, ASYMMETRIC),
    "vicreg": ("lars", 0.3, 0.1, 1e-4, [(2048, 512), (2048, 2048), (2048, 2048)], 2,
               [(*MILD, 0.0, 0.1, 0.5)] * 2),
    "swav": ("lars", 0.6, 0.1, 1e-6, [(2048, 512), (128, 2048)], 1, [STRONG, STRONG]),
    "supcon": ("sgd", 0.4, 0.1, 1e-5, [(2048, 512), (256, 2048)], 0, [STRONG, STRONG]),
}  # fmt: skip
# and what each objective names
SOLO_OBJECTIVE: dict[str, dict[str, float]] = {
    "byol": {"predictor_hidden": 4096, "momentum": 0.99, "momentum_end": 1.0},
    "simsiam": {"predictor_hidden": 512},
    "mocov2plus": {"temperature": 0.2, "queue": 32768, "momentum": 0.99, "momentum_end": 0.999},
    "mocov3": {"temperature": 0.2, "predictor_hidden": 4096, "predictor_norm": False,
               "momentum": 0.99, "momentum_end": 1},
    "vicreg": {"invariance": 25, "variance": 25, "covariance": 1},
    "swav": {"temperature": 0.1, "queue": 3840, "queue_epoch": 50, "prototypes": 3000,
             "freeze_epochs": 2, "sinkhorn_steps": 3, "epsilon": 0.05, "weight_norm": True},
    "supcon": {"temperature": 0.2},
}  # fmt: skip
# The same of scripts/pretrain/imagenet-100: two GPUs with 128 images each.
PHOTOS = [(*MILD, 1.0, 0.0, 0.5), (*MILD, 0.1, 0.2, 0.5)]  # asymmetric.yaml
SOLO_IN: dict[str, tuple[Any, ...]] = {
    "byol": ("lars", 0.5, 0.1, 1e-6, [(4096, 512), (256, 4096)], 1, PHOTOS),
    "simsiam": ("sgd", 0.5, 0.1, 1e-5, [(2048, 512), (2048, 2048), (2048, 2048)], 3, PHOTOS),
    "mocov2plus": ("sgd", 0.3, 0.3, 1e-4, [(2048, 512), (256, 2048)], 0, WEAK),
    "mocov3": ("lars", 0.3, 0.3, 1e-6, [(4096, 512), (256, 4096)], 2, PHOTOS),
    "vicreg": ("lars", 0.3, 0.1, 1e-4, [(2048, 512), (2048, 2048), (2048, 2048)], 2,
               [(*MILD, 0.5, 0.1, 0.5)] * 2),
    "swav": ("lars", 0.6, 0.1, 1e-6, [(2048, 512), (128, 2048)], 1, [STRONG, STRONG]),
    "supcon": ("sgd", 0.5, 0.1, 1e-5, [(2048, 512), (512, 2048)], 0, [STRONG, STRONG]),
}  # fmt: skip
SOLO_IN_OBJECTIVE = {"byol": {"predictor_hidden": 8192}, "mocov2plus": {"queue": 65536}}


@pytest.mark.parametrize("data", SETS)
@pytest.mark.parametrize("method", SOLO)
def test_another_objectives_recipe_has_solo_learns_settings(method: str, data: str) -> None:
    settings = read(f"{data}_{method}")
    optim, objective = settings.optim, settings.objective
    *expected, weights, norms, augmentation = (SOLO_IN if data == "in100" else SOLO)[method]
    assert [optim.optimizer, optim.lr, optim.probe_lr, optim.weight_decay] == expected
    epochs = 400 if data == "in100" else 1000
    assert (optim.batch_size, optim.epochs, optim.warmup_epochs) == (256, epochs, 10)
    assert settings.model.bn_per_view and settings.model.sync_bn
    assert settings.data.train == f"data/{data}/train.beton"
    trust = {"trust_coefficient": 0.02} if optim.optimizer == "lars" else {}
    assert (optim.options, optim.warmup_lr) == ({"momentum": 0.9} | trust, 3e-5)
    assert head(settings) == (weights, norms)
    assert views(settings) == augmentation
    crops = settings.views
    assert (crops.scale_min, crops.local_crops) == (0.2 if method == "vicreg" else 0.08, 0)
    options = SOLO_OBJECTIVE[method]
    if data == "in100":
        options = options | SOLO_IN_OBJECTIVE.get(method, {})
    assert (objective.name, objective.options) == (method, options)


def test_swavs_multi_crop_has_solo_learns_augmentation_for_each_size() -> None:
    """scripts/pretrain/cifar-multicrop/augmentations/swav.yaml, and the rest as with two crops."""
    settings, plain = read("cifar10_swav_multicrop"), read("cifar10_swav")
    large, small = build_crops(settings, 0)
    assert (large.size, large.num_views, large.scale) == (32, 2, (0.2, 1.0))
    assert (small.size, small.num_views, small.scale) == (18, 6, (0.08, 0.5))
    jitter = (0.8, 0.6, 0.6, 0.6, 0.2, 0.2)
    assert views(settings) == [(*jitter, 0.0, 0.0, 0.5), (*jitter, 0.0, 0.2, 0.5)]
    assert views(settings, 1) == [(0.8, 0.8, 0.8, 0.8, 0.2, 0.2, 0.1, 0.1, 0.5)] * 6
    # One value and two values are the large crops'; small ones take the first.
    for given in ("0.3", "0.3,0.7"):
        short = read("cifar10_swav_multicrop", f"--views.blur_prob={given}")
        assert {view[6] for view in views(short, 1)} == {0.3}
    changed = {key for key, value in settings.flat().items() if value != plain.flat().get(key)}
    assert {key for key in changed if not key.startswith("views.")} == {"run.name"}


@pytest.mark.parametrize("data", SETS)
def test_the_supervised_reference_is_its_base_without_a_projector(data: str) -> None:
    settings, base = read(f"{data}_supervised"), read(data)
    assert (settings.objective.name, settings.objective.options) == ("supervised", {})
    assert settings.projector.kind == "none"
    changed = {key for key, value in settings.flat().items() if value != base.flat()[key]}
    # Nothing is chosen on labels that the encoder has seen.
    assert changed == {*("run.name", "objective.name", "projector.kind", "eval.logistic_strengths")}
    for seen in (settings, read(f"{data}_supcon")):
        assert len(seen.eval.options["logistic_strengths"]) == 1


@pytest.mark.parametrize("data", ["cifar10", "stl10"])
def test_superinfo_style_has_infocls_protocol(data: str) -> None:
    settings = read(f"{data}_superinfo")
    optim = settings.optim
    assert (optim.optimizer, optim.lr, optim.weight_decay) == ("adamw", 3e-4, 0)
    assert (optim.batch_size, optim.epochs, optim.warmup_epochs) == (256, 200, 0)
    assert (settings.objective.name, settings.objective.options) == ("simclr", {"temperature": 0.5})
    assert head(settings) == ([(512, 512), (128, 512)], 0)
    assert views(settings) == [(*STRONG[:6], 0.0, 0.0, 0.5)] * 2
    assert settings.views.size == {"cifar10": 32, "stl10": 64}[data]
    split = {"cifar10": "train", "stl10": "unlabeled"}[data]
    assert settings.data.train == f"data/{data}/{split}.beton"
    # InfoCL's SimCLR+MIB adds 5e-4 x mean((mu1 - mu2)^2) to noise of deviation 0.1. Each KL at
    # fixed sigma is mean((mu1 - mu2)^2) / (2 sigma^2).
    mib = settings.superfluous
    assert (mib.noise, mib.sigma) == ("fixed", 0.1)
    assert math.isclose((mib.lambda_a[0] + mib.lambda_b[0]) / (2 * mib.sigma**2), 5e-4)


def test_the_vits_recipe_has_moco_v3s_settings() -> None:
    """main_moco.py with the options of CONFIG.md for ViT-Small on one machine, and its defaults."""
    flat = read("in100_mocov3_vit").flat()
    wanted = {
        "model.encoder": "timm:vit_small_patch16_224", "model.freeze_patch_embedding": True,
        "optim.optimizer": "adamw", "optim.lr": 1.5e-4, "optim.weight_decay": 0.1,
        "optim.batch_size": 1024, "optim.epochs": 300, "optim.warmup_epochs": 40,
        "optim.warmup_lr": 0, "objective.temperature": 0.2, "objective.momentum": 0.99,
        "objective.momentum_end": 1, "views.scale_min": 0.08, "views.size": 224,
    }  # fmt: skip
    assert {key: flat[key] for key in wanted} == wanted
    assert not {"model.stem", "optim.trust_coefficient"} & flat.keys()
    settings = read("in100_mocov3_vit")
    assert head(settings)[0] == [(4096, 512), (4096, 4096), (256, 4096)] and head(settings)[1] == 3
    assert views(settings) == PHOTOS
    predictor = build_objective("mocov3", 256, 100, **settings.objective.options).predictor
    shapes = [tuple(p.shape) for p in predictor.parameters() if p.ndim > 1]
    assert shapes == [(4096, 256), (256, 4096)]
    assert isinstance(predictor[-1], torch.nn.BatchNorm1d) and not predictor[-1].affine


def test_the_noise_control_leaves_out_the_penalty_alone() -> None:
    control, whole = read("cifar10_superinfo_noise").flat(), read("cifar10_superinfo").flat()
    changed = {key: control[key] for key in control if control[key] != whole[key]}
    assert changed.pop("run.name") == "cifar10_superinfo_noise"
    assert changed == {"superfluous.lambda_a": (0.0,), "superfluous.lambda_b": (0.0,)}


FAST = {
    "cifar10": {"views.size_start": 24},
    "in100": {"views.size_start": 128, "data.train": "data/in100_square/train.beton",
              "data.val": "data/in100_square/val.beton"},
}  # fmt: skip


@pytest.mark.parametrize("data", FAST)
def test_a_fast_recipe_is_its_base_but_for_what_its_head_says(data: str) -> None:
    fast, base = read(f"{data}_fast").flat(), read(data).flat()
    changed = {key: fast[key] for key in fast if fast[key] != base[key]}
    named = {"run.name": f"{data}_fast", "data.engine": "resident", "optim.batch_size": 1024,
             "model.bn_per_view": False}  # fmt: skip
    assert changed == named | FAST[data]


@pytest.mark.parametrize("data", SETS)
def test_directclr_compares_the_papers_share_of_the_features(data: str) -> None:
    settings = read(f"{data}_directclr")
    assert settings.projector.kind == "direct"
    assert settings.projector.options["out"] == 512 * 360 / 2048
    assert settings.objective.options == {"temperature": 0.1}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_base_is_followed_and_what_it_says_is_not_said_again(path: Path) -> None:
    files = chain(path)
    given = {setting: file for file in reversed(files) for setting in own(file)}
    settings = read(path.stem)
    assert own(path) <= settings.flat().keys()
    assert settings.sources() == {
        setting: f"file {given[setting]}" if setting in given else "default"
        for setting in settings.flat()
    }
    for base in files[1:2]:
        before = read(base.stem)
        said = {setting for setting, source in before.sources().items() if source != "default"}
        assert own(path)
        for setting in own(path) & said:
            assert settings.flat()[setting] != before.flat()[setting], setting


@pytest.fixture(scope="module")
def maker() -> Any:
    """tools/recipes.py, a script and no package."""
    spec = importlib.util.spec_from_file_location("make_recipes", ROOT / "tools" / "recipes.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_table_is_what_the_script_writes_now(maker: Any) -> None:
    page = ROOT / "docs" / "recipes.md"
    assert page.read_text(encoding="utf-8") == maker.page(), "run: python tools/recipes.py"


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_head_says_all_and_only_of_its_own_recipe(path: Path, maker: Any) -> None:
    title, items = maker.read_head(path)
    assert all(len(line) <= 100 for line in path.read_text().splitlines())
    assert title and all(items[label] for label in maker.LABELS)
    assert "|" not in title + items["Published"] + items["Measured"]  # they are cells of a table
    named = re.findall(r"(?:--cfg rcfg/|--run\.name | runs/)(\w+)", items["Command"])
    commands = re.findall(r"-m fastproj\.(\w+)", items["Command"])
    if path.stem == "demo":
        assert items["Command"] == "make demo"
    else:
        assert named == [path.stem] * 3 and commands == ["train", "evaluate"]
    for other in re.findall(r"(\w+)\.yaml", " ".join(items.values())):
        assert (ROOT / "rcfg" / f"{other}.yaml").exists(), other
    if "its base" in items.get("Differs", ""):
        assert len(chain(path)) > 1
    figure = re.search(r"\d\d\.\d\d", items["Measured"])
    if items["Measured"] != "not measured":
        assert figure and figure[0] in (ROOT / "README.md").read_text()


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_where_batch_norm_sees_all_views_a_head_says_so(path: Path, maker: Any) -> None:
    said = ["in one pass" in " ".join(maker.read_head(file).items.values()) for file in chain(path)]
    assert any(said) == (not read(path.stem).model.bn_per_view)
    ours = re.match("ours", maker.read_head(path).items["Protocol"])
    assert ours or not any(said)  # a published protocol's batch norm sees one view


SOURCED = [path for path in RECIPES if "# Protocol: ours" not in path.read_text()]


def differs(path: Path, maker: Any) -> str:
    """What a recipe says that it does otherwise, and what the recipe says that it is "as"."""
    text = maker.read_head(path).items["Differs"]
    alike = re.match(r"as (?:its base|(\w+)\.yaml)(?:[,;.]|$)", text)
    if not alike:
        return text
    other = f"{alike[1]}.yaml" if alike[1] else chain(path)[1].name
    return f"{text} {differs(path.parent / other, maker)}"


def stores(maker: Any) -> dict[str, Any]:
    """The settings of every data set that a recipe's command prepares, by its folder."""
    found = {}
    for path in RECIPES:
        command = maker.read_head(path).items["Command"].replace("\\", " ")
        for words in re.findall(r"write_ffcv\.py((?:\s+--\w+ \S+)+)", command):
            data = load(PREPARE, words.split(), "test", "").data
            found[data.out] = data
    return found


def centers(settings: Settings) -> bool:
    """Whether the loss takes the batch's mean off: a constant added to all rows is not seen."""
    torch.manual_seed(0)
    objective = build_objective(settings.objective.name, 8, 4, **settings.objective.options)
    z, teacher, labels = torch.randn(2, 16, 8), torch.randn(2, 16, 8), torch.arange(16) % 4
    with torch.no_grad():
        before, after = (float(objective(z + s, teacher + s, labels)) for s in (0, 3))
    return math.isclose(before, after, rel_tol=1e-4)


def topics(settings: Settings, data: Any, protocol: str) -> dict[str, str]:
    """What a published recipe's differences must speak of, each with words that do.

    ``data``: the settings that prepared its images.
    """
    optim, probe = settings.optim, settings.eval.probes[0]
    jpeg = f"as JPEG of at most {data.max_resolution} pixels, quality {data.quality}"
    wanted = {
        "images": jpeg if stored(data.store, data.dataset) == "jpeg" else "stored raw",
        "interpolation": "resized bilinearly with antialiasing",
        "rounding": "not rounded to 8 bits",
        "normalization": "normalized by the set's own mean and standard deviation",
        "probe": {"logistic": "linear probe is logistic regression"}[probe],
        "the source's probe": r"authors: (LARS|SGD)|InfoCL: SGD",
        "batch norm": "one view at a time" if settings.model.bn_per_view else "in one pass",
        "its GPUs": "on all GPUs together" if settings.model.sync_bn else "on each GPU alone",
    }
    if protocol.startswith("solo-learn"):  # its base may be another source's
        wanted["the source's probe"] = "solo-learn('s| has no) linear probe"
    if settings.train.precision == "auto":
        wanted["precision"] = "bfloat16 or float32, by the device"
    if any(view[6] for view in views(settings)):
        wanted["blur"] = "exact Gaussian"
    if centers(settings):
        wanted["standardization"] = "(standardizes|loss are) over all GPUs"
    if optim.optimizer == "lars":
        wanted["LARS"] = "LARS does not scale the online probe"
    elif optim.weight_decay:
        wanted["decay"] = "biases(,| and) norms"
    return wanted


def test_a_published_recipes_differences_speak_of_all_that_applies(maker: Any) -> None:
    prepared = stores(maker)
    assert centers(read("in100_barlow")) and not centers(read("in100"))
    silent = {}
    for path in SOURCED:
        settings, text = read(path.stem), differs(path, maker)
        protocol = maker.read_head(path).items["Protocol"]
        wanted = topics(settings, prepared[str(Path(settings.data.train).parent)], protocol)
        silent[path.stem] = [topic for topic, words in wanted.items() if not re.search(words, text)]
    assert len(silent) > 40 and not {stem: gaps for stem, gaps in silent.items() if gaps}


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_head_names_options_that_its_recipe_takes(path: Path, maker: Any) -> None:
    items = maker.read_head(path).items
    said = items["Protocol"] + items.get("Differs", "")
    for options in re.findall(r"--[\w.]+ \w+(?: --[\w.]+ \w+)*", said):
        read(path.stem, *options.split())


# solo-learn, scripts/linear/imagenet-100: SGD's rate for 256 samples
SOLO_PROBES = {"byol": 0.3, "simsiam": 30, "mocov2plus": 3, "mocov3": 0.3, "vicreg": 0.3,
               "swav": 0.15}  # fmt: skip


@pytest.mark.parametrize("method", SOLO_PROBES)
def test_a_head_has_solo_learns_linear_probe(method: str, maker: Any) -> None:
    text = maker.read_head(ROOT / "rcfg" / f"in100_{method}.yaml").items["Differs"]
    assert f"SGD {SOLO_PROBES[method]:g} (--eval.probes solo --eval.solo_method {method})" in text


GOOD = "# T\n# Command: c\n#   d\n# Protocol: p\n# Published: none\n# Measured: m\n"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "data: {}\n",
        GOOD.replace("# T\n", ""),
        GOOD.replace("# T\n", "# T\n# and more\n"),
        GOOD.replace("# Published: none\n", ""),
        GOOD.replace("# Measured: m\n", "# Measured: m\n# Measured: m\n"),
        GOOD.replace("# Measured: m\n", "\n# Measured: m\n"),
        GOOD.replace("# Protocol: p\n", "# Differs: x\n# Protocol: p\n"),
    ],
)
def test_a_head_with_something_missing_is_refused(text: str, tmp_path: Path, maker: Any) -> None:
    path = tmp_path / "r.yaml"
    path.write_text(GOOD + "# Differs: x: y\ndata: {}\n# Command: late\n")
    labels = {"Command": "c d", "Protocol": "p", "Published": "none", "Measured": "m"}
    assert maker.read_head(path) == ("T", labels | {"Differs": "x: y"})
    path.write_text(text)
    with pytest.raises(InputError, match=r"r\.yaml: its head must be a title"):
        maker.read_head(path)


@pytest.mark.parametrize(
    ("options", "projector", "regularizers"),
    [
        ("", "mlp 2048-256", "–"),
        ("--projector.depth=3 --projector.batch_norm=1", "mlp 2048-2048-256 BN", "–"),
        ("--projector.depth=1 --projector.batch_norm=1", "mlp 256", "–"),
        ("--projector.dropout=0.5 --projector.levels=3", "mlp 2048-256 dropout 0.5, 3 levels", "–"),
        ("--projector.kind=barlow", "barlow 2048-2048-256 BN", "–"),
        ("--projector.kind=linear", "linear 256", "–"),
        ("--projector.kind=none", "none", "–"),
        ("--output_norm=true --projector.levels=3", "mlp 2048-256, output BN, 3 levels", "–"),
        ("--projector.kind=none --latents=9 --k=2", "none 256, sparse 9 (k 2)", "–"),
        ("--matrix_information.weight=0,1e-4", "mlp 2048-256", "matrix information 0 to 0.0001"),
        ("--sparsehead.weight=0.1", "mlp 2048-256", "sparsehead 0.1 (columns)"),
        ("--noise=learned --lambda_a=1 --lambda_b=-2 --sigma=0.3", "mlp 2048-256",
         "superfluous 1, -2; learned noise 0.3"),
    ],
)  # fmt: skip
def test_words_of_the_table(options: str, projector: str, regularizers: str, maker: Any) -> None:
    settings = load(RUN, ["--data.train=x", *options.split()], "test", "")
    assert maker.projector(settings) == projector
    assert maker.regularizers(settings) == regularizers


@pytest.fixture(scope="module")
def beton(tmp_path_factory: pytest.TempPathFactory) -> Beton:
    source = digit_like(np.random.default_rng(0), 32, 16, 4)  # two steps of 16 an epoch
    return write(source, tmp_path_factory.mktemp("data"), Store("raw"))


def small(path: Path) -> dict[str, object]:
    """What makes a recipe small and leaves its method as it is."""
    settings = read(path.stem)
    sizes: dict[str, object] = {
        "model.encoder": "resnet_small", "views.size": 16, "views.local_size": 12,
        "projector.hidden": 32, "projector.out": 16, "objective.predictor_hidden": 16,
        "objective.prototypes": 8, "objective.queue_epoch": 1, "objective.freeze_epochs": 1,
        "optim.batch_size": 16, "optim.epochs": 3, "optim.warmup_epochs": 0.5,
    }  # fmt: skip
    sizes = {name: size for name, size in sizes.items() if name in settings.flat()}
    if settings.projector.latents is not None:
        sizes |= {"projector.latents": 64, "projector.k": 8}
    if settings.views.size_start is not None:
        sizes["views.size_start"] = 12
    if settings.objective.options.get("queue"):
        sizes["objective.queue"] = 32
    return sizes


@pytest.mark.slow
@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_a_recipe_trains_stops_and_goes_on(path: Path, beton: Beton, tmp_path: Path) -> None:
    """In the second epoch swav's queue is full and its prototypes move."""
    given = {"data.train": beton.path, "run.dir": tmp_path, "run.device": "cpu",
             "train.precision": "float32",  # the same on every processor
             "train.log_every": 1, **small(path)}  # fmt: skip
    options = [f"--{setting}={value}" for setting, value in given.items()]
    train(read(path.stem, *options, "--train.stop_after=3"))
    run = train(
        read(path.stem, *options, "--train.stop_after=1", f"--run.resume={tmp_path / path.stem}")
    )
    assert run == tmp_path / path.stem
    steps = [e for e in journal.read(run / "metrics.jsonl") if e["event"] == "step"]
    assert [e["step"] for e in steps] == [1, 2, 3, 4]
    assert all(math.isfinite(e["loss"]) for e in steps)
    newest = checkpoint.latest(run / "checkpoints")
    assert newest and checkpoint.load(newest)["step"] == 4
