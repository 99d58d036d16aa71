"""The laws of the compiled kernels under AddressSanitizer and UBSan: `make sanitize` builds them so and runs this.

LD_PRELOAD=libasan.so python tests/sanitized.py build/sanitize/_cpu*.so
"""

import importlib.util
import sys

import pytest

NAME = "lowbit._cpu"

if __name__ == "__main__":
    spec = importlib.util.spec_from_file_location(NAME, sys.argv[1])
    assert spec is not None and spec.loader is not None
    sys.modules[NAME] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    from lowbit.kernels import native

    assert native._cpu is module, "the installed kernels were imported instead of the sanitized ones"
    sys.exit(
        pytest.main(
            [
                "-q",
                "-p",
                "no:cacheprovider",
                "-W",  # lowbit, and what it imports, was imported before pytest could rewrite it
                "ignore::pytest.PytestAssertRewriteWarning",
                "tests/laws/test_native.py",
                "tests/laws/test_side.py",
                "tests/laws/test_compiled_solvers.py",
                "tests/laws/test_decoding.py",
                "tests/laws/test_packed_attention.py",
                "tests/laws/test_packed_steps.py",
            ]
        )
    )
