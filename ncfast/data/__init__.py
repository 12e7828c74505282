"""Where series come from and how views of them are made."""

from ncfast.data.augment import Augment
from ncfast.data.dataset import Dataset, from_arrays
from ncfast.data.gaps import to_list
from ncfast.data.sources import load_dataset

__all__ = ["Augment", "Dataset", "from_arrays", "load_dataset", "to_list"]
