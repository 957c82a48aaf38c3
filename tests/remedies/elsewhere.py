"""Messages whose remedies are tried in other tests, and those that no test here follows, each with its reason."""

from __future__ import annotations

# A fragment of the message -> the test that does what it says.
TRIED = {
    "let the model return it expanded to its samples": (
        "traps/test_shared_outputs.py::test_trap_31_a_parameter_that_the_loss_takes_itself"
    ),
    "let the model return it expanded, x.expand(n)": (
        "traps/test_shared_outputs.py::test_trap_31_an_output_without_samples_that_the_loss_takes"
    ),
    "has computed without parameters shows no samples": (
        "traps/test_samples_of_arguments.py::test_trap_19_as_many_steps_as_samples_that_nothing_shows"
    ),
    "that it leads to, where the model has": (
        "traps/test_what_counts_samples.py::test_trap_19_as_many_spiking_steps_in_front_as_samples"
    ),
    "calls of the model, whose samples are not said to be the same": (
        "test_verification.py::test_verify_of_a_loss_of_several_calls"
    ),
    "the loss doesn't depend on the outputs of a call of the model": (
        "test_verification.py::test_verify_takes_the_call_that_the_loss_depends_on"
    ),
    "was moved or converted inside of the block": (
        "traps/test_changes.py::test_trap_31_a_conversion_of_what_is_used_outside_of_its_module"
    ),
    "has its samples on axis 0 of its output": (
        "traps/test_what_counts_samples.py::test_trap_19_as_many_steps_in_front_of_the_outputs_as_samples"
    ),
    "of which one has a zero gradient now": "approximations/test_differentiable_zeros.py"
    "::test_trap_22_a_use_behind_a_gate_of_which_nothing_tells_is_refused",
    "and nothing shows which rows are theirs": "approximations/test_differentiable_zeros.py"
    "::test_trap_22_what_nothing_but_numbers_shows_is_refused",
    "which was computed from parameters that are not analyzed": "traps/test_shared_outputs.py"
    "::test_trap_31_outputs_that_all_samples_share_and_no_analyzed_parameter_leads_to",
    "whether data takes part in it or all samples share it": "traps/test_shared_outputs.py"
    "::test_trap_31_an_output_behind_a_gate_by_which_data_comes_in",
    "on what other layers computed from parameters alone": "test_gates.py"
    "::test_gates_on_a_layer_that_no_sample_passes_are_refused_with_the_remedy",
    "frozen, in a layer that has no batch axis": "traps/test_batch_free.py::test_trap_04_frozen_layers_in_the_chain_are_refused",
    "a function that keeps more than saved tensors": (
        "user_program/test_stateful.py::test_a_function_of_saved_tensors_and_constants_is_looked_through"
    ),
    "hides a part of the graph of these outputs": "traps/test_checkpoints.py::test_trap_09_checkpointed_blocks",
    "make a monitor with parameters= the names of those": (
        "monitor/test_passes.py::test_a_pass_for_some_parameters_is_refused_unless_these_are_all"
    ),
    "use smaller batches, or keep less": "faults/test_memory.py::test_fewer_samples_at_a_time_where_memory_runs_out",
    "leave such samples out of the batch": (
        "traps/test_what_counts_samples.py::test_trap_19_samples_without_a_row_leave_it_open_what_rows_are"
    ),
    "was called without a batch axis": (
        "traps/test_what_counts_samples.py::test_trap_19_a_model_that_is_called_on_one_sample_without_a_batch_axis"
    ),
    "let it have a number for each row": "traps/test_what_counts_samples.py::test_trap_19_rows_that_no_output_has",
    "different numbers, the largest of which is": (
        "traps/test_what_counts_samples.py::test_trap_19_numbers_that_are_no_count"
    ),
    "the outputs show that they are on axis": "traps/test_what_counts_samples.py::test_trap_19_outputs_with_the_steps_in_front",
    "say where each argument has its samples": "traps/test_what_counts_samples.py::test_trap_19_a_mask_of_steps",
    "the batch is empty: it has": (
        "monitor/test_empty_batches.py::test_an_input_without_rows_counts_samples_only_if_the_outputs_have_none"
    ),
    "in half precision rounding hides": (
        "approximations/test_fisher_trace.py"
        "::test_a_loss_with_weights_in_half_precision_is_tried_in_float32_if_it_is_a_module"
    ),
    "the loss broadcasts *": "test_first_mistakes.py::test_a_loss_that_compares_every_output_with_every_target_is_refused",
    "data must yield mappings or pairs": "approximations/test_batches.py::test_what_follows_inputs_and_targets_is_not_used",
    "data has a batch without any entry": "approximations/test_batches.py::test_a_mapping_is_one_batch",
    "names an entry of batches that are mappings": "approximations/test_batches.py::test_a_mapping_is_one_batch",
    "pass a list of the two if they are two batches": (
        "approximations/test_batches.py::test_a_tuple_of_two_whole_batches_is_not_half_of_them"
    ),
    "says whose error ends the run": "test_fisher_report.py::test_it_stops_at_the_first_batch_that_is_precise_enough",
    "let another batch come first, or leave this one out": (
        "approximations/test_fisher_trace.py::test_a_batch_that_is_masked_as_a_whole_says_nothing_and_may_come_later"
    ),
    "ids name the rows of per_sample": "approximations/test_batches.py::test_ids_name_the_rows",
    "of them for a batch of * samples; give one for each": "approximations/test_batches.py::test_ids_name_the_rows",
    "the model returned a * without a loss": "approximations/test_batches.py::test_the_models_own_loss",
    "the loss that the model computes can't be told": (
        "approximations/test_batches.py::test_a_loss_taken_out_of_the_outputs_is_the_models_own"
    ),
    "a CUDA graph is being captured": (
        "on_gpu/test_programs.py::test_a_graph_that_was_captured_before_is_replayed_in_the_block"
    ),
    "selective activation checkpointing (context_fn=) runs its forward again": (
        "user_program/test_stateful.py::test_a_call_through_selective_checkpoints_is_exact"
    ),
    "a function that may add the gradient to an attribute": (
        "user_program/test_stateful.py::test_a_gradient_that_is_added_up_elsewhere_is_added_up_once"
    ),
    "a hook on the node that computes its gradients": (
        "user_program/test_node_hooks.py::test_a_change_of_a_layers_inputs_gradient_is_in_the_numbers"
    ),
    'has no columns; say "rows" or "full"': "test_channel_sums.py::test_sums_over_channels",
    "may have their classes on either axis": "test_losses.py::test_the_last_position_has_no_label",
    "on_output= gets it with the samples first": (
        "monitor/test_on_output.py::test_as_many_positions_as_samples_have_to_be_told_apart"
    ),
    "needs whole parameters, and this rank has a part": "test_sharding.py::test_functions_of_a_sharded_model",
    "shard the model with torch.distributed.fsdp.fully_shard": "test_sharding.py::test_every_rank_gets_the_table_of_one_process",
}

