"""NC-VQVAE time-series generation (arXiv 2408.16613)."""

from ncfast.errors import UserError
from ncfast.generated import Generated, open_generated
from ncfast.ncvqvae import NCVQVAE, load
from ncfast.nn.vector_quantize import VectorQuantize
from ncfast.ops import nearest_code
from ncfast.training import fit
from ncfast.version import __version__

__all__ = [
    "NCVQVAE",
    "Generated",
    "UserError",
    "VectorQuantize",
    "__version__",
    "fit",
    "load",
    "nearest_code",
    "open_generated",
]
