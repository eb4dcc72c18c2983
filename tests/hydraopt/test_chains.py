"""A bundle's chains of matrices, brought to the two factors LoRA has."""

import itertools

import pytest
import torch
from peft.utils.other import get_pattern_key

from hydraopt.bundle.chains import chain_of, chain_rank, pair, product
from hydraopt.bundle.layout import ModuleEntry
from hydraopt.bundle.lora_folder import usual_rank


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


@pytest.mark.parametrize("inner", [(2, 5), (5, 2)])
def test_two_factors_keep_the_dtypes_of_the_outer_ones(inner):
    """The small factor in the middle may be kept in another precision; what it is multiplied into is rounded once."""
    generator = torch.Generator().manual_seed(0)
    first, middle, last = (
        torch.randn(*shape, generator=generator) for shape in itertools.pairwise((7, *inner, 6))
    )
    first, last = first.bfloat16(), last.bfloat16()
    up, down = pair((first, middle, last))
    assert up.dtype == down.dtype == torch.bfloat16
    expected = first.double() @ middle.double() @ last.double()
    # bfloat16 rounds a number by at most 2^-9 of it, then at most 2 of them are added up.
    assert float((up.double() @ down.double() - expected).norm()) <= 2**-7 * float(expected.norm())


def test_two_small_factors_are_multiplied_out_without_another_rounding():
    """What is stored in 16 bits is rounded once: the product has the digits of float32, far more than bfloat16's 8."""
    generator = torch.Generator().manual_seed(0)
    x, y, a, b = (torch.randn(3, length, generator=generator).bfloat16() for length in (4, 5, 6, 7))
    a, b = torch.cat([a, a[:2]]), torch.cat([b, b[:1]])
    entry = ModuleEntry(name="m", shape=(7, 6), family="two-sided", shared=((5,), (4,)), heads=((3,),))
    expected = b.double().mT @ x.double().mT @ y.double() @ a.double()
    torch.testing.assert_close(
        product(chain_of(entry, (3,), [x, y], [a, b])).double(), expected, rtol=0, atol=1e-5
    )


def test_each_rank_is_found_by_its_own_name_where_names_end_alike():
    """PEFT takes the first pattern that matches how a name ends; the reference is its own look-up."""
    ranks = {"c": 2, "b.c": 3, "a.b.c": 4, "z.a.b.c": 5, "bxc": 6, "d": 1, "e": 1}
    usual, pattern = usual_rank(ranks)
    assert usual == 1
    assert {name: pattern.get(get_pattern_key(pattern, name), usual) for name in ranks} == ranks
