"""Measures of a quantized model: perplexity, divergence from the original, zero-shot tasks, answers, speed,
memory, layer errors, generated text; leakage of calibration text.

Everything takes a transformers causal LM (a quantized one is an ordinary model with replaced linears) and returns
frozen values. Nothing here prints; long work takes `progress(done, total, description)`.
"""

from lowbit.evaluation.cache_checks import CheckScore, check_generation, check_lengths, check_retrieval
from lowbit.evaluation.chat import Answer, ChatScore, compare_chat, read_prompts
from lowbit.evaluation.generate import check_chat, check_sampling, generate_text
from lowbit.evaluation.harness import score_with_lm_eval
from lowbit.evaluation.judge import Verdict, check_judge, judge_answers
from lowbit.evaluation.layers import output_error, sqnr_db
from lowbit.evaluation.leakage import Leakage, find_leakage
from lowbit.evaluation.memory import DirectoryBytes, directory_bytes, model_bytes, peak_rss, reset_peak_rss
from lowbit.evaluation.paired import Metric, Paired, TaskScore
from lowbit.evaluation.perplexity import Evaluation, evaluate_model
from lowbit.evaluation.reference import KeptOriginal, keep_states
from lowbit.evaluation.speed import Speed, measure_speed
from lowbit.evaluation.windows import PROTOCOLS, as_protocol_reads, cut
from lowbit.evaluation.zero_shot import Task, read_tasks, score_task

__all__ = [
    "PROTOCOLS",
    "Answer",
    "ChatScore",
    "CheckScore",
    "DirectoryBytes",
    "Evaluation",
    "KeptOriginal",
    "Leakage",
    "Metric",
    "Paired",
    "Speed",
    "Task",
    "TaskScore",
    "Verdict",
    "as_protocol_reads",
    "check_chat",
    "check_generation",
    "check_judge",
    "check_lengths",
    "check_retrieval",
    "check_sampling",
    "compare_chat",
    "cut",
    "directory_bytes",
    "evaluate_model",
    "find_leakage",
    "generate_text",
    "judge_answers",
    "keep_states",
    "measure_speed",
    "model_bytes",
    "output_error",
    "peak_rss",
    "read_prompts",
    "read_tasks",
    "reset_peak_rss",
    "score_task",
    "score_with_lm_eval",
    "sqnr_db",
]
