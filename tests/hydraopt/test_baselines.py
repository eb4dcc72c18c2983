"""Task arithmetic, TIES and DARE against dense float64 references that share no code with them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch.utils._python_dispatch import TorchDispatchMode

from hydraopt.errors import AdapterMismatchError, BudgetError
from hydraopt.merging import row_blocks
from hydraopt.merging.dare import dare, dare_ties
from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.row_blocks import factor, leading_part, product
from hydraopt.merging.task_arithmetic import task_arithmetic
from hydraopt.merging.ties import kth_largest, ties

PROPERTY = settings(max_examples=25, deadline=None)
ROUNDING = {"rtol": 1e-9, "atol": 1e-9}  # float64 work on entries of about 1: a few thousand eps


def update(d_out=12, d_in=9, rank=3, *, seed=0, dtype=torch.float64) -> LowRank:
    generator = torch.Generator().manual_seed(seed)
    up = torch.randn(d_out, rank, generator=generator, dtype=torch.float64)
    down = torch.randn(rank, d_in, generator=generator, dtype=torch.float64)
    return LowRank(up.to(dtype), down.to(dtype))


def several(count=4, **shape) -> list[LowRank]:
    return [update(seed=10 + k, **shape) for k in range(count)]


def dense(merged: LowRank) -> torch.Tensor:
    return merged.up.double() @ merged.down.double()


def refactored(one: LowRank, seed: int) -> LowRank:
    """The same dW from other factors: B G^-1 and G A."""
    g = torch.randn(one.rank, one.rank, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    g = g + 4 * torch.eye(one.rank, dtype=torch.float64)
    return LowRank(one.up @ torch.linalg.inv(g), g @ one.down)


def trim(matrix: np.ndarray, density: float) -> np.ndarray:
    """Only the largest entries, by sorting all of them."""
    keep = np.argsort(-np.abs(matrix), axis=None)[: max(1, int(density * matrix.size))]
    result = np.zeros(matrix.size)
    result[keep] = matrix.ravel()[keep]
    return result.reshape(matrix.shape)


def elect(matrices: list[np.ndarray], weights: list[float]) -> torch.Tensor:
    """The disjoint weighted mean, one entry after the other."""
    result = np.zeros(matrices[0].shape)
    for where in np.ndindex(*result.shape):
        votes = [weight * matrix[where] for weight, matrix in zip(weights, matrices, strict=True)]
        sign = 1.0 if sum(votes) >= 0 else -1.0
        agree = [k for k, vote in enumerate(votes) if vote * sign > 0]
        if agree:
            result[where] = sum(votes[k] for k in agree) / sum(abs(weights[k]) for k in agree)
    return torch.from_numpy(result)


def roots(weights):
    """PEFT's split of a weight over the two factors: the sign goes to A."""
    size = [math.sqrt(abs(weight)) for weight in weights]
    return size, [math.copysign(root, weight) for root, weight in zip(size, weights, strict=True)]


@pytest.fixture(params=[None, 40])
def small_blocks(request, monkeypatch):
    """Once as it is (these matrices are one block) and once in blocks of four rows."""
    if request.param:
        monkeypatch.setattr(row_blocks, "BLOCK_NUMBERS", request.param)


# --- task arithmetic -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("d_out", "d_in"), [(24, 16), (16, 24), (5, 30)])
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_the_error_of_a_sum_is_its_discarded_singular_values(d_out, d_in, rank):
    """Eckart-Young: no matrix of that rank is closer, and ours reaches the bound."""
    updates = [update(d_out, d_in, r, seed=r) for r in (2, 3, 4)]
    weights = [0.7, -1.3, 0.2]
    target = sum(weight * dense(one) for one, weight in zip(updates, weights, strict=True))
    merged = task_arithmetic(updates, weights, rank)
    bound = torch.linalg.svdvals(target)[rank:].norm()
    assert abs((dense(merged) - target).norm() - bound) <= 1e-12 * target.norm()
    assert merged.rank == min(rank, d_out)


def test_a_sum_is_exact_once_the_rank_suffices():
    updates, weights = several(3, d_out=30, d_in=20, rank=2), [1.0, -2.0, 0.5]
    target = sum(weight * dense(one) for one, weight in zip(updates, weights, strict=True))
    torch.testing.assert_close(dense(task_arithmetic(updates, weights, 6)), target, **ROUNDING)
    torch.testing.assert_close(dense(task_arithmetic(updates, weights, 50)), target, **ROUNDING)


