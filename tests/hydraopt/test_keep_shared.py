"""Merging onto a former bundle's shared part: what stays byte for byte, and that the rest is the best there is."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import hydraopt
from hydraopt.bundle.layout import SHARED_FILE, task_file
from hydraopt.errors import AdapterFormatError, AdapterMismatchError, BudgetError, BundleError
from hydraopt.merging import keep_shared
from hydraopt.merging.keep_shared import KeepingRun
from hydraopt.merging.second_moments import SecondMoments
from hydraopt.merging.side_by_side import joined
from hydraopt.recipe import SOLVER_VERSION

WIDE = {"q_proj": (48, 64), "up_proj": (96, 48)}


def make(workshop, name, seed, **settings):
    return workshop.adapter(name, **{"seed": seed, "shared_a": True, "shapes": WIDE, "rank": 6} | settings)


@pytest.fixture
def folders(workshop):
    return {f"t{i}": make(workshop, f"t{i}", i) for i in range(4)}


def change(workshop, folders, task, seed, **settings):
    """The set with another adapter for one task."""
    return folders | {task: make(workshop, f"{task}-{seed}", seed, **settings)}


def files(bundle, folder):
    path = bundle.save(folder)
    return {str(f.relative_to(path)): f.read_bytes() for f in path.rglob("*") if f.is_file()}


@pytest.mark.parametrize("method", ["hydraopt", "paper", "separate", "two-sided"])
def test_only_the_changed_tasks_file_and_the_manifest_change(workshop, folders, tmp_path, method):
    former = hydraopt.merge(folders, budget=0.5, method=method)
    fresh = hydraopt.merge(change(workshop, folders, "t1", 50), keep_shared=former)
    before, after = files(former, tmp_path / "before"), files(fresh, tmp_path / "after")
    assert set(before) == set(after)
    assert {name for name in before if before[name] != after[name]} == {"manifest.json", task_file("t1")}
    assert hydraopt.verify(tmp_path / "after").shared == former.manifest.shared
    assert fresh.manifest.recipe.shared_from == former.id
    assert fresh.storage_ratio <= 0.5


@pytest.mark.parametrize("method", ["hydraopt", "paper", "separate", "two-sided"])
def test_reported_errors_are_those_of_what_is_stored(workshop, folders, method):
    former = hydraopt.merge(folders, budget=0.5, method=method)
    now = change(workshop, folders, "t1", 50, scale=3.0)
    fresh = hydraopt.merge(now, keep_shared=former)
    squares = []
    for task, folder in now.items():
        wanted, found = workshop.dense(folder), workshop.dense_bundle(fresh, task)
        lost = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
        squares.append(lost / sum(float(update.square().sum()) for update in wanted.values()))
        reported = fresh.manifest.tasks[task].relative_error
        assert reported == pytest.approx(math.sqrt(squares[-1]), rel=1e-6)
    assert fresh.relative_error == pytest.approx(math.sqrt(sum(squares) / len(squares)), rel=1e-6)


@pytest.mark.parametrize(
    "settings", [{"budget": 0.5}, {"budget": 0.7, "dtype": "float32"}, {"max_error": 0.1}]
)
def test_modules_built_together_are_as_alone(workshop, monkeypatch, settings):
    """Mixed ranks, a module less in one task: the same heads but for the rounding of sums in another order."""
    sets = {
        f"t{i}": make(workshop, f"t{i}", i, layers=4, rank=3 + i, shapes=WIDE if i else {"q_proj": (48, 64)})
        for i in range(4)
    }
    former = hydraopt.merge(sets, method="separate", **settings)
    now = sets | {
        "t0": make(workshop, "less", 70, layers=4, shapes={"q_proj": (48, 64)}),
        "t1": make(workshop, "more", 71, layers=4, rank=8),
    }
    together = hydraopt.merge(now, keep_shared=former)
    sizes = []
    monkeypatch.setattr(
        keep_shared, "joined", lambda problems: sizes.append(len(problems)) or joined(problems)
    )
    assert hydraopt.merge(now, keep_shared=former).id == together.id
    assert sizes == [4, 4]
    monkeypatch.setattr(keep_shared, "_BATCH_NUMBERS", 1)
    alone = hydraopt.merge(now, keep_shared=former)
    assert sizes == [4, 4]
    assert together.manifest.modules == alone.manifest.modules
    for task in ("t0", "t1"):
        found, expected = workshop.dense_bundle(together, task), workshop.dense_bundle(alone, task)
        for name, update in expected.items():
            assert (found[name] - update).norm() <= 1e-5 * update.norm()


def test_the_manifest_is_as_long_as_the_budget_counted_on(workshop, monkeypatch):
    """Digests and errors have their lengths, counts theirs: what is written is never longer, nor much shorter, however
    many modules it tells of."""
    counted, spare = [], []
    measure = KeepingRun._container_bytes
    monkeypatch.setattr(
        KeepingRun,
        "_container_bytes",
        lambda run, choices: counted.append(measure(run, choices)) or counted[-1],
    )
    for layers in (2, 20):
        folders = {f"t{i}": make(workshop, f"{layers}-{i}", i, layers=layers) for i in range(4)}
        former = hydraopt.merge(folders, budget=0.5)
        now = folders | {"t1": make(workshop, f"{layers}-new", 50, layers=layers)}
        fresh = hydraopt.merge(now, keep_shared=former)
        heads = fresh.contents.heads["t1"].nbytes
        written = len(fresh.manifest.canonical()) + fresh.manifest.tasks["t1"].file.bytes - heads
        spare.append(min(size - written for size in counted[-2:] if size >= written))
    assert max(spare) <= 200
    assert abs(spare[0] - spare[1]) <= 16  # digits of sizes and errors


def projected(update, module, shared):
    """What heads of any size on the stored shared factors can hold, densely in float64."""
    onto = [torch.linalg.pinv(rows.double()) @ rows.double() for rows in shared]
    if module.family == "separate":
        return update
    if module.family == "shared-b":
        return onto[0] @ update
    return onto[1] @ update @ onto[0] if module.family == "two-sided" else update @ onto[0]


def shared_factors(bundle):
    """A' and B' of a float32 bundle, from the bytes of the shared file as the format describes them."""
    numbers, start, found = bundle.contents.shared.view(torch.float32), 0, {}
    for module in bundle.manifest.modules:
        d_out, d_in = module.shape
        lengths = (d_out,) if module.family == "shared-b" else (d_in, d_out)
        found[module.name] = []
        for length, (count,) in zip(lengths, module.shared, strict=False):
            found[module.name].append(numbers[start : start + count * length].view(count, length))
            start += count * length
    assert start == len(numbers)
    return found


def mirrored(workshop, name, seed):
    """An adapter whose B, not A, is nearly that of the others."""
    folder = make(workshop, f"{name}-a", seed, shapes={"q_proj": (64, 48), "up_proj": (48, 96)})
    tensors = load_file(folder / "adapter_model.safetensors")
    swap = {"lora_A": "lora_B", "lora_B": "lora_A"}
    flipped = {
        key.replace(part, swap[part]): tensor.mT
        for key, tensor in tensors.items()
        for part in swap
        if part in key
    }
    config = json.loads((folder / "adapter_config.json").read_text())
    return workshop.write(name, config, flipped)


def alike(workshop, name, seed, noise=0.1):
    """An adapter near the others in both A and B."""
    folder = make(workshop, name, 0)
    tensors = load_file(folder / "adapter_model.safetensors")
    generator = torch.Generator().manual_seed(seed)
    noisy = {key: one + noise * torch.randn(one.shape, generator=generator) for key, one in tensors.items()}
    return workshop.write(name, json.loads((folder / "adapter_config.json").read_text()), noisy)


@pytest.mark.parametrize("family", ["separate", "shared-a", "shared-b", "two-sided", "dense-heads"])
def test_changed_heads_are_the_best_on_the_stored_factors(workshop, family):
    """With bytes for every direction what is stored is the dense projection; with fewer, its truncated SVD."""
    method = {"separate": "separate", "two-sided": "two-sided", "dense-heads": "paper"}.get(
        family, "hydraopt"
    )
    maker = {"shared-b": mirrored, "two-sided": alike}.get(family, make)
    folders = {f"t{i}": maker(workshop, f"t{i}", i) for i in range(6)}
    former = hydraopt.merge(folders, budget=0.4, method=method, dtype="float32")
    families = [module.family for module in former.manifest.modules]
    assert family in families
    now = folders | {"t2": maker(workshop, "other", 90)}
    for budget in (0.4, 0.9):
        fresh = hydraopt.merge(now, keep_shared=former, budget=budget)
        shared, found = shared_factors(former), workshop.dense_bundle(fresh, "t2")
        for module in fresh.manifest.modules:
            update = workshop.dense(now["t2"])[module.name]
            wanted = projected(update, module, shared[module.name])
            counts = module.heads[2]
            rank = sum(counts) if family != "dense-heads" else min(wanted.shape) * sum(counts)
            left, sigma, right = torch.linalg.svd(wanted)
            best = left[:, :rank] @ torch.diag(sigma[:rank]) @ right[:rank]
            # float32 storage, and for the rank-th direction the gap to the next: 1e-5 of the update is ample.
            assert float((found[module.name] - best).norm()) <= 1e-5 * float(update.norm())


def test_calibration_leaves_heads_on_a_shared_output_side_as_they_are(workshop, tmp_path):
    """A second moment of inputs says nothing of B'."""
    folders = {f"t{i}": mirrored(workshop, f"t{i}", i) for i in range(6)}
    former = hydraopt.merge(folders, budget=0.4, dtype="float32")
    assert {module.family for module in former.manifest.modules} == {"shared-b"}
    generator = torch.Generator().manual_seed(0)
    moments = {}
    for module in former.manifest.modules:
        mix = torch.randn(module.shape[1], module.shape[1], generator=generator)
        moments[module.name] = mix @ mix.mT
    save_file(moments, tmp_path / "moments.safetensors")
    metrics = SecondMoments(dict.fromkeys(moments, tmp_path / "moments.safetensors"), "0" * 64)
    now = folders | {"t2": mirrored(workshop, "other", 90)}
    plain, calibrated = (
        hydraopt.merge(now, keep_shared=former, budget=1.0, metrics=one) for one in (None, metrics)
    )
    assert calibrated.manifest.recipe.calibration == metrics.digest
    assert torch.equal(calibrated.contents.heads["t2"], plain.contents.heads["t2"])


