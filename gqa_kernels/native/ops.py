"""The compiled ops: definitions, fake kernels and autograd. The library adds the kernels."""

from __future__ import annotations

import torch

from . import autograd, flops, schema

for _name, _schema in (
    ("attention_forward", schema.FORWARD),
    ("attention_output", schema.OUTPUT),
    ("attention_dense_output", schema.DENSE_OUTPUT),
    ("attention_auxiliary", schema.AUXILIARY),
    ("attention_into", schema.INTO),
    ("attention_backward", schema.BACKWARD),
    ("cache_append", schema.APPEND),
    ("cache_keep", schema.KEEP),
    ("cache_slots_exist", schema.SLOTS_EXIST),
):
    schema.define(_name, _schema)

torch.library.register_fake("gqa_kernels::attention_forward", schema.fake_forward(schema.FORWARD))
torch.library.register_fake("gqa_kernels::attention_output", schema.fake_output(schema.OUTPUT))
torch.library.register_fake(
    "gqa_kernels::attention_dense_output", schema.fake_output(schema.DENSE_OUTPUT)
)
torch.library.register_fake(
    "gqa_kernels::attention_auxiliary", schema.fake_auxiliary(schema.AUXILIARY)
)
torch.library.register_fake(
    "gqa_kernels::attention_backward", schema.fake_backward(schema.BACKWARD)
)
torch.library.register_fake("gqa_kernels::cache_append", schema.fake_append)
for _name in ("attention_into", "cache_keep"):
    torch.library.register_fake(f"gqa_kernels::{_name}", schema.fake_nothing)
# Calls that need a gradient take attention_forward. For other calls torch would enter a fallback,
# which does nothing and takes time.
_library = torch.library.Library("gqa_kernels", "FRAGMENT")
for _name in ("attention_output", "attention_dense_output"):
    _library.impl(_name, torch.library.fallthrough_kernel, "Autograd")
autograd.register(
    "gqa_kernels::attention_forward", "gqa_kernels::attention_backward",
    schema.FORWARD, schema.BACKWARD,
)  # fmt: skip
for _name, _schema, _is_backward in (
    ("attention_forward", schema.FORWARD, False),
    ("attention_output", schema.OUTPUT, False),
    ("attention_dense_output", schema.DENSE_OUTPUT, False),
    ("attention_auxiliary", schema.AUXILIARY, False),
    ("attention_into", schema.INTO, False),
    ("attention_backward", schema.BACKWARD, True),
):
    flops.register(_name, _schema, is_backward=_is_backward)
