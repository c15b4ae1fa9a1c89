"""What a user can put right is said in one line, however deep it was wrapped; a bug is not."""

import errno
import importlib
import inspect
import pkgutil

import pytest
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import OmegaConf

import keyanon
from experiments.harness.errors import user_error
from experiments.harness.preflight import open_dataset
from keyanon.errors import BadSetting, UserError


def test_the_line_is_the_cause_s_own():
    with pytest.raises(InstantiationException) as wrapped:
        instantiate({"_target_": "keyanon.methods.baselines.external.Secret", "bits": 0})
    assert user_error(wrapped.value).startswith("Secret.bits=0: expected")
    assert user_error(BadSetting("far=2")) == "far=2"


def test_a_full_disk_is_said_and_a_bug_is_not():
    assert "No space left" in user_error(OSError(errno.ENOSPC, "No space left on device"))
    for bug in (ValueError("3 != 2"), KeyError("a"), OSError(errno.EIO, "Input/output error")):
        assert user_error(bug) is None


def test_a_dataset_s_bug_is_no_missing_dataset():
    problems: list[str] = []
    with pytest.raises(InstantiationException, match="a bug"):
        open_dataset(OmegaConf.create({"dataset": {"_target_": f"{__name__}.raises_a_bug"}}), "broken", problems)
    folder = {"_target_": "keyanon.faces.datasets.Folder", "root": None}
    assert open_dataset(OmegaConf.create({"dataset": folder}), "folder", problems) is None
    assert problems == [
        "dataset folder: no folder of pictures given. Set dataset.root=/path, to a folder or a tar file"
    ]


def raises_a_bug() -> None:
    raise TypeError("a bug")


def test_every_exception_of_the_project_is_a_user_error():
    modules = [importlib.import_module(each.name) for each in pkgutil.walk_packages(keyanon.__path__, "keyanon.")]
    ours = {
        each
        for module in modules
        for _, each in inspect.getmembers(module, inspect.isclass)
        if issubclass(each, Exception) and each.__module__.startswith("keyanon")
    }
    assert len(ours) > 10
    assert all(issubclass(each, UserError) for each in ours)
