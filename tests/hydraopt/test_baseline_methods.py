"""The baselines as methods of the merge: what is stored is what they make, measured, and carried as any bundle is."""

from __future__ import annotations

import json
import math

import pytest
import torch
from click.testing import CliRunner
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import hydraopt
from flows.command_line import main
from hydraopt.errors import AdapterFormatError, BudgetError, BundleError
from hydraopt.merging.baselines import module_seed
from hydraopt.merging.dare import dare, dare_ties
from hydraopt.merging.low_rank import LowRank
from hydraopt.merging.second_moments import SecondMoments
from hydraopt.merging.task_arithmetic import task_arithmetic
from hydraopt.merging.ties import ties

ONE_FOR_ALL = ("ta", "ties", "dare", "dare-ties")
LACKED = "model.layers.0.q_proj"


@pytest.fixture
def folders(workshop):
    """Three tasks of two ranks; one lacks a module."""
    folders = {f"t{i}": workshop.adapter(f"t{i}", seed=i, rank=3 + i % 2, shared_a=True) for i in range(2)}
    return folders | {"t2": workshop.adapter("t2", seed=2, rank=3, skip=(LACKED,))}


def expected(method, on, adapters, name, weights):
    """The update a method makes of one module, by its function alone."""
    having = [task for task, adapter in adapters.items() if name in adapter.modules]
    updates = [LowRank(*(part.double() for part in adapters[task].factors(name))) for task in having]
    own = [weights[task] for task in having]
    seed, rank = module_seed(7, name), 4
    if method == "ta":
        return task_arithmetic(updates, own, rank, on=on)
    if method == "ties":
        return ties(updates, own, rank, density=0.2, on=on, seed=seed)
    if method == "dare":
        return dare(updates, own, rank, density=0.5, on=on, seed=seed)
    return dare_ties(updates, own, rank, density=0.5, on=on, seed=seed)


@pytest.mark.parametrize("method", ONE_FOR_ALL)
@pytest.mark.parametrize("on", ["dw", "factors"])
def test_every_task_gets_the_one_update_at_the_adapters_rank(workshop, folders, method, on):
    """Weights 1 / K over the whole set, also where a task lacks the module; defaults stand in the recipe."""
    bundle = hydraopt.merge(folders, method=method, on=on, seed=7, dtype="float32")
    adapters = {task: hydraopt.read_adapter(folder) for task, folder in folders.items()}
    for task, adapter in adapters.items():
        found = workshop.dense_bundle(bundle, task)
        assert set(found) == set(adapter.modules)
        for name, update in found.items():
            up, down = expected(method, on, adapters, name, dict.fromkeys(folders, 1 / 3))
            assert float((update - up @ down).norm()) <= 1e-6 * float(up.norm() * down.norm())
    recipe = bundle.manifest.recipe
    assert (recipe.rank, recipe.on, recipe.scale) == (4, on, 1.0)
    assert recipe.density == {"ties": 0.2, "dare": 0.5, "dare-ties": 0.5}.get(method)
    assert all(flat.numel() == 0 for flat in bundle.contents.heads.values())


def test_task_arithmetic_is_the_scaled_weighted_mean(workshop, folders):
    """At a rank that holds all directions, against dense float64 sums."""
    bundle = hydraopt.merge(
        folders, method="ta", rank=30, scale=1.5, weights={"t0": 3.0, "t2": 0.5}, dtype="float32"
    )
    shares = {"t0": 3.0 / 4.5, "t1": 1.0 / 4.5, "t2": 0.5 / 4.5}
    dense = {task: workshop.dense(folder) for task, folder in folders.items()}
    for name, update in workshop.dense_bundle(bundle, "t0").items():
        wanted = 1.5 * sum(shares[task] * updates[name] for task, updates in dense.items() if name in updates)
        assert float((update - wanted).norm()) <= 1e-6 * float(wanted.norm())


@pytest.mark.parametrize("method", [*ONE_FOR_ALL, "gradient"])
@pytest.mark.parametrize("bits", [16, 4])
def test_errors_and_bytes_are_those_of_what_is_stored(workshop, folders, tmp_path, method, bits):
    settings = {"rank": 3, "steps": 20} if method == "gradient" else {"rank": 3}
    bundle = hydraopt.merge(folders, method=method, bits=bits, **settings)
    path = bundle.save(tmp_path / "bundle")
    hydraopt.verify(path)
    on_disk = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    assert bundle.manifest.bytes_on_disk == on_disk
    shares = []
    for task, folder in folders.items():
        wanted, found = workshop.dense(folder), workshop.dense_bundle(bundle, task)
        lost = sum(float((wanted[name] - found[name]).square().sum()) for name in wanted)
        shares.append(lost / sum(float(update.square().sum()) for update in wanted.values()))
        assert bundle.manifest.tasks[task].relative_error == pytest.approx(math.sqrt(shares[-1]), rel=1e-6)
    assert bundle.relative_error == pytest.approx(math.sqrt(sum(shares) / len(shares)), rel=1e-6)
    assert hydraopt.merge(folders, method=method, bits=bits, **settings).id == bundle.id


