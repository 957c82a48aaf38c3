"""The autograd graph as the second way in: every use of every parameter, in or outside of its module's forward.

Once the model has returned, its graph is walked from the outputs down to the parameters. Each node that takes a parameter is
a use. Uses inside the call of a hooked module are that call's business. For all others, the parameter travels through a
batch-free chain (a transpose, a chunk, a weight norm; often nothing) up to the frontier: the first node whose output has
samples. A hook there receives the gradient while it still has them. The same walk shows which modules were called without a
batch axis, as position embeddings are. Their output is one more batch-free value on its way to the frontier.

The files, one verb each:

* ``walk`` goes through the graph once and notes calls, uses and what distinguishes the graph from others;
* ``sizes`` tells what the sizes in a graph leave open, and ``carried_axes`` the axes that samples can't be on;
* ``graph`` is a walk with what its nodes tell of the samples, and ``orders`` what decides where they are in graphs of its kind;
* ``audit`` accounts for every use: it has the calls placed and the frontier found for the rest, or refuses;
* ``call_places`` finds where the output of each call has its samples;
* ``operands`` says what calls and nodes take, and ``samples_in_data`` whether data contradict what shapes say of the samples;
* ``frontier`` climbs from parameters to the nodes where they meet the data, and ``uses`` says what it finds there;
* ``chain`` carries a gradient from the frontier back to the parameter;
* ``queries`` answers questions that need no walk: second derivatives, parameters that the loss uses directly;
* ``last_layer`` reads the matrix product that ends a model.
"""
