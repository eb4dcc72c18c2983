"""Fewer heads than tasks, against exhaustive search over all groups with dense float64 updates."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch

import hydraopt
from hydraopt.errors import BudgetError
from hydraopt.merging.basis import stacked_directions
from hydraopt.merging.grouping import (
    HeadSpace,
    SharedHeads,
    group_tasks,
    head_space,
    improved,
    moved_tasks,
    numbered,
    ward,
)
from hydraopt.merging.problem import ModuleProblem

PROBLEMS = 50


@dataclass(frozen=True)
class Dense:
    """Updates of one module as they are, and what groups of them lose."""

    updates: np.ndarray  # (K, d_out, d_in)
    weights: np.ndarray  # (K,)

    def error(self, groups: Sequence[int], rank: int) -> float:
        """Scatter within the groups, and the singular values of their weighted means beyond ``rank``."""
        lost, means = 0.0, []
        for group in sorted(set(groups)):
            own = [k for k, of in enumerate(groups) if of == group]
            total = self.weights[own].sum()
            mean = np.tensordot(self.weights[own], self.updates[own], axes=1) / total
            lost += float((self.weights[own, None, None] * np.square(self.updates[own] - mean)).sum())
            means.append(math.sqrt(total) * mean)
        tail = np.linalg.svd(np.concatenate(means), compute_uv=False)[rank:]
        return lost + float(np.square(tail).sum())

    def least_error(self, heads: int, rank: int) -> float:
        return min(self.error(groups, rank) for groups in all_groups(len(self.updates), heads))


def all_groups(tasks: int, heads: int) -> Iterator[tuple[int, ...]]:
    """Every way to part tasks into exactly so many groups, each once."""

    def parts(begun: tuple[int, ...], used: int) -> Iterator[tuple[int, ...]]:
        if len(begun) == tasks:
            if used == heads:
                yield begun
            return
        for group in range(min(used + 1, heads)):
            yield from parts((*begun, group), max(used, group + 1))

    return parts((), 0)


def random_problem(seed: int) -> tuple[ModuleProblem, Dense, int, int]:
    """A module, its dense updates, a number of heads and a rank: from nothing shared to clear groups."""
    rng = np.random.default_rng(seed)
    tasks, rank = int(rng.integers(4, 9)), int(rng.integers(1, 4))
    heads, rows = int(rng.integers(2, tasks)), int(rng.integers(1, 7))
    d_out, d_in = (int(size) for size in rng.integers(6, 14, size=2))
    ups, downs = rng.normal(size=(tasks, d_out, rank)), rng.normal(size=(tasks, rank, d_in))
    if seed % 3:  # one A to start from
        downs = rng.normal(size=(rank, d_in)) + 0.3 * downs
    if seed % 3 == 2:  # and B that come in groups
        ups = rng.normal(size=(heads, d_out, rank))[rng.integers(heads, size=tasks)] + 0.5 * ups
    ups *= 10.0 ** rng.uniform(-1, 1, size=(tasks, 1, 1))
    updates = ups @ downs
    weights = rng.uniform(0.3, 3.0, size=tasks) / np.square(updates).sum(axis=(1, 2))
    return module(ups, downs, weights), Dense(updates, weights), heads, rows


def module(ups: np.ndarray, downs: np.ndarray, weights: np.ndarray) -> ModuleProblem:
    names = tuple(f"t{k}" for k in range(len(ups)))
    return ModuleProblem(
        "q_proj",
        names,
        torch.from_numpy(weights),
        ups=torch.from_numpy(ups),
        downs=torch.from_numpy(downs),
        ranks=(ups.shape[2],) * len(ups),
    )


def grouped(problem: ModuleProblem, heads: int, rank: int, seed: int = 0):
    found = group_tasks(problem, SharedHeads(heads, rank, seed), 64)
    assert found is not None
    return found


def test_groups_are_as_good_as_the_best_of_all():
    """Within 1 % of exhaustive search on every one of 50 problems."""
    for seed in range(PROBLEMS):
        problem, dense, heads, rank = random_problem(seed)
        groups = grouped(problem, heads, rank).groups
        assert len(set(groups)) == heads
        assert dense.error(groups, rank) <= 1.01 * dense.least_error(heads, rank), f"problem {seed}"


@pytest.mark.parametrize("seed", range(6))
def test_rows_and_energies_are_the_optimum_for_the_groups(seed):
    """What the heads hold on ``A'`` plus what is lost is all there is, at every rank: rows and energies are right."""
    problem, dense, heads, rank = random_problem(seed)
    found = grouped(problem, heads, rank)
    whole = float((dense.weights[:, None, None] * np.square(dense.updates)).sum())
    held = found.along.sum(axis=0).cumsum()
    for count, one in enumerate(held, start=1):
        assert whole - one == pytest.approx(dense.error(found.groups, count), rel=1e-9, abs=1e-10 * whole)
    rows = found.rows.numpy()
    np.testing.assert_allclose(rows @ rows.T, np.eye(len(rows)), atol=1e-9)
    for group, along in enumerate(found.along):  # of each head, not just of all
        own = [k for k, of in enumerate(found.groups) if of == group]
        total = dense.weights[own].sum()
        mean = np.tensordot(dense.weights[own], dense.updates[own], axes=1) / total
        np.testing.assert_allclose(along, total * np.square(mean @ rows.T).sum(axis=0), atol=1e-9 * whole)


