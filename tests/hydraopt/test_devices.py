"""Devices by name."""

import pytest
import torch

import hydraopt
from hydraopt.devices import find_device
from hydraopt.errors import DeviceError


def test_a_device_is_found_by_its_name():
    assert find_device("cpu") == torch.device("cpu")
    assert find_device(torch.device("cpu")) == torch.device("cpu")
    assert find_device("auto") == torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["abacus", "", "CPU", "cuda:x", "cpu:0", "meta", None])
def test_an_unknown_device_is_refused(name):
    with pytest.raises(DeviceError, match=f"device '{name}' is not known; use auto, cpu or cuda"):
        find_device(name)


@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_gpu_that_is_not_there_is_refused(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match=f"'{name}'.*no GPU here"):
        find_device(name)


def test_gpus_are_counted(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert find_device("cuda:1").index == 1
    with pytest.raises(DeviceError, match=r"'cuda:2'.*2 GPU here"):
        find_device("cuda:2")


def test_a_merge_names_the_device_it_cannot_have(workshop):
    with pytest.raises(DeviceError, match="'tpu'"):
        hydraopt.merge({"a": workshop.adapter("a")}, device="tpu")
