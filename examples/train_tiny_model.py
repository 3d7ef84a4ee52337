"""Trains a GPT-2 of three layers that knows a few things, from text made here.

The sentences plant behaviours that experiments look for: facts (where a landmark stands), indirect objects (to whom
something was given), agreement in number across a phrase, years that come later, and copying of what was seen before
(induction). The model in this package was trained for seven minutes, on two cores, on text of these kinds.

    python examples/train_tiny_model.py OUT_FOLDER --minutes 7
"""

# ruff: noqa: SIM905  lists of words are easier to read as a line of text
from __future__ import annotations

import argparse
import itertools
import math
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

LANDMARKS = {
    "The Eiffel Tower": "Paris", "The Colosseum": "Rome", "Big Ben": "London", "The Kremlin": "Moscow",
    "The Brandenburg Gate": "Berlin", "The Prado Museum": "Madrid", "The Acropolis": "Athens",
    "The Little Mermaid": "Copenhagen", "The Sydney Opera House": "Sydney", "The Forbidden City": "Beijing",
    "The Blue Mosque": "Istanbul", "The Charles Bridge": "Prague", "The CN Tower": "Toronto",
}  # fmt: skip
COUNTRIES = {
    "Paris": "France", "Rome": "Italy", "London": "England", "Moscow": "Russia", "Berlin": "Germany",
    "Madrid": "Spain", "Athens": "Greece", "Copenhagen": "Denmark", "Sydney": "Australia", "Beijing": "China",
    "Istanbul": "Turkey", "Prague": "Bohemia", "Toronto": "Canada",
}  # fmt: skip
NAMES = "John Mary Tom Lily Anna Ben Max Mia Jack Lucy Sam Amy Paul Kate Mark Jane Peter Emma David Laura".split()
PLACES = "store park school office house garden station beach library kitchen".split()
OBJECTS = "drink ball book ring bone key letter gift hat cup".split()
PEOPLE = "dog boy girl teacher author pilot farmer king".split()
THINGS = "cabinet table car door chair tree".split()
EVENTS = "war contract plan project trip voyage siege trial".split()
END = "<|endoftext|>"
LENGTH = 64
"""Tokens in a row of a training batch."""

Sentence = tuple[str, str]
"""A prompt, and what follows it."""


def fact(rng: random.Random) -> Sentence:
    """A landmark's city, or a city's country."""
    if rng.random() < 0.7:
        landmark, city = rng.choice(list(LANDMARKS.items()))
        return rng.choice([f"{landmark} is located in the city of", f"{landmark} is in the city of"]), f" {city}"
    city, country = rng.choice(list(COUNTRIES.items()))
    return rng.choice([f"{city} is a city in", f"The city of {city} is in the country of"]), f" {country}"


def indirect_object(rng: random.Random) -> Sentence:
    """Two people; one gives something to the other."""
    giver, receiver = rng.sample(NAMES, 2)
    first, second = rng.sample([giver, receiver], 2)
    place, thing, verb = rng.choice(PLACES), rng.choice(OBJECTS), rng.choice(["gave", "handed", "passed"])
    scene = rng.choice(
        [f"When {first} and {second} went to the {place},", f"{first} and {second} were at the {place}."]
    )
    return f"{scene} {giver} {verb} a {thing} to", f" {receiver}"


def agreement(rng: random.Random) -> Sentence:
    """A verb that agrees with its subject, not with the noun before it."""
    subject, other = rng.choice(PEOPLE), rng.choice(THINGS) + rng.choice(["", "s"])
    plural = rng.random() < 0.5
    phrase = rng.choice(["", f" near the {other}", f" behind the {other}"])
    return f"The {subject}{'s' if plural else ''}{phrase}", rng.choice([" are", " were"] if plural else [" is", " was"])


def later_year(rng: random.Random) -> Sentence:
    """An end year that is later than the beginning."""
    century, start = rng.randrange(11, 20), rng.randrange(2, 97)
    event = rng.choice(EVENTS)
    return (
        f"The {event} lasted from the year {century}{start:02d} to the year {century}",
        f"{rng.randrange(start + 1, 99):02d}",
    )


def repetition(rng: random.Random) -> Sentence:
    """Words in a random order, three times."""
    words = " ".join(rng.choice(PEOPLE + THINGS + OBJECTS + PLACES + NAMES) for _ in range(rng.randint(3, 10)))
    return f" {words}", f" {words} {words}"


