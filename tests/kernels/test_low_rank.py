"""Products with factors of a low rank: each kernel equals its formula in torch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from support.closeness import assert_no_further
from veneer.kernels import low_rank
from veneer.kernels.mixed import FactorTable


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [1, 3, 4, 6])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (5, 63), (40, 200), (3, 600)])
def test_products_equal_torch(rows, columns, rank, dtype, monkeypatch):
    monkeypatch.setattr(low_rank, "MOST_RANKS", 6)
    torch.manual_seed(0)
    x, h, factors = (
        torch.randn(s).to(dtype) for s in ((rows, columns), (rows, rank), (rank, columns))
    )
    w = torch.rand(rows, 1).to(torch.promote_types(dtype, torch.float32))
    wide = x.double(), h.double(), factors.double(), w.double()

    def results():
        yield "project", low_rank.project(x, factors, torch.empty_like(h)), wide[0] @ wide[2].T
        yield "add", low_rank.add(h, factors, x.clone()), wide[0] + wide[1] @ wide[2]
        ours = low_rank.gradient(h, w, x, torch.empty_like(factors))
        yield "gradient", ours, (wide[3] * wide[1]).T @ wide[0]

    compiled = [*results()]
    monkeypatch.setattr(low_rank, "kernel", lambda *_: None)
    slack = 4 * torch.finfo(dtype).eps
    for (name, ours, exact), (_, theirs, _) in zip(compiled, results(), strict=True):
        assert_no_further(ours, theirs, exact, name, slack=slack)


def test_a_table_of_factors_copies_nothing_from_the_host():
    operations: list[str] = []

    class Noted(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            operations.append(function.name())
            return function(*args, **(kwargs or {}))

    A, B = torch.empty(3, 2, 8, device="meta"), torch.empty(3, 2, 5, device="meta")
    with Noted():
        table = FactorTable.of([(A, B), None], experts=3, B_is_transposed=True)
    assert table.A.device == table.ranks.device == A.device
    assert operations
    assert not {"aten::copy_", "aten::_to_copy"} & {*operations}
