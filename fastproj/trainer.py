"""One training run's parts, one step of it, and all that a checkpoint keeps of it."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastproj import checkpoint, dist
from fastproj.build import (
    build_crops,
    build_learner,
    build_optimised,
    build_views,
    penalty_weights,
)
from fastproj.device import choose_precision
from fastproj.diagnostics import Diagnostics
from fastproj.errors import InputError
from fastproj.learner import Step
from fastproj.loaders import Batch, open_loader
from fastproj.machine import cores
from fastproj.manifest import open_beton
from fastproj.norm import synchronise
from fastproj.optim import build_optimiser, cosine, linear, set_rates
from fastproj.regulariser import proximal_step_
from fastproj.settings import Settings

# A run may be resumed on another machine, with other logging; nothing else may change under it.
FREE_TO_CHANGE = ("run.name", "run.dir", "run.device", "run.resume", "data.", "train.", "eval.")


class Trainer:
    """A run: what it is made of, how one step goes, and what a checkpoint keeps of it."""

    def __init__(self, settings: Settings, rank: dist.Rank, device: torch.device) -> None:
        self.settings, self.rank, self.device = settings, rank, device
        optim = settings.optim
        self.beton = open_beton(settings.data.train)
        classes = len(self.beton.classes)
        if classes < 2:
            raise InputError(f"{self.beton.path} has {classes} class: probing needs at least 2")
        if optim.batch_size % (rank.world * optim.accumulate):
            raise InputError(
                f"optim.batch_size {optim.batch_size} cannot be split over {rank.world} rank(s) "
                f"and {optim.accumulate} part(s): make it a multiple of their product"
            )
        self.graphs = settings.train.compile == "graphs"
        if self.graphs and (rank.world > 1 or device.type != "cuda"):
            raise InputError(
                f"train.compile graphs is for one GPU, not {rank.world} rank(s) on {device.type}: "
                "give --train.compile true"
            )
        crops = build_crops(settings, 0)
        self.views = [views.to(device) for views in build_views(settings, self.beton, crops)]
        self.learner = build_learner(settings, classes).to(device)
        self.learner.to(memory_format=torch.channels_last)
        self.weights = penalty_weights(settings)
        self.loader = open_loader(
            self.beton,
            crops,
            optim.batch_size // rank.world,
            device=device,
            engine=settings.data.engine,
            seed=settings.run.seed,
            rank=rank.rank,
            world=rank.world,
            workers=settings.data.workers or max(1, cores() // rank.local_world),
            memory_share=settings.data.memory_share,
        )
        self.precision = choose_precision(settings.train.precision, device)
        self.scaler = torch.amp.GradScaler(
            device.type, enabled=self.precision is torch.float16 and device.type == "cuda"
        )
        self.optimiser = build_optimiser(
            optim.optimiser,
            build_optimised(settings, self.learner),
            lr=optim.lr * optim.batch_size / 256,
            momentum=optim.momentum,
            trust=optim.trust,
        )
        self.generator = torch.Generator(device)
        chosen, groups = settings.objective, settings.sparsehead.groups
        self.diagnostics = Diagnostics(
            self.learner.projector,
            chosen.name,
            chosen.temperature,
            chosen.off_diagonal,
            chosen.scale,
            "rows" if groups == "rows" else "columns",
        )
        self.step = 0
        self.model = self._wrap()

    def _wrap(self) -> nn.Module:
        """Compile in place (so that checkpoint keys stay clean), then DDP where there are ranks."""
        if self.settings.model.sync_bn and self.rank.world > 1:
            synchronise(self.learner)
        wish = self.settings.train.compile
        if wish in ("true", "graphs") or (wish == "auto" and self.device.type == "cuda"):
            # One graph for all. On a CPU (ResNet-10, 128 images, 20 interleaved steps) 1.08 times
            # as fast as eager; the encoder alone 1.04, block by block 0.80 (ResNet-18, 32 images:
            # 0.96, 1.02, 0.90, with as much noise). A second start traces and loads for 4 s; 5; 7.
            # A batch's shape is fixed but for crops that grow.
            self.learner.compile(dynamic=False, mode="reduce-overhead" if self.graphs else None)
            for views in self.views:
                views.compile()  # for a GPU: a CPU has augment
        if self.rank.world == 1:
            return self.learner
        ids = [self.rank.local] if self.device.type == "cuda" else None
        # Each rank keeps its own buffers: those of rank 0 are the ones that are saved.
        return DistributedDataParallel(self.learner, device_ids=ids, broadcast_buffers=False)

    @property
    def total_steps(self) -> int:
        return self.settings.optim.epochs * len(self.loader)

    def begin_epoch(self, epoch: int) -> None:
        """To be called before the first step of an epoch, and on resuming inside one."""
        self.loader.groups = tuple(build_crops(self.settings, epoch))
        self.learner.objective.begin_epoch(epoch)

    def train_step(self, batch: Batch) -> dict[str, Tensor]:
        """One update from this rank's batch.

        Returns scalars still on the device: ``loss`` (all terms weighed), ``online_probe`` (share
        of right answers) and, where there are penalties, every unweighted term.
        """
        optim, steps = self.settings.optim, len(self.loader)
        warmup = min(optim.warmup_epochs * steps, self.total_steps)
        set_rates(self.optimiser, self.step, self.total_steps, warmup, optim.warmup_lr)
        self._seed()
        if self.graphs:  # what the last step's graphs gave back may be written over from here on
            torch.compiler.cudagraph_mark_step_begin()
        done: list[tuple[Step, dict[str, Tensor]]] = []
        for views, labels in zip(
            self._augment(batch), batch.labels.chunk(optim.accumulate), strict=True
        ):
            # Ranks add up their gradients once a step, in the last part's backward pass.
            if len(done) + 1 < optim.accumulate and isinstance(self.model, DistributedDataParallel):
                with self.model.no_sync():
                    done.append(self._part(views, labels))
            else:
                done.append(self._part(views, labels))
        self.learner.objective.before_update()
        self.scaler.step(self.optimiser)
        self.scaler.update()
        self.optimiser.zero_grad()
        self._after_update([step for step, _ in done])
        self.step += 1
        return {name: torch.stack([told[name] for _, told in done]).mean() for name in done[0][1]}

    def _seed(self) -> None:
        """One address a step and rank: a resumed run draws what it would have drawn."""
        address = [self.settings.run.seed, self.step, self.rank.rank]
        views, rest = np.random.SeedSequence(address).generate_state(2).tolist()
        self.generator.manual_seed(views)
        torch.manual_seed(rest)  # for dropout and the noise of stochastic features

    @torch.no_grad()
    def _augment(self, batch: Batch) -> list[tuple[Tensor, ...]]:
        """The views of each crop size, cut along the batch into ``optim.accumulate`` parts."""
        parts: list[list[Tensor]] = []
        for views, crops in zip(self.views, batch.crops, strict=True):
            params = views.sample(len(batch.labels), self.generator)
            by_view = views(crops, params).unflatten(0, (len(views.views), -1))
            parts.append(
                [
                    part.flatten(0, 1).contiguous(memory_format=torch.channels_last)
                    for part in by_view.chunk(self.settings.optim.accumulate, 1)
                ]
            )
        return list(zip(*parts, strict=True))

    def _part(self, views: tuple[Tensor, ...], labels: Tensor) -> tuple[Step, dict[str, Tensor]]:
        """Forward and backward of one part of a step."""
        with torch.autocast(
            self.device.type, self.precision, enabled=self.precision is not torch.float32
        ):
            step: Step = self.model(views, labels)
        loss = step.terms["objective"]
        for name, term in step.terms.items():
            if name != "objective":
                loss = loss + linear(self.weights[name], self.step / self.total_steps) * term
        self.scaler.scale((loss + step.probe_loss) / self.settings.optim.accumulate).backward()
        terms = {name: term.detach() for name, term in step.terms.items()}
        told = terms if len(terms) > 1 else {}
        return step, {"loss": loss.detach(), "online_probe": step.probe_hits, **told}

    def _after_update(self, parts: list[Step]) -> None:
        """What follows the optimiser once a step, whatever the number of ranks and parts."""
        sparse, chosen = self.settings.sparsehead, self.settings.objective
        if sparse.proximal and "sparsehead" in self.weights:
            # η is the schedule's rate, whatever LARS, AdamW or momentum make of a gradient's.
            weight = linear(self.weights["sparsehead"], self.step / self.total_steps)
            rate = self.optimiser.param_groups[0]["lr"]
            proximal_step_(self.learner.projector.first_weight(), sparse.groups, rate * weight)
        progress = self.step / self.total_steps
        self.learner.update_teacher(cosine(chosen.momentum, chosen.momentum_end, progress))
        # Also a copy of one part: a CUDA graph's own tensors do not outlive its next step.
        features, projections = (
            torch.cat([getattr(part, name) for part in parts], 1)
            for name in ("features", "projections")
        )
        teachers = [part.teacher for part in parts if part.teacher is not None]
        teacher = torch.cat(teachers, 1) if teachers else None
        self.learner.objective.after_update(projections, teacher)
        self.diagnostics.watch(features, projections[: len(features)])

    def state(self) -> dict[str, object]:
        """All that the next step depends on."""
        return {
            "settings": self.settings.flat(),
            "data": self.beton.manifest.content,
            "mean": self.beton.manifest.mean,
            "std": self.beton.manifest.std,
            "step": self.step,
            "epoch": self.loader.cursor[0],
            "cursor": list(self.loader.cursor),
            **{name: part.state_dict() for name, part in self.learner.named_children()},
            "optimiser": self.optimiser.state_dict(),
            "scaler": self.scaler.state_dict(),
        }

    def restore(self, path: Path) -> None:
        """Continue where the checkpoint stands. Raises InputError where it is of another run."""
        state = checkpoint.load(path)
        for name, value in self.settings.flat().items():
            before = state["settings"].get(name)
            if before != value and not name.startswith(FREE_TO_CHANGE):
                raise InputError(
                    f"{path} was made with {name} = {before}, now it is {value}: resume with the "
                    "run's own config.yaml, or start another run with --run.name"
                )
        if state["data"] != self.beton.manifest.content:
            raise InputError(
                f"{path} was trained on other data than {self.beton.path}: resume on that data"
            )
        for name, part in self.learner.named_children():
            part.load_state_dict(state[name])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.step = state["step"]
        self.loader.seek(*state["cursor"])