def test_levels_are_chosen_by_price_within_the_bytes_that_are_left(workshop, folders):
    former = hydraopt.merge(folders, budget=0.35)
    now = change(workshop, folders, "t3", 70)
    errors = []
    for budget in (0.35, 0.45, 0.6):
        fresh = hydraopt.merge(now, keep_shared=former, budget=budget)
        errors.append(fresh.manifest.tasks["t3"].relative_error)
        assert fresh.storage_ratio <= budget
        assert fresh.manifest.recipe.budget == budget
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


def test_weights_decide_which_changed_task_is_close(workshop, folders):
    """The more one counts, the closer it is, at the other's expense: both share the bytes that are left."""
    former = hydraopt.merge(folders, budget=0.4)
    now = change(workshop, change(workshop, folders, "t1", 52), "t2", 53)
    found = [
        hydraopt.merge(now, keep_shared=former, weights={"t1": weight}).manifest.tasks
        for weight in (1e-3, 1.0, 1e3)
    ]
    own, other = ([tasks[task].relative_error for tasks in found] for task in ("t1", "t2"))
    assert own[0] > own[1] > own[2]
    assert other[0] < other[1] < other[2]


def test_dense_heads_are_priced_with_all_their_columns(workshop, folders):
    """Two changed tasks under a budget that has no room for both heads of every module."""
    former = hydraopt.merge(folders, method="paper", budget=0.5)
    now = change(workshop, change(workshop, folders, "t1", 54), "t2", 55)
    fresh = hydraopt.merge(now, keep_shared=former, budget=0.3)
    assert fresh.storage_ratio <= 0.3


