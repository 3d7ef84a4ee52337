"""Several inputs in one forward."""

from nnsight import save

SHORT = "The Space Needle"
LONG = "The Eiffel Tower is in the city of"
OTHER = "The Space Needle is in the city of"


def two_invokes(model):
    with model.trace() as tracer:
        with tracer.invoke(LONG):
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(OTHER):
            second = model.lm_head.output[:, -1].save()
    return first, second


def invokes_of_unequal_length(model):
    with model.trace() as tracer:
        with tracer.invoke(SHORT):
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(LONG):
            second = model.lm_head.output[:, -1].save()
    return first, second


def a_write_in_one_of_them(model):
    with model.trace() as tracer:
        with tracer.invoke(LONG):
            model.transformer.h[1].output[:] = 0
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(LONG):
            second = model.lm_head.output[:, -1].save()
    return first, second


def a_write_in_each(model):
    with model.trace() as tracer:
        with tracer.invoke(LONG):
            model.transformer.h[1].mlp.output *= 2
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(OTHER):
            model.transformer.h[1].mlp.output = model.transformer.h[1].mlp.output * 0
            second = model.lm_head.output[:, -1].save()
        with tracer.invoke(SHORT):
            third = model.lm_head.output[:, -1].save()
    return first, second, third


def invokes_in_a_loop(model):
    with model.trace() as tracer:
        found = save([])
        for prompt in (LONG, OTHER, SHORT):
            with tracer.invoke(prompt):
                found.append(model.lm_head.output[0, -1].argmax())
    return found


def all_rows(model):
    with model.trace() as tracer:
        with tracer.invoke(LONG):
            first = model.lm_head.output[:, -1].save()
        with tracer.invoke(OTHER):
            second = model.lm_head.output[:, -1].save()
        with tracer.invoke():
            both = model.lm_head.output[:, -1].save()
    return first, second, both


def a_value_from_another_invoke(model):
    with model.trace() as tracer:
        barrier = tracer.barrier(2)
        with tracer.invoke(LONG):
            clean = model.transformer.h[1].output[:, -1].clone()
            barrier()
        with tracer.invoke(OTHER):
            barrier()
            model.transformer.h[1].output[:, -1] = clean
            patched = model.lm_head.output[:, -1].save()
    return patched


def a_list_in_an_invoke(model):
    with model.trace() as tracer:
        with tracer.invoke([LONG, OTHER]):
            two = model.lm_head.output[:, -1].save()
        with tracer.invoke(SHORT):
            one = model.lm_head.output[:, -1].save()
    return two, one


def a_list_given_to_trace(model):
    with model.trace([LONG, OTHER]):
        hidden = model.transformer.h[1].output.save()
        logits = model.lm_head.output[:, -1].save()
    return hidden, logits


def a_padded_list(model):
    with model.trace([SHORT, LONG]):
        logits = model.lm_head.output[:, -1].save()
    return logits


def ids_in_invokes(llama):
    with llama.trace() as tracer:
        with tracer.invoke([5, 17, 42]):
            first = llama.lm_head.output[:, -1].save()
        with tracer.invoke([9, 3, 4, 8, 7]):
            llama.model.layers[0].output *= 2
            second = llama.lm_head.output[:, -1].save()
    return first, second


def one_invoke(model):
    with model.trace() as tracer, tracer.invoke(LONG):
        hidden = model.transformer.h[1].output.save()
    return hidden
