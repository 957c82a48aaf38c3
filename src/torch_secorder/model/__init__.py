"""The user's model: what it is made of, which ranks hold it, and how it is left as it was.

An analysis works on a model that belongs to the user, who goes on using it. So it first lists the parameters, under the names
that the user gave them, and finds out whether several ranks hold a part each. Then it attaches hooks and changes flags for a
while, and puts everything back, whatever happens in between.

The files that others begin with, one verb each:

* ``parameters`` lists what is analyzed, in a fixed order and under plain names;
* ``ranks`` lets the ranks that hold a model together decide in common;
* ``containers`` finds the tensors in what models take and return;
* ``hooks`` attaches and detaches, also when Ctrl-C comes in between;
* ``restore`` puts back buffers, modes and flags; random state is put back by ``autograd.random_state``.
"""
