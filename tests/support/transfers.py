"""How a run of ``fastproj transfer`` or ``fastproj segment`` ended."""

import json
from pathlib import Path

import torch

from fastproj.runs import checkpoint, journal


def ended(run: Path) -> tuple[dict, list, dict]:
    """The last checkpoint's state, the losses by step, and the scores."""
    newest = checkpoint.latest(run / "checkpoints")
    assert newest
    events = journal.read(run / "metrics.jsonl")
    losses = [(e["step"], e["loss"]) for e in events if e["event"] == "step"]
    (row,) = json.loads((run / "eval.json").read_text())["rows"]
    return checkpoint.load(newest), losses, row


def flat(value: object, prefix: str = "") -> dict[str, torch.Tensor]:
    """Every tensor of nested dictionaries and lists, by its path."""
    if isinstance(value, torch.Tensor):
        return {prefix: value}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(
        value, list) else ()  # fmt: skip
    return {k: t for key, inner in items for k, t in flat(inner, f"{prefix}/{key}").items()}


def assert_same(a: Path, b: Path) -> None:
    """Two runs of six steps ended alike, to the bit."""
    (state, losses, row), (others, other_losses, other_row) = ended(a), ended(b)
    ours, theirs = flat(state), flat(others)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert losses == other_losses and [step for step, _ in losses] == list(range(1, 7))
    assert row["metrics"] == other_row["metrics"]
