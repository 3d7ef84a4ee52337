"""Narrowed programs mean what they meant: against the models' own outputs, and torch hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from architectures import FAMILIES, IDS, random_model
from chosen import some
from torch import nn

from nnsight_compiler import LanguageModel, NNsight, intervene

CAPPED = ("gemma2",)
"""Architectures that change the logits after the head."""


def close(found: Any, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(torch.as_tensor(found), wanted, rtol=1e-4, atol=1e-4)


def fired(experiment: Any, *args: Any) -> list[str]:
    return [each.what for each in experiment.compile(*args).remarks if each.fired and each.optimisation == "narrow"]


def refused(experiment: Any, *args: Any) -> list[str]:
    found = experiment.compile(*args).remarks
    return [each.what for each in found if not each.fired and each.optimisation == "narrow"]


# --- reads of the head, the norm and the logits ---


@intervene
def last(model, ids, token, other, position):
    with model.trace(ids):
        logits = model.lm_head.output
        row = logits[:, position]
        difference = logits[0, -1, token] - logits[0, -1, other]
    return row, difference


@intervene
def of_the_output(model, ids, position):
    with model.trace(ids):
        row = model.output.logits[0, position]
    return row


@pytest.mark.parametrize("kind", some(FAMILIES, "gpt2", "llama", "gemma2", "opt", "phi"))
def test_all_architectures(kind: str, counts) -> None:
    plain = random_model(kind)
    model = LanguageModel(plain)
    with torch.no_grad():
        whole = plain(IDS).logits
    heads: list[torch.Tensor] = []
    handle = plain.lm_head.register_forward_hook(lambda _m, _a, out: heads.append(out))
    with torch.no_grad():
        plain(IDS)
    handle.remove()
    for position in (0, -1, 3):
        row, difference = last(model, IDS, 5, 9, position)
        close(row, heads[0][:, position])
        close(difference, heads[0][0, -1, 5] - heads[0][0, -1, 9])
        close(of_the_output(model, IDS, position), whole[0, position])
    assert len(fired(last, model, IDS, 5, 9, 0)) == 1
    assert "lm_head" in fired(last, model, IDS, 5, 9, 0)[0]
    assert "," in fired(last, model, IDS, 5, 9, 0)[0].partition(" for ")[0], "the norm is narrowed with it"
    assert bool(fired(of_the_output, model, IDS, 0)) == (kind not in CAPPED)


def test_logits_that_are_changed_after_the_head_are_left_alone() -> None:
    model = LanguageModel(random_model("gemma2"))
    assert refused(of_the_output, model, IDS, 0) == ["`logits` is not the very output of a module"]


def test_other_prompts_and_positions_take_the_same_program(model, plain_gpt2) -> None:
    last.cache_clear()
    for ids in (IDS, IDS[:1, :3], torch.tensor([[4, 8, 15, 16, 23, 42, 1]])):
        with torch.no_grad():
            wanted = plain_gpt2(ids).logits
        for position in (-1, 1):
            row, difference = last(model, ids, 7, 8, position)
            close(row, wanted[:, position])
            close(difference, wanted[0, -1, 7] - wanted[0, -1, 8])
    assert last.cache_info().misses == 1


@pytest.mark.parametrize("position", [slice(1, 3), [0, 2], torch.tensor([1, 0]), None, torch.tensor(2), True])
def test_an_argument_that_is_no_whole_number_compiles_anew(model, plain_gpt2, position: Any) -> None:
    last.cache_clear()
    with torch.no_grad():
        wanted = plain_gpt2(IDS).logits
    close(last(model, IDS, 7, 8, 2)[0], wanted[:, 2])
    close(last(model, IDS, 7, 8, position)[0], wanted[:, position])
    close(last(model, IDS, 7, 8, 2)[0], wanted[:, 2])


def test_a_position_or_a_token_out_of_range_is_an_error(model) -> None:
    with pytest.raises(Exception, match="out of"):
        last(model, IDS, 7, 8, 20)
    with pytest.raises(Exception, match="out of"):
        last(model, IDS, 1000, 8, 0)


# --- patches, as they are written first ---


@intervene
def sweep(model, clean, corrupt, layers, positions, token, other):
    with model.trace(clean):
        sources = [layer.output.clone() for layer in model.layers]
    found = []
    for layer in layers:
        row = []
        for position in positions:
            with model.trace(corrupt):
                model.layers[layer].output[:, position] = sources[layer][:, position]
                logits = model.lm_head.output
                row.append((logits[0, -1, token] - logits[0, -1, other]).item())
        found.append(row)
    return found


def test_a_sweep_over_layers_and_positions(either, hooked, grab, clean, corrupt) -> None:
    model, plain, path = either
    positions = list(range(6))
    found = torch.tensor(sweep(model, clean, corrupt, [0, 2], positions, 5, 9))
    for row, layer in enumerate((0, 2)):
        source = grab(plain, clean, f"{path}.{layer}")
        for position in positions:

            def put(out: Any, at: int = position, source: torch.Tensor = source) -> None:
                _first(out)[:, at] = source[:, at]

            logits = hooked(plain, corrupt, (f"{path}.{layer}", "output", put)).logits
            close(found[row, position], logits[0, -1, 5] - logits[0, -1, 9])
    assert fired(sweep, model, clean, corrupt, [0, 2], positions, 5, 9)


def _first(out: Any) -> torch.Tensor:
    return out if isinstance(out, torch.Tensor) else out[0]


@intervene
def lens(model, ids):
    found = []
    with model.trace(ids):
        for layer in model.layers:
            found.append(model.lm_head(model.ln_final(layer.output))[:, -1])
    return torch.stack(found)


def test_a_logit_lens(either, hooked, clean) -> None:
    model, plain, path = either
    inner = plain.transformer.ln_f if path == "transformer.h" else plain.model.norm
    kept: list[torch.Tensor] = []
    hooks = [(f"{path}.{n}", "output", lambda out: kept.append(_first(out).clone())) for n in range(3)]
    hooked(plain, clean, *hooks)
    with torch.no_grad():
        wanted = torch.stack([plain.lm_head(inner(each))[:, -1] for each in kept])
    close(lens(model, clean), wanted)
    assert fired(lens, model, clean)


@intervene
def lens_in_parts(model, ids):
    rows, best = [], []
    with model.trace(ids):
        for layer in model.layers:
            row = model.lm_head(model.ln_final(layer.output[:, -1]))
            rows.append(row)
            best.append(row.argmax(-1))
            print("a layer")
    return rows, best


def calls(experiment: Any, *args: Any) -> list[str]:
    found = experiment.compile(*args).remarks
    return [each.what for each in found if each.fired and each.optimisation == "fuse_calls"]


def test_a_lens_whose_calls_are_one(either, hooked, clean, monkeypatch, capsys) -> None:
    model, plain, path = either
    inner = plain.transformer.ln_f if path == "transformer.h" else plain.model.norm
    kept: list[torch.Tensor] = []
    hooks = [(f"{path}.{n}", "output", lambda out: kept.append(_first(out).clone())) for n in range(3)]
    hooked(plain, clean, *hooks)
    with torch.no_grad():
        wanted = [plain.lm_head(inner(each))[:, -1] for each in kept]
    (norm,) = (name for name, module in plain.named_modules() if module is inner)
    assert calls(lens_in_parts, model, clean) == [f"`{each}` is called once on 3 values" for each in (norm, "lm_head")]
    rows, best = lens_in_parts(model, clean)
    assert capsys.readouterr().out == "a layer\n" * 3
    for row, token, each in zip(rows, best, wanted, strict=True):
        close(row, each)
        assert torch.equal(token, each.argmax(-1))
    ran: list[nn.Module] = []
    forward = nn.Linear.forward
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: (ran.append(self), forward(self, x))[1])
    rows, best = lens_in_parts(model, clean)
    assert ran.count(plain.lm_head) == 1, "the model's own call is not needed"
    ran.clear()
    lens_in_parts.with_options(without="fuse_calls")(model, clean)
    assert ran.count(plain.lm_head) >= 3


@intervene
def lens_of_other_parts(model, ids, first, second):
    with model.trace(ids):
        one = model.lm_head(model.layers[0].output[0, :first])
        other = model.lm_head(model.layers[1].output[0, :second])
    return one, other


def test_parts_that_are_alike_in_one_call_only(model, plain_gpt2, grab, clean) -> None:
    held = [grab(plain_gpt2, clean, f"transformer.h.{layer}") for layer in (0, 1)]
    assert not calls(lens_of_other_parts, model, clean, 2, 2)
    for first, second in ((2, 2), (1, 3)):
        one, other = lens_of_other_parts(model, clean, first, second)
        with torch.no_grad():
            close(one, plain_gpt2.lm_head(held[0][0, :first]))
            close(other, plain_gpt2.lm_head(held[1][0, :second]))


# --- what is written to, and where ---


@intervene
def after_the_norm(model, ids):
    with model.trace(ids):
        model.transformer.ln_f.output[:, -1] = 1.0
        row = model.lm_head.output[0, -1]
    return row


@intervene
def before_the_norm(model, ids):
    with model.trace(ids):
        row = model.lm_head.output[0, -1]
        model.transformer.ln_f.input[:, -1] += 1.0
    return row


@intervene
def of_the_row(model, ids):
    with model.trace(ids):
        row = model.lm_head.output[0, -1]
        row[3] = 7.0
        again = model.output.logits[0, -1]
    return row, again


def test_writes_beside_the_modules(model, plain_gpt2, hooked, clean) -> None:
    def one(out: torch.Tensor) -> None:
        out[:, -1] = 1.0

    close(after_the_norm(model, clean), hooked(plain_gpt2, clean, ("transformer.ln_f", "output", one)).logits[0, -1])

    def more(value: torch.Tensor) -> None:
        value[:, -1] += 1.0

    wanted = hooked(plain_gpt2, clean, ("transformer.ln_f", "input", more)).logits[0, -1]
    close(before_the_norm(model, clean), wanted)
    row, again = of_the_row(model, clean)
    assert row[3] == again[3] == 7.0


@intervene
def lens_of_what_is_written(model, ids):
    with model.trace(ids):
        hidden = model.layers[1].output
        logits = model.lm_head(hidden)
        hidden[:] = 0
        row = logits[0, -1]
        after = model.lm_head(hidden)[0, -1]
    return row, after


def test_a_write_between_a_call_and_the_use_of_its_result(model, plain_gpt2, grab, clean) -> None:
    hidden = grab(plain_gpt2, clean, "transformer.h.1")
    row, after = lens_of_what_is_written(model, clean)
    with torch.no_grad():
        close(row, plain_gpt2.lm_head(hidden)[0, -1])
    assert not after.any()


# --- models of one's own ---


class Chain(nn.Module):
    """A norm, something between, and a head; `between` says what."""

    def __init__(self, between: str) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 12)
        self.between = between

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x))
        match self.between:
            case "view":
                x = x.view(x.shape[0], -1, 8)[:, :, :]
            case "scaled":
                x = x * 2
            case "in place":
                x.mul_(2)
            case "turned":
                x = x.flip(1)
            case "transposed":
                x = x.transpose(0, 1).contiguous().transpose(0, 1)
        return self.head(x)


@intervene
def of_the_head(net, x):
    with net.trace(x):
        row = net.head.output[:, -1]
        one = net.head.output[0, 1, 3]
    return row, one


@pytest.mark.parametrize("between", ["", "view", "scaled", "in place", "turned", "transposed"])
def test_what_stands_between_two_modules(between: str, batch) -> None:
    torch.manual_seed(5)
    plain = Chain(between).eval()
    with torch.no_grad():
        wanted = plain(batch)
    row, one = of_the_head(NNsight(plain), batch)
    close(row, wanted[:, -1])
    close(one, wanted[0, 1, 3])
    (what,) = fired(of_the_head, NNsight(plain), batch)
    assert what.startswith("`first`, `norm`, `head`" if between in ("", "view") else "`head`")


class Mixing(nn.Module):
    """A head that looks at all positions."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(12, 8))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x - x.mean(1, keepdim=True)) @ self.weight.T


