"""One backward pass: captured calls in, squared norms of per-sample gradients out.

``plan`` says which modules are hooked, and ``options`` says what is collected. A ``recorder`` hands each gradient that arrives
to the ``backward_pass`` that it belongs to; ``lifecycle`` begins and finishes these passes. ``user_recorder`` does so for the
user's own passes: ``passes`` knows which of them compute gradients of samples, and ``watched_passes`` which passes of a compiled
model are watched. The recorder's other parts are ``parameter_gradients``, ``model_outputs``, ``changed_gradients``,
``gradient_graphs`` and ``new_parameters``. A ``recorded_block`` has a recorder while it is entered. ``foreign_errors`` turns
errors from other code into refusals, ``history`` explains why a monitor saw no sample, and ``monitoring`` has the arguments of a
monitor.

The ``accumulator`` of a pass has a ``batch`` for each forward that the pass reaches. ``small_calls`` are computed together.
``parameter_norms`` settles all other parameters: from calls, which may share work (``shared_inputs``), and from uses outside of
calls, whose gradients ``use_gradients`` checks. ``doubts`` keeps what may have cancelled on an accelerator until the pass is
over. ``gradient_norms`` takes the norms of the parameters' own gradients, ``shared_outputs`` handles modules whose outputs all
samples share, and ``quantities`` holds everything that is kept besides. The result of a pass is its ``sample_norms``.
"""
