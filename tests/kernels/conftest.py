"""Tests of the kernels run in Triton's interpreter, made faster."""

import quick_interpreter  # noqa: F401
