"""Where series come from: a path, or a name looked up in the user's folders, in aeon's, and on the network."""

import dataclasses
import difflib
import importlib.util
import json
import os
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ncfast.data.arrays import list_some
from ncfast.data.dataset import Dataset, from_arrays, make_dataset
from ncfast.data.formats import ACCEPTED, SPLIT, dataset_name, label_files, read_file
from ncfast.data.layout import Reading
from ncfast.data.windows import load_windows, refuse_without_window
from ncfast.errors import UserError

__all__ = ["Dataset", "from_arrays", "load_dataset"]

# How the file of data set NAME may be called, after NAME; the first that exists is taken.
ENDINGS = (".h5", ".hdf5", ".npz", "_TRAIN.ts", "_TRAIN.tsv", "_TRAIN.csv", "_TRAIN.txt", "_TRAIN", "_TRAIN.arff")
ENDINGS += (".npy", ".csv", ".parquet", ".mat", "_TRAIN.parquet", "_TRAIN.npy", ".tsv", ".ts", ".arff")
ARCHIVE = "UCRArchive_2018"


def load_dataset(
    name_or_path: str | os.PathLike,
    data_dir: str | os.PathLike | None = None,
    *,
    label_column: str | int | None = None,
    layout: str | None = None,
    header: str | None = None,
    index_column: str | int | None = None,
    condition_columns: str | Sequence[str] | None = None,
    window: int | None = None,
    stride: int = 1,
    time_column: str | None = None,
    group_column: str | None = None,
    test_share: float = 0.2,
) -> Dataset:
    """The data set of that name, or in that file or folder.

    A path is what contains a path separator, ends in a known suffix, or is a file or a data set's folder here. A file
    is .h5, .hdf5, .npz, .mat, .npy, .ts, .tsv, .csv, .txt, .arff or .parquet (of the last seven either one of a _TRAIN
    and _TEST pair), laid out as the functions of `ncfast.data.formats` and `ncfast.data.tables` say. A folder holds one
    data set.

    Anything else is a name, upper or lower case, looked up in this order: `data_dir`; $NCFAST_DATA; $AEON_DATA;
    ~/aeon_data; the sets inside the aeon package; last, aeon downloads it (from Zenodo, to $AEON_DATA or ~/aeon_data).
    In each folder it may be NAME.h5, NAME.hdf5, NAME.npz, NAME_TRAIN.ts, NAME_TRAIN.tsv, NAME_TRAIN.csv, NAME.npy,
    NAME.csv or the like, directly, in NAME/ or in UCRArchive_2018/NAME/. aeon's variants NAME_eq (equal lengths) and
    NAME_nmv (no missing values) are names too, in the folder of NAME.

    What is certain of columns and axes is decided, and `notes` say what was; what is not is refused, and the message
    names the option that settles it.

    Args:
        name_or_path: such as FordA, runs/mine.npz or UCRArchive_2018/FordA/FordA_TRAIN.tsv.
        data_dir: where names are looked up first.
        label_column: of a table, by name or place from 0; of a file of arrays, the array; "none": no labels.
        layout: "nctd" [series, channels, time], "ntd" [series, time, channels], or "table": each row is a series.
        header: "yes" or "no": whether the first line of a text table names its columns.
        index_column: of a table, a column to leave out, or several with commas between; "none" keeps all.
        condition_columns: what is known of each series besides its class (`ncfast.data.conditions`): columns of a
            table, or arrays NAME or NAME_train and NAME_test of a file of arrays; names, or a text with commas between.
        window: the file is a long recording, and windows of so many rows are its series; this and what follows is that
            of `ncfast.data.windows.windows_of`.

    Raises:
        UserError: one line: not found (and where it was looked for), unreadable, ambiguous or unfit (`make_dataset`).
    """
    reading = Reading(label_column, layout, header, index_column, condition_columns)
    windows = {"stride": stride, "time_column": time_column, "group_column": group_column, "test_share": test_share}
    given = {"label_column": label_column, "layout": layout, "header": header, "index_column": index_column}
    if window is not None:
        given |= {"window": window, **windows}
    given = {name: value for name, value in given.items() if value is not None}
    dataset = load_read(name_or_path, data_dir, reading, window, windows)
    return dataclasses.replace(dataset, reading=json.dumps(given) if given else "")


