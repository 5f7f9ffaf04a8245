"""The public names. ``__init__.py`` imports each from here when it is first used."""

from .augment.draw import View as View
from .augment.views import Augmentation as Augmentation
from .core.errors import InputError as InputError
from .core.errors import SettingError as SettingError
from .data.beton import Beton as Beton
from .data.beton import open_beton as open_beton
from .evaluation.features import Features as Features
from .evaluation.features import features as features
from .evaluation.probes.common import ProbeResult as ProbeResult
from .evaluation.probes.least_squares import ridge as ridge
from .evaluation.probes.neighbors import knn as knn
from .evaluation.probes.perceptron import mlp as mlp
from .evaluation.probes.regression import logistic as logistic
from .evaluation.probes.sgd import linear_probe as linear_probe
from .evaluation.probes.shots import few_shot as few_shot
from .loaders.base import Batch as Batch
from .loaders.base import Loader as Loader
from .loaders.boxes import Center as Center
from .loaders.boxes import Crop as Crop
from .loaders.boxes import Five as Five
from .loaders.choose import open_loader as open_loader
from .models.encoders import build_encoder as build_encoder
from .models.projector import build_projector as build_projector
from .objective.losses import barlow_twins as barlow_twins
from .objective.losses import nt_xent as nt_xent
from .objective.losses import vicreg as vicreg
from .objective.methods import Objective as Objective
from .objective.methods import build_objective as build_objective
from .objective.penalties import matrix_information as matrix_information
from .prepare.encode import Store as Store
from .prepare.sources import Source as Source
from .prepare.sources import open_sources as open_sources
from .prepare.splits import write_beton as write_beton
from .training.learner import Learner as Learner
from .training.optim import build_optimizer as build_optimizer
from .training.trainer import Trainer as Trainer

__version__: str
