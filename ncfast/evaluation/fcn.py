"""The evaluator's network: a fully convolutional classifier of series (Wang, Yan, Oates 2017, arXiv 1611.06455)."""

import itertools
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ncfast.engine.logging import progress_bar
from ncfast.engine.loop import batch_ends, batches, cosine, derived_seed, seeded
from ncfast.engine.precision import computing
from ncfast.engine.step import TrainingStep

LAYERS = ((128, 8), (256, 5), (128, 3))  # filters and kernel of each convolution
ROWS = 256  # series a forward pass


@dataclass(frozen=True)
class Recipe:
    """How a classifier is trained: AdamW, cosine to 0, the weights of the last step.

    No step looks at a series that is not in the train set: to pick epochs by the test set would tune the ruler to it.

    The authors of NC-VQVAE train 1000 epochs in batches of 256. Smaller batches take more steps an epoch, so that far
    fewer epochs do.

    Attributes:
        epochs: None for as many as make `least_steps`, `least_epochs` at least.
    """

    epochs: int | None = None
    least_steps: int = 600
    least_epochs: int = 20
    batch_size: int = 32
    learning_rate: float = 1e-3
    weight_decay: float = 1e-5

    def epochs_for(self, num_series: int) -> int:
        if self.epochs is not None:
            return self.epochs
        return max(self.least_epochs, math.ceil(self.least_steps / len(batch_ends(num_series, self.batch_size))))


class Convolution(nn.Conv1d):
    """Without bias and padding; on a GPU a product of matrices.

    With cuDNN's, of those that sum float32 in one order, a step of ECG5000 took 29 ms and 26 GiB on an H200, for some
    7 GFLOP.
    """

    def forward(self, x: Tensor) -> Tensor:  # [B, C, L + kernel - 1] -> [B, filters, L]
        return super().forward(x) if x.device.type == "cpu" else as_product(x, self.weight)


def as_product(x: Tensor, weight: Tensor) -> Tensor:
    """F.conv1d: x [B, C, L + kernel - 1], weight [filters, C, kernel] -> [B, filters, L]; sums have a fixed order."""
    columns = x.unfold(2, weight.shape[2], 1).transpose(2, 3).flatten(1, 2)  # [B, C·kernel, L]
    return torch.bmm(weight.flatten(1).expand(len(x), -1, -1), columns)


class FCN(nn.Module):
    """Three convolutions, each with batch norm and ReLU, the mean over time, and one linear layer."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for filters, kernel in LAYERS:
            layers += [
                # As padding="same", which copies the series with a warning where the kernel is even.
                nn.ConstantPad1d(((kernel - 1) // 2, kernel // 2), 0.0),
                Convolution(channels, filters, kernel, bias=False),  # the batch norm would take a bias away again
                nn.BatchNorm1d(filters),
                nn.ReLU(inplace=True),
            ]
            channels = filters
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(channels, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """x [B, C, L], normalised -> [B, 128]: what FID compares."""
        return self.body(x).mean(-1)

    def forward(self, x: Tensor) -> Tensor:
        """x [B, C, L] -> logits [B, classes]."""
        return self.head(self.features(x))

    @torch.no_grad()
    def describe(self, x: Tensor) -> tuple[np.ndarray, np.ndarray]:
        """Normalised series [N, C, L] -> features [N, 128], class probabilities [N, classes], float32."""
        device = self.head.weight.device
        self.eval()
        with computing("fp32", device):
            features = torch.cat([self.features(rows.to(device)) for rows in x.split(ROWS)])
            probabilities = self.head(features).softmax(-1)
        return features.cpu().numpy(), probabilities.cpu().numpy()


def train_fcn(
    x: Tensor, y: np.ndarray, num_classes: int, recipe: Recipe, seed: int, device: torch.device, *, title: str = ""
) -> FCN:
    """A classifier of normalised series. On a GPU a step is a CUDA graph.

    Args:
        x: float32 [N, C, L], N >= 2.
        y: class index of each series, int64 [N].
        num_classes: 2 or more; a class may be without series.
        seed: of the initial weights and of the order of the series.
        title: of the progress bar; without one there is none.
    """
    x, labels = x.to(device), torch.from_numpy(y).to(device)
    device = x.device  # with its number
    generators = [torch.Generator(device).manual_seed(derived_seed(seed, 0))]  # the step may replace it
    with seeded(seed, 1):
        model = FCN(x.shape[1], num_classes)
    model = model.to(device).train()
    epochs = recipe.epochs_for(len(x))
    steps = epochs * len(batch_ends(len(x), recipe.batch_size))
    step = TrainingStep(
        lambda rows, _: {"loss": F.cross_entropy(model(x[rows]), labels[rows])},
        model,
        num_series=len(x),
        weight_decay=recipe.weight_decay,
        rates=[recipe.learning_rate * cosine(i / steps) for i in range(steps)],
        precision="fp32",
        device=device,
        fused=device.type == "cuda",  # a CPU's classifiers keep their bits, which name them
    )
    numbers = itertools.count()
    with progress_bar(title, epochs, unit="epoch", quiet=not title) as bar:
        for _ in range(epochs):
            for rows in batches(len(x), recipe.batch_size, generators[0], device):
                step(next(numbers), rows, generators)
            bar.update()
    step.graphs.clear()  # graphs and step refer to each other, so that their memory would wait for Python to look
    return model.eval()


def classification_accuracy_score(
    x: Tensor,
    y: np.ndarray,
    test: Tensor,
    test_labels: np.ndarray,
    num_classes: int,
    recipe: Recipe,
    seed: int,
    device: torch.device,
    *,
    title: str = "",
) -> float:
    """Accuracy on real test series of a classifier of generated ones: CAS (Ravuri, Vinyals 2019, arXiv 1905.10887).

    Args:
        x, y: generated series and the classes they were asked for; the rest as `train_fcn` takes it.
        test, test_labels: real series, normalised as x [M, C, L], and their classes [M].
    """
    model = train_fcn(x, y, num_classes, recipe, seed, device, title=title)
    return float((model.describe(test)[1].argmax(1) == test_labels).mean())