def test_with_the_whole_budget_each_task_keeps_its_own_rank(workshop, folders):
    former = hydraopt.merge(folders, budget=1.0)
    ranks = {"t1": 2, "t2": 6}
    now = folders | {task: make(workshop, f"rank-{rank}", 57, rank=rank) for task, rank in ranks.items()}
    fresh = hydraopt.merge(now, keep_shared=former)
    for task, rank in ranks.items():
        place = fresh.task_names.index(task)
        assert {sum(module.heads[place]) for module in fresh.manifest.modules} == {rank}


def test_new_tasks_come_and_removed_ones_go(workshop, folders):
    former = hydraopt.merge(folders, budget=0.6)
    now = {task: folders[task] for task in ("t0", "t2", "t3")} | {"a-new": make(workshop, "new", 33)}
    fresh = hydraopt.merge(now, keep_shared=former)
    assert fresh.task_names == ("a-new", "t0", "t2", "t3")
    for task in ("t0", "t2", "t3"):
        assert fresh.manifest.tasks[task] == former.manifest.tasks[task]
        for module, update in workshop.dense_bundle(former, task).items():
            assert torch.equal(workshop.dense_bundle(fresh, task)[module], update)
    alone = hydraopt.merge({"t2": folders["t2"]}, keep_shared=former)
    assert alone.task_names == ("t2",)
    assert alone.manifest.shared == former.manifest.shared
    assert "sized for 4" in alone.warnings[0]


def test_an_unchanged_set_is_the_former_bundle(folders, tmp_path):
    former = hydraopt.merge(folders, budget=0.5)
    assert hydraopt.merge(folders, keep_shared=former.save(tmp_path / "bundle")).id == former.id


