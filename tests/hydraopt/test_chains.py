"""A bundle's chains of matrices, brought to the two factors LoRA has."""

import itertools

import pytest
import torch

from hydraopt.bundle.chains import chain_rank, pair, product


@pytest.mark.parametrize("inner", [(3,), (0,), (2, 5), (5, 2), (4, 4), (0, 3), (3, 0)])
def test_two_factors_have_the_chains_product_and_its_least_rank(inner):
    sizes = (7, *inner, 6)
    generator = torch.Generator().manual_seed(0)
    chain = tuple(torch.randn(*shape, generator=generator) for shape in itertools.pairwise(sizes))
    expected = torch.eye(7, dtype=torch.float64)
    for part in chain:
        expected = expected @ part.double()

    up, down = pair(chain)

    assert up.shape[1] == down.shape[0] == chain_rank(chain) == min(inner)
    torch.testing.assert_close((up @ down).double(), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(product(chain).double(), expected, rtol=0, atol=1e-5)
