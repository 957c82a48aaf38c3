"""Which forward and backward passes are under way, and whose: the user's, or those that the library adds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from threading import Lock, get_ident
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import Node

from torch_secorder.autograd.checkpoints import put_back, put_in_place
from torch_secorder.errors import UnsupportedError
from torch_secorder.model.containers import copied, is_packed
from torch_secorder.model.hooks import restoring

# The number of the backward pass under way in this thread; -1 outside of any.
current_graph_task: Callable[[], int] = torch._C._current_graph_task_id

# The node under way, whose hooks run or which runs itself; None outside of any backward pass.
current_node: Callable[[], Node | None] = torch._C._current_autograd_node

# The innermost of torch.func's transforms under way (vmap, grad and so on); None outside of all.
innermost_transform: Callable[[], Any] = torch._C._functorch.peek_interpreter_stack

# How many blocks of forward-mode differentiation are under way, counted from -1 for none.
forward_mode_level: Callable[[], int] = partial(getattr, torch.autograd.forward_ad, "_current_level")

# Whether the backward pass under way leaves what nodes saved; true outside of any.
keeps_graph: Callable[[], bool] = torch._C._autograd._get_current_graph_task_keep_graph

# Has the engine call back when the backward pass under way is over.
after_backward: Callable[[Callable[[], None]], None] = torch.autograd.Variable._execution_engine.queue_callback

# The hooks that keep saved tensors elsewhere just now, those of activation checkpointing for one, or None.
saved_tensors_hooks: Callable[[], tuple[Any, Any] | None] = partial(
    torch._C._autograd._top_saved_tensors_default_hooks, False
)

# Backward passes under way that the library started, and the threads in which it did. Threads of devices run them too.
LIBRARY_PASSES: dict[int, int] = {}

# Whether the backward pass under way executes a node. For a leaf whose gradient is a result of the pass it raises instead.
_will_execute: Callable[[Node], bool] = torch._C._will_engine_execute_node

# Backward passes in which the library looks through the user's graph. If modules are called inside, a checkpoint runs its forward
# again. It has to save as many tensors as in the first run, so that a monitor's hooks keep inputs there, too.
LOOKS: set[int] = set()

# Threads in which the library is calling a model. User's monitors must not see these calls.
LIBRARY_THREADS: set[int] = set()
_LIBRARY_THREADS_CHANGE = Lock()


@contextmanager
def library_call() -> Iterator[None]:
    """Calls of models inside are the library's own."""
    thread = get_ident()
    if thread in LIBRARY_THREADS:
        yield
        return
    with restoring(partial(_leave_library_call, thread)):
        with _LIBRARY_THREADS_CHANGE:
            LIBRARY_THREADS.add(thread)
            put_in_place(in_library_call)
        yield


def _leave_library_call(thread: int) -> None:
    with _LIBRARY_THREADS_CHANGE:
        LIBRARY_THREADS.discard(thread)
        if not LIBRARY_THREADS:
            put_back()


def in_library_call() -> bool:
    """Whether the library, and not the user, is calling the model."""
    return get_ident() in LIBRARY_THREADS or (bool(LIBRARY_PASSES) and current_graph_task() in LIBRARY_PASSES)


def calling_thread() -> int:
    """The thread that this call is made for: where a device's thread runs the library's backward pass, the one that asked."""
    thread = get_ident()
    return LIBRARY_PASSES.get(current_graph_task(), thread) if LIBRARY_PASSES else thread


# How many modes of the user's see every operation just now, counters of operations for one.
active_modes: Callable[[], int] = torch._C._len_torch_dispatch_stack


def without_modes() -> AbstractContextManager[object]:
    """Inside, modes of the user's that see every operation see none."""
    return torch.utils._python_dispatch._disable_current_modes() if active_modes() else _NOTHING


_NOTHING = nullcontext()


@contextmanager
def looking() -> Iterator[None]:
    """Inside, the backward pass under way is the library's own, which looks through the user's graph."""
    task = current_graph_task()
    LOOKS.add(task)
    try:
        yield
    finally:
        LOOKS.discard(task)


