"""Files of edits. The oracle: the edited model that was written, and torch hooks; what a file may not do is refused."""

import json
import struct

import pytest
import torch
from safetensors import safe_open
from torch import nn
from typer.testing import CliRunner

from nnsight_compiler import CompileError, Experiment, FileError, LanguageModel, LocalOnlyWarning, NNsight, intervene
from nnsight_compiler.cli.commands import app
from nnsight_compiler.files.document import KEY

X = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))


def network(width=4):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 4)).eval()


def doubled(value):
    return value * FACTOR


FACTOR = 2


def written(tmp_path):
    """A model with two edits, and their file."""
    model, vector = NNsight(network()), torch.arange(4.0)
    probe = nn.Linear(4, 4)
    with model.edit() as first:
        hidden = first[0].output
        first[0].output = torch.relu(doubled(probe(hidden))) + vector
    with first.edit() as second:
        model[1].output[:, 0] = 3
    path = tmp_path / "edits.safetensors"
    return second, path, second.export_edits(path), probe, vector


def test_edits_come_back_the_same(tmp_path):
    edited, path, saved, probe, vector = written(tmp_path)
    other = NNsight(network())
    again = other.import_edits(path)
    plain = network()
    with torch.no_grad():
        hidden = torch.relu(probe(plain[0](X)) * 2) + vector
        hidden = torch.tanh(hidden)
        hidden[:, 0] = 3
        expected = plain[2](hidden)
        assert torch.equal(again(X), expected)
        assert torch.equal(edited(X), expected)
        assert torch.equal(other(X), plain(X))
    assert [set(edit.values) for edit in again.edits] == [{"torch", "doubled", "probe", "vector"}, {"model"}]
    assert saved.captured["vector"] == "float32[4]"
    assert saved.size == path.stat().st_size
    assert saved.host_ops == ()
    assert str(saved).startswith(f"{path}: {saved.size} bytes\n  edit 0: {__file__}:")


def test_the_file_is_one_safetensors_file_with_json_in_its_metadata(tmp_path):
    _, path, *_ = written(tmp_path)
    with safe_open(str(path), framework="pt") as opened:
        document = json.loads(opened.metadata()[KEY])
        assert "vector" in " ".join(opened.keys())
    assert document["format"] == "nnsight-compiler-edits"
    assert document["model"] == "Sequential"
    assert len(document["edits"]) == 2
    assert b"pickle" not in path.read_bytes()


def test_importing_in_place_and_again(tmp_path):
    _, path, *_ = written(tmp_path)
    model = NNsight(network())
    assert model.import_edits(path, inplace=True) is model
    assert len(model.edits) == 2
    back = tmp_path / "again.safetensors"
    model.export_edits(back)
    assert torch.equal(NNsight(network()).import_edits(back)(X), model(X))
    model.clear_edits()
    assert torch.equal(model(X), network()(X))


def test_an_edit_that_does_not_fit_the_model_is_refused_at_its_line(tmp_path):
    _, path, *_ = written(tmp_path)
    with pytest.raises(CompileError, match="no index 1") as caught:
        NNsight(nn.Sequential(nn.Linear(4, 4))).import_edits(path)
    assert caught.value.diagnostics[0].span.file == __file__
    assert "model[1].output[:, 0] = 3" in str(caught.value)


def test_what_cannot_be_written_is_refused(tmp_path):
    model = NNsight(network())
    with pytest.raises(FileError, match="this model has no edits to export"):
        model.export_edits(tmp_path / "x.safetensors")
    opened = object()
    with model.edit() as edited:
        edited[0].output[:] += float(hash(opened) > 0)
    with pytest.raises(FileError, match="`opened`: it is an object of class `object`") as caught:
        edited.export_edits(tmp_path / "x.safetensors")
    assert caught.value.diagnostics[0].span.file == __file__


