"""What the tests that run scripts in Triton's interpreter share. It imports Triton, so it is imported where that is there."""

import ast
from pathlib import Path

import numpy
import pytest
import triton
from packaging.version import Version

# Triton 3.6 turns arrays of one number into integers, which NumPy refuses since 2.4.
WORKS = Version(triton.__version__) >= Version("3.7") or Version(numpy.__version__) < Version("2.4")
needs_interpreter = pytest.mark.skipif(not WORKS, reason="this Triton's interpreter and this NumPy do not go together")


def in_parts(script: Path, parts: int) -> list[list[str]]:
    """The names of the script's functions check_NAME, which it runs by NAME, in some parts for as many processes: each of
    those begins with importing torch and Triton."""
    functions = [node for node in ast.parse(script.read_text()).body if isinstance(node, ast.FunctionDef)]
    names = [node.name.removeprefix("check_") for node in functions if node.name.startswith("check_")]
    return [names[part::parts] for part in range(parts)]
