"""Every setting, declared once (here) and read strictly (``read.py``).

fastargs' ``Section`` and ``Param`` hold the declarations. Its own readers are not used: they ignore
unknown keys, take ``False`` for true, cut 0.5 to 0 and exit 0 on an error. Here a file and the
command line both arrive as text with a place, and one checker a setting turns text into a value.
"""

from fastargs import Config, Param, Section

from fastproj.settings.checkers import (
    Bool,
    Choice,
    File,
    Float,
    Floats,
    Int,
    Key,
    OrNull,
    Schedule,
    Text,
)
from fastproj.settings.read import Settings, load

__all__ = ["BENCH", "DEMO", "PREPARE", "RUN", "Settings", "load"]

_share = Float(low=0, high=1)
_positive = Float(above=0)
_not_negative = Float(low=0)
_count = Int(low=1)
_chances = OrNull(Floats(low=0, high=1))
_strengths = OrNull(Floats(low=0))
_schedule = Schedule(low=0)  # of a penalty's weight
_signed_schedule = Schedule()

RUN = Config()
Section("run", "the run and its folder", RUN).params(
    name=Param(Text(), "folder of this run under run.dir; with --cfg the file's stem", "run"),
    dir=Param(File(), "folder that holds the runs", "runs"),
    seed=Param(Int(0, 2**32 - 1), "fixes weights, order, crops and views", 0),
    device=Param(Choice("auto", "cpu", "cuda"), "where to compute; auto: cuda if there", "auto"),
    resume=Param(Bool(), "go on from the newest checkpoint, on the next sample", False),
)
Section("data", "the betons and how they are read", RUN).params(
    train=Param(File(), "beton to pre-train and to train probes on", required=True),
    val=Param(OrNull(File()), "beton on which probes are scored"),
    engine=Param(
        Choice("auto", "resident", "stream", "dali", "reference"), "loader engine", "auto"
    ),
    workers=Param(Int(0), "loader threads; 0: the cores, shared by a machine's ranks", 0),
    memory_share=Param(_share, "resident if the set fits this share of free memory", 0.5),
)
Section(
    "views", "crops and augmentation; null takes the preset's value, a list one a view", RUN
).params(
    preset=Param(Choice("simclr", "barlow", "byol"), "published augmentation", "simclr"),
    size=Param(Int(8), "side of a crop, pixels", 32),
    size_start=Param(
        OrNull(Int(8)),
        "side in the first quarter of the run, growing to views.size in the last; it changes the"
        " recipe; null: views.size throughout",
    ),
    scale_min=Param(Float(above=0, high=1), "smallest crop, share of the image's area", 0.08),
    scale_max=Param(Float(above=0, high=1), "largest crop, share of the image's area", 1.0),
    flip=Param(_chances, "probability of a horizontal flip"),
    jitter=Param(_chances, "probability of colour jitter"),
    brightness=Param(_strengths, "jitter strength, factor 1 ± this"),
    contrast=Param(_strengths, "jitter strength, factor 1 ± this"),
    saturation=Param(_strengths, "jitter strength, factor 1 ± this"),
    hue=Param(OrNull(Floats(low=0, high=0.5)), "jitter strength, ± this share of the circle"),
    gray=Param(_chances, "probability of grayscale"),
    blur=Param(_chances, "probability of Gaussian blur"),
    solarise=Param(_chances, "probability of solarisation"),
    local_crops=Param(Int(0), "small crops beside the two large ones (swav's multi-crop)", 0),
    local_size=Param(Int(8), "side of a small crop, pixels", 96),
    local_scale_min=Param(Float(above=0, high=1), "smallest small crop, share of the area", 0.05),
    local_scale_max=Param(Float(above=0, high=1), "largest small crop, share of the area", 0.14),
)
Section("model", "the encoder", RUN).params(
    encoder=Param(
        Choice("resnet18", "resnet34", "resnet50", "resnet_small"), "architecture", "resnet18"
    ),
    stem=Param(Choice("cifar", "imagenet"), "first layers: small images or large", "cifar"),
    sync_bn=Param(Bool(), "batch statistics over all ranks", False),
)
Section("projector", "the head between the encoder and the objective", RUN).params(
    kind=Param(Key("fastproj.projector", "PROJECTORS"), "architecture", "mlp"),
    hidden=Param(_count, "width of hidden layers, units", 2048),
    out=Param(_count, "width of the output, units", 256),
    depth=Param(_count, "linear layers in an mlp", 2),
    batch_norm=Param(Bool(), "batch normalisation after an mlp's hidden layers", False),
    dropout=Param(Float(low=0, high=0.99), "share of hidden units dropped", 0.0),
    latents=Param(OrNull(_count), "width of a sparse last layer; null: a linear one"),
    k=Param(_positive, "latents kept a row: a count, or below 1 a share of them", 0.01),
    levels=Param(OrNull(Int(2)), "values a discretised output takes; null: continuous"),
)
Section("matrix_information", "penalty: matrix information of features and output", RUN).params(
    weight=Param(_schedule, "0: none", (0.0,)),
    alpha=Param(_positive, "order of the matrix entropy; 1: von Neumann's", 2.0),
)
Section("sparsehead", "penalty: group sparsity of the projector", RUN).params(
    weight=Param(_schedule, "0: none", (0.0,)),
    groups=Param(
        Choice("columns", "rows", "activations"),
        "of the first weight: columns (features), rows; or hidden activations",
        "columns",
    ),
    scale_free=Param(Bool(), "norm over norm, which no scaling of the weights changes", True),
    proximal=Param(Bool(), "weight · sum of norms, by a proximal step after each update", False),
)
Section("superfluous", "penalty: what one view says beyond the other (MIB bound)", RUN).params(
    noise=Param(Choice("none", "fixed", "learned"), "of the stochastic features", "none"),
    sigma=Param(_positive, "standard deviation of the noise, or where it starts", 0.1),
    lambda_a=Param(_signed_schedule, "weight of KL(view 1, view 2); may be negative", (0.0,)),
    lambda_b=Param(_signed_schedule, "weight of KL(view 2, view 1); may be negative", (0.0,)),
)
Section("objective", "the loss on projected views", RUN).params(
    name=Param(Key("fastproj.objective", "OBJECTIVES"), "loss", "simclr"),
    temperature=Param(_positive, "divides similarities: simclr, moco, swav, supcon", 0.2),
    off_diagonal=Param(_not_negative, "barlow: weight of the off-diagonal entries", 0.0051),
    scale=Param(_positive, "barlow: factor of the whole loss", 0.1),
    invariance=Param(_not_negative, "vicreg: weight of the distance", 25.0),
    variance=Param(_not_negative, "vicreg: weight of the variance hinge", 25.0),
    covariance=Param(_not_negative, "vicreg: weight of the covariances", 1.0),
    predictor_hidden=Param(_count, "byol, simsiam, mocov3: width of the predictor", 4096),
    momentum=Param(_share, "byol, moco: of the momentum encoder, at the first step", 0.99),
    momentum_end=Param(_share, "byol, moco: the same at the last step, along a cosine", 1.0),
    queue=Param(Int(0), "mocov2plus, swav: samples remembered; 0: none", 0),
    queue_epoch=Param(Int(0), "swav: first epoch that uses the queue, from 0", 15),
    prototypes=Param(_count, "swav: prototypes", 3000),
    sinkhorn_steps=Param(_count, "swav: iterations", 3),
    epsilon=Param(_positive, "swav: entropy of the assignment", 0.05),
    freeze_epochs=Param(Int(0), "swav: epochs with fixed prototypes", 1),
)
Section("optim", "optimiser and schedule", RUN).params(
    optimiser=Param(Choice("lars", "sgd", "adamw"), "update rule", "lars"),
    lr=Param(_positive, "peak learning rate for 256 samples; scaled by batch_size / 256", 0.4),
    batch_size=Param(Int(2), "samples a step, over all ranks", 256),
    accumulate=Param(_count, "parts a step is split into, each with its own negatives", 1),
    epochs=Param(_count, "passes over the set", 200),
    warmup_epochs=Param(_not_negative, "linear rise of the learning rate, epochs", 10.0),
    warmup_lr=Param(_not_negative, "learning rate at step 0", 3e-5),
    momentum=Param(Float(low=0, high=1), "of lars and sgd", 0.9),
    weight_decay=Param(_not_negative, "on weights, never on biases and norms", 1e-4),
    trust=Param(_positive, "trust coefficient of lars", 0.02),
    probe_lr=Param(_positive, "learning rate of the online probe", 0.1),
)
Section("train", "precision, logging and checkpoints", RUN).params(
    precision=Param(
        Choice("auto", "float32", "bfloat16", "float16"), "auto: float32 on a CPU", "auto"
    ),
    compile=Param(
        Choice("auto", "true", "false", "graphs"),
        "torch.compile; auto: on a GPU; graphs: CUDA graphs as well, for one GPU (not measured)",
        "auto",
    ),
    log_every=Param(_count, "steps between logged steps", 10),
    checkpoint_every=Param(_count, "epochs between checkpoints", 1),
    keep=Param(_count, "newest checkpoints kept", 2),
    stop_after=Param(OrNull(_count), "leave after this many steps, as if interrupted"),
)
Section("eval", "frozen features and their probes", RUN).params(
    checkpoint=Param(File(), "checkpoint file, or last: the run's newest", "last"),
    size=Param(OrNull(Int(8)), "side of the centre crop, pixels; null: views.size"),
    share=Param(Float(above=0, high=1), "centre crop, share of the shorter side", 1.0),
    baselines=Param(Bool(), "probe raw pixels and a random encoder as well", False),
    batch_size=Param(_count, "images in one forward pass", 512),
    learning_rates=Param(Floats(above=0), "grid of the linear probe", (0.01, 0.03, 0.1, 0.3)),
    weight_decays=Param(Floats(low=0), "grid of the linear probe", (1e-4, 1e-3, 1e-2, 1e-1)),
    epochs=Param(_count, "passes of the linear probe over the features", 100),
    probe_batch=Param(_count, "samples a step of the linear probe", 256),
    holdout=Param(Float(above=0, high=0.9), "share of train that picks from the grid", 0.1),
    knn_k=Param(_count, "neighbours that vote", 20),
    knn_temperature=Param(_positive, "weight of a vote: exp(cosine / this)", 0.07),
)

