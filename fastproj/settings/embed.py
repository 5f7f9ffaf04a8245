"""What embed reads: a run's settings, and its own."""

from dataclasses import dataclass

from fastproj.settings.checkers import File, OrNull
from fastproj.settings.run import RUN, Settings
from fastproj.settings.schema import Schema, setting


@dataclass(frozen=True)
class Embed:
    """which set, and where its features go"""

    data: str | None = setting(OrNull(File()), "beton to embed; null: data.train")
    out: str | None = setting(OrNull(File()), "file to write, .npz or .safetensors")


@dataclass(frozen=True)
class EmbedSettings(Settings):
    """A run's settings, and those of ``fastproj embed``."""

    embed: Embed


EMBED = Schema(
    EmbedSettings,
    readers={
        **RUN.readers,
        "embed": (
            *("run.device", "views.size", "embed"),
            *("data.train", "data.engine", "data.workers", "data.memory_share"),
            *(f"eval.{name}" for name in ("checkpoint", "encoder", "normalize", "depths", "size")),
            *(f"eval.{name}" for name in ("crops", "crop_fraction", "batch_size")),
        ),
    },
)