@PROPERTY
@given(seed=st.integers(0, 1000), order=st.permutations(range(3)))
def test_neither_order_nor_factorisation_changes_a_sum(seed, order):
    updates = [update(seed=seed + k) for k in range(3)]
    weights = [0.5, 1.0, 2.0]
    wanted = dense(task_arithmetic(updates, weights, 9))
    found = task_arithmetic([refactored(updates[k], seed) for k in order], [weights[k] for k in order], 9)
    torch.testing.assert_close(dense(found), wanted, **ROUNDING)


def test_factor_wise_sums_hold_the_cross_terms():
    updates, weights = several(3), [0.4, -0.5, 2.0]
    up_roots, down_roots = roots(weights)
    up = sum(root * one.up for root, one in zip(up_roots, updates, strict=True))
    down = sum(root * one.down for root, one in zip(down_roots, updates, strict=True))
    merged = task_arithmetic(updates, weights, on="factors")
    torch.testing.assert_close(merged.up, up, **ROUNDING)
    torch.testing.assert_close(merged.down, down, **ROUNDING)
    wanted = sum(weight * dense(one) for one, weight in zip(updates, weights, strict=True))
    assert float((dense(merged) - wanted).norm() / wanted.norm()) > 0.3  # which is why `dw` is the default


def test_factor_wise_sums_pad_small_ranks_with_zeros_at_the_end():
    small, large = update(rank=1), update(rank=3, seed=1)
    merged = task_arithmetic([small, large], [1.0, 1.0], on="factors")
    up, down = large.up.clone(), large.down.clone()
    up[:, :1] += small.up
    down[:1] += small.down
    torch.testing.assert_close(merged.up, up, **ROUNDING)
    torch.testing.assert_close(merged.down, down, **ROUNDING)


# --- TIES ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e30])
def test_the_selected_magnitude_is_that_of_a_sort(dtype, scale, monkeypatch):
    monkeypatch.setattr(row_blocks, "BLOCK_NUMBERS", 500)
    matrix = scale * torch.randn(40, 30, generator=torch.Generator().manual_seed(3), dtype=dtype)
    matrix[3] = 0
    matrix[5:8] = matrix[9]  # equal entries
    matrix[7] *= -1
    ordered = matrix.abs().flatten().sort(descending=True).values
    for count in (1, 2, 17, 100, 599, 1100, 1169, 1170, 1171, 1200):
        assert kth_largest(factor(matrix), count) == float(ordered[count - 1]), count


@pytest.mark.parametrize("density", [0.05, 0.2, 0.7, 1.0])
@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [0.1, 2.0, 0.7, 0.4], [1.0, -0.5, 0.0, 3.0]])
def test_ties_on_dw_is_the_dense_rule(density, weights, small_blocks):
    updates = several()
    wanted = 1.5 * elect([trim(dense(one).numpy(), density) for one in updates], weights)
    merged = ties(updates, weights, 9, density=density, scale=1.5)
    torch.testing.assert_close(dense(merged), wanted, **ROUNDING)


@pytest.mark.parametrize("weights", [[1, 1, 1, 1], [1.0, -0.5, 0.0, 3.0]])
def test_ties_on_factors_is_the_dense_rule_on_each(weights, small_blocks):
    updates = several()
    up_roots, down_roots = roots(weights)
    merged = ties(updates, weights, density=0.3, on="factors", scale=0.8)
    up = elect([trim(one.up.numpy(), 0.3) for one in updates], up_roots)
    down = elect([trim(one.down.numpy(), 0.3) for one in updates], down_roots)
    torch.testing.assert_close(dense(merged), 0.8 * up @ down, **ROUNDING)


def test_ties_keeps_one_update_that_is_not_trimmed():
    one = update()
    torch.testing.assert_close(dense(ties([one], [0.3], density=1.0)), dense(one), **ROUNDING)


def test_ties_elects_plus_where_the_votes_cancel():
    two = [LowRank(torch.tensor([[value]]), torch.ones(1, 1)) for value in (2.0, -2.0)]
    assert dense(ties(two, [1.0, 1.0], density=1.0)).item() == pytest.approx(2.0)


