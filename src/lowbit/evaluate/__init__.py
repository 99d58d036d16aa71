"""What a quantized model is worth: perplexity and distance to the original, speed, memory, layer errors, its own text.

Everything takes a transformers causal LM (a quantized one is an ordinary model whose linears were replaced) and returns
frozen values. Nothing here prints; long work takes `progress(done, total, description)`.
"""

from lowbit.evaluate.divergence import kl_and_agreement
from lowbit.evaluate.generate import generate_text
from lowbit.evaluate.layers import output_error, sqnr_db
from lowbit.evaluate.memory import DirectoryBytes, directory_bytes, model_bytes, peak_rss, reset_peak_rss
from lowbit.evaluate.perplexity import Evaluation, evaluate_model
from lowbit.evaluate.reference import KeptOriginal, keep_states
from lowbit.evaluate.speed import Speed, measure_speed
from lowbit.evaluate.windows import PROTOCOLS

__all__ = [
    "PROTOCOLS",
    "DirectoryBytes",
    "Evaluation",
    "KeptOriginal",
    "Speed",
    "directory_bytes",
    "evaluate_model",
    "generate_text",
    "keep_states",
    "kl_and_agreement",
    "measure_speed",
    "model_bytes",
    "output_error",
    "peak_rss",
    "reset_peak_rss",
    "sqnr_db",
]
