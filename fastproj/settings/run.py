"""What train, evaluate, report and export read: a run, section by section."""

from dataclasses import dataclass

from fastproj.settings.checkers import (
    Bool,
    Choice,
    File,
    Float,
    Floats,
    Int,
    Key,
    KeyOrAddress,
    Keys,
    OrNull,
    Schedule,
    Text,
)
from fastproj.settings.evaluation import Eval
from fastproj.settings.schema import Declared, Loaded, Needs, Options, Schema, options, setting

Numbers = tuple[float, ...]

_share = Float(low=0, high=1)
_positive = Float(above=0)
_not_negative = Float(low=0)
_count = Int(low=1)
_chances = OrNull(Floats(low=0, high=1))
_strengths = OrNull(Floats(low=0))
_schedule = Schedule(low=0)  # of a penalty's weight
_signed_schedule = Schedule()
_area = Float(above=0, high=1)

_auto_engine = Needs("data.engine is auto", ("data.engine",), lambda engine: engine == "auto")
_ours = Needs(
    "model.encoder is a name without a colon", ("model.encoder",), lambda name: ":" not in name
)
_theirs = Needs(
    "model.encoder is timm:NAME, torchvision:NAME or package.module:function",
    ("model.encoder",),
    lambda name: ":" in name,
)
_local = Needs("views.local_crops is above 0", ("views.local_crops",), bool)
_latents = Needs("projector.latents is a number", ("projector.latents",), bool)
_information = Needs("matrix_information.weight is above 0", ("matrix_information.weight",), any)
_sparse = Needs("sparsehead.weight is above 0", ("sparsehead.weight",), any)
_noisy = Needs(
    "superfluous.noise is fixed or learned", ("superfluous.noise",), lambda noise: noise != "none"
)
_queue = Needs("objective.queue is above 0", ("objective.queue",), bool)
_warmup = Needs("optim.warmup_epochs is above 0", ("optim.warmup_epochs",), bool)


@dataclass(frozen=True)
class Run:
    """the run and its folder"""

    name: str = setting(
        Text(),
        "folder of this run under run.dir; by default the recipe's name, seed, date and time",
        "run",
    )
    dir: str = setting(File(), "folder that holds the runs", "runs")
    seed: int = setting(Int(0, 2**32 - 1), "fixes weights, order, crops and views", 0)
    device: str = setting(
        Choice("auto", "cpu", "cuda", "mps"),
        "where to compute; auto: cuda if there; mps (Apple) is untested",
        "auto",
    )
    resume: str | None = setting(
        OrNull(File()),
        "folder of a run to go on with: its config.yaml, its newest checkpoint, the next sample;"
        " auto: start the run, or go on with run.name in run.dir",
    )
    timeout: float | None = setting(
        OrNull(_positive),
        "seconds that ranks wait for one another before they name the missing one and end; null:"
        " torch's, 600 on GPUs and 1800 on CPUs",
    )


@dataclass(frozen=True)
class Data:
    """the betons and how they are read"""

    train: str = setting(File(), "beton to pre-train and to train probes on", required=True)
    val: str | None = setting(OrNull(File()), "beton on which probes are scored")
    engine: str = setting(Key("fastproj.loaders:ENGINES", "auto"), "loader engine", "auto")
    workers: int = setting(Int(0), "loader threads; 0: the cores, shared by a machine's ranks", 0)
    memory_share: float = setting(
        _share, "resident if the set fits this share of free memory", 0.5, needs=_auto_engine
    )


@dataclass(frozen=True)
class Views:
    """crops and augmentation; null: the preset's; a list: one per view (a third: small crops)"""

    preset: str = setting(Key("fastproj.augment.draw:PRESETS"), "published augmentation", "simclr")
    size: int = setting(Int(8), "side of a crop, pixels", 32)
    size_start: int | None = setting(
        OrNull(Int(8)),
        "side in the first quarter of the run, growing to views.size in the last; it changes the"
        " recipe; null: views.size throughout",
    )
    scale_min: float = setting(_area, "smallest crop, share of the image's area", 0.08)
    scale_max: float = setting(_area, "largest crop, share of the image's area", 1.0)
    flip_prob: Numbers | None = setting(_chances, "probability of a horizontal flip")
    jitter_prob: Numbers | None = setting(_chances, "probability of color jitter")
    brightness: Numbers | None = setting(_strengths, "jitter strength, factor 1 ± this")
    contrast: Numbers | None = setting(_strengths, "jitter strength, factor 1 ± this")
    saturation: Numbers | None = setting(_strengths, "jitter strength, factor 1 ± this")
    hue: Numbers | None = setting(
        OrNull(Floats(low=0, high=0.5)), "jitter strength, ± this share of the circle"
    )
    gray_prob: Numbers | None = setting(_chances, "probability of grayscale")
    blur_prob: Numbers | None = setting(_chances, "probability of Gaussian blur")
    solarize_prob: Numbers | None = setting(_chances, "probability of solarization")
    local_crops: int = setting(
        Int(0), "small crops beside the two large ones (swav's multi-crop)", 0
    )
    local_size: int = setting(Int(8), "side of a small crop, pixels", 96, needs=_local)
    local_scale_min: float = setting(
        _area, "smallest small crop, share of the area", 0.05, needs=_local
    )
    local_scale_max: float = setting(
        _area, "largest small crop, share of the area", 0.14, needs=_local
    )


