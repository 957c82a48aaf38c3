"""A fuzzer: random small models and training loops, compared with a plain loop over samples.

    PYTHONPATH=tests python -m fuzz --seconds 600 --seed 1      # or: make fuzz SECONDS=600 SEED=1
    PYTHONPATH=tests python -m fuzz --case 10000017             # one case again, made smaller, as a program

A model is a stem, a few pieces from `[n, t, d]` to the same shape, and a head. A new piece is three lines in a file of
`pieces/`: the decorator, the function's head, and the `Part` that it returns. Stems, heads, losses and ways into the
library are functions of the same kind.

What a case may come to is in `outcomes.py`. Only wrong numbers and foreign exceptions make the command fail; refusals
of what could have been exact are counted and told.
"""
