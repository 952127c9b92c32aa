"""One model in memory, three roles: student (its adapter, sparse), teacher (no adapter, dense), critic (its own, dense).

A role is entered for one forward and, where it has gradients, for the backward pass that belongs to it: with gradient
checkpointing the forward runs again there. A teacher without gradients may run in between; the processors keep what a
replay needs apart from it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer

import vidsparse
from vidsparse.errors import ConfigError
from vidsparse.processors.binding import BINDING, PROJECTION

STUDENT, CRITIC = "student", "critic"


class Roles:
    """Switches adapters and attention of one transformer.

    Args:
        target: a pipeline, or its transformer; all weights of the transformer are frozen.
        method: the student's method.
        options: its options.

    Raises:
        ConfigError: method, option or targets do not fit.
    """

    def __init__(self, target: Any, method: str, options: dict[str, Any]) -> None:
        self.model: Any = target if isinstance(target, torch.nn.Module) else target.transformer
        self.model.requires_grad_(False)
        self.handle = vidsparse.apply(target, method, **options)
        for _, parameter in self.extra_parameters():
            parameter.data = parameter.data.float()
        self._sparse = self.handle.processor
        self._dense = vidsparse.DenseProcessor()
        self.adapters: dict[str, list[tuple[str, torch.nn.Parameter]]] = {}

    def add_adapter(self, name: str, *, rank: int, alpha: float, targets: str, dropout: float, seed: int) -> None:
        """Give a role LoRA weights: float32, `lora_B` zero, `lora_A` from `seed`."""
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, lora_dropout=dropout)  # type: ignore[arg-type]
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Already found a `peft_config`")  # a second adapter is meant
            torch.manual_seed(seed)
            device = next(self.model.parameters()).device
            try:
                self.model.add_adapter(config, adapter_name=name)
            except ValueError as error:
                raise ConfigError(
                    f"`targets` matches no module of {type(self.model).__name__}: {targets!r}."
                ) from error
            found = [(n, p) for n, p in self.model.named_parameters() if ".lora_" in n and f".{name}." in n]
            generator = torch.Generator().manual_seed(seed)
            for parameter_name, parameter in found:
                parameter.data = parameter.data.float()
                if ".lora_A." in parameter_name:
                    # On the CPU, so that a seed means the same on every device; the spread is peft's own.
                    bound = 1 / parameter.shape[1] ** 0.5
                    start = torch.rand(parameter.shape, generator=generator) * 2 * bound - bound
                    parameter.data.copy_(start.to(device))
        self.adapters[name] = found

    def extra_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """Trained modules of the student's method that are no LoRA: the projections of "sla"."""
        return [(n, p) for n, p in self.model.named_parameters() if f".{PROJECTION}." in n]

    def parameters(self, name: str) -> list[torch.nn.Parameter]:
        found = [p for _, p in self.adapters[name]]
        return found + [p for _, p in self.extra_parameters()] if name == STUDENT else found

    def _enter(self, name: str | None) -> None:
        for layer in self.model.modules():
            if isinstance(layer, BaseTunerLayer):
                if name is None:
                    layer.enable_adapters(False)
                else:
                    layer.enable_adapters(True)
                    layer.set_adapter([name])
        for _, parameter in self.extra_parameters():
            parameter.requires_grad_(name == STUDENT)
        vars(self.model)[BINDING].processor = self._sparse if name == STUDENT else self._dense

    def student(self) -> None:
        """From here on the model is the student."""
        self._enter(STUDENT)

    def critic(self) -> None:
        """From here on the model is the critic."""
        self._enter(CRITIC)

    @contextmanager
    def teacher(self, then: str = STUDENT) -> Iterator[None]:
        """The dense model without adapters and without gradients; afterwards the model is in the role `then`."""
        self._enter(None)
        try:
            with torch.no_grad():
                yield
        finally:
            self._enter(then)