@dataclass(frozen=True)
class Model:
    """the encoder"""

    encoder: str = setting(
        KeyOrAddress("fastproj.models:ENCODERS", "timm", "torchvision"), "architecture", "resnet18"
    )
    stem: str = setting(
        Choice("cifar", "imagenet"), "first layers: small images or large", "cifar", needs=_ours
    )
    freeze_patch_embedding: bool = setting(
        Bool(), "leave a ViT's first layer as it was initialized", False, needs=_theirs
    )
    sync_bn: bool = setting(Bool(), "batch statistics over all ranks", False)
    bn_per_view: bool = setting(
        Bool(), "batch statistics of each view on its own, as in most published code", False
    )


@dataclass(frozen=True)
class Projector:
    """the head between the encoder and the objective"""

    kind: str = setting(Key("fastproj.models:PROJECTORS"), "architecture", "mlp")
    options: Options = options(
        "kind",
        hidden=Declared(_count, "width of hidden layers, units", 2048),
        out=Declared(_count, "width of the output, units", 256, also=_latents),
        depth=Declared(_count, "linear layers in an mlp", 2),
        batch_norm=Declared(Bool(), "batch normalization after an mlp's hidden layers", False),
        dropout=Declared(Float(low=0, high=0.99), "share of hidden units dropped", 0.0),
    )
    latents: int | None = setting(
        OrNull(_count), "width of a sparse last layer; null: a linear one"
    )
    k: float = setting(
        _positive,
        "latents kept per sample: a count, or a fraction if below 1",
        0.01,
        needs=_latents,
    )
    levels: int | None = setting(
        OrNull(Int(2)), "values a discretized output takes; null: continuous"
    )
    output_norm: bool = setting(
        Bool(), "batch normalization of the output, without scale and shift", False
    )


@dataclass(frozen=True)
class MatrixInformation:
    """penalty: matrix information of features and output"""

    weight: Numbers = setting(_schedule, "0: none", (0.0,))
    alpha: float = setting(
        _positive, "order of the matrix entropy; 1: von Neumann's", 2.0, needs=_information
    )


@dataclass(frozen=True)
class SparseHead:
    """penalty: group sparsity of the projector"""

    weight: Numbers = setting(_schedule, "0: none", (0.0,))
    groups: str = setting(
        Choice("columns", "rows", "activations"),
        "of the first weight: columns (features), rows; or hidden activations",
        "columns",
        needs=_sparse,
    )
    scale_free: bool = setting(
        Bool(),
        "norm over norm, which no scaling of the weights changes; not in a proximal step",
        True,
        needs=_sparse,
    )
    proximal: bool = setting(
        Bool(),
        "weight · sum of norms, by a proximal step after each update",
        False,
        needs=_sparse,
    )


@dataclass(frozen=True)
class Superfluous:
    """penalty: what one view says beyond the other (MIB bound)"""

    noise: str = setting(Choice("none", "fixed", "learned"), "of the stochastic features", "none")
    sigma: float = setting(
        _positive, "standard deviation of the noise, or where it starts", 0.1, needs=_noisy
    )
    lambda_a: Numbers = setting(
        _signed_schedule, "weight of KL(view 1, view 2); may be negative", (0.0,), needs=_noisy
    )
    lambda_b: Numbers = setting(
        _signed_schedule, "weight of KL(view 2, view 1); may be negative", (0.0,), needs=_noisy
    )