def test_the_two_kinds_of_file_are_told_apart(tmp_path):
    _, path, *_ = written(tmp_path)
    with pytest.raises(FileError, match=r"this file is read by `model.import_edits\(path\)`"):
        Experiment.load(path)

    @intervene
    def run(model, x):
        with model.trace(x):
            out = model.output
        return out

    other = tmp_path / "run.safetensors"
    run.save(other)
    with pytest.raises(FileError, match=r"this file is read by `Experiment.load\(path\)`"):
        NNsight(network()).import_edits(other)


def test_a_loaded_experiment_runs_on_an_edited_model(tmp_path):
    edited, *_ = written(tmp_path)

    @intervene
    def run(model, x):
        with model.edit() as more:
            more[2].output[:] += 1
        with more.trace(x):
            out = model.output
        return out

    run.save(tmp_path / "run.safetensors")
    loaded = Experiment.load(tmp_path / "run.safetensors")
    with torch.no_grad():
        assert torch.equal(loaded(edited, X), edited(X) + 1)


def test_an_edited_model_is_no_part_of_an_experiment_file(tmp_path):
    edited, *_ = written(tmp_path)

    @intervene
    def run(x):
        with edited.trace(x):
            out = edited.output
        return out

    with pytest.raises(FileError, match="it is an edited model, and an experiment file holds no edits"):
        run.save(tmp_path / "run.safetensors")


def host(value):
    return value


def test_host_calls_are_made_only_where_they_are_allowed(tmp_path, monkeypatch):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "odd_library.py").write_text("def halved(x):\n    return x / 2\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site-packages"))
    import odd_library

    model = NNsight(network())
    with model.edit() as edited:
        edited[0].output = odd_library.halved(edited[0].output)
    path = tmp_path / "host.safetensors"
    with pytest.warns(LocalOnlyWarning, match="odd_library.halved"):
        saved = edited.export_edits(path)
    assert [call.name for call in saved.host_ops] == ["odd_library.halved"]
    with pytest.raises(FileError, match=r"odd_library.halved"):
        NNsight(network()).import_edits(path)
    assert torch.equal(NNsight(network()).import_edits(path, allow_host_calls=True)(X), edited(X))


def changed(path, change):
    """The file with its document changed."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    document = json.loads(header["__metadata__"][KEY])
    change(document)
    header["__metadata__"][KEY] = json.dumps(document)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda document: document.update(version=2), "version 2"),
        (lambda document: document.pop("model"), "the field 'model' is missing"),
        (lambda document: document.update(edits=[]), "there is none"),
        (lambda document: document["globals"].pop("vector"), "nothing in the file, and no builtin, has it"),
        (lambda document: document["edits"][0]["program"].update(kind="function"), "each in its place"),
        (lambda document: document["edits"][0]["program"]["parameters"].pop(), "at edits\\[0\\]"),
        (
            lambda document: document["edits"][0]["program"]["body"]["ops"].append(
                document["edits"][0]["program"]["body"]["ops"][0] | {"result": "late"}
            ),
            "no edit has the op Global there",
        ),
    ],
)
def test_damaged_files_are_refused(tmp_path, change, reason):
    _, path, *_ = written(tmp_path)
    changed(path, change)
    with pytest.raises(FileError, match=reason):
        NNsight(network()).import_edits(path)


def test_the_command_line_shows_and_checks_them(tmp_path):
    tiny = LanguageModel("tiny")
    with tiny.edit() as edited:
        edited.layers[1].mlp.output[:] *= 0.5
    path = tmp_path / "tiny.safetensors"
    edited.export_edits(path)
    shown = CliRunner().invoke(app, ["dump", str(path)])
    assert shown.exit_code == 0
    assert shown.output.startswith("edit ")
    assert "attr %2.mlp" in shown.output or ".mlp" in shown.output
    checked = CliRunner().invoke(app, ["check", str(path), "--model", "tiny"])
    assert checked.exit_code == 0, checked.output
    assert "no mistakes found in 1 edit" in checked.output
    with tiny.edit() as wide:
        wide.layers[1].mlp.output[:, :, 100] = 0
    wide.export_edits(path)
    model = NNsight(network())
    with pytest.raises(CompileError, match="stands for `layers`"):
        model.import_edits(path)