# A fragment of the message -> why its remedy isn't tried.
NOT_TRIED = {
    "pad them to (N, T, ...) in the model's forward": "the remedy is to write another model",
    "max_samples cuts batches by their rows": "max_batches= is tried wherever there is data",
    "can't be cut to the * that are left": "max_batches= is tried wherever there is data",
    "so that the graph of these outputs shows nothing of them": "reports of frozen models are tried in trap 8",
    "digits have cancelled, and the layer's input": "what is changed in place is tried on the pretend device",
    "its output was changed in place after the call": "every other test of on_output= changes nothing in place",
    "the loss that the model computes neither averages nor sums": "a loss that compares samples has no remedy",
    "all that is computed from them belongs to several samples at once": "axes that are said are tried in traps 5 and 19",
    "something in the model or the loss has no second derivative": "the remedy is to write another model",
    "move the block, or the call, out of that function": "every other test of a compiled model has its block outside",
    "gives no gradient for what a parameter went into": "no program is known whose pass for some gradients comes here",
    "gives no gradient for what it uses": "no program is known whose pass for some gradients comes here",
    "use one of the versions of torch that this library was": "there is one version at a time; `make versions` has the others",
    "a compiled function can't be asked for single samples": "every other test of a compiled model has its outputs in the block",
    "what was computed from a parameter alone went through something": "the remedy is to write another model",
    "keep its real and its imaginary part as one real parameter": "the remedy is to write another model",
    "leave this parameter out of parallelize_module": "ranks that compute parts of a use are in tests of several processes only",
    "its module was called again in the same backward pass": "the checkpoints that it names are tried in trap 9",
    "the library does not know this kind of tensor or layer yet": "whoever knows such a kind is to report it",
    "nothing shows whether a backward pass is one of training": "no program is known that comes here without an error of its own",
    "run it without activation checkpointing, or leave out": "activation traces without checkpoints are tried in trap 31",
    "the state has version": "there is no other release yet",
}
