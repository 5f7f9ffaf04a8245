"""Writes docs/recipes.md from the recipes themselves: ``python docs/make_recipes.py``

What a recipe sets is read as a run would read it, what it says of itself from its head: comment
lines at the top, a title and then one item a label (``LABELS``).
"""

import sys
from itertools import takewhile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":  # run as a file: Python then looks beside it, not in the checkout
    sys.path[0] = str(ROOT)

from fastproj.errors import InputError, run_command  # noqa: E402
from fastproj.settings import RUN, Settings, load  # noqa: E402

PAGE = ROOT / "docs" / "recipes.md"
# By the parts of the name: cifar10 and all that is based on it come before cifar100.
RECIPES = sorted((ROOT / "rcfg").glob("*.yaml"), key=lambda path: path.stem.split("_"))
LABELS = ("Command", "Protocol", "Published", "Measured")  # each once, in this order
OPTIONAL = "Differs"  # last: where the recipe and its source part

INTRODUCTION = """\
# Recipes

Written by `python docs/make_recipes.py` from the files in `rcfg/`; change those. A recipe's head
has the command, the whole protocol and where it differs from its source. `base:` in a recipe names
the one whose settings it keeps but for its own. An accuracy is worth what its protocol says: see
the head before comparing two.
"""


class Head(NamedTuple):
    """The comment at the top of a recipe: its title, and the text of each label on one line."""

    title: str
    items: dict[str, str]


def read_head(path: Path) -> Head:
    """The head of a recipe. Raises InputError where an item is missing, doubled or misplaced."""
    comment = takewhile(lambda line: line.startswith("#"), path.read_text("utf-8").splitlines())
    title, *lines = [line.removeprefix("#").strip() for line in comment] or [""]
    items: list[list[str]] = []
    for line in lines:
        label, _, text = line.partition(": ")
        if label in (*LABELS, OPTIONAL):
            items.append([label, text])
        elif items:
            items[-1][1] += f" {line}"
    found = tuple(label for label, _ in items)
    first = lines[0].partition(": ")[0] if lines else ""
    if not title or first != LABELS[0] or found not in (LABELS, (*LABELS, OPTIONAL)):
        raise InputError(
            f"{path}: its head must be a title of one line, then '# Label: text' for each of "
            f"{', '.join(LABELS)} and, where there is one, {OPTIONAL}, in this order"
        )
    return Head(title, dict(items))


def projector(settings: Settings) -> str:
    """The head in a few words: ``mlp 2048-256``, ``mlp 2048-2048 BN, sparse 100000 (k 1000)``."""
    head = settings.projector
    hidden = {"none": 0, "direct": 0, "linear": 0, "barlow": 2}.get(head.kind, head.depth - 1)
    last = head.kind != "none" or head.latents is not None
    words = [head.kind]
    if last:
        words.append("-".join([str(head.hidden)] * hidden + [str(head.out)]))
    if hidden and (head.batch_norm or head.kind == "barlow"):
        words.append("BN")
    if hidden and head.dropout:
        words.append(f"dropout {head.dropout:g}")
    sparse = "" if head.latents is None else f", sparse {head.latents} (k {head.k:g})"
    levels = "" if head.levels is None else f", {head.levels} levels"
    return " ".join(words) + sparse + levels


def regularisers(settings: Settings) -> str:
    """The penalties in use with their weights, and the noise on the features."""

    def weight(schedule: tuple[float, ...]) -> str:
        return " to ".join(f"{value:g}" for value in schedule)

    information, sparse, noisy = (
        settings.matrix_information, settings.sparsehead, settings.superfluous
    )  # fmt: skip
    words = []
    if any(information.weight):
        words.append(f"matrix information {weight(information.weight)}")
    if any(sparse.weight):
        words.append(f"sparsehead {weight(sparse.weight)} ({sparse.groups})")
    if any(noisy.lambda_a + noisy.lambda_b):
        words.append(f"superfluous {weight(noisy.lambda_a)}, {weight(noisy.lambda_b)}")
    if noisy.noise != "none":
        words.append(f"{noisy.noise} noise {noisy.sigma:g}")
    return "; ".join(words) or "–"


def row(path: Path) -> list[str]:
    """The cells of one recipe, in the order of ``COLUMNS``."""
    head = read_head(path)
    settings = load(RUN, ["--cfg", str(path)], "make_recipes", "")
    return [
        f"[{path.stem}](../rcfg/{path.name})",
        head.title,
        settings.objective.name,
        projector(settings),
        regularisers(settings),
        Path(settings.data.train).parent.name,
        str(settings.optim.epochs),
        head.items["Published"],
        head.items["Measured"],
    ]


COLUMNS = ("recipe", "what", "objective", "projector", "regularisers", "data", "epochs",
           "published", "measured")  # fmt: skip


def page() -> str:
    """The text of docs/recipes.md."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS), *(row(path) for path in RECIPES)]
    table = "\n".join("| " + " | ".join(cells) + " |" for cells in rows)
    return f"{INTRODUCTION}\n{table}\n"


def main(argv: object) -> None:
    PAGE.write_text(page(), encoding="utf-8")
    print(f"{PAGE}: {len(RECIPES)} recipes")


if __name__ == "__main__":
    run_command(main)
