"""recover(): a short training of a converted model, which recovers quality lost to the conversion.

Up-training as in GQA (arXiv 2305.13245, section 2.2): the ordinary next-token loss on text, with
AdamW, a warm-up and a cosine to a tenth of the learning rate; of all weights, the attention's, or
of low-rank adapters (LoRA, arXiv 2106.09685). If the parent is given, its next-token distributions
are a second target (distillation, arXiv 1503.02531). Models without a next-token loss or labels,
such as encoders, learn only the parent's last hidden states. Dropout stays off. The trained weights
are fp32 whatever the model computes in, and the model gets its own types back at the end.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import kl_div
from torch.utils.checkpoint import checkpoint

from ..models.families import attention_blocks, attention_layers
from ..models.fingerprint import Fingerprint, check_same, fingerprint
from ..models.float_types import float_types, set_float_types
from ..models.inputs import Batch, model_inputs, token_mask
from ..reporting.files import read_state, write_atomically
from ..reporting.interval import Interval
from ..reporting.progress import track
from .evaluation import (
    hidden_states,
    next_token_loss,
    padding_mask,
    predicts_next_token,
    run,
)

TRAINED = ("all", "attention", "lora")
DTYPES = ("float32", "bfloat16")
STATE = "recovery.pt"
OLDEST_PEFT = "0.21"  # first release tested


@dataclass(frozen=True)
class Recipe:
    """How to train.

    Attributes:
        steps: optimizer steps.
        learning_rate: its peak.
        warmup: steps of linear warm-up; a cosine to ``learning_rate / 10`` follows.
        trained: ``"all"`` weights, those of the ``"attention"`` layers, or ``"lora"`` adapters of
            q, k, v and o, folded into the weights at the end.
        accumulate: batches of a step.
        distillation: weight ``w`` of the parent's distributions: the loss is ``(1 - w)`` x cross
            entropy ``+ w`` x KL(parent || child).
        temperature: both models' logits are divided by it in the KL, which is multiplied by its
            square.
        betas, weight_decay, clip: of AdamW; ``clip`` is the largest gradient norm.
        lora_rank, lora_alpha: of the adapters.
        dtype: what the model computes in: ``"float32"``, or ``"bfloat16"`` (autocast).
        checkpointing: recompute the activations of each block in the backward pass instead of
            keeping them: less memory, about a third more time.
        seed: of the order of the batches and of new adapters.

    Examples:
        >>> from gqa_kernels.convert.recovery import Recipe
        >>> Recipe(steps=50).steps
        50
    """

    steps: int = 100
    learning_rate: float = 1e-4
    warmup: int = 10
    trained: str = "attention"
    accumulate: int = 1
    distillation: float = 0.0
    temperature: float = 1.0
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    clip: float = 1.0
    lora_rank: int = 16
    lora_alpha: int = 32
    dtype: str = "float32"
    checkpointing: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {self.dtype!r}")
        if self.trained not in TRAINED:
            raise ValueError(f"trained must be one of {', '.join(TRAINED)}, got {self.trained!r}")
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(
                f"steps and accumulate must be at least 1, got {self.steps} and {self.accumulate}"
            )
        if not 0 <= self.distillation <= 1:
            raise ValueError(f"distillation must lie in [0, 1], got {self.distillation}")

    def rate(self, step: int) -> float:
        """Learning rate of step ``step``, counted from 0."""
        if step < self.warmup:
            return self.learning_rate * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * done)) / 2)


@dataclass
class Recovery:
    """The history of a training.

    Attributes:
        loss: mean loss of each step.
        validation: ``(steps done, value)`` of the validation function.
    """

    loss: list[float]
    validation: list[tuple[int, float]]

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def recover(
    model: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe = Recipe(),
    *,
    parent: nn.Module | None = None,
    validate: Callable[[nn.Module], float] | None = None,
    validate_every: int = 50,
    folder: str | Path | None = None,
    save_seconds: float = 60.0,
    made_from: Fingerprint | None = None,
    progress: bool = False,
) -> Recovery:
    """Train a converted model in place, through the attention implementation it has.

    Args:
        model: a causal language model with its head; or any model whose batches hold ``labels``;
            or, with distillation, one with hidden states.
        batches: as in ``calibrate``; each epoch uses another order.
        recipe: how to train.
        parent: needed if ``recipe.distillation`` is not 0.
        validate: called on the model before the first step, every ``validate_every`` steps and
            after the last.
        folder: for the state. It is written after the first step, then every ``save_seconds``, and
            after the last; whole or not at all. A run that finds a state there continues it.
        save_seconds: time between two writes of the state.
        made_from: fingerprint of what ``model`` was converted from and how; default that of
            ``model`` (and ``parent``) itself. The state holds it, with those of the batches and the
            recipe, and can't be continued with others.
        progress: show a bar if standard error is a terminal.

    Raises:
        ValueError: no batches, a loss that is not finite, a parent that is missing, or a state that
            was made from something else.
        ImportError: LoRA, and peft is missing or too old.
        NotImplementedError: no next-token loss, no labels and no distillation.

    Examples:
        >>> recovery = recover(child, texts, parent=model, recipe=Recipe(steps=50))
    """
    if not len(batches):
        raise ValueError("batches must hold at least one batch, got none")
    if recipe.distillation and parent is None:
        raise ValueError("parent must be given if recipe.distillation is not 0, got None")
    training = model.training
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad]
    causal = predicts_next_token(model)
    state = None
    if folder is not None:
        state = _State(folder, _origin(model, batches, recipe, parent, made_from))
    model.eval()
    types = float_types(model)
    trained, interval = model, Interval(save_seconds)
    try:
        model.float()
        if recipe.trained == "lora":
            trained = _adapted(model, recipe)
        parameters = _trainable(trained, recipe)
        optimizer = torch.optim.AdamW(
            list(parameters.values()), betas=recipe.betas, weight_decay=recipe.weight_decay
        )
        history = Recovery([], []) if state is None else state.load(parameters, optimizer)
        first = len(history.loss)
        if validate is not None and first == 0:
            history.validation.append((0, validate(model)))
        steps = range(first, recipe.steps)
        for step in track(steps, "Recovering", recipe.steps, progress, first):
            for group in optimizer.param_groups:
                group["lr"] = recipe.rate(step)
            taken = _batches(batches, recipe, step)
            with _checkpointed(model, recipe.checkpointing):
                history.loss.append(_step(trained, parent, taken, recipe, causal))
            nn.utils.clip_grad_norm_(parameters.values(), recipe.clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            if validate is not None and (done % validate_every == 0 or done == recipe.steps):
                history.validation.append((done, validate(model)))
            if state is not None and (interval.is_due() or done == recipe.steps):
                state.save(history, parameters, optimizer)
                interval.restart()
    finally:
        if trained is not model:
            trained.merge_and_unload()  # adapters into the weights, in place
        model.requires_grad_(True)
        for parameter in frozen:
            parameter.requires_grad_(False)
        set_float_types(model, types)
        model.train(training)
    return history


def _step(
    model: nn.Module,
    parent: nn.Module | None,
    batches: list[Batch],
    recipe: Recipe,
    causal: bool,
) -> float:
    """Gradients of one step; its loss."""
    total = 0.0
    for batch in batches:
        inputs = model_inputs(model, batch)
        autocast = torch.autocast(
            model.device.type, torch.bfloat16, enabled=recipe.dtype == "bfloat16"
        )
        with autocast:
            loss = _loss(model, parent, inputs, recipe, causal) / len(batches)
        if not loss.isfinite():
            raise ValueError(f"the loss must stay finite, got {loss.item()}: lower learning_rate")
        loss.backward()
        total += loss.item()
    return total


def _loss(
    model: nn.Module,
    parent: nn.Module | None,
    inputs: dict[str, Tensor],
    recipe: Recipe,
    causal: bool,
) -> Tensor:
    weight = recipe.distillation
    supervised = causal or "labels" in inputs
    if not supervised and not weight:
        raise NotImplementedError(
            f"batches must hold labels for a {model.config.model_type} model without next-token "
            f"loss, or recipe.distillation must not be 0, got {', '.join(inputs)}"
        )
    output = run(model, inputs)
    target = None
    if weight:
        with torch.no_grad():
            target = run(parent, inputs)
    if not supervised:
        return _state_error(output, target, inputs)
    if "labels" in inputs:
        loss = output.loss
    else:
        count, total = next_token_loss(output.logits, inputs)
        loss = total / count
    if not weight:
        return loss
    return (1 - weight) * loss + weight * _divergence(output.logits, target.logits, inputs, recipe)


@contextmanager
def _checkpointed(model: nn.Module, wanted: bool) -> Iterator[None]:
    """Let the blocks recompute their activations. transformers' own switch acts in training mode
    only, in which dropout acts too."""
    blocks = list(attention_blocks(model)) if wanted else []
    for block in blocks:
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    try:
        yield
    finally:
        for block in blocks:
            del block.forward


def _state_error(ours: Any, theirs: Any, inputs: dict) -> Tensor:
    """Squared difference of the last hidden states over the parent's mean square, without
    padding."""
    ours, theirs = hidden_states(ours), hidden_states(theirs)
    mask = token_mask(inputs, padding_mask(inputs), ours)
    return (ours[mask] - theirs[mask]).square().mean() / theirs[mask].square().mean()


def _divergence(ours: Tensor, theirs: Tensor, inputs: dict, recipe: Recipe) -> Tensor:
    """Mean KL(parent || child) over tokens (or images) that are not padding."""
    if ours.dim() == 3:
        mask = token_mask(inputs, padding_mask(inputs), ours)
        ours, theirs = ours[mask], theirs[mask]
    ours, theirs = ((x.float() / recipe.temperature).log_softmax(-1) for x in (ours, theirs))
    return kl_div(ours, theirs, reduction="batchmean", log_target=True) * recipe.temperature**2


def _batches(batches: Sequence[Batch], recipe: Recipe, step: int) -> list[Batch]:
    """The batches of a step: a function of the seed and the step only, so that runs can resume."""
    found = []
    for number in range(step * recipe.accumulate, (step + 1) * recipe.accumulate):
        epoch, place = divmod(number, len(batches))
        order = list(range(len(batches)))
        random.Random(f"{recipe.seed}.{epoch}").shuffle(order)
        found.append(batches[order[place]])
    return found


def _trainable(model: nn.Module, recipe: Recipe) -> dict[str, nn.Parameter]:
    """Parameters to train, by name; the others are frozen."""
    if recipe.trained == "attention":
        layers = attention_layers(model)
        chosen = {
            id(p) for at in layers for p in (*at.module.parameters(), *at.output.parameters())
        }
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in chosen)
    elif recipe.trained == "all":
        model.requires_grad_(True)
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def _adapted(model: nn.Module, recipe: Recipe) -> nn.Module:
    """The model with LoRA adapters on its attention projections."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise ImportError(
            f"trained='lora' needs peft >= {OLDEST_PEFT} "
            f"(pip install 'peft>={OLDEST_PEFT}'): {error}"
        ) from error
    modules = {id(module): name for name, module in model.named_modules()}
    targets = set()
    for layer in attention_layers(model):
        names = layer.family.names
        inner = [names.fused] if names.fused else [names.query, names.key, names.value]
        for projection in (*(getattr(layer.module, name) for name in inner), layer.output):
            targets.add(modules[id(projection)])
    torch.manual_seed(recipe.seed)
    config = LoraConfig(
        r=recipe.lora_rank,
        lora_alpha=recipe.lora_alpha,
        target_modules=sorted(targets),
        fan_in_fan_out=any(hasattr(layer.key, "nf") for layer in attention_layers(model)),
    )
    return get_peft_model(model, config)


