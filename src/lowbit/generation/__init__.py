"""Text that a model writes itself: data for calibration and training where there is none (LLM-QAT, arXiv:2305.17888)."""

from lowbit.generation.files import DataError, GeneratedText, is_generated, read_generated
from lowbit.generation.quality import Quality, judge
from lowbit.generation.sampling import Sampling, Strategy
from lowbit.generation.writing import Start, Total, Written, write, write_tokens

__all__ = [
    "DataError",
    "GeneratedText",
    "Quality",
    "Sampling",
    "Start",
    "Strategy",
    "Total",
    "Written",
    "is_generated",
    "judge",
    "read_generated",
    "write",
    "write_tokens",
]
