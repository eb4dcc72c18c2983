"""Families of factors and the price of a byte, each against dense float64 references or brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

import hydraopt
from hydraopt.errors import BudgetError
from hydraopt.merging import dense_heads, separate, shared_a, shared_b, two_sided
from hydraopt.merging.basis import find_basis
from hydraopt.merging.budget import (
    ModuleCurves,
    PricedModules,
    fill,
    price_grid,
    total_bytes,
    total_error,
    within_budget,
    within_error,
)
from hydraopt.merging.option import LEFT_OUT, Choice, Levels, Option, Part, Rates
from hydraopt.merging.problem import ModuleProblem, load_module
from hydraopt.precision import core_bits, encode

D_OUT, D_IN, RANK, TASKS = 20, 28, 4, 5
FULL = (32,)


def problem(seed=0, *, metric=None, common=True) -> ModuleProblem:
    """Five tasks that share some of their input directions, with weights and ranks of their own."""
    g = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=g, dtype=torch.float64)

    downs = randn(TASKS, RANK, D_IN)
    if common:
        downs = 0.4 * downs + randn(1, RANK, D_IN)
    ups = randn(TASKS, D_OUT, RANK) * torch.logspace(0, -1, RANK, dtype=torch.float64)
    downs[-1, -1] = 0  # a task of lower rank
    ups[-1, :, -1] = 0
    weights = torch.rand(TASKS, generator=g, dtype=torch.float64) + 0.2
    tasks = tuple(f"t{k}" for k in range(TASKS))
    return ModuleProblem("m", tasks, weights, ups, downs, (RANK,) * TASKS, metric)


def updates(one: ModuleProblem) -> torch.Tensor:
    return one.ups @ one.downs


def all_kept(option, ranks=None) -> Levels:
    heads = np.zeros(option.heads.energies.shape, dtype=np.int64)
    for k, rank in enumerate(ranks or ()):
        heads[k, rank:] = LEFT_OUT
    return Levels(tuple(np.zeros(part.energies.shape, dtype=np.int64) for part in option.shared), heads)


def expected(option, levels) -> float:
    parts = zip(option.parts, (*levels.shared, levels.heads), strict=True)
    return option.base_error + sum(part.totals(one)[0] for part, one in parts)


def weighted(one: ModuleProblem, stored) -> float:
    return sum(float(w) * stored.squared_error[t] for w, t in zip(one.weights, one.tasks, strict=True))


def test_separate_leaves_each_tasks_own_tail():
    one = problem()
    option = separate.option(separate.spectra(one) * one.weights[:, None].numpy(), (D_OUT, D_IN), FULL)
    levels = all_kept(option, [2, 1, 3, 0, 4])
    stored = option.solution.build(one, levels, FULL, torch.float32)
    for k, (task, rank) in enumerate(zip(one.tasks, [2, 1, 3, 0, 4], strict=True)):
        tail = float(torch.linalg.svdvals(updates(one)[k])[rank:].square().sum())
        assert stored.squared_error[task] == pytest.approx(tail, rel=1e-5, abs=1e-10)
    assert weighted(one, stored) == pytest.approx(expected(option, levels), rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_shared_rows_are_the_eckart_young_optimum(rank):
    """The tail of the SVD of the stacked, weighted updates is the least error any A' of that rank leaves."""
    one = problem()
    stacked = torch.cat([w.sqrt() * update for w, update in zip(one.weights, updates(one), strict=True)])
    bound = float(torch.linalg.svdvals(stacked)[rank:].square().sum())
    (option,) = dense_heads.options(one, find_basis(one, rank), [rank], FULL)
    assert option.base_error == pytest.approx(bound, rel=1e-9)
    stored = option.solution.build(one, all_kept(option), FULL, torch.float32)
    assert weighted(one, stored) == pytest.approx(bound, rel=1e-6)


@pytest.mark.parametrize("side", ["inputs", "outputs"])
@pytest.mark.parametrize("ranks", [[1, 2, 3, 4, 2], [4, 4, 4, 4, 4], [0, 0, 1, 0, 0]])
def test_low_rank_heads_are_truncated_in_the_shared_span(side, ranks):
    """Project every update on the span densely, truncate it by SVD: what is left over is the error."""
    one = problem(1)
    seen = one if side == "inputs" else one.mirror()
    family = shared_a if side == "inputs" else shared_b
    basis = find_basis(seen, 5)
    (option,) = family.options(seen, basis, [5], FULL)
    levels = all_kept(option, ranks)
    stored = option.solution.build(one, levels, FULL, torch.float32)
    projector = torch.linalg.pinv(basis.rows) @ basis.rows
    for k, (task, rank) in enumerate(zip(one.tasks, ranks, strict=True)):
        update = updates(one)[k] if side == "inputs" else updates(one)[k].mT
        u, s, v = torch.linalg.svd(update @ projector, full_matrices=False)
        left = update - u[:, :rank] * s[:rank] @ v[:rank]
        assert stored.squared_error[task] == pytest.approx(float(left.square().sum()), rel=1e-5, abs=1e-9)
    assert weighted(one, stored) == pytest.approx(expected(option, levels), rel=1e-5)


