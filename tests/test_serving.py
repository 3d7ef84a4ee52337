"""`nnsightc serve`: what it refuses before it loads anything, and what it says when it is there."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from nnsight_compiler.cli import main
from nnsight_compiler.cli.serving import PORT, address_of, is_loopback, listen, named_model, state_folder
from nnsight_compiler.service import running
from nnsight_compiler.service.engine import EngineError
from nnsight_compiler.service.keys import Keys
from nnsight_compiler.service.store import Store
from nnsight_compiler.service.tenants import Tenant


class Command:
    """The command line, whose service only notes that it was to run."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.served: list[running.Serving] = []
        self.failure: Exception | None = None
        self._monkeypatch, self._capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """The exit status, and what it prints to both."""
        served = self.served

        def run(serving: running.Serving, listener: socket.socket, on_ready: Any) -> None:
            served.append(serving)
            with listener:
                if self.failure is not None:
                    raise self.failure
                on_ready()

        self._monkeypatch.setattr(running.Serving, "run", run)
        self._monkeypatch.setattr(sys, "argv", ["nnsightc", "serve", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    return Command(monkeypatch, capsys)


def test_it_says_where_it_is_and_how_to_use_it(command: Command, tmp_path: Path) -> None:
    status, out, _ = command("tiny", "--port", "0", "--state", str(tmp_path))
    assert status == 0
    first, second, third, fourth = out.splitlines()
    assert first == "loading tiny …"
    assert second.startswith("serving tiny at http://127.0.0.1:")
    url = second.split()[-1]
    assert third == f'use it with: model.trace("…", remote="{url}")'
    assert fourth == "stop it with Ctrl-C"
    (serving,) = command.served
    assert serving.models == [("tiny", "tiny")]
    assert (serving.state, serving.api_keys, serving.limits, serving.sandbox) == (tmp_path, None, {}, True)


def test_options_reach_the_service(command: Command, tmp_path: Path) -> None:
    options = "--max-batch 3 --workers 2 --threads 1 --max-queued 7 --max-body 2M --wall 5 --memory 1G --forwards 9"
    command("tiny", "other=tiny", "--port", "0", "--state", str(tmp_path), "--no-sandbox", *options.split())
    (serving,) = command.served
    assert serving.models == [("tiny", "tiny"), ("other", "tiny")]
    assert (serving.max_batch, serving.workers, serving.threads, serving.max_queued) == (3, 2, 1, 7)
    assert serving.limits == {"max_body": 2 << 20, "wall_seconds": 5.0, "memory_bytes": 1 << 30, "forwards": 9}
    assert not serving.sandbox


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org", ""])
def test_where_others_can_reach_it_keys_are_wanted(command: Command, host: str) -> None:
    status, out, err = command("tiny", "--host", host)
    assert (status, out) == (2, "")
    assert err == (
        f"error: other machines can reach {host}, and without keys anybody there could use the service\n"
        "  way out: make a key with nnsightc keys add NAME --api-keys FILE, and add --api-keys FILE; or leave --host "
        "out\n"
    )
    assert not command.served


def test_with_keys_it_may_be_reached(command: Command, tmp_path: Path) -> None:
    keys = Keys(tmp_path / "keys")
    keys.add(Tenant("ada"))
    keys.close()
    chosen = ("--api-keys", str(tmp_path / "keys"), "--state", str(tmp_path), "--port", "0")
    status, out, _ = command("tiny", "--host", "0.0.0.0", *chosen)
    assert status == 0
    assert "\nclients log in with: nnsightc login http://" in out
    status, _, err = command("tiny", "--wall", "5", *chosen)
    assert status == 2
    assert err.startswith("error: with --api-keys, the limits of a job are those of its tenant\n")


def test_a_file_of_keys_must_be_there(command: Command, tmp_path: Path) -> None:
    status, _, err = command("tiny", "--api-keys", str(tmp_path / "none"))
    assert status == 2
    assert err == (
        f"error: there is no file {tmp_path}/none\n"
        f"  way out: nnsightc keys add NAME --api-keys {tmp_path}/none makes one\n"
    )


def test_a_port_that_is_taken_is_refused(command: Command) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        status, _, err = command("tiny", "--port", str(port))
    assert status == 2
    assert err == (
        f"error: nothing can listen at 127.0.0.1:{port}: Address already in use\n"
        "  way out: choose another --port, or 0 for any that is free; --host is an address of this machine\n"
    )


def test_an_address_of_another_machine_is_refused(command: Command, tmp_path: Path) -> None:
    Keys(tmp_path / "keys").close()
    status, _, err = command("tiny", "--host", "192.0.2.1", "--api-keys", str(tmp_path / "keys"))
    assert status == 2
    assert err.startswith(f"error: nothing can listen at 192.0.2.1:{PORT}: Cannot assign requested address\n")


def test_a_model_that_cannot_be_loaded_ends_it_with_the_reason(command: Command, tmp_path: Path) -> None:
    command.failure = EngineError("huge cannot be served: there is no such model")
    status, out, err = command("huge", "--port", "0", "--state", str(tmp_path))
    assert status == 1
    assert "serving" not in out
    assert err == "error: huge cannot be served: there is no such model\n"


def test_a_model_is_called_as_it_was_named(tmp_path: Path) -> None:
    (tmp_path / "llama").mkdir()
    (tmp_path / "small.gguf").touch()
    assert named_model("openai-community/gpt2") == ("openai-community/gpt2", "openai-community/gpt2")
    assert named_model(f"{tmp_path}/llama/") == ("llama", f"{tmp_path}/llama/")
    assert named_model(f"{tmp_path}/small.gguf") == ("small", f"{tmp_path}/small.gguf")
    assert named_model(f"mine={tmp_path}/llama") == ("mine", f"{tmp_path}/llama")
    for text in ("", "=x", "x="):
        with pytest.raises(Exception, match="names no model"):
            named_model(text)


def test_addresses() -> None:
    assert [is_loopback(host) for host in ("127.0.0.1", "127.9.9.9", "::1", "[::1]", "localhost")] == [True] * 5
    assert [is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "localhost.example.org")] == [False] * 4
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        assert address_of("127.0.0.1", listener) == f"http://127.0.0.1:{port}"
        assert address_of("::1", listener) == address_of("[::1]", listener) == f"http://[::1]:{port}"
    assert PORT == 8473


def test_the_state_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", "/somewhere")
    assert state_folder() == Path("/somewhere/nnsight-compiler")
    monkeypatch.delenv("XDG_STATE_HOME")
    assert state_folder() == Path.home() / ".local/state/nnsight-compiler"


def test_one_state_serves_one_service(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with listen("127.0.0.1", 0) as listener, pytest.raises(Exception, match="belongs to a service that runs"):
        running.Serving(models=[("tiny", "tiny")], state=tmp_path).run(listener, lambda: None)
    store.close()


def test_the_front_end_starts_without_waiting_for_torch() -> None:
    asked = (
        "import sys, nnsight_compiler.service.running; print({'torch', 'libcst', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (0, "set()\n", "")
