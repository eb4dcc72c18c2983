"""A bundle inside a transformers model, as a ``PeftModel`` with one adapter per task and A' in memory once."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import nn

from hydraopt.adapters.kinds import LORA_KINDS, PROMPT_KINDS
from hydraopt.adapters.module import PREFIX
from hydraopt.adapters.whole_tensors import is_saved
from hydraopt.bundle.attach_extras import place_extras
from hydraopt.bundle.attach_packed import pack
from hydraopt.bundle.attach_prompts import attach_prompts
from hydraopt.bundle.attach_vera import attach_vera
from hydraopt.bundle.attached_factors import LowRankHead, keep_apart, parameter_like
from hydraopt.bundle.chains import Chain, chain_rank, pair
from hydraopt.bundle.contents import Bundle
from hydraopt.bundle.layout import ModuleEntry
from hydraopt.bundle.lora_folder import lora_chains, lora_settings, name_tails
from hydraopt.bundle.stored_rows import read_once
from hydraopt.errors import BundleError
from hydraopt.names import check_text


def attach(
    bundle: Bundle,
    base_model: nn.Module,
    *,
    tasks: Iterable[str] | Mapping[str, str] | None = None,
    packed: bool = False,
) -> PeftModel:
    """Put the tasks of a bundle into a base model.

    Args:
        bundle: The merged set.
        base_model: A transformers model of the bundle's base. It is changed in place, as PEFT does.
        tasks: Names of those to put in, at least one; None for all. They are of LoRA, DoRA and AdaLoRA, or of VeRA, or
            prompts of one kind: PEFT cannot hold a mixture of these in one model. A mapping gives each another name
            there, ``{adapter: task}``: torch takes none with a dot, nor that of an attribute, such as ``update``.
        packed: Keep the factors in memory as they are stored, in few bits, and read them back module by module at every
            pass: less memory, more time. For linear layers.

    Returns:
        A PeftModel in eval mode with the first of them active; ``set_adapter(task)`` switches. All tasks'
        ``lora_A`` of one module are the same Parameter. Tensors take the dtype and device of the base model's weights.
        What its ``save_pretrained`` writes computes the same, at the rank of A' (:meth:`Bundle.export` writes less).
        What its ``load_adapter`` reads in place of a task changes that one alone; ``delete_adapter`` comes first where
        modules or ranks are other ones.

    Raises:
        BundleError: If there is no such task, a name cannot be an adapter's or is one's that the model holds, the tasks
            do not fit into one model, or the base model lacks a module that they update or has it in another size.
    """
    names = _adapter_names(bundle, bundle.task_names if tasks is None else tasks)
    _check_free(base_model, names)
    model: Any = _attach_for(bundle, names)(bundle, base_model, names)
    if packed:
        pack(bundle, model, names)
    for name in names:  # PEFT writes over that of the first what the base model calls itself
        model.peft_config[name].base_model_name_or_path = bundle.manifest.base_model.name
    model.requires_grad_(requires_grad=False)
    model.set_adapter(next(iter(names)))
    model.requires_grad_(requires_grad=False)
    return model.eval()


def _adapter_names(bundle: Bundle, tasks: Iterable[str] | Mapping[str, str]) -> dict[str, str]:
    """The task of each adapter, by its name in the model."""
    names = dict(tasks) if isinstance(tasks, Mapping) else {task: task for task in tasks}
    if not names:
        raise BundleError("no task to attach; name at least one, or leave tasks out for all")
    bundle.modules_of(names.values())  # a task that is not there is refused before the model is touched
    for name, task in names.items():
        check_text(name, "the name of an adapter")
        if (
            not name
            or "." in name
            or any(hasattr(kind(), name) for kind in (nn.ModuleDict, nn.ParameterDict))
        ):
            better = f"{name.replace('.', '-') or task}-task"
            raise BundleError(
                f"task {task!r}: torch takes no adapter named {name!r}; give it another name in the model, with "
                f"tasks={{{better!r}: {task!r}}}"
            )
    return names


def _check_free(base_model: nn.Module, names: Mapping[str, str]) -> None:
    """PEFT would write an adapter over one of the same name, and so change a model that was attached before."""
    for path, module in base_model.named_modules():
        held: set[str] = set()
        if isinstance(module, BaseTunerLayer):
            held = module._get_available_adapters()  # noqa: SLF001 - the one list of them
        elif isinstance(module, ModulesToSaveWrapper):
            held = set(module.modules_to_save)
        if taken := sorted(held & set(names)):
            raise BundleError(
                f"the base model holds an adapter {taken[0]!r} already (in {path!r}): take the other model's "
                f"`unload()`, a fresh base, or another name, with tasks={{{taken[0] + '-2'!r}: {names[taken[0]]!r}}}"
            )


def attached_kind(bundle: Bundle, task: str) -> str:
    """PEFT's kind of adapter that a task is attached as: tasks of one kind fit into one model."""
    kind = bundle.manifest.tasks[task].kind
    return "LORA" if kind in LORA_KINDS else kind