def test_the_same_inputs_give_the_same_bundle_and_chains_go_on(workshop, folders):
    former = hydraopt.merge(folders, budget=0.5)
    second = change(workshop, folders, "t1", 50)
    third = change(workshop, second, "t2", 51)
    one = hydraopt.merge(second, keep_shared=former)
    assert one.id == hydraopt.merge(second, keep_shared=former).id
    two = hydraopt.merge(third, keep_shared=one)
    assert two.manifest.recipe.shared_from == one.id
    assert two.manifest.shared == former.manifest.shared
    assert two.manifest.tasks["t1"] == one.manifest.tasks["t1"]


def test_error_bounds_and_ranks_go_on(workshop, folders):
    now = change(workshop, folders, "t1", 50)
    bounded = hydraopt.merge(now, keep_shared=hydraopt.merge(folders, max_error=0.3))
    assert bounded.manifest.tasks["t1"].relative_error <= 0.3
    for method in ("paper", "separate"):
        fresh = hydraopt.merge(
            now, keep_shared=hydraopt.merge(folders, method=method, rank=4, dtype="float32")
        )
        found = workshop.dense_bundle(fresh, "t1").values()
        assert {int(torch.linalg.matrix_rank(update, rtol=1e-4)) for update in found} == {4}
    whole = hydraopt.merge(now, keep_shared=hydraopt.merge(folders, budget=1.0, dtype="float32"))
    assert whole.manifest.tasks["t1"].relative_error <= 1e-6


def test_a_budget_takes_the_place_of_an_error_bound_or_a_rank(workshop, folders):
    now = change(workshop, folders, "t1", 50)
    for setting in ({"max_error": 0.3}, {"rank": 4, "method": "separate"}):
        recipe = hydraopt.merge(
            now, keep_shared=hydraopt.merge(folders, **setting), budget=0.9
        ).manifest.recipe
        assert (recipe.budget, recipe.max_error, recipe.rank) == (0.9, None, None)


def test_weights_go_on_for_the_tasks_that_stay(workshop, folders):
    former = hydraopt.merge(folders, budget=0.5, weights={"t1": 2.0, "t3": 4.0})
    now = change(workshop, folders, "t1", 51)
    del now["t3"]
    assert hydraopt.merge(now, keep_shared=former, budget=0.9).manifest.recipe.weights == {"t1": 2.0}


@pytest.mark.parametrize("settings", [{"max_error": 0.3}, {"method": "separate", "rank": 4}, {"budget": 1.0}])
def test_no_size_is_warned_of_where_none_was_asked_for(workshop, folders, settings):
    """An error bound, a rank and the whole of every update take what they need."""
    former = hydraopt.merge(folders, **settings)
    assert hydraopt.merge(change(workshop, folders, "t1", 56), keep_shared=former).warnings == ()


