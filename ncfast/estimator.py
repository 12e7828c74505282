"""A generator of series as a scikit-learn estimator."""

from typing import Any

import numpy as np
from sklearn.base import BaseEstimator
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import check_is_fitted, check_random_state, validate_data

from ncfast.data.gaps import padded
from ncfast.errors import UserError
from ncfast.training.fit import fit

LEAST_LENGTH = 4  # of series: what the STFT takes at least


class SeriesGenerator(BaseEstimator):
    """NC-VQVAE with `fit`, `sample` and `get_params`, for pipelines and grid searches.

    Parameters:
        preset: "default" or "paper".
        ssl: self-supervised loss, a value of `--ssl`: "vicreg", "none", "views" and others.
        stage1_epochs, stage2_epochs: None takes as many as the preset.
        options: other fields of `ncfast.config.Config`, as a dict.
        device: "auto", "cpu", "cuda" or "cuda:N".
        random_state: an int, a RandomState, or None for another one in each call.

    Attributes:
        model_: the trained `ncfast.NCVQVAE`.
        classes_: sorted labels; only after `fit` with y.
        n_features_in_: samples of a series.
    """

    def __init__(
        self,
        preset: str = "default",
        ssl: str = "vicreg",
        stage1_epochs: int | None = None,
        stage2_epochs: int | None = None,
        options: dict[str, Any] | None = None,
        device: str = "auto",
        random_state: int | np.random.RandomState | None = None,
    ) -> None:
        self.preset = preset
        self.ssl = ssl
        self.stage1_epochs = stage1_epochs
        self.stage2_epochs = stage2_epochs
        self.options = options
        self.device = device
        self.random_state = random_state

    def fit(self, X: Any, y: Any = None, *, conditions: Any = None) -> "SeriesGenerator":
        """Trains both stages.

        Args:
            X: series [n, L] or [n, C, L], NaN where a value is missing, or a list of series of unequal lengths.
            y: labels [n], or None.
            conditions: as of `ncfast.fit`.

        Raises:
            ValueError: data or parameters that cannot be used, with the reason.
        """
        if isinstance(X, list) and len({np.shape(series) for series in X}) > 1:
            X = stacked(X)
        X = validate_data(
            self,
            X,
            dtype=np.float64,
            ensure_all_finite="allow-nan",
            ensure_min_samples=2,
            ensure_min_features=LEAST_LENGTH,
            allow_nd=True,
        )
        labels = None
        if y is not None:
            y = np.asarray(y)
            check_classification_targets(y)
            if len(y) != len(X):
                raise ValueError(f"y has a label for each series of X: {len(X)}; got {len(y)}")
            self.classes_, index = np.unique(y, return_inverse=True)
            labels = index.astype(str)  # any type of label comes back as it was
        chosen = {"ssl": self.ssl, "seed": self._seed(), **(self.options or {})}
        for name in ("stage1_epochs", "stage2_epochs"):
            if getattr(self, name) is not None:
                chosen[name] = getattr(self, name)
        try:
            layout = "table" if X.ndim == 2 else "nctd"
            self.model_ = fit(
                X,
                labels,
                layout=layout,
                label_column="none",
                conditions=conditions,
                preset=self.preset,
                device=self.device,
                quiet=True,
                **chosen,
            )
        except UserError as error:
            raise ValueError(str(error)) from error
        self.flat_ = X.ndim == 2
        return self

    def sample(
        self, n_samples: int = 1, labels: Any = "train", condition: Any = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """New series, as X was [n_samples, L] or [n_samples, C, L], and their labels, None after `fit` without y.

        Of unequal lengths they are padded with NaN; `ncfast.data.to_list` makes a list of them [n_samples, C, L].

        labels: "train", "balanced", "none"; labels of y to take in turn; or {label: count}.
        condition: as of `NCVQVAE.sample`, after `fit` with conditions.
        """
        check_is_fitted(self)
        if not isinstance(labels, str):
            names = [self._class_name(label) for label in labels]
            labels = dict(zip(names, labels.values(), strict=True)) if isinstance(labels, dict) else names
        try:
            X, y = self.model_.sample(n_samples, labels, self._seed(), condition=condition)
        except UserError as error:
            raise ValueError(str(error)) from error
        X = X[:, 0] if self.flat_ else X
        return X, None if y is None else self.classes_[y.astype(int)]

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.allow_nan = True
        return tags

    def _class_name(self, label: Any) -> str:
        known = list(getattr(self, "classes_", ()))
        if label not in known:
            raise ValueError(f"labels are of {known}; got {label!r}")
        return str(known.index(label))

    def _seed(self) -> int:
        return int(check_random_state(self.random_state).randint(2**31 - 1))


def stacked(items: list[Any]) -> np.ndarray:
    """Series of unequal lengths as [n, L], or [n, C, L] of several channels, padded with NaN.

    Raises:
        ValueError: items that are no such series.
    """
    try:
        X = padded(items, None, "X")
    except UserError as error:
        raise ValueError(str(error)) from error
    return X[:, 0] if all(np.ndim(item) == 1 for item in items) else X
