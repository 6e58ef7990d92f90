"""Result of localization: one region per entity."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import xarray as xr

from elakit.errors import SettingError
from elakit.measures.masks import check_disjoint
from elakit.numbering import number_of


@dataclass(frozen=True, eq=False)
class Regions:
    """One region per entity, as disjoint boolean masks.

    Attributes
    ----------
    masks : bool array, (entity, y, x)
        True inside the entity's region. No location belongs to two entities.
    scores : float array, (entity, y, x)
        Score of each entity at each location: the maps after differentiation, before thresholds were applied.
    floored : tuple of bool
        True for each entity whose region was too small and was enlarged to the smallest allowed area.
    entities : tuple of str
        Label of each entity, in the order of `masks`.

    Raises
    ------
    SettingError
        Masks overlap or are not boolean, or shapes do not match.
    """

    masks: np.ndarray
    scores: np.ndarray
    floored: tuple[bool, ...]
    entities: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.masks.ndim != 3 or self.masks.dtype != np.bool_:
            raise SettingError(
                f"masks have type {self.masks.dtype} and shape {self.masks.shape}: give booleans of shape "
                "(entity, y, x)."
            )
        if self.scores.shape != self.masks.shape:
            raise SettingError(
                f"scores have shape {self.scores.shape}, but masks have shape {self.masks.shape}. Give both the same "
                "shape."
            )
        for what, values in (("floored", self.floored), ("entities", self.entities)):
            if len(values) != len(self.masks):
                raise SettingError(
                    f"{what} has {number_of(len(values), 'entry')} for {number_of(len(self.masks), 'mask')}; give one "
                    "entry per mask."
                )
        check_disjoint(self.masks)

    @property
    def background(self) -> np.ndarray:
        """Locations outside every region, bool (y, x)."""
        return np.asarray(~self.masks.any(axis=0))

    def to_xarray(self) -> xr.DataArray:
        """`masks` as a boolean DataArray, (entity, y, x), in which `floored` is a coordinate along entity."""
        return xr.DataArray(
            self.masks,
            dims=("entity", "y", "x"),
            coords={"entity": list(self.entities), "floored": ("entity", list(self.floored))},
            name="regions",
        )

    def iou(self, other: Regions | np.ndarray) -> np.ndarray:
        """Intersection over union of each region with another region of the same entity.

        Parameters
        ----------
        other : Regions or bool array, (entity, y, x)
            Regions of the same entities, in the same order.

        Returns
        -------
        float array, (entity,)
            Intersection over union, 0 to 1; 1 if both regions are empty.

        Raises
        ------
        SettingError
            Shapes or entities differ.

        Examples
        --------
        The cat's two regions have one of two locations in common. The frog's two regions are equal:

        >>> masks = np.array([[[1, 1, 0]], [[0, 0, 1]]], dtype=bool)
        >>> regions = Regions(masks, scores=masks.astype(float), floored=(False, False), entities=("cat", "frog"))
        >>> regions.iou([[[1, 0, 0]], [[0, 0, 1]]])
        array([0.5, 1. ])
        """
        if isinstance(other, Regions):
            if other.entities != self.entities:
                raise SettingError(
                    f"These regions have the entities {', '.join(self.entities)}, but the regions to compare have "
                    f"{', '.join(other.entities)}. Compare regions of the same entities, in the same order."
                )
            masks = other.masks
        else:
            masks = np.asarray(other).astype(bool)
        if masks.shape != self.masks.shape:
            raise SettingError(
                f"Masks of shape {masks.shape} cannot be compared with masks of shape {self.masks.shape}. Give masks "
                "of the same entities and of the same size."
            )
        common = (self.masks & masks).sum(axis=(1, 2))
        either = (self.masks | masks).sum(axis=(1, 2))
        return np.where(either == 0, 1.0, common / np.maximum(either, 1))

    def __repr__(self) -> str:
        height, width = self.masks.shape[1:]
        parts = [
            f"{name} {number_of(mask.sum(), 'location')}{' (floor)' if floored else ''}"
            for name, mask, floored in zip(self.entities, self.masks, self.floored, strict=True)
        ]
        return f"Regions({height}x{width}: {', '.join(parts)}, background {self.background.sum()})"
