"""Two oracles: the formula in NumPy loops, and plain autograd through ReLU, top-k and a mask."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastproj.bench import heads
from fastproj.bench.alone import alone
from fastproj.core.errors import SettingError
from fastproj.models import sparse
from fastproj.models.sparse import Sparse, count
from fastproj.models.sparse_kernels import STRIDE

# (features, latents, out, k, rows): k above a sixteenth of the latents is computed densely.
SPARSE = [(7, 50, 5, 3, 9), (6, 90, 6, 1, 4), (16, 2000, 8, 100, 33)]
DENSE = [(7, 50, 5, 20, 9), (6, 40, 6, 40, 11), (5, 1, 3, 1, 4)]


def layer(features, latents, out, k, dtype=torch.float64, seed=0) -> Sparse:
    torch.manual_seed(seed)
    head = Sparse(features, latents, out, k).to(dtype)
    torch.nn.init.normal_(head.pre_bias)
    torch.nn.init.normal_(head.decoder)
    return head


def plain(head: Sparse, x: Tensor) -> Tensor:
    code = F.relu((x - head.pre_bias) @ head.encoder.weight.T + head.encoder.bias)
    mask = torch.zeros_like(code).scatter(1, code.topk(head.k).indices, 1.0)
    out = (code * mask) @ head.decoder + head.bias
    return out + head.pre_bias if out.shape == x.shape else out


def loop(head: Sparse, x: Tensor) -> np.ndarray:
    w, e, d, c, b = (
        p.detach().numpy().astype(np.float64)
        for p in (head.encoder.weight, head.encoder.bias, head.decoder, head.bias, head.pre_bias)
    )
    rows = []
    for row in x.numpy().astype(np.float64):
        code = [max(0.0, float(w[i] @ (row - b) + e[i])) for i in range(len(w))]
        kept = sorted(range(len(w)), key=lambda i: -code[i])[: head.k]
        out = c + sum(code[i] * d[i] for i in kept)
        rows.append(out + b if len(out) == len(b) else out)
    return np.array(rows)


def gradients(out: Tensor, head: Sparse, x: Tensor, grad: Tensor) -> dict[str, Tensor]:
    inputs = dict(head.named_parameters()) | {"x": x}
    return dict(zip(inputs, torch.autograd.grad(out, list(inputs.values()), grad), strict=True))


@pytest.mark.parametrize("sizes", SPARSE + DENSE)
def test_is_the_formula(sizes):
    *shape, rows = sizes
    head = layer(*shape)
    x = torch.randn(rows, shape[0], dtype=torch.float64)
    np.testing.assert_allclose(head(x).detach().numpy(), loop(head, x), rtol=1e-12, atol=1e-12)
    single = head.float()(x.float()).detach()
    assert single.dtype == torch.float32
    np.testing.assert_allclose(single.numpy(), loop(head, x), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("sizes", SPARSE + DENSE)
def test_gradients_are_plain_autograd_s(sizes):
    *shape, rows = sizes
    head = layer(*shape)
    assert sparse._is_sparse(torch.empty(1, head.k), shape[1]) == (sizes in SPARSE)
    x = torch.randn(rows, shape[0], dtype=torch.float64, requires_grad=True)
    grad = torch.randn(rows, shape[2], dtype=torch.float64)
    ours, theirs = (gradients(f(x), head, x, grad) for f in (head, lambda x: plain(head, x)))
    for name in ours:
        assert ours[name].shape == theirs[name].shape
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("k", [6, 20])
def test_gradients_where_few_latents_are_positive(k):
    head = layer(7, 100, 5, k)
    x = torch.randn(30, 7, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        head.encoder.bias -= 1.5
        positives = (head.encoder(x - head.pre_bias) > 0).sum(1)
    assert (positives < k).any() and positives.any()
    grad = torch.randn(30, 5, dtype=torch.float64)
    ours, theirs = (gradients(f(x), head, x, grad) for f in (head, lambda x: plain(head, x)))
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-11, atol=1e-11, msg=name)


@pytest.mark.parametrize("k", [2, 9])
@pytest.mark.parametrize("out", [3, 4])
def test_gradient_is_the_finite_difference(k, out):
    head = layer(4, 40, out, k)
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    code = F.relu(head.encoder(x - head.pre_bias)).detach().sort(1, descending=True).values
    assert (code[:, k - 1] - code[:, k]).min() > 1e-4  # no ties where the difference is taken
    names, parameters = zip(*head.named_parameters(), strict=True)

    def call(x, *values):
        return torch.func.functional_call(head, dict(zip(names, values, strict=True)), x)

    assert torch.autograd.gradcheck(call, (x, *parameters), eps=1e-7, atol=1e-5)


def test_a_summed_output_s_gradient_is_not_contiguous_and_right():
    head = layer(7, 50, 5, 3)
    x = torch.randn(7, 9, dtype=torch.float64).T.requires_grad_()
    head(x).sum().backward()
    wanted = gradients(plain(head, x), head, x, torch.ones(9, 5, dtype=torch.float64))
    torch.testing.assert_close(x.grad, wanted["x"])
    torch.testing.assert_close(head.decoder.grad, wanted["decoder"])


def test_dense_and_sparse_arithmetic_agree(monkeypatch):
    head = layer(32, 3000, 16, 40, torch.float32)
    x = torch.randn(64, 32, requires_grad=True)
    grad = torch.randn(64, 16)
    seen = []
    for share in (0, 1):
        monkeypatch.setattr(sparse, "DENSE_SHARE", share)
        out = head(x)
        seen.append({"out": out, **gradients(out, head, x, grad)})
    for name in seen[0]:
        torch.testing.assert_close(seen[0][name], seen[1][name], rtol=1e-4, atol=1e-4)


@settings(max_examples=150, deadline=None)
@given(
    rows=st.integers(1, 5),
    latents=st.integers(1, 400),
    share=st.floats(0, 1),
    shift=st.sampled_from([-30, -3, -1, 0, 2]),
    kinds=st.sampled_from([0, 2, 30]),  # distinct values; 0: nearly all differ
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 10_000),
)
def test_exactly_the_largest_are_kept(rows, latents, share, shift, kinds, dtype, seed):
    rng = np.random.default_rng(seed)
    a = rng.integers(0, kinds, (rows, latents)) if kinds else rng.normal(size=(rows, latents)) * 3
    a = torch.from_numpy(a + shift).to(dtype)
    k = max(1, round(share * latents))
    before = a.clone()
    values, index = sparse._select(a, k)
    assert torch.equal(a, before) and values.shape == index.shape == (rows, k)
    for row, kept, where in zip(a, values, index, strict=True):
        assert len(set(where.tolist())) == k  # each latent once, ties or not
        assert int((kept > 0).sum()) == min(k, int((row > 0).sum()))
        assert torch.equal(kept, row[where].clamp(min=0))
        wanted = row.clamp(min=0).sort(descending=True).values[:k]
        assert torch.equal(kept.sort(descending=True).values, wanted)


def test_the_guess_from_a_sample_may_fail_and_nothing_changes():
    """The latents that are sampled are large and no others, then small and no others."""
    for large in (1.0, -1.0):
        a = torch.rand(3, 1000) - 0.2
        a[:, ::STRIDE] += large
        values, _ = sparse._select(a, 50)
        wanted = a.relu().topk(50).values
        assert torch.equal(values.sort(descending=True).values, wanted)


def test_ties_leave_exactly_k():
    head = layer(4, 64, 3, 2)
    with torch.no_grad():
        head.encoder.weight[:] = head.encoder.weight[0]
        head.encoder.bias.fill_(10.0)
    x = torch.randn(5, 4, dtype=torch.float64)
    values, index = sparse._select(head.encoder(x).detach(), 2)
    assert (values > 0).all() and (index[:, 0] != index[:, 1]).all()
    grad = gradients(head(x.requires_grad_()), head, x, torch.ones(5, 3, dtype=torch.float64))
    assert int((grad["encoder.weight"] != 0).any(1).sum()) <= 10


@pytest.mark.parametrize("k", [2, 30])
def test_a_row_without_positive_latents_gives_the_biases(k):
    head = layer(4, 64, 4, k)
    with torch.no_grad():
        head.encoder.bias.fill_(-1e3)
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    out = head(x)
    torch.testing.assert_close(out, (head.bias + head.pre_bias).expand(5, 4))
    grad = gradients(out, head, x, torch.ones_like(out))
    for name in ("x", "decoder", "encoder.weight", "encoder.bias"):
        assert not grad[name].any(), name
    assert not head.active(x).any()


@pytest.mark.parametrize("k", [2, 30])
def test_a_diverged_row_is_not_hidden(k):
    head = layer(4, 64, 3, k)
    x = torch.randn(5, 4, dtype=torch.float64)
    x[2] = math.nan
    out = head(x)
    assert out[2].isnan().all() and out[[0, 1, 3, 4]].isfinite().all()


def test_active_latents_are_those_some_row_keeps():
    head = layer(6, 200, 5, 4)
    x = torch.randn(12, 6, dtype=torch.float64)
    code = F.relu(head.encoder(x - head.pre_bias))
    wanted = torch.zeros(200, dtype=torch.bool)
    wanted[code.topk(4).indices.flatten()] = True
    seen = head.active(x)
    assert torch.equal(seen, wanted) and 4 <= int(seen.sum()) <= 48
    assert torch.equal(head.active(x[:6]) | head.active(x[6:]), seen)


def test_starts_as_its_linear_layers_do():
    head = Sparse(10, 400, 7, 0.01)
    assert not head.pre_bias.any() and head.k == 4
    assert head.decoder.abs().max() <= 0.05 and head.decoder.std() > 0.02
    assert head.bias.abs().max() <= 0.05


@pytest.mark.parametrize(
    "k, latents, kept",
    [(1, 5, 1), (5, 5, 5), (0.01, 4096, 41), (0.2, 100_000, 20_000), (1e-9, 10, 1), (3.0, 9, 3)],
)
def test_k_is_a_count_or_a_share(k, latents, kept):
    assert count(k, latents) == kept


@pytest.mark.parametrize("k", [0, -1, 1.5, 11, math.nan, math.inf])
def test_a_wrong_k_is_a_setting_error(k):
    with pytest.raises(SettingError, match="projector.k"):
        count(k, 10)


@pytest.mark.parametrize("k", [20, 400])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_gradients_are_near_float32(k, dtype):
    """The same latents are kept; products round."""
    head = layer(32, 1000, 16, k, torch.float32)
    x = torch.randn(64, 32, requires_grad=True)
    grad = torch.randn(64, 16)
    exact = gradients(head(x), head, x, grad)
    with torch.autocast("cpu", dtype):
        out = head(x)
    for name, half in gradients(out, head, x, grad.to(out.dtype)).items():
        assert half.dtype == torch.float32
        assert F.cosine_similarity(half.flatten(), exact[name].flatten(), dim=0) > 0.97, name


@pytest.mark.parametrize("k", [200, 1000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_selects_what_float32_selects(k, dtype):
    """In half precision the activations tie, so torch.topk picks others; the layer does not."""
    head = layer(32, 4000, 16, k, torch.float32)
    x = torch.randn(256, 32, requires_grad=True)
    code = F.linear(x - head.pre_bias, head.encoder.weight, head.encoder.bias)
    wanted = torch.zeros(256, 4000).scatter_(1, code.topk(k).indices, 1) * (code > 0)
    with torch.autocast("cpu", dtype):
        out = head(x)
        half = head.encoder(x - head.pre_bias)
    rounded = torch.zeros(256, 4000).scatter_(1, half.topk(k).indices, 1) * (half > 0)
    assert not torch.equal(rounded, wanted)
    # Latents that a row keeps have a gradient there: of one row at a time, by latent.
    for row in range(0, 256, 64):
        (grad,) = torch.autograd.grad(out[row].sum(), head.encoder.bias, retain_graph=True)
        assert torch.equal(grad != 0, wanted[row] > 0)
    with torch.autocast("cpu", dtype):
        assert torch.equal(head.active(x), wanted.any(0))


@pytest.mark.parametrize("threads", [1, 3])
def test_gradients_do_not_depend_on_threads(threads):
    head = layer(8, 500, 6, 20)
    x, grad = torch.randn(40, 8).double(), torch.randn(40, 6).double()
    values, index = sparse._select(head.encoder(x).detach(), 20)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seen = sparse._gradients(grad, x, values, index, head.decoder)
    finally:
        torch.set_num_threads(before)
    wanted = grad.T @ torch.zeros(40, 500).double().scatter(1, index, values)
    torch.testing.assert_close(seen[3], wanted.T)


@pytest.mark.parametrize("k", [5, 500])
def test_custom_operators_are_what_torch_expects(k):
    a = torch.randn(6, 1000)
    torch.library.opcheck(sparse._select, (a, k))
    values, index = sparse._select(a, k)
    inputs = (torch.randn(6, 4), torch.randn(6, 3), values, index, torch.randn(1000, 4))
    torch.library.opcheck(sparse._gradients, inputs)


@pytest.mark.parametrize("k", [5, 500])
def test_nothing_as_large_as_an_activation_is_kept_for_the_backward_pass(k):
    head = layer(8, 2000, 6, k, torch.float32)
    saved = []

    def keep(tensor):
        saved.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        head(torch.randn(1000, 8))
    assert saved and max(saved) < 1000 * 2000


def test_the_plain_head_of_the_benchmark_is_the_same_function():
    head = layer(6, 90, 6, 5)
    other = heads.Plain(6, 90, 6, 5).double()
    other.load_state_dict(
        {
            "encoder.weight": head.encoder.weight,
            "encoder.bias": head.encoder.bias,
            "decoder.weight": head.decoder.T,
            "decoder.bias": head.bias,
            "pre_bias": head.pre_bias,
        }  # fmt: skip
    )
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(other(x), head(x))


@pytest.mark.slow
@pytest.mark.parametrize("k, most", [pytest.param(200, 1.5, marks=pytest.mark.soak), (4000, 2.5)])
def test_two_activations_at_once_at_most(k, most):
    """Beside an activation of 64 MB the weights are nothing; plain autograd holds four."""
    ours, plain = (
        alone(
            heads.measured, name=name, rows=800, sizes=[8, 20_000, 8, k], device="cpu", repeats=1
        )["peak_bytes"]
        for name in heads.HEADS
    )
    activation = 800 * 20_000 * 4
    assert 0.9 * activation < ours < most * activation < plain


@pytest.mark.gpu
@pytest.mark.parametrize("k", [20, 400])
def test_the_gpu_agrees_and_is_not_waited_for(k):
    head = layer(32, 1000, 16, k)
    x = torch.randn(64, 32, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(64, 16, dtype=torch.float64)
    exact = gradients(head(x), head, x, grad)
    head.cuda()
    x, grad = x.detach().cuda().requires_grad_(), grad.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        seen = gradients(head(x), head, x, grad)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name in exact:
        torch.testing.assert_close(seen[name].cpu(), exact[name], msg=name)