def test_the_manifest_names_the_solver_of_now(workshop, folders, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("hydraopt.merging.assembly.SOLVER_VERSION", "1")
        former = hydraopt.merge(folders, budget=0.5)
    assert former.manifest.solver == "1"
    fresh = hydraopt.merge(change(workshop, folders, "t1", 50), keep_shared=former)
    assert fresh.manifest.solver == SOLVER_VERSION


def test_a_task_far_from_the_shared_part_is_named(workshop, folders):
    """Its A points elsewhere: no head on the kept rows can follow, and more bytes do not help."""
    former = hydraopt.merge(folders, budget=0.5, method="paper")
    like = hydraopt.merge(change(workshop, folders, "t1", 50), keep_shared=former)
    unlike = hydraopt.merge(
        change(workshop, folders, "t1", 50, shared_a=False), keep_shared=former, budget=1.0
    )
    (warning,) = unlike.warnings
    assert "'t1'" in warning
    assert f"{unlike.manifest.tasks['t1'].relative_error:.4f}" in warning
    outside = float(warning.split("former bundle; ")[1].split(" %")[0]) / 100
    assert outside == pytest.approx(unlike.manifest.tasks["t1"].relative_error ** 2, abs=0.01)
    assert unlike.manifest.tasks["t1"].relative_error > like.manifest.tasks["t1"].relative_error
    near = make(workshop, "near", 1, scale=1.5)  # t1 again, but louder
    assert hydraopt.merge(folders | {"t1": near}, keep_shared=former).warnings == ()


def test_no_error_below_a_twentieth_is_warned_of(workshop, folders):
    """However many times the former one it is, here that of rounding to float32."""
    former = hydraopt.merge(folders, method="paper", rank=24, dtype="float32")
    fresh = hydraopt.merge(folders | {"t0": alike(workshop, "near", 90, noise=0.03)}, keep_shared=former)
    assert 1000 * former.relative_error < fresh.manifest.tasks["t0"].relative_error < 0.05
    assert fresh.warnings == ()


def test_extras_of_changed_tasks_are_carried(workshop, folders):
    name = "base_model.model.score.weight"
    old, new = torch.zeros(5, 16), torch.ones(5, 16)
    first = change(workshop, folders, "t0", 1, extras={name: old}, task_type="SEQ_CLS")
    former = hydraopt.merge(first, budget=0.6)
    fresh = hydraopt.merge(
        change(workshop, first, "t0", 60, extras={name: new}, task_type="SEQ_CLS"), keep_shared=former
    )
    assert torch.equal(fresh.extras("t0")[name], new)
    assert torch.equal(former.extras("t0")[name], old)


def test_a_zero_adapter_and_missing_modules(workshop, folders):
    former = hydraopt.merge(folders, budget=0.5)
    zero = hydraopt.merge(change(workshop, folders, "t1", 1, scale=0.0), keep_shared=former)
    assert zero.manifest.tasks["t1"].relative_error == 0
    assert zero.warnings == ()
    partial = change(workshop, folders, "t1", 1, skip=("model.layers.0.q_proj",))
    found = hydraopt.merge(partial, keep_shared=former).factors("t1")
    assert set(found) == set(workshop.dense(partial["t1"]))


def test_what_does_not_belong_on_the_shared_part_is_refused(workshop, folders):
    former = hydraopt.merge(folders, budget=0.5)
    other = {"t0": make(workshop, "o", 3, base_model_name_or_path="other/base")}
    with pytest.raises(AdapterMismatchError, match=r"'other/base'.*'tiny/base'"):
        hydraopt.merge(other, keep_shared=former)
    with pytest.raises(AdapterMismatchError, match=r"k_proj.*merge afresh"):
        hydraopt.merge({"t0": make(workshop, "k", 3, shapes={"k_proj": (8, 64)})}, keep_shared=former)
    with pytest.raises(AdapterMismatchError, match=r"q_proj.*\(48, 63, 'linear'\).*\(48, 64, 'linear'\)"):
        hydraopt.merge({"t0": make(workshop, "s", 3, shapes={"q_proj": (48, 63)})}, keep_shared=former)
    for setting in ({"dtype": "float16"}, {"bits": 8}, {"method": "paper"}, {"max_error": 0.1}, {"seed": 1}):
        with pytest.raises(BundleError, match=f"{next(iter(setting))}=.*contradicts"):
            hydraopt.merge(folders, keep_shared=former, **setting)
    with pytest.raises(BudgetError, match=r"leaves \d+ bytes to the changed tasks t1"):
        hydraopt.merge(change(workshop, folders, "t1", 9), keep_shared=former, budget=0.2)
    revised = {task: make(workshop, f"{task}-b", i, revision="b") for i, task in enumerate(folders)}
    with pytest.raises(AdapterMismatchError, match=r"base model revision 'b'.*None"):
        hydraopt.merge(revised, keep_shared=former)
    tight = hydraopt.merge(folders, max_error=0.05, method="paper")
    with pytest.raises(BudgetError, match=r"max_error=0.05.*no less than 0\.\d+"):
        hydraopt.merge(change(workshop, folders, "t1", 9, shared_a=False), keep_shared=tight)


def test_changed_adapters_are_held_to_what_every_merge_asks(workshop, folders):
    """Finite numbers, within the range of the stored dtype."""
    former = hydraopt.merge(folders, budget=0.5, dtype="float16", bits=16)
    with pytest.raises(BudgetError, match=r"range of .*float16"):
        hydraopt.merge(change(workshop, folders, "t1", 61, scale=1e9), keep_shared=former)
    now = change(workshop, folders, "t1", 60)
    file = now["t1"] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = min(tensors)
    tensors[name][0, 0] = math.nan
    save_file(tensors, file)
    with pytest.raises(AdapterFormatError, match=re.escape(name)):
        hydraopt.merge(now, keep_shared=former)


def test_a_damaged_former_bundle_is_refused(workshop, folders, tmp_path):
    path = hydraopt.merge(folders, budget=0.5).save(tmp_path / "bundle")
    for name in (SHARED_FILE, task_file("t2")):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        with pytest.raises(BundleError, match="SHA-256"):
            hydraopt.merge(change(workshop, folders, "t1", 50), keep_shared=path)
        (path / name).write_bytes(whole)
    with pytest.raises(BundleError, match="not a bundle"):
        hydraopt.merge(folders, keep_shared=tmp_path / "nothing")
