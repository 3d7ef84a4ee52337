"""What nnsight refuses, or does otherwise in plain sight. Each docstring says what happens there, here, and why."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from nnsight import NNsight, save

PROMPT = "The Eiffel Tower is in the city of"
OTHER = "The Space Needle is in the city of"


def reads_in_any_order(net):
    """A later module is read before an earlier one.

    nnsight: `OutOfOrderError`.
    here: both are read.
    why: D1; the program is known before the model runs, so the order of its lines need not be the model's.
    """
    with net.trace(torch.ones(2, 6)):
        late = net.layers[2].output.save()
        early = net.layers[0].output.save()
    return early, late


def an_input_after_its_output(net):
    """The input of a module is read after its output.

    nnsight: `OutOfOrderError`.
    here: both are read.
    why: D1.
    """
    with net.trace(torch.ones(2, 6)):
        after = net.layers[1].output
        before = net.layers[1].input
        change = (after - before).save()
    return change


def a_write_above_the_read_that_it_needs(net):
    """A later module is written on a line above the one that reads what it is given.

    nnsight: `OutOfOrderError`.
    here: works, with the lines in any order that Python's names allow.
    why: D1.
    """
    with net.trace(torch.ones(2, 6)):
        out = net.output.save()
        net.layers[2].output = net.layers[0].output * 2
    return out


def a_number_for_a_whole_output(model):
    """A number is assigned to an output.

    nnsight: the module's output becomes that number, and what follows fails or broadcasts, as it may be.
    here: a number fills the tensor.
    why: zero ablation is written so.
    """
    with model.trace(PROMPT):
        model.transformer.h[1].output = 0
        hidden = model.transformer.h[2].input.save()
    return hidden


def an_item_of_a_tuple_is_assigned(mixed):
    """One item of a tuple that a module returned is assigned.

    nnsight: `TypeError`, since tuples cannot be changed.
    here: that item is replaced.
    why: D10.
    """
    with mixed.trace(torch.ones(2, 6)):
        mixed.pairs[0].output[0] = mixed.pairs[0].output[0] * 0
        stream = mixed.pairs[1].input.save()
    return stream


def a_value_of_another_invoke_without_a_barrier(model):
    """A value of one invoke is written in another.

    nnsight: `NameError`, unless a barrier is put into both.
    here: works; a barrier is accepted and does nothing.
    why: D1; what needs what is known.
    """
    with model.trace() as tracer:
        with tracer.invoke(PROMPT):
            clean = model.transformer.h[1].output[:, -1]
        with tracer.invoke(OTHER):
            model.transformer.h[1].output[:, -1] = clean
            logits = model.lm_head.output[:, -1].save()
    return logits


def a_trace_and_an_invoke_in_one_with(model):
    """A trace and its only invoke stand in one `with`.

    nnsight: `AttributeError`.
    here: works.
    why: D5; in Python, one `with` of two items is two nested ones.
    """
    with model.trace() as tracer, tracer.invoke(PROMPT):
        hidden = model.transformer.h[1].output.save()
    return hidden


def gradients_in_the_order_of_the_forward(net):
    """Gradients are read from the first layer to the last.

    nnsight: an error: they arrive from the last to the first.
    here: works, in any order.
    why: D1.
    """
    with net.trace(torch.ones(2, 6)):
        early = net.layers[0].output
        late = net.layers[1].output
        with net.output.sum().backward():
            first = early.grad.save()
            second = late.grad.save()
    return first, second


def a_value_that_was_not_saved(net):
    """A value that was not saved is used after the trace.

    nnsight: `UnboundLocalError`, or what the name held before.
    here: an error that names the line which made the value, and the way out.
    why: D4.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        net.output.save()
    return hidden.sum()


def an_old_value_of_an_unsaved_name(net):
    """A name that held something before the trace is assigned in it, unsaved, and used after.

    nnsight: the old value is used, silently.
    here: an error that names the line.
    why: D4.
    """
    hidden = torch.zeros(3)
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        net.output.save()
    return hidden.sum()


def a_child_of_a_skipped_module(model):
    """A module inside a skipped one is read.

    nnsight: `OutOfOrderError`, when the run ends.
    here: an error before the model runs, with both lines.
    why: D8.
    """
    with model.trace(PROMPT):
        model.transformer.h[1].skip(model.transformer.h[1].input)
        hidden = model.transformer.h[1].mlp.output.save()
    return hidden


