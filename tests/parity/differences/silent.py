"""What fails without a word in nnsight. Each docstring says what happens there, what happens here, and why."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def a_local_name_is_assigned(model):
    """A new value is bound to a name, and nothing uses it.

    nnsight: the model is unchanged, and nothing is said.
    here: a warning at the line: the value is used by nothing.
    why: who writes this meant to change the model.
    """
    with model.trace(PROMPT):
        hidden = model.transformer.h[1].output
        hidden = hidden * 0
        logits = model.lm_head.output.save()
    return logits


def a_trace_without_with(model):
    """`model.trace(…)` is called, but not entered.

    nnsight: gives an object back and runs nothing.
    here: the object refuses whatever is asked of it.
    why: nothing was run, so nothing can be read.
    """
    model.trace(PROMPT)
    return "nothing"


def an_argument_of_generate_given_to_trace(model):
    """`trace` is given `max_new_tokens`.

    nnsight: one forward; the argument is ignored.
    here: an error that names `generate`.
    why: five tokens were asked for.
    """
    with model.trace(PROMPT, max_new_tokens=5):
        out = model.output.save()
    return out.logits


def a_number_is_saved(net):
    """A small number is saved; other names of the body hold numbers too.

    nnsight: a name that happens to hold the same number comes back, another does not: saves go by identity.
    here: plain Python values come back, as after any block of Python; values of the model come back if saved.
    why: D4; what is saved is a value at a line, not an object.
    """
    with net.trace(torch.ones(2, 6)):
        saved = save(4)
        same = 4
        other = 5
        net.output.save()
    try:
        return saved, same, other
    except NameError:
        return saved, same


def a_saved_value_is_written_later(net):
    """A value is saved, then written in place.

    nnsight: the saved tensor is the live one and changes with it.
    here: the saved tensor is the value at that line.
    why: D3; a save is a copy wherever something may write later.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        before = hidden.save()
        hidden[:] = 0
        net.output.save()
    return before


def the_model_writes_over_a_saved_value(mixed):
    """A value is saved, and the model's next module works in place (`ReLU(inplace=True)`).

    nnsight: the saved tensor is what the ReLU made of it.
    here: what the module returned.
    why: D3; it is not the reader's business what runs next.
    """
    with mixed.trace(torch.linspace(-1, 1, 12).reshape(2, 6)):
        hidden = mixed.pairs[0].linear.output.save()
    return hidden


def a_write_outside_of_the_steps(model):
    """A generation is steered by a write that names no step.

    nnsight: happens at the first step only.
    here: happens at every step.
    why: D6; steering means the whole text, and a step is named where one is meant.
    """
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        model.lm_head.output[:, -1, 9] = 1000
        ids = tracer.result.save()
    return ids[0, -4:]


def an_edit_in_a_generation(own_model):
    """A model is edited, and the edited model generates.

    nnsight: the edit holds at the first step only.
    here: at every step.
    why: D6; an edit means the same in `trace` and in `generate`.
    """
    with own_model.edit(inplace=True):
        own_model.lm_head.output[:, -1, 9] = 1000
    with own_model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        ids = tracer.result.save()
    return ids[0, -4:]


def a_later_module_first_in_a_step(model):
    """In a loop over steps, the head is read before a layer is written.

    nnsight: the write lands one step late.
    here: at the step that the loop says.
    why: D1; within a step, as within a forward, the model's order rules and not that of the lines.
    """
    with model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5) as tracer:
        before = save([])
        for _ in tracer.iter[1:3]:
            before.append(model.lm_head.output[:, -1].argmax(-1))
            model.transformer.h[0].output[:] = 0
        ids = tracer.result.save()
    return before, ids[0, -5:]


def code_after_an_open_loop(model):
    """There are lines after a loop over all steps.

    nnsight: they do not run, and what they would have saved is lost (a warning tells of the step that never came).
    here: they run.
    why: D6; the end of a generation is no mistake.
    """
    counted = None
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        tokens = save([])
        for _ in tracer.iter[:]:
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
        counted = save(len(tokens))
    return counted


def a_table_with_as_many_rows_as_invokes(tabled):
    """A module returns a constant table whose first dimension happens to equal the number of rows.

    nnsight: cuts the table into rows: each invoke sees one row of it.
    here: the whole table.
    why: D7; which dimension counts rows is inferred, never guessed from sizes.
    """
    with tabled.trace() as tracer:
        with tracer.invoke([5, 17, 42]):
            first = tabled.table.output.save()
        with tracer.invoke([9, 3, 4]):
            second = tabled.table.output.save()
    return first, second


