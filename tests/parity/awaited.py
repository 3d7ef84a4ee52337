"""Programs that this version does not run yet: by file, program, or program and form, with the reason."""

import pytest

AWAITED: dict[str, str] = {
    "generation": "generation",
    "invokes.two_invokes": "invokes",
    "invokes.invokes_of_unequal_length": "invokes",
    "invokes.a_write_in_one_of_them": "invokes",
    "invokes.a_write_in_each": "invokes",
    "invokes.invokes_in_a_loop": "invokes",
    "invokes.all_rows": "invokes",
    "invokes.a_value_from_another_invoke": "invokes",
    "invokes.a_list_in_an_invoke": "invokes",
    "invokes.ids_in_invokes": "invokes",
    "invokes.one_invoke": "invokes",
    "cache": "tracer.cache",
    "edits": "edits",
    "sessions": "sessions",
    "source": "operations inside of a forward",
    "control": "skip and stop",
    "names.renamed_layers": "rename",
    "names.a_renamed_submodule": "rename",
    "names.names_of_the_model_stay": "rename",
    "names.the_shape_by_scan": "scan",
    "modules.an_attached_module": "attached modules",
    "silent.a_write_outside_of_the_steps": "generation",
    "silent.an_edit_in_a_generation": "edits",
    "silent.a_later_module_first_in_a_step": "generation",
    "silent.code_after_an_open_loop": "generation",
    "silent.a_table_with_as_many_rows_as_invokes": "invokes",
    "silent.the_first_token_under_padding": "invokes",
    "silent.a_typo_in_a_new_name": "rename",
    "silent.a_cached_value_is_written_later": "tracer.cache",
    "silent.a_child_is_edited": "edits",
    "loud.a_value_of_another_invoke_without_a_barrier": "invokes",
    "loud.a_child_of_a_skipped_module": "skip and stop",
    "loud.a_cache_after_a_read": "tracer.cache",
    "loud.an_edited_view": "edits",
    "loud.an_end_before_the_asked_for_step": "generation",
    "loud.the_next_step": "generation",
}


def mark(*keys: str) -> list[pytest.MarkDecorator]:
    """The mark of what is awaited under the first of these keys, if any is."""
    return [pytest.mark.xfail(strict=True, reason=AWAITED[key]) for key in keys if key in AWAITED][:1]