def test_no_step_loses():
    rng = np.random.default_rng(1)
    for seed in range(20):
        problem, dense, heads, rank = random_problem(seed)
        space = head_space(problem, *stacked_directions(problem))
        start = rng.permutation(np.arange(len(dense.weights)) % heads)
        groups, errors = improved(space, start, rank)
        slack = 1e-9 * space.energy
        assert errors[0] == pytest.approx(dense.error(start.tolist(), rank), abs=slack)
        assert errors[-1] == pytest.approx(dense.error(groups.tolist(), rank), abs=slack)
        assert all(later <= earlier + slack for earlier, later in pairwise(errors))


def test_moves_end_where_no_single_move_gains():
    for seed in range(10):
        _, dense, heads, _ = random_problem(seed)
        scaled = np.sqrt(dense.weights)[:, None] * dense.updates.reshape(len(dense.weights), -1)
        groups = moved_tasks(scaled @ scaled.T, dense.weights, np.arange(len(dense.weights)) % heads)
        full = 10**6  # no singular value is beyond: the scatter alone
        reached = dense.error(groups.tolist(), full)
        for task in range(len(groups)):
            for other in range(heads):
                moved = groups.copy()
                moved[task] = other
                if len(set(moved.tolist())) == heads:
                    assert dense.error(moved.tolist(), full) >= reached - 1e-9 * reached


def test_ward_merges_what_loses_least_first():
    """From K to K - 1 groups Ward is exhaustive; with weights, heavy tasks are not what it joins."""
    for seed in range(10):
        _, dense, _, _ = random_problem(seed)
        tasks = len(dense.weights)
        scaled = np.sqrt(dense.weights)[:, None] * dense.updates.reshape(tasks, -1)
        groups = ward(scaled @ scaled.T, dense.weights, tasks - 1).tolist()
        assert dense.error(groups, 10**6) == pytest.approx(dense.least_error(tasks - 1, 10**6), rel=1e-9)


@pytest.mark.parametrize("seed", range(8))
def test_order_and_factors_of_tasks_are_irrelevant(seed):
    problem, dense, heads, rank = random_problem(seed)
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(dense.weights))
    mix = rng.normal(size=(problem.downs.shape[1],) * 2) + 3 * np.eye(problem.downs.shape[1])
    other = module(
        problem.ups.numpy()[order] @ np.linalg.inv(mix),
        mix @ problem.downs.numpy()[order],
        dense.weights[order],
    )
    groups, shuffled = np.array(grouped(problem, heads, rank).groups), grouped(other, heads, rank).groups
    assert numbered(groups[order]).tolist() == list(shuffled)


@pytest.mark.parametrize("seed", range(4))
def test_with_a_metric_groups_are_those_of_whitened_updates(seed):
    """``|dW C^(1/2)|`` of the updates is ``|dW'|`` of ``dW' = dW L`` with ``C = L L^T``."""
    problem, dense, heads, rank = random_problem(seed)
    mix = np.random.default_rng(seed).normal(size=(problem.d_in, problem.d_in + 3))
    metric = mix @ mix.T
    lower = np.linalg.cholesky(metric)
    measured = grouped(replace(problem, metric=torch.from_numpy(metric)), heads, rank)
    white = grouped(module(problem.ups.numpy(), problem.downs.numpy() @ lower, dense.weights), heads, rank)
    assert measured.groups == white.groups
    np.testing.assert_allclose(measured.along.sum(axis=0), white.along.sum(axis=0), rtol=1e-6, atol=1e-9)


def test_groups_are_the_same_every_time_whatever_the_seed_finds():
    problem, dense, heads, rank = random_problem(5)
    assert grouped(problem, heads, rank).groups == grouped(problem, heads, rank).groups
    other = grouped(problem, heads, rank, seed=1).groups
    assert dense.error(other, rank) <= 1.01 * dense.least_error(heads, rank)


def test_a_search_that_finds_other_groups_with_another_seed_is_repeatable():
    rng = np.random.default_rng(0)
    ups, downs = rng.normal(size=(24, 12, 2)), rng.normal(size=(24, 2, 14))
    weights = 1 / np.square(ups @ downs).sum(axis=(1, 2))
    problem = module(ups, downs, weights)
    first = [grouped(problem, 7, 4, seed=seed).groups for seed in range(4)]
    assert len(set(first)) > 1
    assert [grouped(problem, 7, 4, seed=seed).groups for seed in range(4)] == first


