"""The same merges on a GPU and on the CPU. Everything else here runs on a GPU, too, where there is one."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

import hydraopt
from hydraopt.errors import BudgetError
from hydraopt.merging.frontier import frontier
from hydraopt.merging.kept_factors import KeptFactors
from hydraopt.merging.merge import open_set, silent
from hydraopt.merging.parallel import in_order
from hydraopt.merging.problem import load_module
from hydraopt.merging.run import MergeRun
from hydraopt.merging.second_moments import SecondMoments
from hydraopt.recipe import Recipe

needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA GPU; run this file again on a machine with one"
)


@pytest.fixture
def folders(workshop):
    return {
        f"t{i}": workshop.adapter(f"t{i}", seed=i, rank=2 + i % 3, shared_a=i > 0, lora_alpha=3)
        for i in range(5)
    }


def assert_same(workshop, one, other, folders):
    """Two devices round sums differently: the bounds are far above that, and far below what a wrong formula gives."""
    assert other.storage_ratio == pytest.approx(one.storage_ratio, abs=1e-3)
    assert other.relative_error == pytest.approx(one.relative_error, abs=1e-5)
    for task in folders:
        mine, yours = workshop.dense_bundle(one, task), workshop.dense_bundle(other, task)
        for name, update in mine.items():
            assert (update - yours[name]).norm() <= 1e-4 * update.norm()


@needs_gpu
@pytest.mark.parametrize(
    "settings",
    [
        {"budget": 0.6},
        {"max_error": 0.2},
        {"method": "paper", "budget": 0.6},
        {"method": "paper", "rank": 4, "heads": 2},
        {"method": "separate", "rank": 2},
        {"method": "two-sided", "budget": 0.6},
        {"method": "gradient", "rank": 4, "steps": 50},
        *(
            {"method": method, "on": on}
            for method in ("ta", "ties", "dare", "dare-ties")
            for on in ("dw", "factors")
        ),
    ],
    ids=str,
)
def test_a_gpu_merges_as_the_cpu_does(workshop, folders, settings):
    one, other = (
        hydraopt.merge(folders, dtype="float32", device=device, **settings) for device in ("cpu", "cuda")
    )
    assert_same(workshop, one, other, folders)


@needs_gpu
def test_a_gpu_rounds_to_few_bits_as_the_cpu_does(workshop, folders):
    """A sum on the edge of two levels may fall to either side: the errors agree, not every byte."""
    one, other = (hydraopt.merge(folders, budget=0.6, device=device) for device in ("cpu", "cuda"))
    assert other.storage_ratio == pytest.approx(one.storage_ratio, abs=2e-3)
    assert other.relative_error == pytest.approx(one.relative_error, rel=1e-2)


@needs_gpu
def test_a_gpu_keeps_a_shared_part(workshop, folders):
    former = hydraopt.merge(folders, budget=0.6, dtype="float32", device="cpu")
    folders["t1"] = workshop.adapter("other", seed=77, rank=3, shared_a=True)
    one, other = (hydraopt.merge(folders, keep_shared=former, device=device) for device in ("cpu", "cuda"))
    assert_same(workshop, one, other, folders)


@needs_gpu
def test_a_gpu_weighs_by_calibration_data(workshop, folders, tmp_path):
    one = hydraopt.merge(folders, budget=0.6, dtype="float32", device="cpu")
    sizes = {module.name: module.shape[1] for module in one.manifest.modules}
    drawn = torch.Generator().manual_seed(0)
    moments = {}
    for name, size in sizes.items():
        inputs = torch.randn(3 * size, size, generator=drawn)
        moments[name] = inputs.mT @ inputs / len(inputs)
    file = tmp_path / "moments.safetensors"
    save_file(moments, file)
    metrics = SecondMoments(dict.fromkeys(moments, file), "0" * 64)
    one, other = (
        hydraopt.merge(folders, budget=0.6, dtype="float32", metrics=metrics, device=device)
        for device in ("cpu", "cuda")
    )
    assert_same(workshop, one, other, folders)


@needs_gpu
def test_a_gpu_draws_the_same_frontier(folders):
    one, other = (frontier(folders, device=device) for device in ("cpu", "cuda"))
    assert len(one) == len(other)
    for mine, yours in zip(one, other, strict=True):
        assert (yours.method, yours.budget) == (mine.method, mine.budget)
        assert yours.relative_error == pytest.approx(mine.relative_error, abs=1e-3)


@pytest.mark.parametrize("most", [0, 1 << 30])
def test_factors_that_are_kept_are_those_of_the_files(workshop, folders, most):
    """As far as the room goes, and read again beyond; with ranks padded and scalings folded in either way."""
    device = torch.device("cpu")
    adapters = {task: hydraopt.read_adapter(folder) for task, folder in folders.items()}
    kept = KeptFactors(adapters, device, most)
    names = list(adapters["t0"].modules)
    for _ in range(2):
        with kept.reading_ahead(names):
            for name in names:
                read = load_module(name, adapters, dict.fromkeys(adapters, 1.0), device)
                again = load_module(name, adapters, dict.fromkeys(adapters, 1.0), device, kept=kept)
                assert torch.equal(read.ups, again.ups)
                assert torch.equal(read.downs, again.downs)
                assert again.is_bfloat16 == read.is_bfloat16
                again.ups.zero_()  # a problem's tensors are its own


def test_kept_factors_change_no_bundle(folders):
    adapters = open_set(folders)
    recipe, device = Recipe(budget=0.6), torch.device("cpu")
    runs = [
        MergeRun(adapters, recipe, device, silent, kept=kept)
        for kept in (None, KeptFactors(adapters, device, 1 << 30))
    ]
    assert runs[0].run().id == runs[1].run().id


def test_a_full_card_is_named():
    def work(_: int) -> None:
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of ..."
        )

    with pytest.raises(BudgetError, match=r"CUDA out of memory\. Free some, or use device='cpu'"):
        list(in_order(work, [1], "work", lambda *_: None))
