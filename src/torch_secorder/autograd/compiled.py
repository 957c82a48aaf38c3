"""Code that ``torch.compile`` compiled, run as it was written for a while, so that hooks see it.

torch decides at each call of compiled code, by its stance, whether the compiled code runs or the code as it was written. The
stance belongs to the whole process. Ours is set while anyone holds it; afterwards the stance is again what it was before.
Nothing here imports the compiler, which takes a second; where it isn't there yet, the stance is set as soon as it is.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from threading import RLock
from types import ModuleType
from typing import Any, TypeVar
from weakref import ref

from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    get_eval_frame_callback,
    set_code_exec_strategy,
)

from torch_secorder.errors import LifecycleError
from torch_secorder.model.hooks import restoring

Function = TypeVar("Function", bound=Callable[..., Any])

COMPILER = "torch._dynamo.eval_frame"
_turn = RLock()  # Several threads may enter and leave blocks.


class EagerCode:
    """While this is held, compiled code runs as it was written, in the whole process.

    Args:
        on_compiled_call: called whenever compiled code is called meanwhile, in the thread that calls it.

    Attributes:
        held: whether this is held now.
    """

    held = False

    def __init__(self, on_compiled_call: Callable[[], object] = lambda: None):
        self.on_compiled_call = on_compiled_call

    def hold(self) -> None:
        """Set the stance.

        Raises:
            LifecycleError: inside of code that is compiled, of which torch compiles the rest whatever the stance is.
        """
        if self.held:
            return
        if get_eval_frame_callback() not in (None, False):
            raise LifecycleError(
                "this began inside of a function that torch.compile compiles: move the block, or the call, out of that function"
            )
        with _turn:
            self.held = True
            _STANCE.holders[id(self)] = ref(self)
            _STANCE.update()

    def release(self) -> None:
        """Give the stance back, unless others hold it. What is broken off half-way is done again when this object goes."""
        if self.held:
            with _turn:
                _STANCE.holders.pop(id(self), None)
                _STANCE.update()
                self.held = False

    __del__ = release


@contextmanager
def eager_code() -> Iterator[None]:
    """Inside, compiled code runs as it was written, in the whole process."""
    code = EagerCode()
    with restoring(code.release):
        code.hold()
        yield


class _Stance:
    """The stance that torch reads while compiled code is to run as it was written.

    Code that sets a stance for a while and then puts this one back may do so when nobody holds it any more. Then it is to torch
    what the stance before it is.

    Attributes:
        holders: those who hold it, by their ids.
    """

    def __init__(self) -> None:
        self.holders: dict[int, ref[EagerCode]] = {}
        self._before: Any = None
        self._taken = False  # whether this stance took the place of another one for its present holders

    @property
    def stance(self) -> str:
        """What torch does with compiled code. It asks at each call of such code, and of functions that it never compiles."""
        if not self.holders:
            before: str = self._before.stance
            return before
        if sys._getframe(1).f_locals.get("callback") not in (None, False):
            for holder in list(self.holders.values()):
                if (code := holder()) is not None:
                    code.on_compiled_call()
        return "force_eager"

    @property
    def backend(self) -> Any:
        """The compiler that takes the place of all others."""
        return None if self.holders else self._before.backend

    @property
    def skip_guard_eval_unsafe(self) -> bool:
        """Whether some of the conditions for compiled code go unchecked."""
        return not self.holders and bool(self._before.skip_guard_eval_unsafe)

    def update(self) -> None:
        """Set this stance for its first holder, and the earlier one when the last holder is gone.

        A stance that others have set meanwhile stays.
        """
        if sys.is_finalizing():  # Python is about to end, and has taken its list of imports away already.
            return
        compiler: Any = sys.modules.get(COMPILER)
        if not hasattr(compiler, "_set_stance"):
            _IMPORT.watch(bool(self.holders))
            return
        is_set = compiler._stance is self
        if self.holders and not self._taken and not is_set:
            self._before = compiler._stance
            _set(compiler, self)
        elif not self.holders and is_set:
            _set(compiler, self._before)
        self._taken = bool(self.holders)


class _CompilersImport:
    """Notices when the compiler is imported while the stance is held, and sets the stance before anything can be compiled."""

    def watch(self, wanted: bool) -> None:
        """Watch the imports of this process from now on, or watch them no more."""
        if wanted and self not in sys.meta_path:
            sys.meta_path.insert(0, self)
        elif not wanted and self in sys.meta_path:
            sys.meta_path.remove(self)

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        """The answer to Python's question where a module is: for the compiler what other finders say, and nothing for others."""
        if name != COMPILER:
            return None
        self.watch(False)
        spec = find_spec(name)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_and_set(module: ModuleType) -> None:
                run(module)
                with _turn:
                    _STANCE.update()

            spec.loader.exec_module = run_and_set  # type: ignore[method-assign]  # It is replaced on this one loader.
        return spec


_STANCE, _IMPORT = _Stance(), _CompilersImport()


def _set(compiler: Any, stance: Any) -> None:
    """Set the stance, also in a callback of a backward pass that compiled code has started."""
    callback = compiler.set_eval_frame(None)
    try:
        compiler._set_stance(stance)
    finally:
        compiler.set_eval_frame(callback)


def never_compiled(function: Function) -> Function:
    """Have torch run a function, and all that it calls, as it is written, also where compiled code calls it.

    This is what ``torch.compiler.disable`` does, without loading the compiler.
    """
    set_code_exec_strategy(function.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    function._torchdynamo_disable = True  # type: ignore[attr-defined]  # It is read where a compiled function calls this one.
    return function