@contextmanager
def library_pass(roots: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Copies of what the library's own call of a model returned; backward passes from them inside are the library's own."""
    copies, begun, thread = [x.view_as(x) for x in roots], set[int](), get_ident()

    def begin(grads: object) -> None:
        begun.add(task := current_graph_task())
        LIBRARY_PASSES[task] = thread

    for root in copies:
        assert root.grad_fn is not None
        # Nodes of our own run before all others, so that no monitor of this model takes the pass for the user's.
        root.grad_fn.register_prehook(begin)
    try:
        with library_call():
            yield copies
    finally:
        for task in begun:
            LIBRARY_PASSES.pop(task, None)  # An interrupt may have come before it was there.


def is_library_pass(task: int) -> bool:
    """Whether the library started this backward pass, or it runs in a thread where the library calls a model."""
    return task in LIBRARY_PASSES or get_ident() in LIBRARY_THREADS


def computes_gradient_of(leaf: Node) -> bool:
    """Whether the backward pass under way accumulates the gradient of the leaf with this node, or returns it."""
    try:
        return _will_execute(leaf)
    except RuntimeError:
        return True


def accumulates_gradient_of(leaf: Node) -> bool | None:
    """Whether the backward pass under way adds to ``.grad`` of the leaf with this node; None if it returns the gradient."""
    try:
        return _will_execute(leaf)
    except RuntimeError:
        return None


def leaf_of(node: Node) -> Tensor | None:
    """The leaf whose gradient a node accumulates; None for any other node."""
    return getattr(node, "variable", None)


def is_of_python_function(node: Node) -> bool:
    """Whether a node belongs to a ``torch.autograd.Function``, whose backward may start passes of its own."""
    return isinstance(node, torch.autograd.function.BackwardCFunction)


def is_executed(node: Node) -> bool:
    """Whether the backward pass under way calls a node that is no leaf's."""
    return _will_execute(node)


def any_vmapped(values: Iterable[Tensor | None]) -> bool:
    """Whether one of these tensors stands for several ones, inside of ``torch.func.vmap`` or of ``is_grads_batched=True``."""
    functorch = torch._C._functorch
    for value in values:  # Every step does this, so that no function of Python's is called for each value.
        if value is not None and (functorch.is_batchedtensor(value) or functorch.is_legacy_batchedtensor(value)):
            return True
    return False


def raise_after_backward(error: Exception) -> None:
    """Raise behind whatever else waits for the end of this pass, DistributedDataParallel's reduction for one."""

    def raise_it() -> None:
        raise error

    after_backward(raise_it)


@contextmanager
def refusing_checkpoints() -> Iterator[None]:
    """Inside, a checkpoint's refusal of a backward pass that was asked for some gradients only is told in the library's words."""
    try:
        yield
    except RuntimeError as error:
        if is_selective_checkpoints(error):
            raise selective_checkpoint() from error
        if "use_reentrant" not in str(error):
            raise
        raise UnsupportedError(
            "re-entrant activation checkpointing computes gradients only together with those of the parameters: use "
            "torch.utils.checkpoint with use_reentrant=False, or a FisherMonitor around your own backward"
        ) from error


def is_selective_checkpoints(error: Exception) -> bool:
    """Whether torch refuses to run the forward of a selective checkpoint again."""
    return "selective activation checkpoint" in str(error)


def selective_checkpoint() -> UnsupportedError:
    """The refusal of a second pass through a selective checkpoint."""
    return UnsupportedError(
        "selective activation checkpointing (context_fn=) runs its forward again for one backward pass only, and this takes "
        "more: use torch.utils.checkpoint without context_fn, or a FisherMonitor around your own backward"
    )


def is_capturing() -> bool:
    """Whether what is started now is put down in a CUDA graph, where nothing can be read."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def step_in_a_cuda_graph() -> UnsupportedError:
    """The refusal of a step that is captured."""
    return UnsupportedError(
        "a CUDA graph is being captured, in which no number can be read, and whose replays run no hooks: leave the block before "
        "the capture, and run one step outside of the graph under a monitor whenever you want numbers"
    )


def call_model(model: Callable[..., Any], inputs: Any) -> Any:
    """``model(inputs)`` as a call of the library's; a tuple is spread over positions and a mapping over keywords.

    The model gets copies. One that normalizes its inputs in place would find them normalized already when it is run again.
    """
    with library_call():
        if isinstance(inputs, Mapping):
            return model(**copied(dict(inputs)))
        inputs = copied(inputs)
        return model(*inputs) if isinstance(inputs, tuple) and not is_packed(inputs) else model(inputs)
