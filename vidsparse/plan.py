"""What a generation will compute, before it runs."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from vidsparse.layout import LatentGrid


@dataclass(frozen=True)
class Plan:
    """Expected densities of one generation.

    Attributes:
        method: name of the method.
        grid: latent grid.
        num_steps: denoising steps.
        block_size: tokens per block.
        block_density: density of the mask in sparse calls.
        density: one list per layer with the density at each step.
        dense_steps: steps in which every layer is dense.
        dense_layers: layers that are dense in every step.
        note: a setting that could not be met, or None.
    """

    method: str
    grid: LatentGrid
    num_steps: int
    block_size: int
    block_density: float
    density: tuple[tuple[float, ...], ...]
    dense_steps: tuple[int, ...]
    dense_layers: tuple[int, ...]
    note: str | None = None

    @property
    def mean_density(self) -> float:
        """Mean over layers and steps, dense calls as 1.0."""
        cells = [cell for layer in self.density for cell in layer]
        return sum(cells) / len(cells)

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "mean_density": self.mean_density}