def test_a_head_that_mixes_positions(batch) -> None:
    plain = Chain("").eval()
    plain.head = Mixing()  # type: ignore[assignment]
    with torch.no_grad():
        wanted = plain(batch)
    row, one = of_the_head(NNsight(plain), batch)
    close(row, wanted[:, -1])
    close(one, wanted[0, 1, 3])
    assert refused(of_the_head, NNsight(plain), batch) == [
        "`head` is run for all positions: it is not known that `mean` treats positions apart here"
    ]


def test_hooks_of_the_users_that_come_later(batch) -> None:
    plain = Chain("").eval()
    net = NNsight(plain)
    of_the_head(net, batch)
    assert fired(of_the_head, net, batch)
    handle = plain.head.register_forward_hook(lambda _m, _a, out: out.flip(1))
    with torch.no_grad():
        wanted = plain(batch)
    close(of_the_head(net, batch)[0], wanted[:, -1])
    handle.remove()
    with torch.no_grad():
        close(of_the_head(net, batch)[0], plain(batch)[:, -1])


# --- gradients ---


@intervene
def attributed(model, ids, token, other):
    with model.trace(ids):
        hidden = model.layers[1].output
        logits = model.lm_head.output
        metric = logits[0, -1, token] - logits[0, -1, other]
        with metric.backward():
            gradient = hidden.grad.clone()
    return gradient


