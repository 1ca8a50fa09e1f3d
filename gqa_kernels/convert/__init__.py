"""Conversion of Hugging Face models: other KV heads, the same queries.

::

    child = convert(model, maps, merging="aligned", moments=stats)
    child.set_attn_implementation(register())      # integrations.transformers
    save(child, "child", processor=tokenizer)
    child = load("child")

``plan`` searches maps for all layers, ``selection`` chooses among several, ``sequential`` converts
layer by layer, ``prune_heads`` drops query heads, ``evaluation`` compares with the parent,
``recovery`` trains the child,
``lm_harness`` runs lm-eval on it. ``gqa_kernels.models.families`` lists the model families;
``attention.py`` holds the two that need a forward of their own.

A child's checkpoint is an ordinary one with ``kv_head_map`` (and ``value_head_map``) in its config.
If its groups are not those of ordinary GQA, ``save`` and ``save_pretrained`` both write a config
that says ``attn_implementation: asym_gqa``, so that transformers refuses it unless ``register()``
was called, whatever attention the caller names. Its ``architectures`` name a class that engines
know from this package only. Anything else would compute equal groups.
"""

from .checkpoint import load, save
from .model import convert
from .pruning import lowest_heads, prune_heads
from .selection import Selection, select_maps
from .split import random_split

__all__ = [
    "Selection",
    "convert",
    "load",
    "lowest_heads",
    "prune_heads",
    "random_split",
    "save",
    "select_maps",
]