def _origin(
    model: nn.Module,
    batches: Sequence[Batch],
    recipe: Recipe,
    parent: nn.Module | None,
    made_from: Fingerprint | None,
) -> Fingerprint:
    """The fingerprint of a recovery."""
    if made_from is None:
        made_from = fingerprint(model)
        if recipe.distillation:
            made_from |= {f"parent's {n}": value for n, value in fingerprint(parent).items()}
    return made_from | fingerprint(batches=batches, **asdict(recipe))


class _State:
    """A recovery in progress, in one file."""

    def __init__(self, folder: str | Path, made_from: Fingerprint):
        self.path = Path(folder) / STATE
        self.made_from = made_from

    def save(
        self,
        history: Recovery,
        parameters: dict[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
    ) -> None:
        data = io.BytesIO()
        content: dict[str, Any] = {
            "made from": self.made_from,
            "loss": history.loss,
            "validation": history.validation,
            "parameters": {name: p.detach() for name, p in parameters.items()},
            "optimizer": optimizer.state_dict(),
        }
        torch.save(content, data)
        write_atomically(self.path, data.getvalue())

    def load(
        self, parameters: dict[str, nn.Parameter], optimizer: torch.optim.Optimizer
    ) -> Recovery:
        """The history so far. Sets parameters and optimizer."""
        if not self.path.exists():
            return Recovery([], [])
        content = read_state(self.path)
        check_same(self.path, content.get("made from"), self.made_from)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(content["parameters"][name])
        optimizer.load_state_dict(content["optimizer"])
        return Recovery(content["loss"], [tuple(each) for each in content["validation"]])


def steps_kept(folder: str | Path) -> int:
    """Steps in the state of a folder, 0 if it has none."""
    path = Path(folder) / STATE
    return len(read_state(path)["loss"]) if path.exists() else 0