def test_fewer_bits_take_fewer_bytes(folders):
    sizes = [hydraopt.merge(folders, method="ties", bits=bits).contents.shared.numel() for bits in (16, 8, 4)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > 2.5 * sizes[2]  # 4 of 16 bits, and a scale for every short vector


def test_the_seed_decides_what_is_dropped(folders):
    merged = [hydraopt.merge(folders, method="dare", seed=seed) for seed in (0, 0, 1)]
    assert merged[0].id == merged[1].id
    assert not torch.equal(merged[0].contents.shared, merged[2].contents.shared)
    names = [f"model.layers.{i}.q_proj" for i in range(100)]
    assert len({module_seed(0, name) for name in names}) == 100


@pytest.mark.parametrize("heads", [None, 2])
def test_the_fit_comes_near_the_closed_form_with_the_same_bytes(folders, heads):
    """300 steps of Adam on updates of a few hundred numbers; the optimum is the closed form's, for any start."""
    fitted = hydraopt.merge(folders, method="gradient", heads=heads, rank=3, steps=300, dtype="float32")
    closed = hydraopt.merge(folders, method="paper", heads=heads, rank=3, dtype="float32")
    assert closed.relative_error * (1 - 1e-5) <= fitted.relative_error <= 1.02 * closed.relative_error
    for ours, theirs in zip(fitted.manifest.modules, closed.manifest.modules, strict=True):
        assert (ours.shared, ours.heads, ours.groups) == (theirs.shared, theirs.heads, theirs.groups)


def test_a_fit_is_closer_to_the_task_that_counts_more(folders):
    errors = [
        hydraopt.merge(folders, method="gradient", rank=2, steps=100, dtype="float32", weights={"t0": weight})
        .manifest.tasks["t0"]
        .relative_error
        for weight in (100.0, 0.01)
    ]
    assert errors[0] < 0.5 * errors[1]


def test_a_fit_takes_a_budget_as_the_closed_form_does(folders):
    fitted = hydraopt.merge(folders, method="gradient", budget=0.75, steps=2)
    closed = hydraopt.merge(folders, method="paper", budget=0.75)
    assert fitted.storage_ratio <= 0.75
    assert fitted.manifest.recipe.steps == 2
    counts = [[module.shared for module in one.manifest.modules] for one in (fitted, closed)]
    assert counts[0] == counts[1]


@torch.no_grad()
@pytest.mark.parametrize("settings", [{"method": "ties"}, {"method": "paper", "heads": 2, "rank": 3}])
def test_attached_and_exported_it_computes_the_same(workshop, tmp_path, settings):
    shapes = {"self_attn.q_proj": (16, 16)}
    folders = {
        f"t{i}": workshop.adapter(f"t{i}", seed=i, shared_a=True, shapes=shapes, target_modules=["q_proj"])
        for i in range(3)
    }
    bundle = hydraopt.merge(folders, dtype="float32", **settings)
    attached, tokens = bundle.attach(llama()), torch.arange(14).reshape(2, 7) % 11
    plain = llama()(tokens).logits
    for task, folder in bundle.export(tmp_path / "out").items():
        attached.set_adapter(task)
        logits = attached(tokens).logits
        assert float((logits - plain).abs().max()) > 1e-3
        torch.testing.assert_close(
            PeftModel.from_pretrained(llama(), folder)(tokens).logits, logits, rtol=0, atol=1e-5
        )


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        intermediate_size=24,
        initializer_range=0.3,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"method": "ties", "budget": 0.5}, "budget is not for the method 'ties'"),
        ({"method": "ta", "max_error": 0.5}, "max_error is not for the method 'ta'"),
        ({"method": "dare", "heads": 2}, "heads is not for the method 'dare'"),
        ({"method": "ta", "density": 0.5}, "density is not for the method 'ta'"),
        ({"method": "ties", "steps": 5}, "steps is not for the method 'ties'"),
        ({"method": "gradient", "max_error": 0.5}, "max_error is not for the method 'gradient'"),
        ({"method": "gradient", "rank": 2, "budget": 0.5}, "exactly one of budget, rank"),
        ({"method": "gradient", "rank": 2, "steps": 0}, "steps=0"),
        ({"method": "gradient", "rank": 2, "on": "dw"}, "on is not for the method 'gradient'"),
        ({"method": "paper", "rank": 2, "scale": 2.0}, "scale is not for the method 'paper'"),
        ({"budget": 0.5, "on": "factors"}, "on is not for the method 'hydraopt'"),
        ({"method": "ties", "density": 0.0}, "density=0.0"),
        ({"method": "dare", "density": 1.1}, "density=1.1"),
        ({"method": "ties", "scale": math.inf}, "scale=inf"),
        ({"method": "ties", "on": "entries"}, "on='entries'"),
        ({"method": "ties", "rank": 0}, "rank=0"),
        ({"method": "ties", "weights": {"t0": 0, "t1": 0, "t2": 0}}, "weights of all tasks are 0"),
    ],
)
def test_what_a_method_does_not_have_is_refused_by_name(folders, settings, words):
    with pytest.raises(BudgetError, match=words):
        hydraopt.merge(folders, **settings)


