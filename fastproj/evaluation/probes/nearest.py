"""The nearest rows of each query by cosine similarity, exactly, of equally near ones the first.

On a CPU ``nearest.c`` takes them from the similarities that a matrix product gave, called through
ctypes, which releases the GIL. Where the processor multiplies bfloat16 faster, the product is in
bfloat16: it says which rows may be among the nearest, and only these get exact similarities.
"""

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional

from fastproj.core.device import choose_precision
from fastproj.core.errors import InputError
from fastproj.core.linear import linear, pack
from fastproj.core.native import library

SIMILARITIES = 2**22  # held at once (16 MiB of float32), four times as many in bfloat16,
QUERIES = 64  # or those of as many queries: fewer would read all rows for little work
ROUNDING = 2**-8  # of a number in bfloat16: the largest relative error
SLACK = 1e-4  # for products of two roundings, and for what float32 rounds in sums and lengths


class _Search(ctypes.Structure):
    """``nearest.c``'s."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("rough", "exact", "query", "bank")),
        *((name, ctypes.c_int64) for name in ("queries", "rows", "width", "some", "k")),
        *((name, ctypes.c_void_p) for name in ("near", "row", "others")),
        ("next", ctypes.c_int64),
    ]


class Bank:
    """Rows among which the nearest are sought: ``features`` float32 (N, d)."""

    def __init__(self, features: Tensor) -> None:
        self.rows = functional.normalize(features, dim=1).contiguous()
        self.device = features.device
        self.native = self.device.type == "cpu" and _built()
        quick = self.native and choose_precision("auto", self.device) == torch.bfloat16
        self.rounded = pack(self.rows.bfloat16()) if quick else None

    def nearest(self, queries: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Similarities float32 and row numbers int64, both (Q, k), the nearest first.

        ``queries``: float32 (Q, d), not all 0. For rows of length 1 a product in bfloat16 is away
        from the exact one by ``ROUNDING`` for each of the two rows (Cauchy and Schwarz) and for
        itself, at most. A query for which others than those found may be nearer is sought anew.
        """
        queries = functional.normalize(queries, dim=1)
        near = queries.new_empty(len(queries), k)
        rows = torch.empty(near.shape, dtype=torch.int64, device=self.device)
        left = torch.arange(len(queries), device=self.device)
        some = k + max(36, k // 2)
        if self.rounded is not None and some < len(self.rows):
            others = queries.new_empty(len(queries))
            for part in left.split(max(QUERIES, 4 * SIMILARITIES // len(self.rows))):
                rough = linear(queries[part].bfloat16(), self.rounded)
                near[part], rows[part], others[part] = self._found(rough, k, queries[part], some)
            left = left[near[:, -1] <= others + ROUNDING * (2 + others.abs()) + SLACK]
        for part in left.split(max(QUERIES, SIMILARITIES // len(self.rows))):
            similarity = linear(queries[part], self.rows)
            if self.native:
                near[part], rows[part], _ = self._found(similarity, k)
            else:
                near[part], rows[part] = largest(similarity, k)
        return near, rows

    def _found(
        self, similarity: Tensor, k: int, queries: Tensor | None = None, some: int = 0
    ) -> tuple[Tensor, Tensor, Tensor]:
        """``largest`` of ``similarity`` (Q, N), which is exact in float32. Of one in bfloat16, the
        ``some`` largest get exact ones from ``queries``; third (Q,): no other is above that.
        """
        count, number = similarity.shape
        near, others = torch.empty(count, k), torch.empty(count)
        rows = torch.empty(count, k, dtype=torch.int64)
        rough = queries is not None
        search = _Search(
            similarity.data_ptr() if rough else None,
            None if rough else similarity.data_ptr(),
            queries.data_ptr() if queries is not None else None,
            self.rows.data_ptr(), count, number, self.rows.shape[1], some, k,
            near.data_ptr(), rows.data_ptr(), others.data_ptr(), 0,
        )  # fmt: skip
        threads = max(1, min(torch.get_num_threads(), count))
        with ThreadPoolExecutor(threads) as pool:
            runs = [
                pool.submit(library().fastproj_nearest, ctypes.byref(search))
                for _ in range(threads)
            ]
            if any([run.result() for run in runs]):
                raise MemoryError("out of memory while looking for the nearest")
        return near, rows, others


def largest(similarity: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and columns, both (Q, k), of the ``k`` largest of each row (Q, N), the largest first.

    Of equals the first columns. The ``k`` largest lie in the ``k`` groups of columns
    with the largest maxima: one pass finds these, and few columns are left to sort.
    """
    size = int((similarity.shape[1] / k) ** 0.5)  # columns per group, to keep both parts small
    groups = similarity.shape[1] // size
    best = similarity[:, : size * groups].unflatten(1, (size, groups)).amax(1)
    highest, group = best.topk(k, dim=1)
    column = torch.arange(similarity.shape[1], device=similarity.device)
    within = column[: size * groups : groups].view(-1, 1) + group.unsqueeze(1)
    rest = column[size * groups :].expand(len(similarity), -1)
    columns = torch.cat([within.flatten(1), rest], dim=1)
    candidates = similarity.gather(1, columns)
    values, at = candidates.topk(k, dim=1)
    columns = columns.gather(1, at)
    last = values[:, -1:]
    tied = (candidates >= last).sum(1) > k
    tied |= (best >= last).sum(1) > (highest >= last).sum(1)
    if tied.any():  # rare: topk may have taken any of the equals
        order = similarity[tied].sort(dim=1, descending=True, stable=True).indices
        columns[tied] = order[:, :k]
    # Of equals the first columns come first: fewer neighbors than k may vote as well.
    columns = columns.sort(1).values
    values, order = similarity.gather(1, columns).sort(dim=1, descending=True, stable=True)
    return values, columns.gather(1, order)


def _built() -> bool:
    try:
        return bool(library())
    except InputError:
        return False
