"""Programs that this version does not run yet: by file, program, or program and form, with the reason."""

import pytest

AWAITED: dict[str, str] = {
    "generation": "generation",
    "cache": "tracer.cache",
    "edits": "edits",
    "gradients.of_one_layer": "gradients inside a trace",
    "gradients.of_two_layers": "gradients inside a trace",
    "gradients.times_activation": "gradients inside a trace",
    "gradients.written": "gradients inside a trace",
    "gradients.of_two_losses": "gradients inside a trace",
    "gradients.through_a_write": "gradients inside a trace",
    "gradients.of_parameters": "gradients inside a trace",
    "gradients.by_autograd": "gradients inside a trace",
    "gradients.a_low_rank_adapter_learns": "gradients of tensors that an object of the user's holds",
    "source.an_operation_changed.experiment": "operations of a model whose input the experiment computes",
    "source.an_operations_input.experiment": "operations of a model whose input the experiment computes",
    "source.an_assignment_in_a_forward.experiment": "operations of a model whose input the experiment computes",
    "source.an_operation_skipped.experiment": "operations of a model whose input the experiment computes",
    "silent.a_write_outside_of_the_steps": "generation",
    "silent.an_edit_in_a_generation": "edits",
    "silent.a_later_module_first_in_a_step": "generation",
    "silent.code_after_an_open_loop": "generation",
    "silent.a_gradient_outside_of_a_backward": "gradients inside a trace",
    "silent.a_cached_value_is_written_later": "tracer.cache",
    "silent.a_child_is_edited": "edits",
    "loud.gradients_in_the_order_of_the_forward": "gradients inside a trace",
    "loud.a_cache_after_a_read": "tracer.cache",
    "loud.an_edited_view": "edits",
    "loud.an_end_before_the_asked_for_step": "generation",
    "loud.the_next_step": "generation",
}


def mark(*keys: str) -> list[pytest.MarkDecorator]:
    """The mark of what is awaited under the first of these keys, if any is."""
    return [pytest.mark.xfail(strict=True, reason=AWAITED[key]) for key in keys if key in AWAITED][:1]
