"""Records of verification on disk: another machine's and damaged ones are ignored, concurrent writers lose nothing."""

from __future__ import annotations

import json
import os
import threading
import warnings

import pytest
import torch

import miras_kernels as mk
from miras_kernels import dispatch, verification
from records import CPU, FAIL, KEY, PASS, forget, taken, tokens, verify

pytestmark = pytest.mark.usefixtures("cache")


def record(cache):
    (path,) = cache.glob("verified-cpp-*.json")
    return path


def test_results_of_another_machine_or_version_are_ignored(monkeypatch, tmp_path):
    backend = dispatch.BACKENDS["cpp"]
    verification.add("cpp", CPU, {f"{KEY} sequence": FAIL})
    other = tmp_path / "_C.so"
    other.write_bytes(b"rebuilt")
    for where, name, value in (
        (backend, "files", lambda: [other]),
        (backend, "environment", lambda device: {"capability": "another"}),
        (torch, "__version__", "9.9"),
        (mk, "__version__", "9.9"),
        (verification.platform, "machine", lambda: "another"),
    ):
        with monkeypatch.context() as changed:
            changed.setattr(where, name, value)
            forget(monkeypatch)
            assert taken(20, True) == "cpp"
    forget(monkeypatch)
    assert taken(20, True) == "reference"


def damaged(good: bytes) -> dict[str, bytes]:
    content = json.loads(good)
    changed = lambda **changes: json.dumps(content | changes).encode()
    return {
        "empty": b"", "truncated": good[:-20], "binary": bytes(range(256)), "list": b"[]", "null": b"null", "deep": b"[" * 100_000,
        "schema": changed(schema=99), "machine": changed(machine={}), "results": changed(results=[1]), "entry": changed(results={KEY: 1}),
        "day": changed(results={KEY: {"when": 1, "failure": None}}), "failure": changed(results={KEY: {"when": "", "failure": False}}),
        "absent": changed(results={KEY: {"when": ""}}),
    }  # fmt: skip


def test_a_damaged_record_is_ignored(cache, monkeypatch):
    verification.add("cpp", CPU, {f"{KEY} sequence": FAIL, f"{KEY} decode": PASS})
    path = record(cache)
    cases = damaged(path.read_bytes())
    for content in cases.values():
        path.write_bytes(content)
        forget(monkeypatch)
        with pytest.warns(UserWarning, match=f"{path.name} is ignored"):
            assert taken(20, True) == "cpp"
        assert "not verified on this machine" in verification.distrust_reason("cpp", CPU, f"{KEY} decode", "", "skip", True)
    forget(monkeypatch)
    with pytest.warns(UserWarning, match="is ignored"):
        assert verify().ok  # and writes a good one
    forget(monkeypatch)
    assert len(verification.results("cpp", CPU)) == 2


def test_a_folder_that_cannot_be_used(cache, monkeypatch):
    cache.write_text("a file")
    with pytest.warns(UserWarning, match="results of verification are ignored"):
        assert taken() == "cpp"
    found = verify()
    assert found.ok and "the results could not be stored: " in str(found)
    assert len(verification.results("cpp", CPU)) == 2  # they apply in this process
    forget(monkeypatch)
    monkeypatch.setattr(os, "listdir", lambda path: (_ for _ in ()).throw(PermissionError("no")))
    with pytest.warns(UserWarning, match="PermissionError: no"):
        assert taken() == "cpp"


def test_a_process_without_a_home_directory(monkeypatch):
    for name in ("MIRAS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(verification.Path, "expanduser", lambda self: (_ for _ in ()).throw(RuntimeError("no home")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert taken() == "cpp"
        assert "set MIRAS_CACHE" in verify().unkept


def test_where_records_are(monkeypatch):
    monkeypatch.delenv("MIRAS_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/some/where")
    assert str(verification.folder()) == "/some/where/miras_kernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert str(verification.folder()) == "/home/someone/.cache/miras_kernels"


def test_two_writers_lose_nothing(cache, monkeypatch):
    machine = verification.machine("cpp", CPU)
    verification.add("cpp", CPU, {"first": PASS})
    path = record(cache)

    def write(who):
        for i in range(25):
            verification.add("cpp", CPU, {f"{who} {i}": PASS})

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a reader never sees half a file
        writers = [threading.Thread(target=write, args=(who,)) for who in "ab"]
        for x in writers:
            x.start()
        while any(x.is_alive() for x in writers):
            assert "first" in verification._read(path, machine)
    assert len(verification._read(path, machine)) == 51
    assert not list(cache.glob("*.tmp"))


def test_records_are_read_once(monkeypatch):
    """And kernels are not hashed where there are no records."""
    calls, listdir = [], os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: calls.append(path) or listdir(path))
    monkeypatch.setattr(dispatch.BACKENDS["cpp"], "files", None)
    for _ in range(3):
        mk.linear_memory(*tokens(20))
        mk.Decoder(mk.MemoryState((torch.zeros(1, 1, 8, 8),)), chunk_size=4).step(*tokens(1))
    assert len(calls) == 1


def test_a_compiled_program_skips_it_too(monkeypatch):
    """In one graph: the record is read while PyTorch traces."""
    verification.add("cpp", CPU, {f"{KEY} sequence": FAIL})
    forget(monkeypatch)
    monkeypatch.setattr(dispatch.BACKENDS["cpp"], "forward", None)
    torch.compiler.reset()
    run = torch.compile(lambda *a: mk.linear_memory(*a)[0], fullgraph=True, backend="eager", dynamic=True)
    wanted = mk.linear_memory(*tokens(20), backend="reference")[0]
    assert torch.equal(run(*tokens(20)), wanted)
