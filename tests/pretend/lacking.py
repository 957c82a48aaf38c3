"""What a device or its torch lacks, and not the library: the traps' tests that can't run with it as the default device."""

from __future__ import annotations

FUSED = "fused attention, which is plain products on it"
GENERATOR = "a random generator of its own"
NESTED = "tensors of a kind of their own inside of nested ones"
PLAIN = "parameters and inputs whose type is torch's own"
SPARSE = "sparse tensors"

# Tests of tests/traps -> what they need, and what CUDA does not have, or not with torch's default device there.
ON_CUDA = {
    "test_scripted_models_are_exact_before_and_after_torch_has_fused_them": "a scripted GRU without a warning",
    "test_trap_04_what_samples_share_does_not_look_like_one_samples_by_chance": "one random generator for all devices",
    "test_trap_14_two_monitors_and_copies_of_a_model_that_needs_the_graph": "a copy of a GRU without a warning",
    "test_trap_17_positions_of_fused_attention_are_no_samples": "fused attention of such narrow heads",
    "test_trap_17_positions_that_attend_to_other_steps_are_no_samples": "fused attention of such narrow heads",
    # This is a lack of the library's, which docs/concepts/devices.rst names.
    "test_trap_19_as_many_in_front_as_samples[an ensemble of recurrent layers]": "a view into cuDNN's recurrent layers",
    "test_trap_19_packed_sequences": "pack_sequence, whose lengths would be on the default device",
    "test_trap_19_packed_sequences_through_an_lstm": "pack_sequence, whose lengths would be on the default device",
    "test_trap_29_a_sparse_matrix_of_learned_edges": "sparse matrices without a warning",
    "test_trap_29_layers_without_elements_over_positions": "a backward of embeddings of width 0, which reads foreign memory",
}
# The same for the pretend device.
ON_PRETEND = {
    "test_trap_04_what_samples_share_does_not_look_like_one_samples_by_chance": GENERATOR,
    "test_trap_08_a_frozen_parameter_used_as_a_function_is_refused": PLAIN,
    "test_trap_17_positions_of_fused_attention_are_no_samples": FUSED,
    "test_trap_17_positions_that_attend_to_other_steps_are_no_samples": FUSED,
    "test_trap_19_a_layer_that_gets_single_steps_of_as_many_as_there_are_samples": PLAIN,
    "test_trap_19_a_model_that_is_called_on_one_sample_without_a_batch_axis": PLAIN,
    "test_trap_19_an_argument_that_requires_a_gradient": PLAIN,
    "test_trap_19_as_many_samples_as_steps_on_the_second_axis_of_the_input": PLAIN,
    "test_trap_19_as_many_steps_in_front_of_the_outputs_as_samples": PLAIN,
    "test_trap_19_equal_samples_tell_by_their_places_in_memory": PLAIN,
    "test_trap_19_outputs_with_the_steps_in_front": PLAIN,
    "test_trap_19_the_input_is_seen_through_a_transpose": PLAIN,
    "test_trap_29_a_kind_of_tensor_that_is_not_known_is_refused_in_words": NESTED,
    "test_trap_29_a_zero_gradient_of_a_nested_output": NESTED,
    "test_trap_29_nested_outputs": NESTED,
    "test_trap_29_nested_tensors": NESTED,
    "test_trap_29_sparse_bags": SPARSE,
    "test_trap_29_a_sparse_matrix_of_learned_edges": SPARSE,
}
LACKING = {"cuda": ON_CUDA, "pretend": ON_PRETEND}