@pytest.mark.parametrize("ranks", [[1, 2, 3, 4, 2], [4, 4, 4, 4, 4]])
def test_two_sided_cores_are_truncated_between_both_spans(ranks):
    one = problem(2)
    inputs, outputs = find_basis(one, 6), find_basis(one.mirror(), 6)
    (option,) = two_sided.options(one, inputs, outputs, [6], FULL)
    levels = all_kept(option, ranks)
    stored = option.solution.build(one, levels, FULL, torch.float32)
    right = torch.linalg.pinv(inputs.rows) @ inputs.rows
    left = torch.linalg.pinv(outputs.rows) @ outputs.rows
    for k, (task, rank) in enumerate(zip(one.tasks, ranks, strict=True)):
        u, s, v = torch.linalg.svd(left @ updates(one)[k] @ right, full_matrices=False)
        lost = updates(one)[k] - u[:, :rank] * s[:rank] @ v[:rank]
        assert stored.squared_error[task] == pytest.approx(float(lost.square().sum()), rel=1e-5, abs=1e-9)
    assert weighted(one, stored) == pytest.approx(expected(option, levels), rel=1e-5)


def test_rounded_factors_leave_what_the_solver_expects():
    """Noise constants are averages over Gaussian numbers; a handful of vectors of 20 numbers scatters around them."""
    one = problem(3)
    bits = (16, 8, 4)
    basis = find_basis(one, 6)
    (option,) = shared_a.options(one, basis, [6], bits)
    for level in range(3):
        shared = np.full(6, level)
        levels = Levels((shared,), np.full(option.heads.energies.shape, level))
        stored = option.solution.build(one, levels, bits, torch.bfloat16)
        rounding = expected(option, levels) - option.base_error
        assert 0.2 * rounding <= weighted(one, stored) - option.base_error <= 2 * rounding


@pytest.mark.parametrize("bits", [16, 8])
def test_the_noise_of_a_direction_is_that_of_both_its_vectors(bits):
    """Rounded, the small factor's at its own precision, against the outer product as it was. At these bits the small
    factor doubles the noise; the constants hold to 5 %."""
    u, v = torch.randn(2, 400, 2048, generator=torch.Generator().manual_seed(bits), dtype=torch.float64)
    (_, up), (_, down) = encode(u, bits, torch.bfloat16), encode(v, core_bits(bits), torch.bfloat16)
    whole = u.square().sum(1) * v.square().sum(1)
    met = (u * up).sum(1) * (v * down).sum(1)
    lost = whole - 2 * met + up.square().sum(1) * down.square().sum(1)
    (noise,) = Rates.of((bits,), (2048,), (2048,)).noise
    assert float(lost.sum() / whole.sum()) == pytest.approx(noise, rel=0.05)


def test_the_iteration_finds_what_the_full_decomposition_finds():
    """A stack too tall for the full one: the energy it captures is within 0.5 % of the optimum at every rank kept."""
    g = torch.Generator().manual_seed(0)
    downs = torch.randn(60, 8, 300, generator=g) * 0.3 + torch.randn(1, 8, 300, generator=g)
    one = ModuleProblem(
        "m", tuple(map(str, range(60))), torch.ones(60, dtype=torch.float64),
        torch.randn(60, 100, 8, generator=g), downs, (8,) * 60,
    )  # fmt: skip
    exact, found = find_basis(one, 40, exact=True), find_basis(one, 40)
    assert bool((found.energies.cumsum(0) >= 0.995 * exact.energies.cumsum(0)).all())
    torch.testing.assert_close(found.rows @ found.rows.mT, torch.eye(40), rtol=0, atol=1e-5)
    along = (one.cores @ found.cross).square().sum(dim=(0, 1))
    torch.testing.assert_close(along, found.energies, rtol=1e-5, atol=0)