def test_adapters_that_no_average_can_serve_are_refused(workshop, folders):
    zero = workshop.adapter("zero", scale=0.0)
    with pytest.raises(BudgetError, match="task 'zero' changes nothing"):
        hydraopt.merge(folders | {"zero": zero}, method="ta")
    file = folders["t1"] / "adapter_model.safetensors"
    tensors = load_file(file)
    name = next(iter(tensors))
    tensors[name][0, 0] = math.nan
    save_file(tensors, file)
    for method in ("ta", "ties"):
        with pytest.raises(AdapterFormatError, match="NaN"):
            hydraopt.merge(folders, method=method)


@pytest.mark.parametrize("method", ["ta", "gradient"])
def test_calibration_is_not_silently_left_aside(folders, method):
    with pytest.raises(BudgetError, match=f"calibration is not for the method '{method}'"):
        hydraopt.merge(folders, method=method, rank=2, metrics=SecondMoments({}, "0" * 64))


@pytest.mark.parametrize("method", ["ta", "ties", "dare", "dare-ties", "gradient", "paper", "hydraopt"])
@pytest.mark.parametrize("shape", [(1, 9), (9, 1), (1, 1)])
def test_modules_of_one_row_or_column_are_merged(workshop, method, shape):
    """Of a gate, say; a factor of one column counts as contiguous however its numbers lie."""
    folders = {
        f"t{i}": workshop.adapter(f"t{i}", seed=i, rank=3, shapes={"gate": shape, "q_proj": (8, 9)})
        for i in range(3)
    }
    ways = [{}] if method == "hydraopt" else [{"rank": 2}]
    ways += [{"on": "factors", "rank": 2}] if method in {"ta", "ties", "dare", "dare-ties"} else []
    for way in ways:
        limit = {"max_error": 0.3} if method == "hydraopt" else way
        bundle = hydraopt.merge(folders, method=method, **limit)
        assert set(bundle.factors("t0")) == set(workshop.dense(folders["t0"]))


def test_no_former_baseline_is_continued(workshop, folders):
    changed = folders | {"t1": workshop.adapter("other", seed=9, shared_a=True)}
    for method, words in (("ties", "share dense heads"), ("gradient", "fitted by Adam")):
        former = hydraopt.merge(folders, method=method, rank=2)
        with pytest.raises(BundleError, match=words):
            hydraopt.merge(changed, keep_shared=former)


def test_on_the_command_line(folders, tmp_path):
    paths = [f"{task}={folder}" for task, folder in folders.items()]

    def run(*options):
        command = ["merge", *paths, "--out", str(tmp_path / "bundle"), *options, "--json"]
        return CliRunner().invoke(main, command)

    merged = run(
        "--method", "dare-ties", "--rank", "2", "--on", "factors", "--density", "0.3", "--scale", "0.5"
    )
    assert merged.exit_code == 0
    wanted = hydraopt.merge(folders, method="dare-ties", rank=2, on="factors", density=0.3, scale=0.5)
    assert json.loads(merged.stdout)["bundle_id"] == wanted.id
    grouped = run("--method", "paper", "--heads", "2", "--rank", "2")
    assert (
        json.loads(grouped.stdout)["bundle_id"] == hydraopt.merge(folders, method="paper", heads=2, rank=2).id
    )
    assert run("--method", "ties", "--budget", "0.25").exit_code == 2
