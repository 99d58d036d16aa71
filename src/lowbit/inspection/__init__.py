"""Where a model is hard to quantize: outlier channels, massive tokens, weight ranges, layers with large errors.

It shows the figures of SmoothQuant (arXiv:2211.10438) for every input of every block, as tables and plots.
"""

from lowbit.inspection.collect import inspect_model
from lowbit.inspection.importance import importance_matrix
from lowbit.inspection.rows import InputRow, Inspection, LayerRow, MassiveToken

__all__ = ["InputRow", "Inspection", "LayerRow", "MassiveToken", "importance_matrix", "inspect_model"]
