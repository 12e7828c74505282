"""What a user brings as an array or as labels, as NumPy has it."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from ncfast.data.gaps import without_none
from ncfast.errors import UserError

FLOAT32_MAX = float(np.finfo(np.float32).max)


def to_numpy(array: Any, where: str, *, ragged: bool = False) -> np.ndarray:
    """The array, with NaN where it is masked or None; of objects, and one-dimensional, where NumPy cannot stack its
    items.

    ragged: items may be series of unequal lengths.
    """
    if hasattr(array, "detach"):  # a torch tensor, perhaps on a GPU
        array = array.detach().cpu()
    if isinstance(array, list | tuple):
        array = [unmasked(item) for item in array]
    array = unmasked(array)
    try:
        array = np.asarray(array)
    except ValueError:  # items of different shapes
        array = np.fromiter(array, dtype=object, count=len(array))
    except TypeError as error:
        raise UserError(f"{where}: expected an array; got {type(array).__name__} ({error})") from error
    if array.ndim > 1:
        array = without_none(array)
    if array.dtype == object and array.ndim == 1 and not ragged:
        try:
            shapes = {np.shape(item) for item in array if np.ndim(item)}
        except ValueError as error:
            raise UserError(f"{where}: the channels of one series have unequal lengths; they share one") from error
        for axis in (-1, 0):  # of time, where each series is [C, L] or [L, C]
            lengths = {shape[axis] for shape in shapes}
            if len(lengths) > 1:
                raise UserError(
                    f"{where}: the series have unequal lengths, {min(lengths)} to {max(lengths)} time points; "
                    "crop, pad or resample them to one length first"
                )
    return array


def unmasked(array: Any) -> Any:
    """What a masked array shows, and NaN (of text, nothing) where it hides; other arrays as they are."""
    if not isinstance(array, np.ma.MaskedArray) or not np.ma.is_masked(array):
        return array
    if array.dtype.kind in "iub":
        array = array.astype(np.float64)
    return array.filled(np.nan if array.dtype.kind in "fc" else None if array.dtype.kind == "O" else "")


def label_text(label: Any) -> str:
    """The label as a string: 1 for 1.0, nothing for None and NaN."""
    if isinstance(label, bytes):
        return label.decode(errors="backslashreplace")
    if label is None or label != label:
        return ""
    return str(int(label)) if isinstance(label, float) and label.is_integer() else str(label)


def numeric_values(names: np.ndarray) -> np.ndarray | None:
    """The names' values, float64, where all are finite numbers."""
    try:
        values = names.astype(np.float64)
    except ValueError:
        return None
    return values if np.isfinite(values).all() else None


def sorted_classes(names: np.ndarray) -> tuple[str, ...]:
    """The distinct names: by value when all are numbers ("2" before "10"), else alphabetically."""
    distinct = np.unique(names)
    values = numeric_values(distinct)
    return tuple((distinct if values is None else distinct[np.argsort(values, kind="stable")]).tolist())


def list_some(names: Sequence[str], most: int = 8) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