def test_gradients_go_through(model, plain_gpt2, clean) -> None:
    kept: list[torch.Tensor] = []
    handle = plain_gpt2.transformer.h[1].register_forward_hook(lambda _m, _a, out: kept.append(_first(out)))
    logits = plain_gpt2(clean).logits
    handle.remove()
    (wanted,) = torch.autograd.grad(logits[0, -1, 5] - logits[0, -1, 9], kept)
    close(attributed(model, clean, 5, 9), wanted)
    assert all(parameter.grad is None for parameter in plain_gpt2.parameters())
    assert fired(attributed, model, clean, 5, 9)


@intervene
def attributed_pairs(model, pairs):
    found = []
    for ids, wanted, other in pairs:
        with model.trace(ids):
            hidden = model.layers[1].output
            logits = model.lm_head.output
            with (logits[0, -1, wanted] - logits[0, -1, other]).backward():
                found.append(hidden.grad.clone())
    return found


def test_gradients_of_tokens_that_are_parts_of_a_loops_items(model, plain_gpt2) -> None:
    pairs = [(IDS[:1], 5, -1), (torch.tensor([[4, 8, 15]]), 0, 6), (IDS[:1].flip(1), 2, 2)]
    wanted = []
    for ids, first, second in pairs:
        kept: list[torch.Tensor] = []
        handle = plain_gpt2.transformer.h[1].register_forward_hook(lambda _m, _a, out, k=kept: k.append(_first(out)))
        logits = plain_gpt2(ids).logits
        handle.remove()
        wanted += torch.autograd.grad(logits[0, -1, first] - logits[0, -1, second], kept)
    attributed_pairs.cache_clear()
    for mine, right in zip(attributed_pairs(model, pairs), wanted, strict=True):
        close(mine, right)
    assert any("by rows of its weight" in each for each in fired(attributed_pairs, model, pairs))
    for mine, right in zip(attributed_pairs(model, pairs[::-1]), wanted[::-1], strict=True):
        close(mine, right)
    assert attributed_pairs.cache_info().misses == 1
    slices = [(ids, slice(first, first + 1), second) for ids, first, second in pairs[:2]]  # no single tokens
    for mine, right in zip(attributed_pairs(model, slices), wanted, strict=False):
        close(mine, right)
    assert attributed_pairs.cache_info().misses == 2
    with pytest.raises(IndexError):
        attributed_pairs(model, [(IDS[:1], 10**6, 0)])


