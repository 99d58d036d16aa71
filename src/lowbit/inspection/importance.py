"""Importance matrices: streams a model block by block and sums the squares of every linear's inputs, for llama.cpp's encoder."""

from __future__ import annotations

from os import PathLike
from pathlib import Path

from torch import Tensor

from lowbit.checkpoints.imatrix import LEGACY, Imatrix, names_of, write_imatrix
from lowbit.checkpoints.source import open_model
from lowbit.checkpoints.target import check_new_file
from lowbit.data import Bos, CalibrationText, calibration_of
from lowbit.inspection.collect import original_blocks
from lowbit.numerics import SquareSum
from lowbit.progress import Progress, silent
from lowbit.surroundings import own_settings


@own_settings()
def importance_matrix(
    model: str | PathLike[str],
    calibration: CalibrationText,
    *,
    out: str | PathLike[str],
    samples: int = 32,
    seq_len: int = 512,
    bos: Bos = "auto",
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Imatrix:
    """Runs text through ``model`` and writes the summed squares of every linear's inputs as an importance matrix of llama.cpp.

    The sums are those of the original model, as ``llama-imatrix`` takes them of a file in full precision. Linears that read one
    input have equal entries.

    Args:
        model, bos, trust_remote_code: as for :func:`lowbit.quantize`.
        calibration: a text, ``self``, ids ``[N, T]`` or a Calibration.
        out: the file to write, which must not exist: GGUF, or the older layout if it ends in ``.dat``. Directories that lead to
            it are made.
        samples, seq_len: number of windows of a text, and tokens of each, which are the file's chunks.
        progress: called with finished blocks, all of them, and the current activity.

    Raises:
        ValueError: a model without a GGUF file, a text that cannot be used, a file that exists or has another suffix.
    """
    out = Path(out).expanduser()
    check_new_file(out, (".gguf", LEGACY), "an importance matrix of llama.cpp (since 2025, before it)")
    source = open_model(model, trust_remote_code=trust_remote_code)
    names = names_of(source.config)
    text = calibration_of(source, calibration, samples, seq_len, bos)
    entries: dict[str, Tensor] = {}
    for number, (state, behind, total) in enumerate(original_blocks(source, text.ids)):
        (progress or silent)(number, total, f"block {number + 1} of {total}")
        stats = state.collect((SquareSum(),), behind=behind)
        for shared in state.resolved.shared_inputs:
            for path in shared.readers:
                entries[names(f"{state.full_name(path)}.weight")] = stats[shared.name][SquareSum()]
    chunks, chunk_size = text.ids.shape
    found = Imatrix(entries, (text.name,), chunks, chunk_size, source.name, source.fingerprint, text.warnings)
    out.parent.mkdir(parents=True, exist_ok=True)
    write_imatrix(found, out)
    return found
