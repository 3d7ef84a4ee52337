"""The examples run as they stand, without a download, and find what they set out to show."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
import torch

from nnsight_compiler import LanguageModel

EXAMPLES = Path(__file__).parent.parent.parent / "examples"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    def call(name: str) -> list[str]:
        torch.set_num_threads(1)
        monkeypatch.setattr(sys, "argv", [name])
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out.splitlines()

    return call


def numbers(line: str) -> list[float]:
    words = line.replace("'", " ").replace(":", " ").split()
    return [float(word) for word in words if word.replace(".", "", 1).lstrip("+-").isdigit()]


def test_first_example_finds_the_fact_at_the_last_token(run) -> None:
    lines = run("first_example.py")
    patched = [line for line in lines if line.startswith("layer")]
    assert "' Seattle'" in next(line for line in patched if line.startswith("layer 2, position  2"))
    assert "' Paris'" in next(line for line in patched if line.startswith("layer 2, position -1"))
    assert any(line.startswith("experiment patch(") for line in lines)


def test_the_logit_lens_ends_at_paris(run) -> None:
    lines = run("logit_lens.py")
    assert len(lines) == 3
    assert lines[-1].startswith("layer  2: ' Paris'")


def test_patching_restores_all_at_one_place_and_nothing_before_it(run) -> None:
    header, *rows = run("activation_patching.py")
    position = [index for index, word in enumerate(header.split()) if word == "Mary"][1]
    assert len(rows) == 3
    first = numbers(rows[0])[1:]
    assert first[position] == pytest.approx(1, abs=0.05)
    assert all(abs(value) < 1e-3 for value in first[:position])


def test_steering_raises_what_it_steers_towards(run) -> None:
    lines = [line for line in run("steering.py") if line.startswith("strength")]
    paris = [numbers(line)[1] for line in lines]
    assert paris[0] < 0.1
    assert paris[-1] > 0.9


def test_ablating_a_unit_that_is_silent_moves_nothing(run) -> None:
    lines = run("any_module.py")
    torch.manual_seed(0)
    network = torch.nn.Sequential(
        torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    )
    hidden = network[1](network[0](torch.randn(1, 4)))[0]
    moved = [float(line.split()[-1]) for line in lines]
    assert len(moved) == 8
    assert all((change == 0) == (unit == 0) for change, unit in zip(moved, hidden.tolist(), strict=True))
    assert any(moved)


def test_patching_in_one_forward_gives_what_one_forward_for_each_gives(run) -> None:
    lines = run("invokes.py")
    model = LanguageModel("tiny")
    texts = ("The Eiffel Tower is in the city of", "The Space Needle is in the beautiful city of")
    clean, corrupt = (model.tokenizer([text], return_tensors="pt")["input_ids"] for text in texts)
    module = model._ready()
    assert len(lines) == len(module.transformer.h)
    for block, line in zip(module.transformer.h, lines, strict=True):
        kept = []
        handle = block.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output.clone()))
        with torch.no_grad():
            module(input_ids=clean)
            handle.remove()
            handle = block.register_forward_hook(
                lambda _, args, output, kept=kept: output.index_copy(
                    1, torch.tensor([-1]) % output.shape[1], kept[0][:, -1:]
                )
            )
            chances = module(input_ids=corrupt).logits[0, -1].softmax(-1)
            handle.remove()
        assert repr(model.tokenizer.decode(chances.argmax())) in line
        assert float(line.split()[-1]) == pytest.approx(float(chances.max()), abs=0.006)


def test_attribution_patching_finds_what_patching_finds(run) -> None:
    header, *rows = run("gradients.py")
    tower, last = header.split().index("Tower") - 1, header.split().index("of") - 1
    for guess, true in zip(rows[::2], rows[1::2], strict=True):
        guessed, found = numbers(guess)[1:], numbers(true)[1:]
        assert guessed[0] == found[0] == 0
        assert max(range(8), key=guessed.__getitem__) == max(range(8), key=found.__getitem__)
    assert max(range(8), key=numbers(rows[0])[1:].__getitem__) == tower
    assert max(range(8), key=numbers(rows[-2])[1:].__getitem__) == last


def test_a_generation_that_is_steered_goes_to_paris(run) -> None:
    lines = [line for line in run("generation.py") if line.startswith("strength")]
    assert lines[0].startswith("strength 0.0: ' Seattle'")
    assert lines[1].startswith("strength 1.0: ' Paris'")


def test_every_layer_of_the_tiny_model_is_needed(run) -> None:
    lines = run("skip.py")
    assert numbers(lines[0])[0] > 0.9
    chances = [numbers(line)[1] for line in lines if line.startswith("without layer")]
    assert len(chances) == 3
    assert max(chances) < 0.5


def test_a_session_patches_what_an_earlier_trace_gave(run) -> None:
    lines = run("session.py")
    assert numbers(lines[0])[1] > 0.9
    assert len(lines) == 3


def test_an_autoencoder_learns(run) -> None:
    losses = [numbers(line.replace(",", " "))[1] for line in run("own_modules.py")]
    assert len(losses) == 3
    assert losses[-1] < losses[0] / 10


def test_an_mlp_that_does_not_see_its_attention_loses_the_fact(run) -> None:
    lines = run("source.py")
    assert any(line.startswith("self_mlp_0 ─┐") for line in lines)
    (plain,) = (numbers(line)[-1] for line in lines if line.startswith("' Paris'"))
    layers = [numbers(line)[-1] for line in lines if line.startswith("layer")]
    assert len(layers) == 3
    assert layers[0] < plain - 1
    assert layers[2] < plain - 1


def test_the_fact_reaches_the_last_token_through_attention(run) -> None:
    lines = run("attention.py")
    assert "layer 0: the last token looks most at 'ĠTower'" in lines
    edges = [numbers(line)[-1] for line in lines if "without the edge" in line]
    assert edges[0] > 4
    assert abs(edges[1]) < 0.1
    assert any("computed from q, k and the mask" in line for line in lines)


def test_a_subject_is_moved_before_the_first_layer_only(run) -> None:
    header, *lines = run("positions.py")
    model = LanguageModel("tiny")
    clean, corrupt = "The Eiffel Tower is in the city of", "The Space Needle is in the city of"
    words = model.tokenizer.tokenize(clean)
    tokens = [words.index("ĠEiffel"), words.index("ĠTower")]
    assert header == f"Eiffel Tower: tokens {tuple(tokens)}"
    module = model._ready()
    assert len(lines) == len(module.transformer.h)
    for number, (block, line) in enumerate(zip(module.transformer.h, lines, strict=True)):
        kept = []
        handle = block.register_forward_pre_hook(lambda _, args, kept=kept: kept.append(args[0].clone()))
        with torch.no_grad():
            module(**model.tokenizer(clean, return_tensors="pt"))
            handle.remove()
            handle = block.register_forward_pre_hook(
                lambda _, args, kept=kept: (args[0].index_copy(1, torch.tensor(tokens), kept[0][:, tokens]), *args[1:])
            )
            logits = module(**model.tokenizer(corrupt, return_tensors="pt")).logits[0, -1]
            handle.remove()
        assert line == f"before layer {number}: {model.tokenizer.decode(logits.argmax())!r}"
    assert "' Paris'" in lines[0]
    assert "' Seattle'" in lines[1]


def test_a_scan_shows_the_shapes_that_a_run_gives(run) -> None:
    tokens, *layers, logits = run("scan.py")
    model = LanguageModel("tiny")
    out = model._ready()(**model.tokenizer("The Eiffel Tower is in the city of", return_tensors="pt")).logits
    assert tokens == "tokens (1, 2)"
    assert layers == [f"layer {number}: torch.float32 [1, 2, 128]" for number in range(3)]
    assert logits == f"logits: {out.dtype} {list(out.shape)}"


def test_the_residual_stream_comes_nearer_to_what_it_becomes(run) -> None:
    *lines, shown = run("cache.py")
    model = LanguageModel("tiny")
    module, kept = model._ready(), []
    handles = [
        block.register_forward_hook(lambda _, args, out: kept.append(out[0, -1])) for block in module.transformer.h
    ]
    with torch.no_grad():
        module(**model.tokenizer("The Eiffel Tower is in the city of", return_tensors="pt"))
    for handle in handles:
        handle.remove()
    expected = [float(torch.cosine_similarity(each, kept[-1], dim=0)) for each in kept]
    assert [numbers(line)[-1] for line in lines] == pytest.approx(expected, abs=0.001)
    assert expected == sorted(expected)
    assert shown == "<cache of 4 modules: transformer.h.0, transformer.h.1, transformer.h.2, transformer.ln_f>"


def test_an_edit_from_a_file_steers_as_the_edit_does(run) -> None:
    first, *_, last = run("edits.py")
    plain, steered = numbers(first.replace(",", " "))
    assert plain < 0.01
    assert steered > 0.9
    assert numbers(last) == [steered]


def test_what_runs_elsewhere_gives_what_plain_hooks_give(run) -> None:
    crossing, *lines, paris, seattle = run("remote.py")
    model = LanguageModel("tiny")
    texts = ("The Eiffel Tower is in the city of", "The Space Needle is in the city of")
    clean, corrupt = (model.tokenizer([text], return_tensors="pt")["input_ids"] for text in texts)
    module = model._ready()
    assert crossing.startswith("sends ")
    assert crossing.endswith(f"receives {module.config.vocab_size * 4 / 1024:.2f} KiB")
    assert len(lines) == len(module.transformer.h)
    for block, line in zip(module.transformer.h, lines, strict=True):
        kept = []
        handle = block.register_forward_hook(lambda _, args, output, kept=kept: kept.append(output[:, -1].clone()))
        with torch.no_grad():
            module(input_ids=clean)
            handle.remove()
            handle = block.register_forward_hook(
                lambda _, args, output, kept=kept: torch.cat([output[:, :-1], kept[0][:, None]], 1)
            )
            chances = module(input_ids=corrupt).logits[0, -1].softmax(-1)
            handle.remove()
        assert repr(model.tokenizer.decode(chances.argmax())) in line
        assert float(line.split()[-1]) == pytest.approx(float(chances.max()), abs=0.006)
    assert (paris, seattle) == ("' Paris' 1", "' Seattle' 1")


def test_every_example_has_a_test() -> None:
    text = Path(__file__).read_text(encoding="utf-8")
    tested = {path.name for path in EXAMPLES.glob("*.py") if f'run("{path.name}")' in text}
    assert tested == {path.name for path in EXAMPLES.glob("*.py")} - {"train_tiny_model.py"}
