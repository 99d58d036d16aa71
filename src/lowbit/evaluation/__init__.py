"""Measures of a quantized model: perplexity, divergence from the original, speed, memory, layer errors, generated text.

Everything takes a transformers causal LM (a quantized one is an ordinary model with replaced linears) and returns
frozen values. Nothing here prints; long work takes `progress(done, total, description)`.
"""

from lowbit.evaluation.generate import check_chat, generate_text
from lowbit.evaluation.layers import output_error, sqnr_db
from lowbit.evaluation.memory import DirectoryBytes, directory_bytes, model_bytes, peak_rss, reset_peak_rss
from lowbit.evaluation.perplexity import Evaluation, evaluate_model
from lowbit.evaluation.reference import KeptOriginal, keep_states
from lowbit.evaluation.speed import Speed, measure_speed
from lowbit.evaluation.tasks import TaskScore, check_generation, check_retrieval
from lowbit.evaluation.windows import PROTOCOLS

__all__ = [
    "PROTOCOLS",
    "DirectoryBytes",
    "Evaluation",
    "KeptOriginal",
    "Speed",
    "TaskScore",
    "check_chat",
    "check_generation",
    "check_retrieval",
    "directory_bytes",
    "evaluate_model",
    "generate_text",
    "keep_states",
    "measure_speed",
    "model_bytes",
    "output_error",
    "peak_rss",
    "reset_peak_rss",
    "sqnr_db",
]
