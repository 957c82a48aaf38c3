"""From the user's own forward and backward to one record per call of a module. No mathematics.

``module_hooks`` makes the ``records``; ``forwards`` knows which ``model_run`` a call belongs to. ``module_notes`` and
``own_axes`` are about what single modules say of the samples, ``frozen_uses`` about parameters that leave nothing in the
graph, and ``watched_calls`` about calls of which only the output is of interest.
"""