def the_first_token_under_padding(model):
    """`[:, 0]` in an invoke whose prompt is shorter than another's.

    nnsight: the padding.
    here: the prompt's first token.
    why: D7; a prompt gives the same values in a batch as alone.
    """
    with model.trace() as tracer:
        with tracer.invoke("The Space Needle"):
            first = model.transformer.wte.output[:, 0].save()
        with tracer.invoke(PROMPT):
            model.lm_head.output.save()
    return first


def a_module_that_runs_twice(mixed):
    """The output of a module that one forward calls twice is read.

    nnsight: that of the first call.
    here: an error giving the count; `.calls[0]` and `.calls[1]` say which.
    why: D6; the reader may not know that there are two.
    """
    with mixed.trace(torch.ones(2, 6)):
        hidden = mixed.shared.output.save()
    return hidden


def an_operation_that_runs_several_times(net):
    """The output of an operation inside of a forward is read, and the operation stands in a loop.

    nnsight: that of the first round.
    here: an error giving the count; `.calls[0]` and so on say which.
    why: D6.
    """
    with net.trace(torch.ones(2, 6)):
        value = net.source.torch_tanh_0.output.save()
    return value


def an_input_of_the_users_is_written(net):
    """The input of the first module is written in place.

    nnsight: the tensor that the user gave is changed.
    here: it stays as it was.
    why: what was given to a forward belongs to the caller.
    """
    x = torch.ones(2, 6)
    with net.trace(x):
        net.layers[0].input[:] = 0
        net.output.save()
    return x


def a_gradient_outside_of_a_backward(net):
    """`.grad` of a value is read where no backward pass is.

    nnsight: `None`.
    here: an error at the line.
    why: a gradient exists in `with loss.backward():`.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        gradient = save(hidden.grad)
        net.output.save()
    return gradient


def a_typo_in_a_new_name(misnamed):
    """A name of one's own stands for a module that does not exist.

    nnsight: the entry is ignored.
    here: an error with the nearest names.
    why: the name would be missed only where it is used.
    """
    with misnamed.trace(PROMPT):
        logits = misnamed.lm_head.output.save()
    return logits.shape


_COUNT = 0


def a_global_is_assigned(net):
    """A body assigns a name that the function declares `global`.

    nnsight: the assignment is lost.
    here: it happens.
    why: D5; Python stays Python.
    """
    global _COUNT
    _COUNT = 0
    with net.trace(torch.ones(2, 6)):
        _COUNT = _COUNT + 1
        net.output.save()
    return _COUNT


def a_name_is_deleted(net):
    """A body deletes a name of the function around it.

    nnsight: nothing happens.
    here: the name is gone.
    why: D5; Python stays Python.
    """
    spare = 5
    with net.trace(torch.ones(2, 6)):
        del spare
        net.output.save()
    try:
        return spare + 0
    except NameError as error:
        return type(error).__name__


def a_cached_value_is_written_later(mixed):
    """A cache is made, and the model writes a value in it in place.

    nnsight: on the CPU the cache holds the live tensor, which changes.
    here: the value as it stood when the module was done.
    why: D3.
    """
    with mixed.trace(torch.linspace(-1, 1, 12).reshape(2, 6)) as tracer:
        cache = tracer.cache(modules=[mixed.pairs[0].linear])
    return cache["model.pairs.0.linear"].output


def row_zero_of_a_tensor(model):
    """`output[0]` is written for the first item of a tuple, where the block returns a tensor.

    nnsight: row 0 of the batch.
    here: row 0 of the batch, as in torch: what a value is decides what its items are.
    why: D10; `nnsightc check` shows the shape of every value.
    """
    with model.trace([PROMPT, PROMPT]):
        hidden = model.transformer.h[0].output[0].save()
    return hidden.shape


def a_child_is_edited(own_net):
    """An edit is made on a submodule, and the whole model is traced.

    nnsight: the edit is ignored.
    here: an error: edits are made on the whole model.
    why: an edit that does not apply must not be accepted.
    """
    with own_net.layers[0].edit(inplace=True):
        own_net.layers[0].output[:] = 0
    with own_net.trace(torch.ones(2, 6)):
        hidden = own_net.layers[0].output.save()
    return hidden
