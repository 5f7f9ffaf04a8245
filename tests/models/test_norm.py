"""Batch norm over ranks: two Gloo processes compute what one does with the whole batch."""

import copy

import torch
from torch import nn

from fastproj.core import dist
from fastproj.models.norm import SyncBatchNorm, synchronize
from tests.support.ranks import on_ranks

WORLD, SHARE = 2, 3


def network() -> nn.Sequential:
    torch.manual_seed(0)
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(36, 5)]
    return nn.Sequential(*layers, nn.BatchNorm1d(5, affine=False)).double()


def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(WORLD * SHARE, 2, 5, 5, generator=generator, dtype=torch.float64) * 3 + 1


def loss(y: torch.Tensor) -> torch.Tensor:
    """Its mean over equal shares is that of the whole."""
    return (y**3 + y.sin()).mean()


def on_one_share() -> dict:
    model = network()
    synchronize(model)
    x = images().chunk(WORLD)[dist.rank()].requires_grad_()
    value = loss(model(x))
    value.backward()
    return {
        "loss": dist.mean(value),
        "x": x.grad,
        "gradients": [dist.mean(p.grad) for p in model.parameters()],
        "buffers": dict(model.named_buffers()),
        "eval": model.eval()(x.detach()),
    }


def test_two_ranks_equal_one(tmp_path):
    model, x = network(), images().requires_grad_()
    value = loss(model(x))
    value.backward()
    exact = {"rtol": 1e-9, "atol": 1e-11}
    ranks = on_ranks(WORLD, on_one_share, tmp_path)
    for seen in ranks:
        torch.testing.assert_close(seen["loss"], value.detach(), **exact)
        torch.testing.assert_close(seen["gradients"], [p.grad for p in model.parameters()], **exact)
        torch.testing.assert_close(seen["buffers"], dict(model.named_buffers()), **exact)
    # As dist.gather's, the gradient of a rank's samples is W times their share.
    gathered = torch.cat([seen["x"] for seen in ranks]) / WORLD
    torch.testing.assert_close(gathered, x.grad, **exact)
    evaluated = torch.cat([seen["eval"] for seen in ranks])
    torch.testing.assert_close(evaluated, model.eval()(x.detach()), **exact)


def test_alone_it_is_plain_batch_norm_under_the_same_names():
    plain = network()
    synced = copy.deepcopy(plain)
    weight = synced[1].weight
    synchronize(synced)
    assert isinstance(synced[1], SyncBatchNorm)
    assert isinstance(synced[4], SyncBatchNorm)
    assert synced[1].weight is weight
    assert synced.state_dict().keys() == plain.state_dict().keys()
    for training in (True, False):
        ours, theirs = synced.train(training)(images()), plain.train(training)(images())
        assert torch.equal(ours, theirs)
    assert torch.equal(synced[1].running_var, plain[1].running_var)
    assert synced[1].num_batches_tracked == 1