def test_no_rows_are_kept_where_the_means_have_no_energy():
    """The one mean of two opposite tasks and a third of rank 1 has rank 1."""
    ups, downs = np.zeros((3, 6, 2)), np.zeros((3, 2, 8))
    rng = np.random.default_rng(0)
    ups[0], downs[0] = rng.normal(size=(6, 2)), rng.normal(size=(2, 8))
    ups[1], downs[1] = -ups[0], downs[0]
    ups[2, :, 0], downs[2, 0] = rng.normal(size=6), rng.normal(size=8)
    found = grouped(module(ups, downs, np.ones(3)), 1, 5)
    assert found.rows.shape == (1, 8)
    assert found.along.shape == (1, 1)


@pytest.mark.parametrize(("rank", "directions"), [(4, 64), (16, 64), (40, 160)])
def test_groups_are_looked_for_in_four_directions_a_row_and_64_at_least(monkeypatch, rank, directions):
    """Fewer would be strong ones of single tasks, where there are rows for weaker ones that groups share."""
    asked, narrowed = [], HeadSpace.narrowed

    def noted(self, most):
        asked.append(most)
        return narrowed(self, most)

    monkeypatch.setattr(HeadSpace, "narrowed", noted)
    random = np.random.default_rng(0)
    ups, downs = random.standard_normal((3, 6, 4)), random.standard_normal((3, 4, 40))
    grouped(module(ups, downs, np.ones(3)), 2, rank)
    assert asked == [directions]


def set_error(workshop, bundle, folders) -> float:
    """Sum over the tasks of |dW - merged|^2 / |dW|^2, from dense float64 products."""
    total = 0.0
    for task, folder in folders.items():
        wanted, found = workshop.dense(folder), workshop.dense_bundle(bundle, task)
        lost = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
        total += lost / sum(float(update.square().sum()) for update in wanted.values())
    return total


def test_a_merge_with_fewer_heads_is_the_best_of_all_groups(workshop):
    """Per module the least error any groups and any A' leave, up to the 1 % of the search; stored once a group."""
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True, rank=2) for i in range(5)}
    heads, rank = 2, 3
    bundle = hydraopt.merge(folders, method="paper", heads=heads, rank=rank, dtype="float32")
    dense = {task: workshop.dense(folder) for task, folder in folders.items()}
    norms = [sum(float(u.square().sum()) for u in updates.values()) for updates in dense.values()]
    least = sum(
        Dense(np.stack([one[name].numpy() for one in dense.values()]), 1 / np.array(norms)).least_error(
            heads, rank
        )
        for name in dense["t0"]
    )
    error = set_error(workshop, bundle, folders)
    assert least * (1 - 1e-6) <= error <= 1.01 * least
    assert bundle.relative_error == pytest.approx(math.sqrt(error / 5), rel=1e-6)
    for entry in bundle.manifest.modules:
        assert set(entry.groups) == set(range(heads))
    numbers = sum(
        rank * (d_in + heads * d_out) for d_out, d_in in (entry.shape for entry in bundle.manifest.modules)
    )
    assert bundle.contents.shared.numel() == 4 * numbers
    assert all(flat.numel() == 0 for flat in bundle.contents.heads.values())


def test_bundles_of_grouped_heads_are_whole(workshop, tmp_path):
    """Saved, verified, exported: the folders hold what the bundle computes. One task lacks two modules."""
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True) for i in range(4)}
    folders["t4"] = workshop.adapter("t4", seed=9, skip=("model.layers.0.q_proj", "model.layers.1.down_proj"))
    bundle = hydraopt.merge(folders, method="paper", heads=2, budget=0.6, bits=16)
    assert bundle.storage_ratio <= 0.6
    hydraopt.verify(bundle.save(tmp_path / "bundle"))
    read = hydraopt.Bundle.load(tmp_path / "bundle")
    assert read.id == bundle.id
    lacking = next(entry for entry in read.manifest.modules if entry.name == "model.layers.0.q_proj")
    assert lacking.groups[-1] == -1
    assert lacking.heads[-1] is None
    for task, folder in read.export(tmp_path / "exported").items():
        exported = workshop.dense(folder)
        stored = workshop.dense_bundle(read, task)
        assert set(exported) == set(stored)
        for name, update in stored.items():
            assert float((exported[name] - update).norm()) <= 1e-6 * float(update.norm())


def test_the_order_of_adapters_is_irrelevant(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(4)}
    one = hydraopt.merge(folders, method="paper", heads=2, rank=3)
    assert hydraopt.merge(dict(reversed(folders.items())), method="paper", heads=2, rank=3).id == one.id