@PROPERTY
@given(seed=st.integers(0, 1000), order=st.permutations(range(3)), size=st.sampled_from([1e-3, 1.0, 50.0]))
def test_ties_knows_neither_order_nor_factorisation_nor_the_size_of_weights(seed, order, size):
    updates = [update(seed=seed + k) for k in range(3)]
    weights = [0.5, 1.0, 2.0]
    wanted = dense(ties(updates, weights, 9, density=0.4))
    shuffled = [refactored(updates[k], seed) for k in order]
    found = dense(ties(shuffled, [size * weights[k] for k in order], 9, density=0.4))
    torch.testing.assert_close(found, wanted, **ROUNDING)


# --- DARE ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["factors", "dw"])
def test_dare_that_drops_nothing_is_task_arithmetic(on):
    updates, weights = several(), [0.5, -1.0, 0.2, 0.9]
    found = dare(updates, weights, 9, density=1.0, seed=0, on=on)
    torch.testing.assert_close(dense(found), dense(task_arithmetic(updates, weights, 9, on=on)), **ROUNDING)


def test_dare_drops_or_rescales_each_entry():
    one = update(200, 150, 4)
    found = dense(dare([one], [1.0], 150, density=0.3, seed=1))
    ratio = found / dense(one)
    stays = ratio > 0.5 / 0.3
    torch.testing.assert_close(ratio[stays], torch.full_like(ratio[stays], 1 / 0.3), rtol=1e-6, atol=1e-6)
    assert float(found[~stays].abs().max()) <= 1e-9
    # 30 000 coin tosses: five standard deviations are 0.0132.
    assert abs(float(stays.double().mean()) - 0.3) <= 5 * math.sqrt(0.3 * 0.7 / stays.numel())
    # Neither rows nor columns are favoured: 150 and 200 tosses each, a thousand-fold chance of five deviations.
    for side in (0, 1):
        spread = stays.double().mean(side)
        assert float((spread - 0.3).abs().max()) <= 5 * math.sqrt(0.3 * 0.7 / stays.shape[side])


@pytest.mark.parametrize("method", [dare, dare_ties])
@pytest.mark.parametrize("on", ["factors", "dw"])
def test_dare_repeats_bit_by_bit_and_leaves_the_global_generator_alone(method, on):
    updates, weights = several(d_out=40, d_in=30), [1.0, 0.5, 0.5, 2.0]
    state = torch.get_rng_state()
    first = method(updates, weights, density=0.5, seed=7, on=on)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(99)
    again = method(updates, weights, density=0.5, seed=7, on=on)
    torch.set_rng_state(state)
    assert torch.equal(first.up, again.up)
    assert torch.equal(first.down, again.down)
    other = method(updates, weights, density=0.5, seed=8, on=on)
    assert float((dense(first) - dense(other)).norm()) > 0.1 * float(dense(first).norm())


def test_what_dare_drops_does_not_depend_on_the_blocks(monkeypatch):
    updates = several(d_out=40, d_in=30)
    whole = dense(dare(updates, [1.0] * 4, 30, density=0.5, seed=7))
    monkeypatch.setattr(row_blocks, "BLOCK_NUMBERS", 70)
    torch.testing.assert_close(dense(dare(updates, [1.0] * 4, 30, density=0.5, seed=7)), whole, **ROUNDING)


def test_dare_drops_differently_in_each_task_and_factor():
    """Twice the same update, and A of B's shape: one pattern for all would be seen at once."""
    one = update(20, 20, 20)
    apart = dare([one, one], [1.0, 0.0], 20, density=0.5, seed=0)
    other = dare([one, one], [0.0, 1.0], 20, density=0.5, seed=0)
    assert float((dense(apart) - dense(other)).norm()) > 0.5 * float(dense(one).norm())
    merged = dare([one], [1.0], density=0.5, seed=0, on="factors")
    both = ((merged.up == 0) == (merged.down == 0)).double().mean()
    assert 0.4 < float(both) < 0.6  # 400 pairs of coins: four standard deviations


def test_dare_keeps_the_mean():
    """Unbiased: the mean of 200 draws lies within five of its standard errors of the sum, in norm."""
    updates, weights = several(2, d_out=6, d_in=5, rank=2), [0.5, -2.0]
    target = dense(task_arithmetic(updates, weights, 5))
    draws = torch.stack([dense(dare(updates, weights, 5, density=0.4, seed=s)) for s in range(200)])
    error = (draws.mean(0) - target).norm()
    assert float(error) <= 5 * float(draws.std(0).norm()) / math.sqrt(200)


