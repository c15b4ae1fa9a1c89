"""Networks in ONNX, on the device of the run."""

import functools
import warnings
from pathlib import Path
from typing import Any

import torch

from keyanon.weights import WrongWeights


def open_onnx(path: Path, device: torch.device) -> Any:
    """An onnxruntime session on a device's execution provider, with as many CPU threads as PyTorch has.

    Warns where onnxruntime does not have that provider; raises WrongWeights where the file is no network.
    """
    return _open(path, device, torch.get_num_threads())


@functools.cache
def _open(path: Path, device: torch.device, threads: int) -> Any:
    import onnxruntime

    fallback = "CPUExecutionProvider"
    wanted = f"{device.type.upper()}ExecutionProvider"
    providers = sorted({wanted, fallback} & set(onnxruntime.get_available_providers()), key=fallback.__eq__)
    card = {} if device.index is None else {"device_id": device.index}
    options = [{} if name == fallback else card for name in providers]
    settings = onnxruntime.SessionOptions()
    settings.intra_op_num_threads = threads
    try:
        session = onnxruntime.InferenceSession(str(path), settings, providers=providers, provider_options=options)
    except Exception as error:  # of onnxruntime's own kinds, which have no class in common
        raise WrongWeights(
            f"{path}: cannot be read as a network in ONNX ({' '.join(str(error).split())[:300]})"
        ) from error
    if wanted not in session.get_providers():
        warnings.warn(
            f"{path.name} runs on {', '.join(session.get_providers())}: this onnxruntime has no working {wanted} "
            f"for the device {device.type!r}. See 'On a GPU' in docs/tutorial.md.",
            RuntimeWarning,
            stacklevel=3,
        )
    return session
