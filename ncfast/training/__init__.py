"""How a model is trained: both stages, and the run folder."""