def test_dare_ties_is_the_dense_rule_on_what_dare_leaves(small_blocks):
    updates, weights = several(3), [0.5, -1.0, 2.0]
    units = [[1.0 if k == j else 0.0 for k in range(3)] for j in range(3)]
    left = [dense(dare(updates, unit, 9, density=0.6, seed=4)).numpy() for unit in units]
    left = [
        np.where(np.abs(matrix) < 1e-9, 0, matrix) for matrix in left
    ]  # rounding of the way back from rank 9
    merged = dare_ties(updates, weights, 9, density=0.6, seed=4, scale=0.7)
    torch.testing.assert_close(dense(merged), 0.7 * elect(left, weights), rtol=1e-7, atol=1e-7)


# --- all of them -----------------------------------------------------------------------------------------------------

METHODS = {
    "ta": task_arithmetic,
    "ties": lambda *args, **options: ties(*args, density=0.4, **options),
    "dare": lambda *args, **options: dare(*args, density=0.4, seed=3, **options),
    "dare-ties": lambda *args, **options: dare_ties(*args, density=0.4, seed=3, **options),
}


@pytest.fixture(scope="module")
def peft_model():
    """Three adapters of one linear layer (14, 10) in a live PEFT model, alpha twice the rank."""
    base = torch.nn.Sequential(torch.nn.Linear(10, 14, bias=False))
    model = None
    for k in range(3):
        config = LoraConfig(r=4, lora_alpha=8, target_modules=["0"])
        if model is None:
            model = get_peft_model(base, config, adapter_name="t0")
        else:
            model.add_adapter(f"t{k}", config)
        one = update(14, 10, 4, seed=k, dtype=torch.float32)
        layer = model.base_model.model[0]
        layer.lora_B[f"t{k}"].weight.data.copy_(one.up)
        layer.lora_A[f"t{k}"].weight.data.copy_(one.down)
    return model


