"""Messages whose remedies are tried in other tests, and those that no test here follows, each with its reason."""

from __future__ import annotations

# A fragment of the message -> the test that does what it says.
TRIED = {
    "frozen, in a layer that has no batch axis": "traps/test_batch_free.py::test_trap_04_frozen_layers_in_the_chain_are_refused",
    "a function that keeps more than saved tensors": (
        "user_program/test_stateful.py::test_a_function_of_saved_tensors_and_constants_is_looked_through"
    ),
    "hides a part of the graph of these outputs": "traps/test_checkpoints.py::test_trap_09_checkpointed_blocks",
    "use smaller batches, or keep less": "faults/test_memory.py::test_fewer_samples_at_a_time_where_memory_runs_out",
    "leave such samples out of the batch": (
        "traps/test_what_counts_samples.py::test_trap_19_samples_without_a_row_leave_it_open_what_rows_are"
    ),
    "the outputs show that they are on axis": "traps/test_what_counts_samples.py::test_trap_19_outputs_with_the_steps_in_front",
    "say where each argument has its samples": "traps/test_what_counts_samples.py::test_trap_19_a_mask_of_steps",
    "the loss broadcasts *": "test_first_mistakes.py::test_a_loss_that_compares_every_output_with_every_target_is_refused",
    "needs whole parameters, and this rank has a part": "test_sharding.py::test_functions_of_a_sharded_model",
    "shard the model with torch.distributed.fsdp.fully_shard": "test_sharding.py::test_every_rank_gets_the_table_of_one_process",
}

# A fragment of the message -> why its remedy isn't tried.
NOT_TRIED = {
    "pad them to (N, T, ...) in the model's forward": "the remedy is to write another model",
    "data must yield pairs (inputs, targets)": "every test of a report passes pairs",
    "something in the model or the loss has no second derivative": "the remedy is to write another model",
    "move the block, or the call, out of that function": "every other test of a compiled model has its block outside",
    "gives no gradient for what a parameter went into": "no program is known whose pass for some gradients comes here",
    "gives no gradient for what it uses": "no program is known whose pass for some gradients comes here",
    "use one of the versions of torch that this library was": "there is one version at a time; `make versions` has the others",
    "a compiled function can't be asked for single samples": "every other test of a compiled model has its outputs in the block",
    "what was computed from a parameter alone went through something": "the remedy is to write another model",
    "is not known yet, as no gradient reached them": "no program is known that comes here",
    "keep its real and its imaginary part as one real parameter": "the remedy is to write another model",
    "leave this parameter out of parallelize_module": "ranks that compute parts of a use are in tests of several processes only",
    "its module was called again in the same backward pass": "the checkpoints that it names are tried in trap 9",
    "the library does not know this kind of tensor or layer yet": "whoever knows such a kind is to report it",
    "nothing shows whether a backward pass is one of training": "no program is known that comes here without an error of its own",
    "run it without activation checkpointing, or leave out": "activation traces without checkpoints are tried in trap 31",
    "the state has version": "there is no other release yet",
}