def load_read(
    name_or_path: str | os.PathLike,
    data_dir: str | os.PathLike | None,
    reading: Reading,
    window: int | None,
    windows: dict[str, Any],
) -> Dataset:
    """`load_dataset`; windows: its options of windows."""
    text = os.fspath(name_or_path)
    if not text.strip():
        raise UserError("the name of the data set is empty: give a name such as FordA, a file or a folder")
    path = Path(text).expanduser()
    if window is not None:
        reading.refuse(text, "label_column", "layout", "index_column")
        return load_windows(path, window, reading=reading, **windows)
    refuse_without_window(**windows)
    known_suffix = path.suffix.lower() in ACCEPTED
    if path.name != text or known_suffix or path.is_file() or (path.is_dir() and names_directly_in(path)):
        return load_path(path, reading)
    dataset = load_name(text, None if data_dir is None else Path(data_dir).expanduser(), reading)
    if path.is_dir():
        note = f"the folder {text} here holds no data set, so {dataset.source} was read"
        dataset = dataclasses.replace(dataset, notes=(note, *dataset.notes))
    return dataset


def load_path(path: Path, reading: Reading) -> Dataset:
    if not path.exists():
        beside = [entry.name for entry in entries(path.parent)]
        raise UserError(f"no file or folder {str(path)!r}{did_you_mean(path.name, beside)}")
    if path.is_file():
        return load_file(path, reading)
    file = file_in(path)
    if file is None:
        inside = sorted(names_in(path))
        found = f"several: {list_some(inside)}; name one, with this as the data folder" if inside else "none"
        raise UserError(f"{path}: expected a folder that holds one data set ({', '.join(ACCEPTED)}); found {found}")
    return load_file(file, reading)


def load_name(name: str, data_dir: Path | None, reading: Reading) -> Dataset:
    if data_dir is not None and not data_dir.is_dir():
        raise UserError(f"the data folder {str(data_dir)!r} does not exist")
    folders = search_path(data_dir)
    for folder in folders:
        file = find(name, folder)
        if file is not None:
            return load_file(file, reading)

    looked = ", ".join(f"{folder}{'' if folder.is_dir() else ' (missing)'}" for folder in folders)
    try:
        published = published_names()
        title = {title.lower(): title for title in published}.get(base_name(name).lower())
        if title is not None:
            return load_file(download(title, name), reading)
        why = did_you_mean(name, set(published).union(*map(names_in, folders)))
        looked += ", aeon's list of UCR/UEA sets" if published else ""
    except DownloadError as error:
        why = f", and {error}"
    own = data_dir or os.environ.get("NCFAST_DATA") or "a folder and give that as the data folder or $NCFAST_DATA"
    install = "" if has_aeon() else ", or pip install 'ncfast[data]' to download UCR/UEA sets"
    raise UserError(
        f"no data set {name!r}{why}: looked in {looked}; put {name}.h5 (X_train, y_train, X_test, y_test) or "
        f"{name}/{name}_TRAIN.tsv into {own}{install}"
    )


def load_file(file: Path, reading: Reading) -> Dataset:
    train, test, notes = read_file(file, reading)
    return make_dataset(train, test, name=dataset_name(file), source=str(file), notes=notes, reading=reading)


def search_path(data_dir: Path | None) -> list[Path]:
    """The folders a name is looked up in, in order, whether they exist or not."""
    own = os.environ.get("NCFAST_DATA")
    folders = [data_dir, Path(own).expanduser() if own else None, *aeon_caches(), *aeon_folders()]
    return list(dict.fromkeys(folder for folder in folders if folder is not None))


def find(name: str, folder: Path) -> Path | None:
    """The file of that data set in a folder of data sets."""
    places = [folder]
    for parent in (folder, folder / ARCHIVE):
        for own in (name, base_name(name)):
            places += same_name(own, entries(parent))
    return next((file for place in places if (file := file_named(name, place))), None)


def file_in(folder: Path) -> Path | None:
    """The file of the one data set that `folder` holds: of the folder's name, or the only one there is."""
    names = names_directly_in(folder)
    own = folder.resolve().name
    if own in names or len(names) != 1:
        return file_named(own, folder)
    return file_named(names.pop(), folder)


def names_directly_in(folder: Path) -> set[str]:
    return {dataset_name(entry) for entry in entries(folder) if is_data(entry)}