@dataclass(frozen=True)
class Objective:
    """the loss on projected views"""

    name: str = setting(Key("fastproj.objective:OBJECTIVES"), "loss", "simclr")
    options: Options = options(
        "name",
        temperature=Declared(_positive, "divides similarities: simclr, moco, swav, supcon", 0.2),
        off_diagonal=Declared(_not_negative, "barlow: weight of the off-diagonal entries", 0.0051),
        scale=Declared(_positive, "barlow: factor of the whole loss", 0.1),
        invariance=Declared(_not_negative, "vicreg: weight of the distance", 25.0),
        variance=Declared(_not_negative, "vicreg: weight of the variance hinge", 25.0),
        covariance=Declared(_not_negative, "vicreg: weight of the covariances", 1.0),
        predictor_hidden=Declared(_count, "byol, simsiam, mocov3: width of the predictor", 4096),
        predictor_norm=Declared(
            Bool(), "mocov3: batch norm after the predictor, without scale and shift", False
        ),
        momentum=Declared(_share, "byol, moco: of the momentum encoder, at the first step", 0.99),
        momentum_end=Declared(_share, "byol, moco: the same at the last step, along a cosine", 1.0),
        queue=Declared(Int(0), "mocov2plus, swav: samples remembered; 0: none", 0),
        queue_epoch=Declared(
            Int(0), "swav: first epoch that uses the queue, from 0", 15, needs=_queue
        ),
        prototypes=Declared(_count, "swav: prototypes", 3000),
        sinkhorn_steps=Declared(_count, "swav: iterations", 3),
        epsilon=Declared(_positive, "swav: entropy of the assignment", 0.05),
        freeze_epochs=Declared(Int(0), "swav: epochs with fixed prototypes", 1),
        weight_norm=Declared(
            Bool(), "swav: prototypes by weight normalization, not normalized after updates", False
        ),
    )


@dataclass(frozen=True)
class Optim:
    """optimizer and schedule"""

    optimizer: str = setting(Key("fastproj.training:OPTIMIZERS"), "update rule", "lars")
    options: Options = options(
        "optimizer",
        momentum=Declared(Float(low=0, high=1), "of lars and sgd", 0.9),
        trust_coefficient=Declared(_positive, "trust coefficient of lars", 0.02),
    )
    lr: float = setting(
        _positive, "peak learning rate for 256 samples; scaled by batch_size / 256", 0.4
    )
    batch_size: int = setting(Int(2), "samples per step, over all ranks", 256)
    accumulate: int = setting(_count, "parts a step is split into, each with its own negatives", 1)
    epochs: int = setting(_count, "passes over the set", 200)
    warmup_epochs: float = setting(_not_negative, "linear rise of the learning rate, epochs", 10.0)
    warmup_lr: float = setting(_not_negative, "learning rate at step 0", 3e-5, needs=_warmup)
    weight_decay: float = setting(_not_negative, "on weights, never on biases and norms", 1e-4)
    probe_lr: float = setting(_positive, "learning rate of the online probe", 0.1)


@dataclass(frozen=True)
class Train:
    """precision, logging, diagnostics and checkpoints"""

    precision: str = setting(
        Choice("auto", "float32", "bfloat16", "float16"),
        "auto: bfloat16 where it is faster on this processor or GPU, else float32",
        "auto",
    )
    compile: str = setting(
        Choice("auto", "true", "false", "graphs"),
        "torch.compile; auto: on a GPU; graphs: CUDA graphs as well, for one GPU (not measured)",
        "auto",
    )
    log_every: int = setting(_count, "steps between logged steps", 10)
    log_to: tuple[str, ...] | None = setting(
        OrNull(Keys("fastproj.runs:SINKS")),
        "where scalars and pictures go beside metrics.jsonl; null: nowhere else",
    )
    diagnostics_every: int = setting(Int(0), "epochs between diagnostics; 0: never", 1)
    online_every: int = setting(
        Int(0), "epochs between scores of the online probe and of kNN on data.val; 0: never", 0
    )
    checkpoint_every: int = setting(_count, "epochs between checkpoints", 1)
    keep: int = setting(_count, "newest checkpoints kept", 2)
    init_from: str | None = setting(
        OrNull(File()),
        "checkpoint, export or other library's file whose encoder a new run starts from",
    )
    patience: int = setting(
        _count, "seconds for a batch; then the run ends, and says which worker hangs", 300
    )
    stop_after: int | None = setting(
        OrNull(_count), "leave after this many steps, as if interrupted"
    )


@dataclass(frozen=True)
class Trained(Loaded):
    """What every command that trains reads."""

    run: Run


@dataclass(frozen=True)
class Pretrained(Run):
    """the run and its folder"""

    extend: int | None = setting(
        OrNull(Int(1)),
        "raise optim.epochs of the finished run to this: the learning rate jumps to where a run of"
        " so many epochs has it",
        needs=Needs(
            "run.resume names a run", ("run.resume",), lambda resume: resume not in (None, "auto")
        ),
    )


@dataclass(frozen=True)
class Settings(Trained):
    """A run's settings: ``settings.optim.lr``. All of them go into its ``config.yaml``."""

    run: Pretrained
    data: Data
    views: Views
    model: Model
    projector: Projector
    matrix_information: MatrixInformation
    sparsehead: SparseHead
    superfluous: Superfluous
    objective: Objective
    optim: Optim
    train: Train
    eval: Eval


RUN = Schema(
    Settings,
    readers={  # train reads everything: evaluate finds its own part in config.yaml
        "evaluate": ("run.seed", "run.device", "data", "views.size", "eval"),
        "export": ("eval.checkpoint",),
    },
)
