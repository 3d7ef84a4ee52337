"""The model of the workloads: the shape of GPT-2 small, with random weights that are the same in every process."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Size:
    """How large the model is, and how much of each workload is done."""

    layers: int
    width: int
    heads: int
    vocabulary: int
    spread: float  # the standard deviation of the weights
    prompt: int  # tokens of a prompt
    differs: int  # the first token in which a clean and a corrupted prompt differ
    text: int  # tokens of a text that is harvested
    rows: int  # texts in a batch
    batches: int
    pairs: int
    read_layer: int
    steered_layer: int
    strengths: int
    new_tokens: int


SIZES = {
    "small": Size(12, 768, 12, 50_257, 0.05, 15, 10, 64, 32, 64, 8, 5, 6, 8, 16),
    "tiny": Size(3, 16, 2, 53, 0.4, 5, 2, 7, 3, 2, 2, 1, 1, 3, 4),
}


def make_model(size: Size) -> GPT2LMHeadModel:
    """GPT-2 in evaluation mode.

    Its weights follow from the names of the parameters and a seed, not from how a version of transformers initialises
    them, so that the processes of all libraries hold the same ones.
    """
    config = GPT2Config(
        n_layer=size.layers,
        n_embd=size.width,
        n_head=size.heads,
        vocab_size=size.vocabulary,
        n_positions=1024,
        bos_token_id=None,
        eos_token_id=None,  # so that each generation has its full length
    )
    model = GPT2LMHeadModel(config).eval()
    assert model.generation_config is not None
    model.generation_config.pad_token_id = 0
    seeded = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            parameter.normal_(0, size.spread, generator=seeded)
            if ".ln_" in name and name.endswith("weight"):
                parameter += 1
    return model


def make_tokenizer(model: GPT2LMHeadModel) -> PreTrainedTokenizerFast:
    """A tokenizer that knows nothing but padding, for libraries that want one; prompts are token ids."""
    words = Tokenizer(WordLevel({"<pad>": model.config.vocab_size}, unk_token="<pad>"))
    special = dict.fromkeys(("pad_token", "unk_token", "bos_token", "eos_token"), "<pad>")
    return PreTrainedTokenizerFast(tokenizer_object=words, **special)


def tokens(size: Size, rows: int, length: int, seed: int) -> Tensor:
    """Random token ids, `[rows, length]`."""
    return torch.randint(size.vocabulary, (rows, length), generator=torch.Generator().manual_seed(seed))


def pair(size: Size, seed: int) -> tuple[Tensor, Tensor, int, int]:
    """A clean and a corrupted prompt, which differ in one token, and the two answers that are compared."""
    clean = tokens(size, 1, size.prompt, seed)
    corrupted = clean.clone()
    corrupted[0, size.differs] = (corrupted[0, size.differs] + 1) % size.vocabulary
    answers = torch.randperm(size.vocabulary, generator=torch.Generator().manual_seed(seed))
    return clean, corrupted, int(answers[0]), int(answers[1])


def fingerprint(model: GPT2LMHeadModel, size: Size) -> list[float]:
    """A few logits, by which two processes tell whether they hold the same model."""
    with torch.no_grad():
        logits = model(tokens(size, 1, size.prompt, 0)).logits[0, -1, :4]
    return [round(value, 4) for value in logits.tolist()]