def values_are_attached(net):
    """A value is saved where nothing asks for a gradient.

    nnsight: it leaves with its graph, which keeps the whole forward in memory.
    here: it leaves detached; `trace(…, grad=True)` or anything that requires a gradient keeps the graph.
    why: D12.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output.save()
    return hidden.requires_grad


def a_cache_after_a_read(net):
    """A cache is asked for after the first access.

    nnsight: `ValueError`.
    here: works; the order of lines does not matter.
    why: D1.
    """
    with net.trace(torch.ones(2, 6)) as tracer:
        net.output.save()
        cache = tracer.cache(modules=[net.layers[1]])
    return cache["model.layers.1"].output


def a_value_of_a_wrong_shape(net):
    """A tensor of another shape is assigned.

    nnsight: an error of the model's, from wherever the shape first hurts.
    here: an error at the line, with both shapes, before the model runs.
    why: D8.
    """
    with net.trace(torch.ones(2, 6)):
        net.layers[1].output = torch.zeros(2, 5)
        out = net.output.save()
    return out


def a_value_of_another_dtype(net):
    """A tensor of another dtype is assigned.

    nnsight: an error of the model's.
    here: it is moved to the site's dtype and device.
    why: D7.
    """
    with net.trace(torch.ones(2, 6)):
        net.layers[1].output = torch.zeros(2, 6, dtype=torch.float64)
        out = net.output.save()
    return out


def an_edited_view(net):
    """`with model.edit() as …` gives an edited view.

    nnsight: a pair, the tracer and the view.
    here: the view.
    why: an edit has no use for a tracer; `inplace=True` edits the model itself in both.
    """
    with net.edit() as edited:
        edited.layers[0].output[:] = 0
    with edited.trace(torch.ones(2, 6)):
        hidden = edited.layers[0].output.save()
    return hidden


def a_try_in_a_body(net):
    """A body contains a `try`.

    nnsight: works, unless it is the first statement of the body.
    here: an error that says where a `try` may stand: around the `with`, or in a helper that the body calls.
    why: what it surrounds runs at several points of the forward, and the model runs between them.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output
        try:
            scale = int("two")
        except ValueError:
            scale = 2
        net.layers[1].output = hidden * scale
        out = net.output.save()
    return out


def a_body_on_the_line_of_the_with(net):
    """A body on the line of its `with`.

    nnsight: refused.
    here: works.
    why: the program is compiled from its source.
    """
    with net.trace(torch.ones(2, 6)): out = net.output.save()  # fmt: skip  # noqa: E701
    return out


def more_steps_than_tokens(model):
    """A loop asks for more steps than `max_new_tokens` allows.

    nnsight: the loop is cut short, what stands after it is lost, and a warning says so.
    here: an error at the line, before the model runs.
    why: D8.
    """
    with model.generate(PROMPT, max_new_tokens=2, min_new_tokens=2) as tracer:
        tokens = save([])
        for _ in tracer.iter[:4]:
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
        counted = save(len(tokens))
    return tokens, counted


def an_end_before_the_asked_for_step(model):
    """The text ends (here because a write makes it end) before the step that a loop asks for.

    nnsight: the loop is cut short, what stands after it is lost, and a warning says so.
    here: an error that names the line and the step at which the text ended.
    why: D6; fewer steps than asked for is never silent.
    """
    with model.generate(PROMPT, max_new_tokens=4) as tracer:
        tokens = save([])
        for step in tracer.iter[:4]:
            if step == 1:
                model.lm_head.output[:, -1, 0] = 1000
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
        counted = save(len(tokens))
    return tokens, counted


def the_next_step(model):
    """`module.next()` moves what follows to the next step.

    nnsight: gone since 0.8.
    here: accepted.
    why: programs of earlier versions use it.
    """
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3):
        first = model.lm_head.output[0, -1].argmax(-1).save()
        second = model.lm_head.next().output[0, -1].argmax(-1).save()
    return first, second


def a_plain_call_after_a_trace(net):
    """The user's module, after it was traced.

    nnsight: the `forward` of each module stays replaced.
    here: nothing of ours is left on it.
    why: D8.
    """
    module = torch.nn.Sequential(torch.nn.Linear(6, 6), torch.nn.ReLU())
    wrapper = NNsight(module)
    with wrapper.trace(torch.ones(2, 6)):
        out = wrapper.output.save()
    del net
    return ["forward" in vars(each) for each in module.modules()], out.shape


def four_threads(net):
    """Four threads trace one model.

    nnsight: most of the traces fail.
    here: each gets its own values.
    why: D9.
    """
    start = threading.Barrier(4)

    def work(number):
        start.wait()
        failed = 0
        x = torch.full((1, 6), float(number))
        for _ in range(5):
            try:
                with net.trace(x):
                    given = net.layers[0].input.save()
                    time.sleep(0.01)
                    net.layers[1].output.save()
                failed += int(not torch.equal(given, x))
            except Exception:
                failed += 1
        return failed

    with ThreadPoolExecutor(4) as pool:
        return sum(pool.map(work, range(4))) > 0


def an_unknown_keyword(model):
    """`trace` is given a keyword that the model's forward does not know.

    nnsight: passed on; the models of transformers ignore it.
    here: an error with the nearest name.
    why: D8.
    """
    with model.trace(PROMPT, ouput_attentions=True):
        logits = model.lm_head.output.save()
    return logits.shape


def an_unknown_module(net):
    """A module that does not exist is read.

    nnsight: `AttributeError` while the body runs.
    here: an error before the model runs, with the line and the nearest names.
    why: D10.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layer[0].output.save()
    return hidden


def a_return_in_a_body(net):
    """`return` inside of a trace.

    nnsight: `SyntaxError`.
    here: ends the body of a decorated function; in an undecorated block it is refused.
    why: D5.
    """
    with net.trace(torch.ones(2, 6)):
        return net.output


def a_write_that_nothing_can_notice(net):
    """The last line writes to the model, and nothing is read after it.

    nnsight: happens, to no end.
    here: an error: the write can reach nothing.
    why: D8.
    """
    with net.trace(torch.ones(2, 6)):
        hidden = net.layers[0].output.save()
        net.layers[2].output[:] = 0
    return hidden.shape
