"""One backward pass: captured calls in, squared norms of per-sample gradients out.

``plan`` says which modules are hooked, ``options`` what is collected. A ``recorder`` hands each gradient that arrives to the
``backward_pass`` that it belongs to, which ``lifecycle`` begins and finishes; ``user_recorder`` does so for passes of the
user's. Which of those are of the samples is known to ``passes``, which of a compiled model's are watched to
``watched_passes``. Its other helpers are ``model_outputs``, ``changed_gradients``, ``gradient_graphs`` and
``new_parameters``; ``foreign_errors`` says what is raised of others' errors, and ``history`` why a monitor saw nothing.
``monitoring`` has the arguments of a monitor.

The ``accumulator`` of a pass has a ``batch`` for each forward that the pass reaches. ``small_calls`` are computed together;
``parameter_norms`` settles all other parameters, from calls that share ``shared_inputs`` and from what ``use_gradients`` lets
in of uses outside of calls. ``doubts`` keeps what may have cancelled on an accelerator until the pass is over,
``gradient_norms`` is about the parameters' own gradients, ``shared_outputs`` about modules whose outputs all samples share,
``quantities`` about whatever is kept besides. What a pass says of its samples are its ``sample_norms``.
"""