@intervene
def steered(model, ids, vector, token):
    with model.trace(ids):
        model.layers[1].output[:] += vector
        logit = model.lm_head.output[0, -1, token]
    return logit


@intervene
def trained(model, ids, token):
    with model.trace(ids, grad=True):
        logit = model.lm_head.output[0, -1, token]
    return logit


def test_gradients_after_the_call(model, plain_gpt2, hooked, clean) -> None:
    vector, same = (torch.full((32,), 0.1, requires_grad=True) for _ in range(2))
    steered(model, clean, vector, 5).backward()
    hooked(plain_gpt2, clean, ("transformer.h.1", "output", lambda out: out + same), grad=True).logits[
        0, -1, 5
    ].backward()
    weights = [parameter.grad for parameter in plain_gpt2.parameters()]
    assert any(each is not None for each in weights)
    plain_gpt2.zero_grad()
    close(vector.grad, same.grad)
    steered(model, clean, vector, 5).backward()
    assert all(parameter.grad is None for parameter in plain_gpt2.parameters())

    trained(model, clean, 5).backward()
    found = [parameter.grad for parameter in plain_gpt2.parameters()]
    plain_gpt2.zero_grad()
    plain_gpt2(clean).logits[0, -1, 5].backward()
    for mine, parameter in zip(found, plain_gpt2.parameters(), strict=True):
        close(mine, parameter.grad)
    plain_gpt2.zero_grad()
    assert not steered(model, clean, vector.detach(), 5).requires_grad


# --- switches ---


def test_the_switch(model, clean) -> None:
    whole = last.with_options(without="narrow")
    assert not fired(whole, model, clean, 5, 9, 0)
    for mine, other in zip(last(model, clean, 5, 9, 0), whole(model, clean, 5, 9, 0), strict=True):
        close(mine, other)