@pytest.mark.parametrize("weight", [1.0, 0.5])
@pytest.mark.parametrize(("method", "name"), [("ta", "linear"), ("ties", "ties")])
def test_factor_wise_merges_are_those_of_peft(peft_model, weight, method, name):
    """With one scaling and one weight for all, as the docstrings promise; PEFT works in float32."""
    into = f"{name}-{int(100 * weight)}"
    density = 0.4 if name == "ties" else None
    peft_model.add_weighted_adapter(
        ["t0", "t1", "t2"], [weight] * 3, into, combination_type=name, density=density
    )
    wanted = peft_model.base_model.model[0].get_delta_weight(into).detach().double()
    updates = [update(14, 10, 4, seed=k, dtype=torch.float32) for k in range(3)]
    updates = [LowRank(2 * one.up, one.down) for one in updates]
    options = {"scale": weight} if name == "ties" else {}
    found = METHODS[method](updates, [weight] * 3, on="factors", **options)
    torch.testing.assert_close(dense(found), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ties", "dare", "dare-ties"])
@pytest.mark.parametrize("rank", [1, 4, 16])
def test_streamed_low_rank_is_close_to_the_dense_svd(name, rank):
    """The error of the rank-r result against the whole merged matrix, over Eckart-Young's bound: below 1.0001.

    The merged matrices have slowly falling spectra, the hard case of a range finder. Worst seen 1.000005.
    """
    updates = several(6, d_out=120, d_in=90, rank=4)
    weights = [0.2, 1.0, 0.5, 0.5, 0.1, 0.7]
    whole = dense(METHODS[name](updates, weights, 90))
    found = METHODS[name](updates, weights, rank)
    assert found.rank == rank
    bound = torch.linalg.svdvals(whole)[rank:].norm()
    error = float((dense(found) - whole).norm() / bound)
    assert 1 - 1e-9 <= error <= 1.0001


def test_the_range_finder_is_exact_where_the_rank_is_small():
    one = update(300, 200, 5, seed=2)
    torch.testing.assert_close(dense(leading_part(product(one), 5, seed=0)), dense(one), **ROUNDING)


class LargestTensor(TorchDispatchMode):
    """Remembers the most numbers any operation's result held."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


@pytest.mark.parametrize("on", ["factors", "dw"])
@pytest.mark.parametrize("name", METHODS)
def test_no_merge_ever_holds_a_whole_matrix(name, on):
    updates = several(3, d_out=1200, d_in=800, rank=4, dtype=torch.float32)
    with LargestTensor() as largest:
        METHODS[name](updates, [1.0, 0.5, 0.2], on=on)
    assert largest.numbers <= row_blocks.BLOCK_NUMBERS < 1200 * 800 / 3


@pytest.mark.parametrize("on", ["factors", "dw"])
@pytest.mark.parametrize("name", METHODS)
def test_every_weight_counts(name, on):
    """A task of weight 0 has no say, wherever it stands."""
    updates = several(3)
    alone = dense(METHODS[name](updates[:1], [1.0], 9, on=on))
    torch.testing.assert_close(dense(METHODS[name](updates, [1.0, 0.0, 0.0], 9, on=on)), alone, **ROUNDING)
    for k in (1, 2):
        weights = [1.0, 0.0, 0.0]
        weights[k] = 0.8
        assert float((dense(METHODS[name](updates, weights, 9, on=on)) - alone).norm()) > 0.1


@pytest.mark.parametrize("on", ["factors", "dw"])
@pytest.mark.parametrize("name", METHODS)
def test_mixed_ranks_zero_updates_and_small_modules(name, on):
    updates = [update(5, 40, rank, seed=rank) for rank in (1, 3, 8)]
    zero = LowRank(torch.zeros(5, 2, dtype=torch.float64), torch.zeros(2, 40, dtype=torch.float64))
    merged = METHODS[name]([*updates, zero], [1.0, 1.0, 1.0, 1.0], on=on)
    assert merged.shape == (5, 40)
    assert merged.rank == (8 if on == "factors" else 5)
    assert bool(torch.isfinite(dense(merged)).all())
    nothing = METHODS[name]([zero, zero], [1.0, 1.0], on=on)
    assert float(dense(nothing).abs().max()) == 0
    padded = METHODS[name](updates, [1.0, 1.0, 1.0], 2, on=on)
    assert padded.rank == 2


@pytest.mark.parametrize("name", METHODS)
def test_half_precision_is_merged_in_float32(name):
    updates = several(dtype=torch.bfloat16)
    exact = [LowRank(one.up.double(), one.down.double()) for one in updates]
    found = METHODS[name](updates, [1.0] * 4, 9)
    assert found.up.dtype == found.down.dtype == torch.float32
    wanted = dense(METHODS[name](exact, [1.0] * 4, 9))
    # Entries within rounding of a threshold or of a tied vote could flip; with these seeds none does.
    torch.testing.assert_close(dense(found), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.01, math.nan])
@pytest.mark.parametrize("name", ["ties", "dare", "dare_ties"])
def test_a_density_outside_of_0_to_1_is_refused(name, density):
    method = {"ties": ties, "dare": dare, "dare_ties": dare_ties}[name]
    seed = {} if name == "ties" else {"seed": 0}
    with pytest.raises(BudgetError, match=rf"density={density}.*\(0, 1\]"):
        method(several(), [1.0] * 4, density=density, **seed)


@pytest.mark.parametrize("on", ["factors", "dw"])
@pytest.mark.parametrize("name", METHODS)
def test_updates_that_do_not_fit_together_are_refused(name, on):
    method = METHODS[name]
    good = update()
    with pytest.raises(AdapterMismatchError, match="2 updates and 1 weights"):
        method([good, good], [1.0], on=on)
    with pytest.raises(AdapterMismatchError, match="0 updates"):
        method([], [], on=on)
    with pytest.raises(AdapterMismatchError, match=r"update 1 changes a weight of \(12, 10\).*\(12, 9\)"):
        method([good, update(d_in=10)], [1.0, 1.0], on=on)
    with pytest.raises(AdapterMismatchError, match=r"update 0: factors of \(12, 3\) and \(2, 9\)"):
        method([LowRank(good.up, good.down[:2])], [1.0], on=on)
    with pytest.raises(AdapterMismatchError, match="update 1 holds NaN"):
        method([good, LowRank(good.up * math.nan, good.down)], [1.0, 1.0], on=on)
    with pytest.raises(BudgetError, match="weight 1 is inf"):
        method([good, good], [1.0, math.inf], on=on)
    with pytest.raises(BudgetError, match="rank=0"):
        method([good], [1.0], 0, on=on)
    with pytest.raises(BudgetError, match="on='B'"):
        method([good], [1.0], on="B")


def test_other_settings_out_of_range_are_refused():
    with pytest.raises(BudgetError, match="seed=-1"):
        dare(several(), [1.0] * 4, density=0.5, seed=-1)
    for method, seed in ((ties, {}), (dare_ties, {"seed": 0})):
        with pytest.raises(BudgetError, match="scale=nan"):
            method(several(), [1.0] * 4, density=0.5, scale=math.nan, **seed)
