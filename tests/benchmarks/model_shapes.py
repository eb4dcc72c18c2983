"""Adapters with the shapes of well-known models: random numbers in the structure fine-tuning leaves.

All tasks start from one A, as a pipeline that trains them from a stored init does, and move away from it a little;
B has a decaying spectrum of its own. Merge time and memory depend on the shapes alone.
"""

from __future__ import annotations

import json
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import torch
from safetensors.torch import save_file

SHAPES = {
    "llama-3.2-1b": (
        16,
        {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.k_proj": (512, 2048),
            "self_attn.v_proj": (512, 2048),
            "self_attn.o_proj": (2048, 2048),
            "mlp.gate_proj": (8192, 2048),
            "mlp.up_proj": (8192, 2048),
            "mlp.down_proj": (2048, 8192),
        },
    ),
    "llama-3.2-1b-four": (  # one module of each kind of shape above
        1,
        {
            "self_attn.q_proj": (2048, 2048),
            "self_attn.v_proj": (512, 2048),
            "mlp.up_proj": (8192, 2048),
            "mlp.down_proj": (2048, 8192),
        },
    ),
    "llama-3.1-8b": (
        32,
        {
            "self_attn.q_proj": (4096, 4096),
            "self_attn.k_proj": (1024, 4096),
            "self_attn.v_proj": (1024, 4096),
            "self_attn.o_proj": (4096, 4096),
            "mlp.gate_proj": (14336, 4096),
            "mlp.up_proj": (14336, 4096),
            "mlp.down_proj": (4096, 14336),
        },
    ),
}
"""Layers, and per module (d_out, d_in)."""


def write_adapters(model: str, count: int, rank: int, folder: Path) -> list[Path]:
    """Write ``count`` bf16 adapters below ``folder``, reusing those that are there."""
    folders = [folder / f"task-{task:03d}" for task in range(count)]
    missing = [task for task in range(count) if not (folders[task] / "adapter_model.safetensors").exists()]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as workers:
        where = [folders[task] for task in missing]
        list(workers.map(_write_adapter, repeat(model), missing, repeat(rank), where))
    return folders


def _write_adapter(model: str, task: int, rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    layers, shapes = SHAPES[model]
    start = torch.Generator().manual_seed(0)
    own = torch.Generator().manual_seed(1 + task)
    decay = torch.logspace(0, -1.5, rank)
    tensors = {}
    for layer in range(layers):
        for name, (d_out, d_in) in shapes.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            down = torch.randn(rank, d_in, generator=start) + 0.3 * torch.randn(rank, d_in, generator=own)
            up = torch.randn(d_out, rank, generator=own) * decay
            tensors[f"{prefix}.lora_A.weight"] = (down / d_in**0.5).bfloat16()
            tensors[f"{prefix}.lora_B.weight"] = (up / rank).bfloat16()
    folder.mkdir(parents=True, exist_ok=True)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": f"benchmark/{model}",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": sorted({name.rsplit(".", 1)[-1] for name in shapes}),
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file(tensors, folder / "adapter_model.safetensors")