def test_as_many_heads_as_tasks_is_one_each(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(3)}
    plain = hydraopt.merge(folders, method="paper", rank=4)
    asked = hydraopt.merge(folders, method="paper", rank=4, heads=3)
    assert all(entry.groups == () for entry in asked.manifest.modules)
    assert torch.equal(plain.contents.shared, asked.contents.shared)
    with pytest.raises(BudgetError, match=r"heads=4.*3 tasks"):
        hydraopt.merge(folders, method="paper", rank=4, heads=4)


def test_a_task_that_changes_nothing_takes_no_head(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(2)}
    folders["zero"] = workshop.adapter("zero", scale=0.0)
    bundle = hydraopt.merge(folders, method="paper", rank=8, heads=2, dtype="float32")
    assert bundle.factors("zero") == {}
    assert (
        bundle.relative_error <= 1e-5
    )  # rank 8 holds both A, and both other tasks have a head to themselves
    for method in ("paper", "gradient"):
        assert hydraopt.merge({"zero": folders["zero"]}, method=method, rank=2).relative_error == 0


def test_more_heads_than_tasks_that_change_anything_are_one_each(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(2)}
    folders |= {f"zero{i}": workshop.adapter(f"zero{i}", scale=0.0) for i in range(3)}
    bundle = hydraopt.merge(folders, method="paper", rank=8, heads=3, dtype="float32")
    assert {entry.groups for entry in bundle.manifest.modules} == {(0, 1, -1, -1, -1)}
    assert bundle.relative_error <= 1e-5


@pytest.mark.parametrize("method", ["paper", "gradient"])
def test_a_task_that_changes_nothing_is_exported_as_such(workshop, tmp_path, method):
    """PEFT cannot hold an adapter without a module."""
    folders = {
        "some": workshop.adapter("some", skip=("model.layers.0.down_proj",)),
        "zero": workshop.adapter("zero", scale=0.0),
    }
    bundle = hydraopt.merge(folders, method=method, rank=4, heads=1)
    for profile in ("peft", "portable", "vllm"):
        out = bundle.export(tmp_path / profile, profile=profile)
        assert all(not bool(update.any()) for update in workshop.dense(out["zero"]).values())
        assert any(bool(update.any()) for update in workshop.dense(out["some"]).values())
    alone = hydraopt.merge({"zero": folders["zero"]}, method=method, rank=4)
    assert workshop.dense(alone.export(tmp_path / "alone")["zero"])


def test_a_task_without_weight_gets_the_nearest_head(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(3)}
    folders["copy"] = workshop.adapter("copy", seed=1)
    bundle = hydraopt.merge(folders, method="paper", rank=12, heads=3, weights={"copy": 0.0}, dtype="float32")
    for entry in bundle.manifest.modules:
        groups = dict(zip(bundle.task_names, entry.groups, strict=True))
        assert groups["copy"] == groups["t1"]
        assert len({groups[f"t{i}"] for i in range(3)}) == 3


def test_a_loud_task_without_weight_moves_no_group(workshop):
    """Ten million times as large as the others."""
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i) for i in range(3)}
    folders["loud"] = workshop.adapter("loud", seed=7, scale=1e7)
    bundle = hydraopt.merge(folders, method="paper", rank=12, heads=3, weights={"loud": 0.0}, dtype="float32")
    for entry in bundle.manifest.modules:
        groups = dict(zip(bundle.task_names, entry.groups, strict=True))
        assert len({groups[f"t{i}"] for i in range(3)}) == 3


def test_an_error_bound_is_met_with_fewer_heads(workshop):
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i // 2, shared_a=True) for i in range(4)}
    bundle = hydraopt.merge(folders, method="paper", heads=2, max_error=0.3)
    assert bundle.relative_error <= 0.3
    alone = {f"t{i}": workshop.adapter(f"u{i}", seed=i) for i in range(4)}
    with pytest.raises(BudgetError, match="paper"):
        hydraopt.merge(alone, method="paper", heads=2, max_error=0.3)


def test_copies_of_an_adapter_cost_next_to_nothing_by_default(workshop):
    """Four exact copies at the error one of them has alone, for little more than its bytes."""
    shapes = {"q_proj": (512, 512)}
    folders = [workshop.adapter(f"t{i}", seed=1, shapes=shapes) for i in range(4)]
    alone = hydraopt.merge({"t0": folders[0]}, max_error=0.05)
    copies = hydraopt.merge({f"t{i}": folder for i, folder in enumerate(folders)}, max_error=0.05)
    assert factor_bytes(copies) <= 1.1 * factor_bytes(alone)


def factor_bytes(bundle) -> int:
    return bundle.contents.shared.numel() + sum(flat.numel() for flat in bundle.contents.heads.values())
