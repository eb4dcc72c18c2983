"""The fitted form against Adam on dense updates by automatic differentiation, and against the closed form's optimum."""

from __future__ import annotations

import math

import pytest
import torch

from hydraopt.errors import AdapterMismatchError, BudgetError
from hydraopt.merging.gradient import gradient
from hydraopt.merging.low_rank import LowRank


def updates_of(count=4, d_out=11, d_in=8, rank=3, *, scale=1.0, seed=0) -> list[LowRank]:
    """Updates that share most of their A."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common = draw(rank, d_in)
    return [LowRank(scale * draw(d_out, rank), common + 0.4 * draw(rank, d_in)) for _ in range(count)]


def dense(update: LowRank) -> torch.Tensor:
    return update.up.double() @ update.down.double()


def relative_error(updates, weights, heads, fitted) -> float:
    lost = sum(
        w * float((dense(u) - fitted.heads[m].double() @ fitted.shared.double()).square().sum())
        for u, w, m in zip(updates, weights, heads, strict=True)
    )
    return math.sqrt(
        lost / sum(w * float(dense(u).square().sum()) for u, w in zip(updates, weights, strict=True))
    )


def least_error(updates, weights, heads, rank) -> float:
    """Scatter within the groups and the discarded singular values of their means: the global optimum."""
    total = sum(w * float(dense(u).square().sum()) for u, w in zip(updates, weights, strict=True))
    lost, means = 0.0, []
    for m in sorted(set(heads)):
        own = [(dense(u), w) for u, w, head in zip(updates, weights, heads, strict=True) if head == m]
        weight = sum(w for _, w in own)
        mean = sum(w * u for u, w in own) / weight
        lost += sum(w * float((u - mean).square().sum()) for u, w in own)
        means.append(math.sqrt(weight) * mean)
    lost += float(torch.linalg.svdvals(torch.cat(means))[rank:].square().sum())
    return math.sqrt(lost / total)


def test_each_step_is_adams_on_dense_updates():
    """Ten steps of torch's Adam under autograd, from the same start and in the same units. Float64 on both sides: only
    the order of sums differs, and Adam's division by small moments enlarges that a little."""
    updates, weights, heads, rank = updates_of(), [0.3, 2.0, 0.7, 1.0], [0, 1, 0, 2], 3
    fitted = gradient(updates, weights, rank, heads=heads, steps=10, learning_rate=0.05)

    targets = [dense(update) for update in updates]
    total = sum(w * t.square().sum() for w, t in zip(weights, targets, strict=True))
    units = []
    for m in range(3):
        own = [k for k in range(4) if heads[k] == m]
        energy = sum(weights[k] * targets[k].square().sum() for k in own) / sum(weights[k] for k in own)
        units.append((energy / (11 * rank)).sqrt())
    mean = sum(update.down for update in updates) / 4
    shared = (mean / mean.norm(dim=1, keepdim=True) * math.sqrt(8)).requires_grad_()
    stack = torch.zeros(3, 11, rank, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([shared, stack], lr=0.05)
    for _ in range(10):
        adam.zero_grad()
        lost = sum(
            w * (t - units[m] * stack[m] @ shared / math.sqrt(8)).square().sum()
            for w, t, m in zip(weights, targets, heads, strict=True)
        )
        (lost / total).backward()
        adam.step()

    torch.testing.assert_close(fitted.shared, shared.detach() / math.sqrt(8), rtol=1e-8, atol=1e-8)
    for m in range(3):
        torch.testing.assert_close(fitted.heads[m], units[m] * stack[m].detach(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reported_errors_are_those_of_the_fit(dtype):
    updates = [LowRank(u.up.to(dtype), u.down.to(dtype)) for u in updates_of()]
    weights, heads = [0.3, 2.0, 0.7, 1.0], [0, 1, 0, 2]
    for steps in (1, 7, 60):
        fitted = gradient(updates, weights, heads=heads, steps=steps)
        assert len(fitted.errors) == steps + 1
        assert fitted.errors[0] == pytest.approx(1.0)  # heads start at zero
        wanted = relative_error(updates, weights, heads, fitted)
        # The squared error is a difference of terms of size 1, here above 0.01.
        assert fitted.errors[-1] == pytest.approx(wanted, rel=1e-4 if dtype == torch.float32 else 1e-10)
        assert fitted.shared.dtype == dtype


@pytest.mark.parametrize("heads", [[0, 1, 2, 3], [0, 1, 0, 1], [0, 0, 0, 0]])
@pytest.mark.parametrize("start", ["mean", "random"])
def test_it_approaches_the_optimum_and_never_passes_it(heads, start):
    updates, weights = updates_of(), [0.3, 2.0, 0.7, 1.0]
    least = least_error(updates, weights, heads, 2)
    fitted = gradient(updates, weights, 2, heads=heads, steps=3000, start=start, learning_rate=0.02)
    assert min(fitted.errors) >= least * (1 - 1e-9)
    assert fitted.errors[-1] <= 1.01 * least


def test_it_stops_as_soon_as_the_error_is_small_enough():
    updates, weights, heads = updates_of(), [1.0] * 4, [0, 1, 2, 3]
    enough = 1.05 * least_error(updates, weights, heads, 2)
    fitted = gradient(updates, weights, 2, heads=heads, steps=3000, target_error=enough)
    assert fitted.errors[-1] <= enough
    assert min(fitted.errors[:-1]) > enough
    assert relative_error(updates, weights, heads, fitted) == pytest.approx(fitted.errors[-1], rel=1e-9)


def test_the_size_of_updates_and_weights_is_irrelevant():
    small, large = updates_of(scale=1e-4), updates_of(scale=1e3)
    one = gradient(small, [1.0, 2.0, 3.0, 4.0], heads=[0, 1, 2, 3], steps=20)
    other = gradient(large, [10.0, 20.0, 30.0, 40.0], heads=[0, 1, 2, 3], steps=20)
    torch.testing.assert_close(torch.tensor(one.errors), torch.tensor(other.errors), rtol=1e-6, atol=1e-9)
    for a, b in zip(one.heads, other.heads, strict=True):
        torch.testing.assert_close(1e7 * a, b, rtol=1e-6, atol=1e-6)


def test_a_task_without_weight_has_no_say():
    updates = updates_of()
    with_it = gradient(updates, [1.0, 1.0, 1.0, 0.0], heads=[0, 1, 0, 2], steps=30, start="random")
    without = gradient(updates[:3], [1.0, 1.0, 1.0], heads=[0, 1, 0], steps=30, start="random")
    torch.testing.assert_close(with_it.shared, without.shared)
    assert float(with_it.heads[2].abs().max()) == 0


def test_random_rows_come_from_the_seed_alone():
    updates = updates_of()
    state = torch.get_rng_state()

    def fit(seed):
        return gradient(updates, [1.0] * 4, 5, heads=[0, 1, 2, 3], steps=3, seed=seed, start="random").shared

    first = fit(1)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(fit(1), first)
    assert not torch.allclose(fit(2), first, atol=0.1)


def test_it_fits_more_rows_than_the_adapters_have():
    """Rows beyond the mean of A start at random, and help."""
    updates, heads = updates_of(), [0, 1, 2, 3]
    fitted = gradient(updates, [1.0] * 4, 6, heads=heads, steps=500)
    assert fitted.shared.shape == (6, 8)
    assert fitted.errors[-1] < 0.7 * least_error(updates, [1.0] * 4, heads, 3)


@pytest.mark.parametrize("heads", [[0, 1, 2], [0, 1, 3, 3], [1, 1, 2, 2], [0, 0, 0, -1]])
def test_heads_that_do_not_fit_the_tasks_are_refused(heads):
    with pytest.raises(AdapterMismatchError, match=r"heads=.*4 tasks"):
        gradient(updates_of(), [1.0] * 4, heads=heads, steps=1)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": 0}, "steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0"),
        ({"learning_rate": math.nan}, "learning_rate=nan"),
        ({"start": "pca"}, "start='pca'"),
        ({"rank": 0}, "rank=0"),
        ({"weights": [1.0, -1.0, 1.0, 1.0]}, "must not be negative"),
        ({"weights": [0.0] * 4}, "nothing to fit"),
    ],
)
def test_settings_that_make_no_fit_are_refused(setting, message):
    options = {"weights": [1.0] * 4, "heads": [0, 1, 2, 3], "steps": 2} | setting
    with pytest.raises(BudgetError, match=message):
        gradient(updates_of(), **options)
