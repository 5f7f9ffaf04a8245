"""What every loss keeps: world size, order, precision, targets, and the shapes it refuses."""

from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastproj.core import dist
from fastproj.core.errors import InputError
from fastproj.objective import losses
from tests.support.ranks import on_ranks

TAU = 0.2
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Sample(NamedTuple):
    """What the losses see of B images: trained views, targets, labels; and a queue of keys."""

    x: torch.Tensor  # (B, 3, d)
    t: torch.Tensor  # (B, 2, d)
    labels: torch.Tensor  # (B,)
    queue: torch.Tensor  # (K, d)

    def images(self, which):
        return Sample(self.x[which], self.t[which], self.labels[which], self.queue)

    def to(self, dtype):
        return Sample(self.x.to(dtype), self.t.to(dtype), self.labels, self.queue.to(dtype))


def sample(batch=6, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x, t = torch.randn(batch, 5, width, generator=generator, dtype=torch.float64).split([3, 2], 1)
    labels = torch.randint(-1, 3, (batch,), generator=generator)
    return Sample(x, t, labels, torch.randn(7, width, generator=generator, dtype=torch.float64))


def assigned(s):
    """Codes (2, B, K) of this rank's images, solved over those of all ranks."""
    mine = dist.rank() * len(s.t) + torch.arange(len(s.t), device=s.t.device)
    scores = dist.gather(s.t).unbind(1)
    return torch.stack([losses.sinkhorn(view, 0.5, 3)[mine] for view in scores])


LOSSES = {
    "nt_xent": lambda s: losses.nt_xent(s.x[:, 0], s.x[:, 1], TAU),
    "sup_con": lambda s: losses.sup_con(s.x.transpose(0, 1), s.labels, TAU),
    "info_nce": lambda s: losses.info_nce(s.x[:, 0], s.t[:, 1], s.queue, TAU),
    "moco_v3": lambda s: losses.moco_v3(s.x[:, 0], s.x[:, 1], s.t[:, 0], s.t[:, 1], TAU),
    "byol": lambda s: losses.byol(s.x[:, 0], s.x[:, 1], s.t[:, 0], s.t[:, 1]),
    "simsiam": lambda s: losses.simsiam(s.x[:, 0], s.x[:, 1], s.t[:, 0], s.t[:, 1]),
    "barlow_twins": lambda s: losses.barlow_twins(s.x[:, 0], s.x[:, 1], 0.3, 0.7),
    "vicreg": lambda s: losses.vicreg(s.x[:, 0], s.x[:, 1], 2.0, 3.0, 0.5),
    "swav": lambda s: losses.swav(s.x.transpose(0, 1), assigned(s), TAU),
}
every_loss = pytest.mark.parametrize("name", LOSSES)
half = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def with_gradient(name, s, autocast=None):
    x = s.x.detach().requires_grad_()
    # Not around backward: torch lets the caller's autocast reach it, and asks not to.
    with torch.autocast(x.device.type, dtype=autocast, enabled=autocast is not None):
        loss = LOSSES[name](s._replace(x=x))
    loss.backward()
    return loss.detach(), x.grad


@every_loss
def test_the_order_of_images_does_not_matter(name):
    s = sample()
    for seed in range(5):
        order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
        (loss, gradient), (shuffled, other) = (with_gradient(name, p) for p in (s, s.images(order)))
        torch.testing.assert_close(shuffled, loss, **EXACT)
        torch.testing.assert_close(other, gradient[order], **EXACT)


@every_loss
def test_which_image_a_view_is_of_matters(name):
    s = sample()
    loss = LOSSES[name](s)
    others = s.images(torch.arange(6).roll(1))
    one_view = torch.cat([others.x[:, :1], s.x[:, 1:]], 1)
    assert abs(LOSSES[name](s._replace(x=one_view)) - loss) > 1e-3
    if name in {"info_nce", "moco_v3", "byol", "simsiam", "swav"}:
        assert abs(LOSSES[name](s._replace(t=others.t)) - loss) > 1e-3


@half
@every_loss
def test_half_precision_is_lifted_to_float32(name, dtype):
    rough = sample(64, 32).to(dtype)
    loss, gradient = with_gradient(name, rough)
    wanted, exact = with_gradient(name, rough.to(torch.float32))
    assert loss.dtype == torch.float32 and gradient.dtype == dtype
    assert torch.equal(loss, wanted)
    torch.testing.assert_close(gradient.float(), exact, rtol=2e-2, atol=1e-5)


@half
@every_loss
def test_autocast_changes_nothing(name, dtype):
    s = sample(64, 32).to(torch.float32)
    inside = with_gradient(name, s, autocast=dtype)
    for a, b in zip(inside, with_gradient(name, s), strict=True):
        assert torch.equal(a, b)


@every_loss
def test_long_rows_stay_finite(name):
    """Norms and products beyond float16's 65,504. VICReg's gradient grows with the third power of
    the rows and leaves float16 itself: what comes back in float32 does not."""
    rough = sample(64, 32)
    rough = Sample(rough.x * 1e4, rough.t * 1e4, rough.labels, rough.queue * 1e4)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        loss, gradient = with_gradient(name, rough.to(dtype).to(torch.float32))
        assert loss.isfinite() and gradient.isfinite().all()
        if name != "vicreg":
            assert with_gradient(name, rough.to(dtype))[1].isfinite().all()


@every_loss
def test_rows_of_zeros_and_a_collapsed_batch_stay_harmless(name):
    s = sample().to(torch.float32)
    x, t = s.x.clone(), s.t.clone()
    x[0], t[1], x[3, 0], t[3] = 0, 0, 0, 0
    for broken in (s._replace(x=x, t=t), s._replace(x=x[:1].expand_as(x), t=t[:1].expand_as(t))):
        loss, gradient = with_gradient(name, broken)
        assert loss.isfinite() and gradient.norm() < 100


@every_loss
def test_targets_get_no_gradient(name):
    s = sample()
    t, queue = s.t.clone().requires_grad_(), s.queue.clone().requires_grad_()
    LOSSES[name](s._replace(x=s.x.clone().requires_grad_(), t=t, queue=queue)).backward()
    assert t.grad is None or not t.grad.any()
    assert queue.grad is None


def test_codes_get_no_gradient():
    s = sample()
    codes = assigned(s).requires_grad_()
    losses.swav(s.x.transpose(0, 1).requires_grad_(), codes, TAU).backward()
    assert codes.grad is None


def test_the_widest_argument_decides_and_keywords_count():
    s = sample().to(torch.float32)
    queries, keys, queue = s.x[:, 0], s.t[:, 0], s.queue
    wide = losses.info_nce(queries.half(), keys, queue=queue.double(), temperature=TAU)
    assert wide.dtype == torch.float64
    narrow = losses.info_nce(queries.half(), keys.half(), queue=queue.half(), temperature=TAU)
    assert narrow.dtype == torch.float32


@every_loss
def test_one_graph_holds_the_loss(name):
    """No graph break, and the same numbers, gradient included."""
    torch.compiler.reset()
    s = sample()
    x = s.x.clone().requires_grad_()
    compiled = torch.compile(LOSSES[name], fullgraph=True, backend="aot_eager")
    loss = compiled(s._replace(x=x))
    loss.backward()
    for ours, wanted in zip((loss.detach(), x.grad), with_gradient(name, s), strict=True):
        torch.testing.assert_close(ours, wanted, **EXACT)


@pytest.mark.gpu
@every_loss
def test_the_gpu_agrees_and_is_not_waited_for(name):
    rough = sample(64, 32).to(torch.float16)
    on_gpu = Sample(*(part.cuda() for part in rough))
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, gradient = with_gradient(name, on_gpu, autocast=torch.float16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    wanted, exact = with_gradient(name, rough)
    torch.testing.assert_close(loss.cpu(), wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient.cpu(), exact, rtol=2e-2, atol=1e-4)


Z, OTHER, FLAT = torch.randn(4, 3), torch.randn(5, 3), torch.randn(4)
LABELS, VIEWS, CODES = torch.zeros(4, dtype=torch.int64), torch.randn(3, 4, 3), torch.rand(2, 4, 3)
REFUSED = {
    "nt_xent": [(Z, OTHER, TAU), (FLAT, FLAT, TAU)],
    "sup_con": [(Z, LABELS, TAU), (VIEWS, LABELS[:3], TAU), (VIEWS[:1], LABELS, TAU)],
    "info_nce": [(Z, OTHER, Z, TAU), (Z, Z, Z[:, :2], TAU), (Z, Z, FLAT, TAU), (Z, Z, Z[:0], TAU)],
    "moco_v3": [(Z, Z, Z, OTHER, TAU), (FLAT, FLAT, FLAT, FLAT, TAU)],
    "byol": [(Z, Z, OTHER, Z), (Z, Z, Z, Z[:, :2])],
    "simsiam": [(Z, OTHER, Z, Z), (FLAT, FLAT, FLAT, FLAT)],
    "barlow_twins": [(Z, OTHER, 1.0, 1.0), (FLAT, FLAT, 1.0, 1.0), (Z[:1], Z[:1], 1.0, 1.0)],
    "vicreg": [(Z, OTHER, 1.0, 1.0, 1.0), (VIEWS, VIEWS, 1.0, 1.0, 1.0), (Z[:1], Z[:1], 1, 1, 1)],
    "swav": [(VIEWS[:1], CODES, TAU), (VIEWS, VIEWS, TAU), (VIEWS, CODES[:, :3], TAU)],
    "sinkhorn": [(VIEWS, 0.05, 3), (FLAT, 0.05, 3)],
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_shapes_are_an_input_error_of_one_line(name):
    for arguments in REFUSED[name]:
        with pytest.raises(InputError, match=rf"^{name} needs .*, not \([\d, ]+\)") as error:
            getattr(losses, name)(*arguments)
        assert "\n" not in str(error.value)


# World size. Two Gloo processes on the CPU, the second with half of the global batch. BatchNorm is
# left out: torch's SyncBatchNorm refuses tensors that are not on a GPU.
WORLD, SHARE = 2, 5


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 16), nn.Tanh(), nn.Linear(16, 5)).double()


def shared() -> Sample:
    """Both ranks have classes in common, and an unlabeled image in the same place."""
    return sample(WORLD * SHARE, seed=3)._replace(
        labels=torch.tensor([0, 1, -1, 0, 2, 1, -1, -1, 0, 2])
    )


def run(name: str, model: nn.Module, s: Sample) -> dict:
    """Loss, gradient of each row, and of the model through ``model``."""
    projected = model(s.x.flatten(0, 1)).unflatten(0, s.x.shape[:2])
    LOSSES[name](s._replace(x=projected)).backward()
    loss, per_row = with_gradient(name, s._replace(x=projected))
    model = torch.cat([p.grad.flatten() for p in model.parameters()])
    return {"loss": loss, "mean": dist.mean(loss), "rows": per_row, "model": model}


def on_one_share() -> dict:
    s = shared().images(slice(dist.rank() * SHARE, (dist.rank() + 1) * SHARE))
    return {name: run(name, DistributedDataParallel(network()), s) for name in LOSSES}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return on_ranks(WORLD, on_one_share, tmp_path_factory.mktemp("ranks"))


@every_loss
def test_two_ranks_equal_one(name, ranks):
    alone = run(name, network(), shared())
    assert alone["model"].norm() > 1e-3
    for seen in ranks:
        torch.testing.assert_close(seen[name]["mean"], alone["loss"], **EXACT)
        torch.testing.assert_close(seen[name]["model"], alone["model"], **EXACT)
    # Before DDP's mean over ranks, each rank holds W times its rows' share of the gradient.
    per_row = torch.cat([seen[name]["rows"] for seen in ranks]) / WORLD
    torch.testing.assert_close(per_row, alone["rows"], **EXACT)
    # A loss over a rank's own anchors differs between ranks; statistics of all images do not.
    losses_alike = torch.equal(ranks[0][name]["loss"], ranks[1][name]["loss"])
    assert losses_alike == (name == "barlow_twins")


def test_each_share_alone_is_another_loss(ranks):
    """What the ranks are told of one another matters, for those that see others' samples."""
    halves = [shared().images(slice(k * SHARE, (k + 1) * SHARE)) for k in range(WORLD)]
    for name in LOSSES:
        apart = sum(run(name, network(), half)["loss"] for half in halves) / WORLD
        local = name in {"info_nce", "byol", "simsiam"}
        assert torch.isclose(apart, ranks[0][name]["mean"], rtol=1e-6) == local, name