PREPARE = Config()
Section("data", "raw images to a beton and its manifest", PREPARE).params(
    dataset=Param(
        OrNull(
            Choice("cifar10", "cifar100", "stl10", "imagenet", "imagenet100", "folder", "digits")
        ),
        "what to read; needed unless data.verify is given",
    ),
    root=Param(OrNull(File()), "folder of the raw images; digits need none"),
    out=Param(OrNull(File()), "folder to write <split>.beton and <split>.json into"),
    split=Param(Choice("all", "train", "val", "unlabeled"), "all: every split", "all"),
    download=Param(Bool(), "fetch the set into data.root first (cifar10, cifar100, stl10)", False),
    store=Param(Choice("auto", "raw", "jpeg", "square"), "auto: raw if small, or jpeg", "auto"),
    quality=Param(Int(1, 100), "JPEG quality", 90),
    max_resolution=Param(OrNull(_count), "longest side in the jpeg store, pixels; null: as is"),
    side=Param(Int(8), "side in the square store, pixels", 160),
    workers=Param(Int(0), "processes; 0: every core this process may use", 0),
    on_error=Param(Choice("stop", "skip"), "at an unreadable file: end, or leave it out", "stop"),
    verify=Param(OrNull(File()), "beton to read whole and compare with its manifest"),
)

BENCH = Config()
Section("bench", "what is measured, and on which images", BENCH).params(
    photos=Param(
        OrNull(File()), "jpeg beton of photographs: decode, loaders, chain, start, growth"
    ),
    squares=Param(OrNull(File()), "square beton of photographs: loaders"),
    small=Param(OrNull(File()), "raw beton of small images: loaders, step, growth"),
    device=Param(Choice("auto", "cpu", "cuda"), "where to compute; auto: cuda if there", "auto"),
    workers=Param(Int(0), "loader threads; 0: every core this process may use", 0),
    repeats=Param(_count, "measured calls, after the warm-up", 5),
    out=Param(File(), "JSON file to write, and beside it a picture", "bench-results/bench.json"),
)

DEMO = Config()
Section("demo", "the whole way through on a small set", DEMO).params(
    dataset=Param(Choice("digits", "cifar10"), "cifar10 is downloaded (170 MB)", "digits"),
    data=Param(File(), "folder for raw images and betons", "data"),
    seed=Param(Int(0, 2**32 - 1), "fixes weights, order, crops and views", 0),
)
