"""Importing this makes Triton's interpreter several times as fast, where its version has the parts that this needs.

At every call of a function inside a kernel it lists all members of triton.language to patch them, though the launch has
patched them already. Here the first call of a launch patches a module's language and the others find it patched. And
kernels run where the stack has room.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

_FRAME_BYTES = 1 << 16


def _with_room() -> Callable[[Callable[[], Any]], Any]:
    """Calls what it is given from a frame of 64 KiB.

    Python keeps frames in chunks of 16 KiB and maps or unmaps one wherever the stack crosses its end; a kernel that
    hovers there spends half its time so. A frame too large for a chunk gets a larger one, with room for calls below.
    """
    names: dict[str, Any] = {}
    unused = " = ".join(f"_{n}" for n in range(_FRAME_BYTES // 8))
    exec(f"def call(run):\n    if run is None:\n        {unused} = None\n    return run()\n", names)  # noqa: S102
    return names["call"]


def quicken(interpreter: Any) -> None:
    with_room = _with_room()
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched: set[str] = set()

    def patch_once(fn: Any) -> Any:
        if fn.__module__ in patched:
            return interpreter._LangPatchScope()
        patched.add(fn.__module__)
        return patch(fn)

    def launch_anew(self: Any, *args: Any, **kwargs: Any) -> Any:
        patched.clear()
        try:
            return with_room(lambda: launch(self, *args, **kwargs))
        finally:
            patched.clear()

    interpreter._patch_lang = patch_once
    interpreter.GridExecutor.__call__ = launch_anew


if importlib.util.find_spec("triton") is not None:
    from triton.runtime import interpreter

    if all(hasattr(interpreter, name) for name in ("_patch_lang", "_LangPatchScope", "GridExecutor")):
        quicken(interpreter)