@pytest.mark.parametrize("tasks", [30, 150])
@pytest.mark.parametrize("rounds", [False, True])
def test_rows_are_as_precise_where_products_round_to_bfloat16(tasks, rounds, monkeypatch):
    """Adapters of bfloat16 numbers, their directions over four orders of magnitude, few enough for the full
    decomposition and too many: each row holds the energy it is said to, the weak ones, sums of large numbers that
    cancel, as well. The tolerance is for rows rounded to bfloat16 and, beside it, for sums in float32, whose last digit
    is that of the strongest row: measured at half a digit on three processors. The rounding of products is done here,
    for processors that would not."""
    if rounds:
        exact = torch.Tensor.__matmul__

        def product(left, right):
            if left.dtype == right.dtype == torch.float32:
                left, right = left.bfloat16().float(), right.bfloat16().float()
            return exact(left, right)

        monkeypatch.setattr(torch.Tensor, "__matmul__", product)
    g = torch.Generator().manual_seed(0)
    decay = torch.logspace(0, -2, 8)
    downs = torch.randn(tasks, 8, 300, generator=g) * 0.01 + torch.randn(1, 8, 300, generator=g)
    one = ModuleProblem(
        "m", tuple(map(str, range(tasks))), torch.ones(tasks, dtype=torch.float64),
        (torch.randn(tasks, 100, 8, generator=g) * decay).bfloat16().float(), downs.bfloat16().float(), (8,) * tasks,
        is_bfloat16=True,
    )  # fmt: skip
    found = find_basis(one, 16)
    monkeypatch.undo()
    along = (one.cores @ (one.downs.double() @ found.rows.double().mT)).square().sum(dim=(0, 1))
    last_digit = torch.finfo(torch.float32).eps * float(found.energies[0])
    torch.testing.assert_close(along, found.energies, rtol=5e-3, atol=2 * last_digit)


def test_every_vector_takes_its_cheapest_precision():
    """Brute force over all levels of every vector, at prices from nothing to everything."""
    energies = np.array([[5.0, 1.0, 0.2, 0.01], [3.0, 0.5, 1e-4, 0.0]])
    for may_leave_out in (True, False):
        part = Part(energies, Rates.of((16, 8, 4, 2), (30,), (6,)), may_leave_out)
        prices = np.geomspace(1e-8, 10, 60)
        errors, sizes = part.cost(prices)
        choices = range(-1 if may_leave_out else 0, 4)
        for price, error, size in zip(prices, errors, sizes, strict=True):
            best = sum(
                min(
                    energy * (1.0 if level < 0 else part.rates.noise[level])
                    + price * (0.0 if level < 0 else part.rates.bytes[level])
                    for level in choices
                )
                for energy in energies.flat
            )
            assert error + price * size == pytest.approx(best, rel=1e-9)
            found = part.totals(part.levels(price))
            assert found[0] + price * found[1] == pytest.approx(best, rel=1e-9)


def two_small_modules():
    modules = []
    for seed in range(2):
        one = problem(seed)
        basis = find_basis(one, 8)
        own = separate.option(separate.spectra(one) * one.weights[:, None].numpy(), (D_OUT, D_IN), (16, 4))
        modules.append([own, *shared_a.options(one, basis, [2, 5, 8], (16, 4))])
    error = sum(module[0].cost(np.array([1e9]))[0][0] for module in modules)
    prices = price_grid(error, 5000)
    return PricedModules([ModuleCurves.of(options, prices) for options in modules], prices)


def test_no_price_does_better_than_the_budget_solver():
    """For every pair of options and a fine ladder of prices: whatever fits the budget is no closer."""
    modules = two_small_modules()
    fine = np.geomspace(modules.prices[0], modules.prices[-1], 400)
    for size in (200, 700, 1500, 3000):
        found = within_budget(modules, size)
        assert total_bytes(found) <= size
        for options in itertools.product(*(module.options for module in modules.modules)):
            costs = [option.cost(fine) for option in options]
            errors = sum(e for e, _ in costs) + sum(option.doubt for option in options)
            sizes = sum(b for _, b in costs)
            compared = total_error(found) + sum(choice.option.doubt for choice in found)
            if (sizes <= size).any():
                assert compared <= errors[sizes <= size].min() * (1 + 1e-9)


