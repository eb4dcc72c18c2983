"""Small adapters on disk, and dense float64 references made without the code under test."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

SHAPES = {"q_proj": (12, 16), "v_proj": (8, 16), "down_proj": (16, 24)}


class Workshop:
    """Writes PEFT folders and multiplies their factors out, densely and in float64."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def adapter(self, name, *, rank=4, seed=0, layers=2, shapes=None, scale=1.0, dtype=torch.float32, shared_a=False,
                skip=(), extras=None, refactor=None, **config):  # fmt: skip
        """Write a LoRA folder. ``refactor`` is a seed: A -> G A, B -> B G^-1 with a random well-conditioned G."""
        own, common = torch.Generator().manual_seed(1 + seed), torch.Generator().manual_seed(999)
        tensors = {}
        for layer in range(layers):
            for module, (d_out, d_in) in (shapes or SHAPES).items():
                path = f"model.layers.{layer}.{module}"
                down = torch.randn(rank, d_in, generator=common if shared_a else own, dtype=torch.float64)
                if shared_a:
                    down = down + 0.2 * torch.randn(rank, d_in, generator=own, dtype=torch.float64)
                up = torch.randn(d_out, rank, generator=own, dtype=torch.float64)
                up = scale * up * torch.logspace(0, -1, rank, dtype=torch.float64)
                if path in skip:
                    continue
                if refactor is not None:
                    g = torch.randn(
                        rank, rank, generator=torch.Generator().manual_seed(refactor), dtype=torch.float64
                    )
                    g = g + 3 * torch.eye(rank, dtype=torch.float64)
                    down, up = g @ down, up @ torch.linalg.inv(g)
                tensors[f"base_model.model.{path}.lora_A.weight"] = down.to(dtype)
                tensors[f"base_model.model.{path}.lora_B.weight"] = up.to(dtype)
        tensors |= extras or {}
        settings = {
            "peft_type": "LORA",
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": "tiny/base",
            "r": rank,
            "lora_alpha": 2 * rank,
            "target_modules": sorted(shapes or SHAPES),
        } | config
        return self.write(name, settings, tensors)

    def write(self, name, config, tensors):
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "adapter_config.json").write_text(json.dumps(config))
        if tensors:
            save_file(
                {key: value.contiguous() for key, value in tensors.items()},
                folder / "adapter_model.safetensors",
            )
        return folder

    @staticmethod
    def dense(folder, scaling=None) -> dict[str, torch.Tensor]:
        """``s B A`` per module in float64; ``scaling`` overrides alpha / r."""
        config = json.loads((folder / "adapter_config.json").read_text())
        tensors = load_file(folder / "adapter_model.safetensors")
        factor = config["lora_alpha"] / config["r"] if scaling is None else scaling
        updates = {}
        for name, down in tensors.items():
            if name.endswith("lora_A.weight"):
                up = tensors[name.replace("lora_A", "lora_B")]
                module = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                updates[module] = factor * up.double() @ down.double()
        return updates

    @staticmethod
    def dense_bundle(bundle, task) -> dict[str, torch.Tensor]:
        """What a bundle stores for one task, multiplied out in float64."""
        updates = {}
        for module, parts in bundle.factors(task).items():
            product = parts[0].double()
            for part in parts[1:]:
                product = product @ part.double()
            updates[module] = product
        return updates


@pytest.fixture
def workshop(tmp_path) -> Workshop:
    return Workshop(tmp_path / "adapters")