def file_named(name: str, folder: Path) -> Path | None:
    """The file of that data set directly in `folder`."""
    listing = entries(folder)
    candidates = [entry for ending in ENDINGS for entry in same_name(name + ending, listing)]
    candidates += [entry for entry in listing if dataset_name(entry).lower() == name.lower()]  # such as train.csv
    return next((entry for entry in candidates if entry.is_file() and is_data(entry)), None)


def same_name(name: str, listing: Iterable[Path]) -> list[Path]:
    """The entries of that name, in any case, the exact one first."""
    return sorted((e for e in listing if e.name.lower() == name.lower()), key=lambda e: (e.name != name, e.name))


def entries(folder: Path) -> list[Path]:
    """What is in `folder`; nothing if it is missing, closed to us or no folder."""
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def is_data(entry: Path) -> bool:
    """Whether the file is a data set's first: not a test split, not labels that lie beside their series."""
    match = SPLIT.fullmatch(entry.stem)
    if match is not None and match[2].lower() == "test":
        return False
    # Text that is no split, such as README.txt, describes a data set.
    known = {*ACCEPTED, ""} if match is not None else {*ACCEPTED} - {".txt"}
    return entry.suffix.lower() in known and entry.is_file() and not holds_labels(entry)


def holds_labels(entry: Path) -> bool:
    """Whether the file's name is one that labels have, beside a file of series."""
    if re.search(r"(^|_)(y|labels?)(_|\.|$)", entry.name, re.IGNORECASE) is None:
        return False
    others = [other for other in entries(entry.parent) if other != entry and other.suffix.lower() in ACCEPTED]
    return (
        any(entry in label_files(other) for other in others) or re.search(r"_(y|labels)\.npy$", entry.name) is not None
    )


def names_in(folder: Path) -> set[str]:
    """The data sets that a lookup in `folder` could find."""
    listing = [*entries(folder), *entries(folder / ARCHIVE)]
    files = {dataset_name(entry) for entry in listing if is_data(entry)}
    return files | {entry.name for entry in listing if file_named(entry.name, entry)}


def base_name(name: str) -> str:
    """The data set that NAME_eq or NAME_nmv is a variant of."""
    return re.sub(r"(_eq|_nmv)+$", "", name, flags=re.IGNORECASE)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    spelled = {other.lower(): other for other in known}
    close = difflib.get_close_matches(name.lower(), spelled, n=3, cutoff=0.7)
    return f" (did you mean {' or '.join(spelled[other] for other in close)}?)" if close else ""


def has_aeon() -> bool:
    return importlib.util.find_spec("aeon") is not None


def aeon_caches() -> list[Path]:
    """Where aeon keeps its downloads."""
    own = os.environ.get("AEON_DATA")
    return [*([Path(own).expanduser()] if own else []), Path("~/aeon_data").expanduser()]


def aeon_folders() -> list[Path]:
    """The sets inside the installed aeon package, and the downloads of its older versions.

    The package is located and not imported, which would take seconds.
    """
    spec = importlib.util.find_spec("aeon")
    packages = (spec.submodule_search_locations or []) if spec else []
    folders = [Path(package, "datasets", name) for package in packages for name in ("data", "local_data")]
    return [folder for folder in folders if folder.is_dir()]


class DownloadError(Exception):
    """Why a data set could not be downloaded."""


def published_names() -> list[str]:
    """The UCR and UEA sets that aeon can download; none without aeon."""
    if not has_aeon():
        return []
    try:
        from aeon.datasets.tsc_datasets import tsc_zenodo
    except Exception as error:  # a broken installation of aeon, or of what it needs, fails in any way it likes
        raise DownloadError(f"aeon, which would download it, does not import ({error_text(error)})") from error
    return list(tsc_zenodo)


def download(title: str, name: str) -> Path:
    """The file of data set `name`, `title` or a variant of it, downloaded by aeon into its cache.

    The download becomes visible when it is whole: an interrupted one would later read as a shorter data set.
    """
    cache = aeon_caches()[0]
    try:
        from aeon.datasets import load_classification

        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache, prefix=f".{title}-") as partial:
            load_classification(title, split="train", extract_path=partial)
            if find(name, cache) is None:  # else another process was faster
                os.replace(Path(partial, title), cache / title)
    except Exception as error:  # aeon and the network raise what they like
        raise DownloadError(f"downloading it failed ({error_text(error)})") from error
    file = find(name, cache)
    if file is None:
        raise DownloadError(f"its download, {cache / title}, does not hold it")
    return file


def error_text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