def test_what_lies_outside_a_shared_span_counts_twice():
    """Between options of one module; an error bound is met by the error as it is."""
    one = problem()
    for option in shared_a.options(one, find_basis(one, 8), [2, 5, 8], (16, 4)):
        assert option.doubt == option.base_error > 0
    own = separate.option(separate.spectra(one) * one.weights[:, None].numpy(), (D_OUT, D_IN), (16, 4))
    assert own.doubt == 0
    modules = two_small_modules()
    curves = modules.modules[0]
    expected_best = np.argmin(curves.errors + curves.doubts + modules.prices * curves.bytes, axis=0)
    assert np.array_equal(modules.best[0], expected_best)


def test_the_last_module_to_swap_goes_by_what_counts_twice():
    """Two modules alike, of which the budget has room for one without sharing: 0.5 is lost with that, 0.4 outside a
    shared span, which counts as 0.8."""
    rates = Rates.of(FULL, (25,))
    nothing, one = np.zeros((1, 1)), Part(np.zeros(1), rates, may_leave_out=False)
    heads = Part(nothing, Rates.of(FULL, (1,)), may_leave_out=False)
    dear = Part(nothing, Rates.of(FULL, (100,)), may_leave_out=False)
    options = [Option("separate", None, (), dear, 0.5), Option("shared-a", None, (one,), heads, 0.4)]
    prices = price_grid(2.0, 800)
    modules = PricedModules([ModuleCurves.of(options, prices)] * 2, prices)
    found = within_budget(modules, 520)
    assert {choice.option.family for choice in found} == {"separate", "shared-a"}
    assert total_bytes(found) == 400 + 104


def test_what_is_left_is_spent_to_the_last_byte():
    """A vector of 30 numbers at 32 bits takes 120 bytes."""
    option = Option(
        "separate", None, (), Part(np.ones((1, 1)), Rates.of(FULL, (30,)), may_leave_out=True), 0.0
    )
    empty = [Choice(option, Levels((), np.array([[LEFT_OUT]])))]
    assert total_bytes(fill(empty, 119)) == 0
    assert total_bytes(fill(empty, 120)) == 120


def test_an_error_bound_is_met_with_no_more_bytes_than_a_budget_needs():
    modules = two_small_modules()
    for bound in (0.05, 0.5, 2.0):
        found = within_error(modules, math.sqrt(bound), 1.0)
        assert total_error(found) <= bound
        smaller = within_budget(modules, total_bytes(found) - 60)
        assert total_error(smaller) > bound * 0.98


def test_a_budget_of_nothing_keeps_nothing():
    modules = two_small_modules()
    assert total_bytes(within_budget(modules, 0)) == 0
    with pytest.raises(BudgetError):
        within_budget(modules, -1)


def test_a_metric_measures_errors_on_the_inputs():
    """Closed form by whitening: minimise |(dW - D) C^(1/2)|, checked on dense whitened updates."""
    g = torch.Generator().manual_seed(5)
    root = torch.randn(D_IN, D_IN, generator=g, dtype=torch.float64) * torch.logspace(
        0, -1.5, D_IN, dtype=torch.float64
    )
    one = problem(4, metric=root.mT @ root)
    whitened = updates(one) @ torch.linalg.cholesky(one.metric)
    stacked = torch.cat([w.sqrt() * update for w, update in zip(one.weights, whitened, strict=True)])
    (option,) = dense_heads.options(one, find_basis(one, 3), [3], FULL)
    bound = float(torch.linalg.svdvals(stacked)[3:].square().sum())
    assert option.base_error == pytest.approx(bound, rel=1e-8)
    spectra = separate.spectra(one)
    for k in range(TASKS):
        values = torch.linalg.svdvals(whitened[k])[:RANK].square().numpy()
        np.testing.assert_allclose(spectra[k], values, rtol=1e-8, atol=1e-10)


def test_modules_are_read_with_the_scaling_and_zeros_beyond_a_tasks_rank(workshop):
    folders = {"a": workshop.adapter("a", rank=2), "b": workshop.adapter("b", seed=1, rank=5, lora_alpha=15)}
    adapters = {task: hydraopt.read_adapter(folder) for task, folder in folders.items()}
    one = load_module("model.layers.0.q_proj", adapters, {"a": 1.0, "b": 2.0}, torch.device("cpu"))
    for k, task in enumerate(one.tasks):
        scaling = {"a": 2.0, "b": 3.0}[task]
        wanted = workshop.dense(folders[task], scaling)["model.layers.0.q_proj"]
        torch.testing.assert_close(updates(one)[k], wanted, rtol=1e-12, atol=1e-12)
        assert float(one.norms[k]) == pytest.approx(float(wanted.square().sum()), rel=1e-10)
    assert one.weights.tolist() == [1.0, 2.0]
