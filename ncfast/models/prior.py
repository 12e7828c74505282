"""The prior of stage 2: a bidirectional transformer over tokens (MaskGIT, arXiv 2202.04200)."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ncfast.config import Config
from ncfast.data.conditions import ConditionColumn
from ncfast.nn.embedding import embedding
from ncfast.nn.transformer import Transformer
from ncfast.ops import layer_norm


class Prior(nn.Module):
    """Logits of every token given the unmasked ones, a class and conditions.

    Token id K is the mask; class id C is "no class", and a condition that is NaN is "not known".
    """

    def __init__(
        self,
        config: Config,
        codebook: Tensor,
        num_tokens: int,
        num_classes: int,
        conditions: Sequence[ConditionColumn] = (),
        num_series: int = 0,
    ) -> None:
        """
        Args:
            codebook: of stage 1 [K, D]; the token embeddings start there unless config.embeddings is "random".
            conditions: k of them; none leave everything as it is without.
            num_series: N of the training set, whose conditions are kept.
        """
        super().__init__()
        K, D = codebook.shape
        self.num_codes = K
        self.num_tokens = num_tokens
        self.num_classes = num_classes
        tokens = codebook.detach().clone() if config.embeddings == "learned" else torch.randn(K, D).to(codebook)
        self.token_embedding = nn.Parameter(torch.cat([tokens, torch.randn(1, D).to(tokens)]))  # [K + 1, D]
        self.position_embedding = nn.Parameter(torch.randn(num_tokens, D))
        self.norm = nn.LayerNorm(D, eps=1e-12)
        self.class_embedding = nn.Embedding(num_classes + 1, D)
        self.transformer = Transformer(
            D,
            config.prior_dim,
            num_tokens + 1,
            config.prior_layers,
            config.prior_heads,
            config.prior_head_dim,
            config.prior_ff_mult,
        )
        self.head = nn.Sequential(nn.Linear(D, D), nn.GELU(), nn.LayerNorm(D, eps=1e-12), nn.Linear(D, K))
        # Last, so that they change no random number of the others.
        self.condition_embedding = ConditionEmbedding(conditions, D, num_series) if conditions else None

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor,
        conditions: Tensor | None = None,
        drop: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """tokens [B, n] in 0..K, labels [B] in 0..C, conditions float64 [B, k] -> logits [B, n, K]. drop: dropout."""
        first = self.embed_classes(labels, conditions)
        x = torch.cat([first[..., None, :], self.embed_tokens(tokens)], dim=-2)  # [B, 1 + n, D]
        return self.predict(self.transformer(x, drop)[..., 1:, :])

    def predict(self, x: Tensor) -> Tensor:
        """What the transformer returns [..., D] -> logits [..., K], float32 or better under any autocast."""
        first, _, norm, last = self.head
        x = apply_layer_norm(norm, first(x), gelu=True, dtype=last.weight.dtype)
        with torch.autocast(x.device.type, enabled=False):
            return last(x)

    def embed_tokens(self, tokens: Tensor) -> Tensor:
        """tokens [B, n] in 0..K -> [B, n, D]."""
        return apply_layer_norm(self.norm, embedding(tokens, self.token_embedding), add=self.position_embedding)

    def embed_classes(self, labels: Tensor, conditions: Tensor | None = None) -> Tensor:
        """labels [B] in 0..C, conditions float64 [B, k], None where none is known -> [B, D]."""
        embedded = self.class_embedding(labels)
        if self.condition_embedding is None:
            return embedded
        return embedded + self.condition_embedding(labels.shape, conditions)


class ConditionEmbedding(nn.Module):
    """The sum of what each condition is embedded as: a number by a small network, a category by a table.

    Attributes:
        rows: conditions of the training series, float64 [N, k]; new series take theirs from these.
        classes: of the same series, int64 [N]; 0 without labels.
    """

    HIDDEN = 64

    def __init__(self, columns: Sequence[ConditionColumn], dim: int, num_series: int) -> None:
        super().__init__()
        self.columns = tuple(columns)
        self.embeddings = nn.ModuleList(
            NumberEmbedding(column, dim, self.HIDDEN)
            if column.kind == "number"
            else CategoryEmbedding(len(column.categories), dim)
            for column in columns
        )
        self.register_buffer("rows", torch.zeros(num_series, len(columns), dtype=torch.float64))
        self.register_buffer("classes", torch.zeros(num_series, dtype=torch.int64))

    def remember(self, rows: Tensor, classes: Tensor | None) -> None:
        """Those of the training series: rows float64 [N, k], classes int64 [N] or None."""
        self.rows.copy_(rows)
        if classes is not None:
            self.classes.copy_(classes)

    def forward(self, shape: torch.Size, conditions: Tensor | None) -> Tensor:
        """conditions float64 [B, k], NaN where not known; None for none known of `shape` [B] -> [B, D]."""
        if conditions is None:
            conditions = self.rows.new_full((*shape, len(self.columns)), torch.nan)
        # Float32 under any autocast: a number is to be told from one that is near it.
        with torch.autocast(conditions.device.type, enabled=False):
            return torch.stack([embed(conditions[..., i]) for i, embed in enumerate(self.embeddings)]).sum(0)


class NumberEmbedding(nn.Module):
    """float64 [B] -> [B, D]: of the number in standard deviations from the mean."""

    def __init__(self, column: ConditionColumn, dim: int, hidden: int) -> None:
        super().__init__()
        self.mean, self.std = column.mean, column.std
        self.network = nn.Sequential(nn.Linear(1, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.unknown = nn.Parameter(torch.randn(dim))

    def forward(self, values: Tensor) -> Tensor:
        unknown = values.isnan()
        # Without the NaN, which would pass into the gradients even of what `where` leaves out.
        z = ((values.nan_to_num(self.mean) - self.mean) / self.std).to(self.unknown.dtype)
        return torch.where(unknown[..., None], self.unknown, self.network(z[..., None]))


class CategoryEmbedding(nn.Embedding):
    """Places float64 [B] in 0..m-1 or NaN -> [B, D]."""

    def __init__(self, num_categories: int, dim: int) -> None:
        super().__init__(num_categories + 1, dim)

    def forward(self, values: Tensor) -> Tensor:
        return super().forward(values.nan_to_num(self.num_embeddings - 1).long())


def apply_layer_norm(
    norm: nn.LayerNorm,
    x: Tensor,
    *,
    add: Tensor | None = None,
    gelu: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """norm(gelu(x + add)) in dtype, x's if None: x [..., n, D], add [n, D]."""
    return layer_norm(x, norm.weight, norm.bias, add=add, eps=norm.eps, gelu=gelu, dtype=dtype)
