"""Steering vectors in files, and steering from a line of text."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from subcircuit.analysis.vectors import load_vector, parse_steering, save_vector
from subcircuit.engine.errors import PatchError, StoreError


def test_a_vector_is_read_as_it_was_written(tmp_path):
    vector = torch.randn(7)
    save_vector(tmp_path / "v.safetensors", vector, {"site": "r2"})
    assert torch.equal(load_vector(tmp_path / "v.safetensors"), vector)


@pytest.mark.parametrize(
    ("text", "site", "positions", "coefficient"),
    [
        ("@r2*4", "r2", None, 4.0),
        ("@r2", "r2", None, 1.0),
        ("@a1.h3*-0.5", "a1.h3", None, -0.5),
        ("@m3@-1*1e-2", "m3", (-1,), 0.01),
        ("@a0.q1@0,-2", "a0.q1", (0, -2), 1.0),
    ],
)
def test_a_line_names_file_site_positions_and_coefficient(tmp_path, text, site, positions, coefficient):
    file = tmp_path / "odd@name*2.safetensors"
    save_vector(file, torch.arange(3.0))
    found = parse_steering(f"{file}{text}")
    assert (str(found.component), found.positions, found.coefficient) == (site, positions, coefficient)
    assert torch.equal(found.vector, torch.arange(3.0))


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("v.safetensors", PatchError, "expected FILE@SITE"),
        ("v.safetensors@x2", PatchError, "expected FILE@SITE"),
        ("v.safetensors@r2*", PatchError, "expected FILE@SITE"),
        ("v.safetensors@r2*1-1", PatchError, "coefficient '1-1' is no number"),
        ("v.safetensors@a2", PatchError, "component 'a2' is not understood"),
        ("nowhere.safetensors@r2", StoreError, "nowhere.safetensors: no steering vector"),
        ("v.safetensors@m1.n2", PatchError, "'m1.n2' cannot be steered"),
        ("two.safetensors@r2", StoreError, r"shapes \[\(2,\), \(2,\)\]; expected one vector"),
        ("words.safetensors@r2", StoreError, "words.safetensors: no steering vector"),
    ],
)
def test_bad_steering_is_one_clear_line(tmp_path, monkeypatch, text, error, message):
    monkeypatch.chdir(tmp_path)
    save_vector("v.safetensors", torch.ones(2))
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, "two.safetensors")
    (tmp_path / "words.safetensors").write_text("no tensors here")
    with pytest.raises(error, match=message) as caught:
        parse_steering(text)
    assert "\n" not in str(caught.value)
