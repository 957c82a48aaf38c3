"""The autograd graph as the second way in: every use of every parameter, in or outside of its module's forward.

Walking back from the model's outputs finds each node that consumes a parameter. Uses inside the call of a hooked module are
that call's business. For all others, the parameter travels through a batch-free chain (a transpose, a chunk, a weight norm;
often nothing) to the frontier, the first node whose output has samples, and a hook there receives the gradient while it still
has them. The same walk shows which modules were called without a batch axis at all, such as position embeddings: their output is
one more batch-free value on its way to a frontier.
"""