def _attach_for(
    bundle: Bundle, names: Mapping[str, str]
) -> Callable[[Bundle, nn.Module, Mapping[str, str]], PeftModel]:
    kinds: dict[str, str] = {}
    for task in names.values():
        kinds.setdefault(attached_kind(bundle, task), task)
    if len(kinds) > 1:
        named = " and ".join(f"{kind} (task {task!r})" for kind, task in kinds.items())
        raise BundleError(
            f"the tasks are {named}, which one model cannot hold together; attach those of each to a model of their "
            "own, with tasks=[...]"
        )
    kind = next(iter(kinds))
    if kind == "VERA":
        return attach_vera
    return attach_prompts if kind in PROMPT_KINDS else _attach_lora


def _attach_lora(bundle: Bundle, base_model: nn.Module, names: Mapping[str, str]) -> PeftModel:
    modules = bundle.modules_of(names.values())
    _check_modules(bundle, modules, base_model)
    _check_replaced(bundle, modules, tuple(names.values()))
    shared_rows = _shared_rows(bundle, modules, base_model)
    read_shared = read_once()
    tables = {module.name for module in modules if module.layer == "embedding"}
    tails = name_tails(name for name, _ in base_model.named_modules())
    model: Any = None
    for name, task in names.items():
        chains = lora_chains(bundle, task, read_shared)
        ranks = {at: chain_rank(chain) if at in tables else len(chain[-1]) for at, chain in chains.items()}
        settings = lora_settings(bundle, task, ranks)
        if not tails.isdisjoint(chains):  # a list would give modules whose names end alike an update, too
            settings["target_modules"] = "|".join(map(re.escape, sorted(chains)))
        config = LoraConfig(**settings)
        if model is None:
            model = get_peft_model(base_model, config, adapter_name=name, low_cpu_mem_usage=True)
        else:
            model.add_adapter(name, config, low_cpu_mem_usage=True)
        for module, chain in chains.items():
            _place(model.get_submodule(PREFIX + module), name, chain, shared_rows.get(module))
        place_extras(model, name, bundle.extras(task))
    keep_apart(model)
    return model


def _check_modules(bundle: Bundle, modules: Sequence[ModuleEntry], base_model: nn.Module) -> None:
    found = dict(base_model.named_modules())
    for module in modules:
        weight = getattr(found.get(module.name), "weight", None)
        if weight is None:
            raise BundleError(
                f"the base model has no {module.layer} module {module.name!r}; the bundle belongs to "
                f"{bundle.manifest.base_model.name!r}"
            )
        if sorted(weight.shape) != sorted(module.shape):
            raise BundleError(
                f"module {module.name!r} is {tuple(weight.shape)} in the base model but {module.shape} in the bundle; "
                f"it belongs to {bundle.manifest.base_model.name!r}"
            )


def _check_replaced(bundle: Bundle, modules: Sequence[ModuleEntry], tasks: Sequence[str]) -> None:
    """One model cannot hold a layer that one task replaces whole and another updates."""
    for other in tasks:
        for name in bundle.manifest.tasks[other].saved_modules:
            hit = [module.name for module in modules if is_saved(f"{module.name}.weight", name)]
            for task in tasks if hit else ():
                if set(hit) & set(bundle.factors(task)):
                    raise BundleError(
                        f"task {other!r} replaces {name!r} whole and task {task!r} updates it; one model cannot hold "
                        "both. Export the tasks and load them one at a time"
                    )


def _shared_rows(
    bundle: Bundle, modules: Sequence[ModuleEntry], base_model: nn.Module
) -> dict[str, nn.Parameter]:
    """A' of every module that has one, as the one Parameter all tasks will use."""
    updated = {module.name for module in modules}
    return {
        name: parameter_like(rows, base_model.get_submodule(name).weight)
        for name, rows in bundle.shared_rows().items()
        if name in updated
    }


def _place(layer: Any, name: str, chain: Chain, shared: nn.Parameter | None) -> None:
    """Put a chain where PEFT keeps an adapter's factors; ``shared`` is its last matrix, if all tasks use it."""
    like = layer.get_base_layer().weight
    if shared is not None and shared.shape != chain[-1].shape:
        shared = None  # the task keeps nothing of A' here: its chain is one zero direction
    if isinstance(layer.get_base_layer(), nn.Embedding):
        up, down = pair(chain)
        layer.lora_embedding_A[name] = (
            parameter_like(down, like) if shared is None or len(chain) == 3 else shared
        )
        layer.lora_embedding_B[name] = parameter_like(up, like)
        return
    layer.lora_A[name] = _linear(parameter_like(chain[-1], like) if shared is None else shared)
    if len(chain) == 3:
        layer.lora_B[name] = LowRankHead(parameter_like(chain[0], like), parameter_like(chain[1], like))
    else:
        layer.lora_B[name] = _linear(parameter_like(chain[0], like))


def _linear(weight: nn.Parameter) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = weight
    return linear
