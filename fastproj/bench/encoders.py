"""timm's encoders through the commands: trained, resumed, evaluated, exported and loaded back."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastproj import evaluate, export, train
from fastproj.bench import Engine, Plan, Row, rates
from fastproj.bench.alone import alone, memory
from fastproj.core.errors import InputError
from fastproj.data.beton import Beton
from fastproj.data.layout import RAW
from fastproj.evaluation.load import load_encoder
from fastproj.evaluation.results import read_evaluation
from fastproj.prepare.encode import Store
from fastproj.prepare.sources import Lazy, Source
from fastproj.prepare.splits import write_beton
from fastproj.runs import checkpoint, journal
from fastproj.runs.folder import RunFolder

# Small ones of twelve families, with the side of their images.
MODELS = {
    "resnet18": 224, "resnet18d": 224, "regnetx_002": 224, "mobilenetv3_small_050": 224,
    "efficientnet_b0": 224, "convnext_atto": 224, "vit_tiny_patch16_224": 224,
    "deit_tiny_distilled_patch16_224": 224, "swin_tiny_patch4_window7_224": 224,
    "mixer_s32_224": 224, "maxvit_rmlp_pico_rw_256": 224, "vit_pwee_patch16_reg1_gap_256": 32,
}  # fmt: skip
STOP = 3  # steps before the run is stopped and resumed
CLOSE = 1e-5  # largest difference between the trained encoder's outputs and timm's own


def run(
    plan: Plan, models: Mapping[str, int] = MODELS, batch: int = 16, held_out: int = 32
) -> list[Row]:
    """SimCLR in float32, one row and one process per model; the unit is one image, of two crops.

    The steps after the first are timed. ``peak_bytes`` is the peak resident memory of the training
    process, on a GPU that of its tensors. A run that cannot be trained, resumed bit for bit,
    evaluated, exported or loaded back is ``missing``, with the reason.
    """
    steps = max(1 + plan.repeats, STOP + 1)
    rows = []
    with TemporaryDirectory(prefix="fastproj-") as folder:
        for side, beton in ((224, plan.photos), (32, plan.small)):
            chosen = [name for name, size in models.items() if size == side]
            if beton is None or not chosen:
                continue
            data = Path(folder) / str(side)
            _few(beton, data, "train", 0, batch * steps)
            _few(beton, data, "val", batch * steps, held_out)
            case = f"encoder: SimCLR, two crops of {side} px, batch {batch}, float32, AdamW"
            for name in chosen:
                print(f"encoders, {side} px: {name}", file=sys.stderr)
                row = Row("encoders", case, f"timm:{name}", "ours", "images")
                given = {"name": name, "size": side, "batch": batch, "data": str(data)}
                try:
                    found = alone(tried, device=plan.device.type, workers=plan.workers, **given)
                except InputError as error:
                    rows.append(replace(row, missing=str(error).splitlines()[-1]))
                    continue
                rows.append(_row(row, batch, found))
    return rows


def _row(row: Row, batch: int, found: Mapping[str, Any]) -> Row:
    engine = Engine(row.engine, row.role, batch, lambda: lambda: None)
    measured = rates(row.stage, row.case, engine, row.unit, found["seconds"])
    note = f"{found['parameters'] / 1e6:.1f} M parameters, {found['features']:,} features"
    return replace(measured, peak_bytes=found["peak_bytes"], note=note)


def _few(beton: Beton, folder: Path, split: str, first: int, count: int) -> None:
    """Write ``count`` images of a drawn order of ``beton``, from ``first`` on and then again."""
    order = np.random.default_rng(0).permutation(len(beton))  # sets often lie class by class
    positions = order[(np.arange(count) + first) % len(beton)]

    def read(position: int) -> bytes | np.ndarray:
        stored, shape = beton.stored(position), (beton.height[position], beton.width[position], 3)
        return stored.reshape(shape) if beton.mode[position] == RAW else stored.tobytes()

    source = Source(split, beton.classes, Lazy(read, positions.tolist()), beton.label[positions])
    raw = (beton.mode[positions] == RAW).all()
    write_beton(source, folder, Store("raw") if raw else Store("jpeg", quality=90), workers=1)


def tried(name: str, size: int, batch: int, data: str, device: str, workers: int) -> dict[str, Any]:
    """Take ``timm:name`` the whole way in this process, on the betons in the folder ``data``.

    Returns ``seconds`` of each step after the first, ``peak_bytes``, ``parameters``, ``features``.
    Raises ``InputError`` where a resumed run or the exported encoder is another one.
    """
    runs = Path(data) / name
    given = {
        "data.train": f"{data}/train.beton", "data.val": f"{data}/val.beton", "run.dir": runs,
        "run.device": device, "data.workers": workers, "model.encoder": f"timm:{name}",
        "views.size": size, "optim.optimizer": "adamw", "optim.lr": 1e-3,
        "optim.batch_size": batch, "optim.epochs": 1, "optim.warmup_epochs": 0,
        "train.precision": "float32", "train.log_every": 1, "eval.probes": "knn", "eval.knn_k": 3,
    }  # fmt: skip
    argv = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    whole, broken = RunFolder(runs / "whole"), RunFolder(runs / "broken")
    train.main([*argv, "--run.name", "whole"])
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else memory("VmHWM")
    train.main([*argv, "--run.name", "broken", "--train.stop_after", str(STOP)])
    train.main(["--run.resume", str(broken.path)])
    ends = [_newest(run) for run in (whole, broken)]
    if not _same(*map(checkpoint.load, ends)):
        raise InputError(f"timm:{name}: the resumed run is another one than the unbroken one")
    evaluate.main([str(whole.path)])
    if not read_evaluation(whole).rows:
        raise InputError(f"timm:{name}: evaluated without a result")
    export.main([str(whole.path)])
    trained, theirs = load_encoder(ends[0]).module.eval(), loaded_back(whole.weights, name, size)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        difference = (trained(images) - theirs(images)).abs().max().item()
    if not difference <= CLOSE:
        raise InputError(f"timm:{name}: timm's own model differs by {difference:g} after loading")
    events = [e for e in journal.read(whole.metrics) if e["event"] == "step"]
    return {
        "seconds": [batch / event["images_per_second"] for event in events[1:]],
        "peak_bytes": peak,
        "parameters": sum(p.numel() for p in theirs.parameters()),
        "features": theirs(images).shape[1],
    }


def loaded_back(path: Path, name: str, size: int) -> nn.Module:
    """timm's own model ``name`` with exactly the weights of the export, made without fastproj."""
    import timm
    from safetensors.torch import load_file

    try:
        model = timm.create_model(name, num_classes=0, img_size=size)
    except TypeError:  # it takes every size
        model = timm.create_model(name, num_classes=0)
    model.load_state_dict(load_file(path), strict=True)
    return model.eval()


def _newest(run: RunFolder) -> Path:
    path = checkpoint.latest(run.checkpoints)
    assert path is not None  # the run has just written one
    return path


def _same(one: Any, other: Any) -> bool:
    """Whether two checkpoints are equal bit for bit, except for the settings that name the run."""
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        keys = one.keys() - {"settings"}
        return keys == other.keys() - {"settings"} and all(_same(one[k], other[k]) for k in keys)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return one == other
