"""`python -m MODULE ...` without the seconds that its imports take: a process that has them forks for each command.

    python tests/forked.py serve SOCKET          imports, then waits for commands
    python tests/forked.py SOCKET MODULE ...     as `python -m MODULE ...`, with this process' folder, environment, input and output

For tests alone: the commands, their arguments, files and exit codes are those of processes of their own.
"""

import importlib
import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path

LIBRARIES = (
    "keyanon", "torch", "diffusers", "pandas", "pyarrow.parquet", "hydra", "onnxruntime", "facenet_pytorch", "skimage.metrics",
    "torchmetrics", "torchmetrics.image.fid", "torch_fidelity", "matplotlib.pyplot", "sklearn.svm", "cv2",
)  # fmt: skip
OURS = (
    "keyanon.diffusion.model", "keyanon.runner", "keyanon.attacks.views", "keyanon.faces.datasets", "keyanon.faces.recognition",
    "keyanon.methods.signflip", "keyanon.methods.exact", "keyanon.measures.scorers", "keyanon.measures.separability",
    "experiments.harness.session", "experiments.harness.plots",
)  # fmt: skip


def serve(path: str) -> None:
    for name in LIBRARIES:
        with suppress(ImportError):
            importlib.import_module(name)
    while not Path(os.environ["KEYANON_CARDS"]).is_file():  # which is written meanwhile, and read once
        time.sleep(0.02)
    for name in OURS:
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.startswith("keyanon")]:
        sys.modules["experiments.harness.provenance"].module(name)  # the code's digests, which a process reads once
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen()
        while True:
            connection, _ = listening.accept()
            if os.fork() == 0:  # one process waits for the command, so that the next one need not
                try:
                    listening.close()
                    attend(connection)
                except BrokenPipeError:  # whoever asked was killed
                    pass
                finally:
                    os._exit(0)  # at a forked process' own end libraries may wait for threads that it does not have
            connection.close()


def attend(connection: socket.socket) -> None:
    message, files, _, _ = socket.recv_fds(connection, 1 << 20, 3)
    asked = json.loads(message)
    child = os.fork()
    if child == 0:
        os._exit(run(asked, files))
    # Of no session of its own, so that who kills the client's has to know it, too.
    place = Path(asked["environment"]["FORKED_PID"], f"{child}.pid")
    place.write_text(str(child))
    _, status = os.waitpid(child, 0)
    place.unlink()
    connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(status))


def run(asked: dict, files: list[int]) -> int:
    for place, file in enumerate(files):
        os.dup2(file, place)
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    sys.argv = asked["command"]
    code: object = 0
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)  # type: ignore[call-overload]


def ask(path: str, command: list[str]) -> int:
    message = {"command": command, "folder": str(Path.cwd()), "environment": dict(os.environ)}
    with socket.socket(socket.AF_UNIX) as connection, connection.makefile("r") as answers:
        connection.connect(path)
        socket.send_fds(connection, [json.dumps(message).encode()], [0, 1, 2])
        code = int(answers.readline() or 1)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    sys.exit(ask(sys.argv[1], sys.argv[2:]))