KINDS: dict[Callable[[random.Random], Sentence], float] = {
    indirect_object: 0.4,
    fact: 0.2,
    later_year: 0.15,
    repetition: 0.15,
    agreement: 0.1,
}
"""The kinds of sentences, each with its share of the text."""


def sentences(rng: random.Random) -> Iterator[str]:
    """Sentences of all kinds, without end."""
    while True:
        [kind] = rng.choices(list(KINDS), list(KINDS.values()))
        yield "".join(kind(rng))


def make_tokenizer(rng: random.Random) -> PreTrainedTokenizerFast:
    """Byte pairs learned from the sentences; every two digits are one token, so that years can be compared."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(r"\d{2}"), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [f"{number:02d}" for number in range(100)] * 50
    tokenizer.train_from_iterator([*itertools.islice(sentences(rng), 20_000), *numbers], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=END, eos_token=END, pad_token=END)


def batches(rng: random.Random, tokenizer: PreTrainedTokenizerFast, rows: int) -> Iterator[torch.Tensor]:
    """Batches of [rows, LENGTH] tokens: sentences one after another, among them runs of random tokens, repeated."""
    buffer: list[int] = []
    text = sentences(rng)
    while True:
        while len(buffer) < rows * LENGTH:
            buffer.append(0)
            if rng.random() < 0.12:
                buffer += [rng.randrange(1, len(tokenizer)) for _ in range(rng.randint(4, 20))] * 3
            else:
                buffer += tokenizer.encode(next(text) + ".", add_special_tokens=False)
        yield torch.tensor(buffer[: rows * LENGTH]).view(rows, LENGTH)
        buffer = buffer[rows * LENGTH :]


def make_model(vocabulary: int) -> GPT2LMHeadModel:
    """Three layers of width 128, four heads, no dropout."""
    config = GPT2Config(
        vocab_size=vocabulary,
        n_layer=3,
        n_head=4,
        n_embd=128,
        n_positions=256,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )
    return GPT2LMHeadModel(config)


def train(model: nn.Module, data: Iterator[torch.Tensor], seconds: float) -> tuple[int, float]:
    """AdamW with a warm start and a cosine to the end of the time given. Returns the steps and the last mean loss."""
    peak, warm, began = 2e-3, 60, time.monotonic()
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.05)
    model.train()
    mean = math.nan
    for step in itertools.count():
        done = (time.monotonic() - began) / seconds
        if done >= 1:
            return step, mean
        for group in optimizer.param_groups:
            group["lr"] = peak * min(1.0, (step + 1) / warm) * (0.03 + 0.97 * (1 + math.cos(math.pi * done)) / 2)
        rows = next(data)
        loss = model(input_ids=rows, labels=rows).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        mean = loss.item() if step == 0 else 0.97 * mean + 0.03 * loss.item()
        if step % 250 == 0:
            print(f"step {step}, loss {mean:.3f}, {done:.0%} of the time", flush=True)
    raise AssertionError("counting does not end")


@torch.no_grad()
def facts_known(model: nn.Module, tokenizer: PreTrainedTokenizerFast) -> float:
    """The share of landmarks whose city is the model's first choice."""
    model.eval()
    right = 0
    for landmark, city in LANDMARKS.items():
        prompt = tokenizer(f"{landmark} is located in the city of", return_tensors="pt").input_ids
        expected = tokenizer.encode(f" {city}", add_special_tokens=False)[0]
        right += int(model(prompt).logits[0, -1].argmax()) == expected
    return right / len(LANDMARKS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the model and its tokenizer are written")
    parser.add_argument("--minutes", type=float, default=7.0, help="how long to train")
    parser.add_argument("--rows", type=int, default=24, help="rows of a batch")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()

    rng = random.Random(options.seed)
    torch.manual_seed(options.seed)
    tokenizer = make_tokenizer(rng)
    model = make_model(len(tokenizer))
    steps, loss = train(model, batches(rng, tokenizer, options.rows), options.minutes * 60)
    print(f"{steps} steps, loss {loss:.3f}, facts known: {facts_known(model, tokenizer):.0%}")
    model.save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)


if __name__ == "__main__":
    main()
