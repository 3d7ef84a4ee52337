"""IPython in a terminal: cells have another kind of name there, and the same text another name each time."""

from __future__ import annotations

import subprocess
import sys

SESSION = """\
import torch; from torch import nn; from nnsight_compiler import NNsight, intervene
plain = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)); model = NNsight(plain); X = torch.ones(1, 4)
with model.trace(X):
    out = model[0].output.save()

print("read", torch.equal(out, plain[0](X)))
with model.trace(X):
    out = model[0].output.save()

print("again", torch.equal(out, plain[0](X)))
@intervene
def double(model, x):
    with model.trace(x):
        out = model[0].output * 2
    return out

print("experiment", torch.equal(double(model, X), plain[0](X) * 2))
%time with model.trace(X): out = model[1].output.save()
print("timed", torch.equal(out, plain(X)))
with model.trace(X):
    out = model.nothing.output.save()

double.ir
def embedded():
    inner = 3
    import IPython; IPython.embed(colors="nocolor", banner1="", simple_prompt=True)

embedded()
with model.trace(X):
    deep = (model[0].output * inner).save()

print("embedded", torch.equal(deep, plain[0](X) * inner))
exit
print("after")
"""


def test_a_session_in_the_terminal() -> None:
    command = [sys.executable, "-m", "IPython", "--simple-prompt", "--no-banner", "--colors=nocolor", "--quick"]
    done = subprocess.run(command, input=SESSION, capture_output=True, text=True, timeout=120)
    out = done.stdout
    for word in ("read", "again", "experiment", "timed", "embedded"):
        assert f"{word} True" in out, out + done.stderr
    assert "CompileError: In[11]:2:11: Sequential has no `nothing`; it has: 0, 1\n" in out
    assert "        out = model.nothing.output.save()\n" in out
    assert "experiment double(%model, %x)" in out
    assert "# In[7]:2" in out
    assert "after" in out
