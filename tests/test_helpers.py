"""The helpers in which other tests have their assertions can fail: each is handed something wrong once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.tensor import Shard

import lora_adapters as adapters
import mixin_ranks
import test_convert
import test_encode_save
import test_load_group
import test_lora_bad


def test_other_bits_in_a_file_are_seen(tmp_path: Path) -> None:
    for name, bits in (("a", 1.0), ("b", -1.0)):
        (tmp_path / name).mkdir()
        save_file({"w": torch.tensor([0.5, bits])}, tmp_path / name / "model.safetensors")
    with pytest.raises(AssertionError, match="w"):
        test_encode_save.same(tmp_path / "a", tmp_path / "b")
    assert test_convert.unlike(tmp_path / "a", tmp_path / "b") == ["model.safetensors"]
    assert test_convert.unlike(tmp_path / "a", tmp_path / "a") == []


def test_other_factors_or_words_of_an_adapter_are_seen(tmp_path: Path) -> None:
    source = adapters.write(tmp_path / "a", test_lora_bad.good(), r=2, lora_alpha=4)
    state = adapters.tensors(source)
    other = adapters.write(tmp_path / "b", state, r=2, lora_alpha=8)
    with pytest.raises(AssertionError):
        adapters.same(source, other)
    name = max(state)
    changed = {**state, name: -state[name]}
    other = adapters.write(tmp_path / "c", changed, r=2, lora_alpha=4)
    with pytest.raises(AssertionError, match="lora"):
        adapters.same(source, other)
    adapters.same(source, source)


def test_a_good_adapter_is_not_refused(tmp_path: Path) -> None:
    with pytest.raises(pytest.fail.Exception, match="DID NOT RAISE"):
        test_lora_bad.refused(tmp_path, test_lora_bad.good(), "lora", config={"r": 2, "lora_alpha": 4})


def test_ranks_that_fail_are_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        mixin_ranks.run("no such check", tmp_path, ep=1)


def test_bytes_that_are_read_twice_are_seen(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        test_load_group.sharing(2, tmp_path, [((2,), [Shard(0)], False)], [2])
