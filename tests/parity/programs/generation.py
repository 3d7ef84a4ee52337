"""Generation: steps, results, writes at some steps or all."""

import torch
from nnsight import save

PROMPT = "The Eiffel Tower is in the city of"


def the_result(model):
    with model.generate(PROMPT, max_new_tokens=4) as tracer:
        ids = tracer.result.save()
    return ids


def hidden_states_of_every_step(model):
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        states = save([])
        for _ in tracer.iter[:3]:
            states.append(model.transformer.h[1].output[:, -1])
    return states


def open_ended(model):
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        tokens = save([])
        for _ in tracer.iter[:]:
            tokens.append(model.lm_head.output[0, -1].argmax(-1))
    return tokens


def by_all(model):
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        norms = save([])
        for _ in tracer.all():
            norms.append(model.transformer.h[0].output[:, -1].norm())
    return norms


def some_steps(model):
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        norms = save([])
        for _ in tracer.iter[1:3]:
            norms.append(model.transformer.h[0].output[:, -1].norm())
    return norms


def one_step(model):
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        for _ in tracer.iter[2]:
            hidden = model.transformer.h[0].output.save()
    return hidden


def steps_of_a_list(model):
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        numbers = save([])
        norms = save([])
        for step in tracer.iter[[0, 3]]:
            numbers.append(step)
            norms.append(model.transformer.h[0].output[:, -1].norm())
    return numbers, norms


def a_write_at_every_step(model):
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        for _ in tracer.iter[:4]:
            model.transformer.h[1].output[:, -1] += 0.5
        ids = tracer.result.save()
    return ids


def a_write_at_one_step(model):
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        for _ in tracer.iter[1]:
            model.lm_head.output[:, -1, 9] = 1000
        ids = tracer.result.save()
    return ids


def a_condition_on_the_step(model):
    with model.generate(PROMPT, max_new_tokens=4, min_new_tokens=4) as tracer:
        for step in tracer.iter[:4]:
            if step == 2:
                model.lm_head.output[:, -1, 9] = 1000
        ids = tracer.result.save()
    return ids


def the_logits_of_every_step(model):
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        logits = save([])
        for _ in tracer.iter[:3]:
            logits.append(model.lm_head.output[:, -1])
        ids = tracer.result.save()
    return logits, ids


def sampled(model):
    torch.manual_seed(4)
    with model.generate(PROMPT, max_new_tokens=5, min_new_tokens=5, do_sample=True, temperature=1.5) as tracer:
        ids = tracer.result.save()
    return ids


def scores_in_the_result(model):
    with model.generate(
        PROMPT, max_new_tokens=3, min_new_tokens=3, return_dict_in_generate=True, output_scores=True
    ) as tracer:
        result = tracer.result.save()
    return result.sequences, list(result.scores)


def two_sites_in_a_step(model):
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        changes = save([])
        for _ in tracer.iter[:3]:
            before = model.transformer.h[0].output[:, -1]
            after = model.transformer.h[2].output[:, -1]
            changes.append((after - before).norm())
    return changes


def a_value_from_step_to_step(model):
    with model.generate(PROMPT, max_new_tokens=3, min_new_tokens=3) as tracer:
        last = None
        for _ in tracer.iter[:3]:
            hidden = model.transformer.h[1].output
            if last is not None:
                hidden[:, -1] += last * 0.1
            last = hidden[:, -1].clone()
        ids = tracer.result.save()
    return ids


def a_list_of_prompts(model):
    with model.generate([PROMPT, "The Space Needle"], max_new_tokens=3, min_new_tokens=3) as tracer:
        ids = tracer.result[:, -3:].save()
    return ids


def invokes_in_generation(model):
    with model.generate(max_new_tokens=3, min_new_tokens=3) as tracer:
        with tracer.invoke(PROMPT):
            first = tracer.result[:, -3:].save()
        with tracer.invoke("The Space Needle"):
            second = tracer.result[:, -3:].save()
    return first, second
