"""Positions by text: the oracle is the text that the tokens found stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from nnsight_compiler import CompileError, LanguageModel, NNsight, intervene
from nnsight_compiler.models.positions import Position, PositionError

PROMPT = "The Eiffel Tower is in the city of"


class Slow:
    """A tokenizer that does not tell where its tokens come from."""

    is_fast = False

    def __init__(self, fast: Any) -> None:
        self.fast = fast
        self.all_special_ids = fast.all_special_ids

    def __call__(self, texts: Any) -> Any:
        return self.fast(texts)

    def decode(self, ids: Any, **options: Any) -> str:
        return self.fast.decode(ids, **options)


@pytest.fixture(scope="module")
def tiny() -> LanguageModel:
    return LanguageModel("tiny", dispatch=True)


@pytest.fixture(scope="module", params=["fast", "slow"])
def model(request: pytest.FixtureRequest, tiny: LanguageModel) -> LanguageModel:
    tokenizer = tiny.tokenizer if request.param == "fast" else Slow(tiny.tokenizer)
    return LanguageModel(tiny._wrapped, tokenizer)


def decoded(model: LanguageModel, prompt: str, position: Position) -> str:
    ids = model.tokenizer(prompt)["input_ids"]
    return model.tokenizer.decode([ids[number] for number in position])


def test_several_tokens_one_after_the_other(model: LanguageModel):
    found = model.position(PROMPT, "Eiffel Tower")
    assert decoded(model, PROMPT, found) == " Eiffel Tower"
    assert (found.first, found.last, found.all) == (found[0], found[-1], slice(found[0], found[-1] + 1))
    assert len(found) == 2
    assert repr(found) == "Position(1, 2)"


def test_spaces_at_the_ends_belong_to_no_other_token(model: LanguageModel):
    for words in ("Eiffel Tower", " Eiffel Tower", "Eiffel Tower ", " Eiffel Tower "):
        assert decoded(model, PROMPT, model.position(PROMPT, words)) == " Eiffel Tower"


def test_a_token_that_holds_a_part_of_the_words_counts_whole(model: LanguageModel):
    assert decoded(model, PROMPT, model.position(PROMPT, "ffel Tow")) == " Eiffel Tower"


def test_one_of_several(model: LanguageModel):
    prompt = "The city in the city of"
    numbers = [model.position(prompt, "city", occurrence=each).first for each in (0, 1, -1)]
    assert numbers == [1, 4, 4]
    with pytest.raises(PositionError) as caught:
        model.position(prompt, "city")
    assert str(caught.value) == (
        "'city' is 2 times in the prompt, at tokens 1, 4; say which is meant: `occurrence=0` to `occurrence=1`; its"
        " tokens: 0 'The'  1 ' city'  2 ' in'  3 ' the'  4 ' city'  5 ' of'"
    )
    with pytest.raises(PositionError, match="'city' is 2 times in the prompt: there is no `occurrence=2`"):
        model.position(prompt, "city", occurrence=2)


def test_words_that_are_not_there(model: LanguageModel):
    with pytest.raises(PositionError) as caught:
        model.position(PROMPT, "Eiffel Towr")
    assert str(caught.value).startswith(
        "'Eiffel Towr' is not in the prompt; its tokens: 0 'The'  1 ' Eiffel'  2 ' Tower'  3 ' is'"
    )
    for nothing in ("", 3):
        with pytest.raises(PositionError, match="found by the words that stand there"):
            model.position(PROMPT, nothing)  # type: ignore[arg-type]


def test_characters_of_several_tokens(model: LanguageModel):
    prompt = "The caf\u00e9 \u65e5\u672c is in the city"
    for words in ("caf\u00e9", "\u65e5\u672c", "\u672c"):
        found = model.position(prompt, words)
        ids = model.tokenizer(prompt)["input_ids"]
        before = model.tokenizer.decode(ids[: found.first])
        after = model.tokenizer.decode(ids[found.last + 1 :])
        assert words in decoded(model, prompt, found)
        assert words not in before + after
    assert decoded(model, prompt, model.position(prompt, "is")) == " is"


@pytest.mark.parametrize("form", ["ids", "tensor", "mapping"])
def test_in_token_ids(model: LanguageModel, form: str):
    ids = model.tokenizer(PROMPT)["input_ids"]
    prompt = {"ids": ids, "tensor": torch.tensor([ids]), "mapping": {"input_ids": torch.tensor([ids])}}[form]
    assert model.position(prompt, "Eiffel Tower") == (1, 2)


def test_in_one_of_several_prompts_padding_counts(model: LanguageModel):
    prompts = ["The Eiffel Tower", PROMPT]
    padding = len(model.tokenizer(PROMPT)["input_ids"]) - 3
    assert model.position(prompts, "Eiffel Tower", row=0) == (padding + 1, padding + 2)
    assert model.position(prompts, "Eiffel Tower", row=-1) == (1, 2)
    with pytest.raises(PositionError, match="there are 2 prompts: say which is meant, `row=0` to `row=1`"):
        model.position(prompts, "Eiffel Tower")
    with pytest.raises(PositionError, match="there is no `row=2` among 2 prompts"):
        model.position(prompts, "Eiffel Tower", row=2)


@pytest.fixture(scope="module")
def marked() -> PreTrainedTokenizerFast:
    """A tokenizer of another kind: it puts a token before each text, and marks spaces rather than holding them."""
    words = ["<s>", "<unk>", "\u2581The", "\u2581Ei", "ffel", "\u2581Tower", "\u2581is", "\u2581in"]
    made = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=1))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.decoder = decoders.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", unk_token="<unk>")


@pytest.mark.parametrize("kind", ["fast", "slow"])
def test_tokens_that_the_tokenizer_adds_are_counted(tiny: LanguageModel, marked: Any, kind: str):
    model = LanguageModel(tiny._wrapped, marked if kind == "fast" else Slow(marked))
    assert model.position("The Eiffel Tower is", "Eiffel") == (2, 3)
    assert model.position("The Eiffel Tower is", "Tower") == (4,)
    assert model.position("The Eiffel Tower is", "The") == (1,)


# --- in a trace ---


@intervene
def at(model, prompt, words):
    with model.trace(prompt) as tracer:
        found = tracer.position(words)
        hidden = model.layers[1].output
        return found, hidden[:, found], hidden[:, found.last], hidden[:, found.all]


@intervene
def zero(model, prompt, words):
    with model.trace(prompt) as tracer:
        model.layers[0].output[:, tracer.position(words)] = 0
        hidden = model.layers[0].output
    return hidden


def test_of_the_prompt_of_a_trace(tiny: LanguageModel):
    with torch.no_grad():
        expected = tiny(PROMPT, output_hidden_states=True).hidden_states[2]
    at.cache_clear()
    found, each, last, part = at(tiny, PROMPT, "Eiffel Tower")
    assert found == (1, 2)
    assert torch.equal(each, expected[:, [1, 2]])
    assert torch.equal(last, expected[:, 2])
    assert torch.equal(part, expected[:, 1:3])
    other = "In the city is the Space Needle"
    assert decoded(tiny, other, at(tiny, other, "Space Needle")[0]) == " Space Needle"
    assert at.cache_info().misses == 1


def test_written_to(tiny: LanguageModel):
    hidden = zero(tiny, PROMPT, "Eiffel Tower")
    assert not hidden[:, 1:3].any()
    assert hidden[:, 3:].all()


@pytest.mark.parametrize("form", ["text", "keyword", "options"])
def test_in_an_undecorated_block(tiny: LanguageModel, form: str):
    ids = torch.tensor([tiny.tokenizer(PROMPT)["input_ids"]])
    options = {"input_ids": ids}
    if form == "text":
        with tiny.trace(PROMPT) as tracer:
            found = tracer.position("Eiffel Tower")
            hidden = tiny.layers[0].output[:, found].save()
    elif form == "keyword":
        with tiny.trace(input_ids=ids) as tracer:
            found = tracer.position("Eiffel Tower")
            hidden = tiny.layers[0].output[:, found].save()
    else:
        with tiny.trace(**options) as tracer:
            found = tracer.position("Eiffel Tower")
            hidden = tiny.layers[0].output[:, found].save()
    assert found == (1, 2)
    assert hidden.shape == (1, 2, 128)


def test_a_plain_call_in_a_function(tiny: LanguageModel):
    @intervene
    def outside(model, prompt, other):
        place = model.position(other, "Tower")
        with model.trace(prompt):
            hidden = model.layers[0].output[:, place.first]
        return place, hidden

    place, hidden = outside(tiny, PROMPT, PROMPT)
    assert place == (2,)
    assert hidden.shape == (1, 128)


def test_mistakes_are_told_at_their_line(tiny: LanguageModel):
    with pytest.raises(PositionError, match="is not in the prompt") as caught:
        at(tiny, PROMPT, "Louvre")
    lines = [entry.lineno for entry in caught.traceback if str(entry.path) == __file__]
    assert lines[-1] == at._function.__code__.co_firstlineno + 2  # the traceback counts from 0

    with (
        pytest.raises(CompileError, match="positions by words need a tokenizer"),
        NNsight(tiny._wrapped).trace(torch.tensor([[1, 2]])) as tracer,
    ):
        tracer.position("x")
