"""Training methods: one file a method, each a `torch.optim.Optimizer` around a base optimizer."""

from __future__ import annotations

from flatbench.config.lazy import lazy_names
from flatbench.config.registry import Registry

#: the methods by the names that a study file knows them by
REGISTRY = Registry(
    "optimizer",
    {
        "plain": "flatbench.optim.plain:Plain",
        "sam": "flatbench.optim.sam:SAM",
        "asam": "flatbench.optim.asam:ASAM",
        "gsam": "flatbench.optim.gsam:GSAM",
        "friendly_sam": "flatbench.optim.friendly_sam:FriendlySAM",
        "looksam": "flatbench.optim.looksam:LookSAM",
        "msam": "flatbench.optim.msam:MomentumSAM",
        "lora_mgpo": "flatbench.optim.lora_mgpo:LoRAMGPO",
        "ivon": "flatbench.optim.ivon:IVON",
        "flat_lora": "flatbench.optim.flat_lora:FlatLoRA",
        "eflat_lora": "flatbench.optim.eflat_lora:EFlatLoRA",
        "flat_lora_rwp": "flatbench.optim.random_perturbation:RandomPerturbation",
        "obar": "flatbench.optim.bar:OBAR",
        "nbar": "flatbench.optim.bar:NBAR",
        "bi_lora": "flatbench.optim.bi_lora:BiLoRA",
        "swa": "flatbench.optim.averaging:SWA",
        "ema": "flatbench.optim.averaging:EMA",
        "lora_plus": "flatbench.optim.peft_optimizers:LoRAPlus",
        "lora_fa": "flatbench.optim.peft_optimizers:LoRAFA",
    },
    group="flatbench.optimizers",
)

#: Other names of methods and their names here:
#: arXiv 2508.00522 renamed its methods in v3, and FriendlySAM's paper writes F-SAM; both names are in use.
ALIASES = {"fmlora": "flat_lora", "efmlora": "eflat_lora", "fsam": "friendly_sam"}

_PLACES = {
    **REGISTRY.classes(),
    "release": "flatbench.optim.base.follower:release",
    "FMLoRA": "flatbench.optim.flat_lora:FlatLoRA",
    "EFMLoRA": "flatbench.optim.eflat_lora:EFlatLoRA",
}

__all__ = ["ALIASES", "REGISTRY", *_PLACES]
__getattr__ = lazy_names(__name__, _PLACES)
