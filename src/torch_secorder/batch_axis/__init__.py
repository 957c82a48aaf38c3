"""Where a tensor has its samples.

Shapes can lie: a batch may be as large as a sequence is long, windows or heads may be folded into the batch, positions may have
no batch axis at all. The evidence that can't lie is the gradient itself. Send random numbers r back from the model's outputs,
and then the same numbers with sample n's part multiplied by a mark w_n, a power of two of its own. What belongs to sample n
comes back multiplied by w_n, exactly, since powers of two multiply without rounding. What several samples share does not.
Where a device adds in another order each time, so that digits differ all the same, some samples are silent instead: r is zero
for them, and what belongs to them comes back as zero.

The files, one verb each:

* ``told`` is what the user says: ``batch_axis=``, ``n_samples=`` and ``sample_of=``;
* ``count`` says how many samples a call of the model has, by that word or by the shapes of its arguments;
* ``samples`` takes arguments, outputs and targets apart by samples;
* ``placement`` says where a tensor has its samples: on which axis, and how they lie along it;
* ``of_parameters`` finds outputs that have no samples, since they are computed from parameters alone;
* ``argument_samples`` says where something that was made of an argument has the argument's samples;
* ``sketch`` keeps of a gradient what shows its samples, on its device until a look is over;
* ``marks`` and ``silence`` say what came back as it does for a placement, each for one kind of look;
* ``evidence`` finds the placement that fits, or what a look leaves open;
* ``labels`` says of each entry of a gradient whose outputs it is computed from, and ``label_rules`` what nodes do with labels;
* ``moving`` finds the nodes whose settings and indices decide where samples are;
* ``derivation`` follows labels through a graph, and reads the placements from them;
* ``order`` is what decides where graphs of one kind have their samples, as far as that follows from their nodes;
* ``search_pass`` lets such gradients flow through the user's graph, in which no hook runs;
* ``knowledge`` remembers, for each model and each kind of graph, what was found, and when to look again;
* ``search`` decides what to ask: what is known, what nodes saved, a batch of three samples, or a pass through the whole graph.
"""
