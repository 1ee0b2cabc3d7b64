"""A real Triton server on 127.0.0.1: the binary of nvidia-pytriton, in the environment that NIM4_TRITON_ENV names (utils/triton_env.sh)."""

import os
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest

VARIABLE = "NIM4_TRITON_ENV"


def environment():
    """The folder of that environment; skips the test where there is none."""
    pytest.importorskip("tritonclient.grpc")
    folder = os.environ.get(VARIABLE)
    if not folder:
        pytest.skip(f"{VARIABLE} names no environment with tritonserver: utils/triton_env.sh makes one")
    return Path(folder)


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class TritonServer:
    """Serves a model repository until left, or killed."""

    def __init__(self, repository, folder, port=None):
        packages = next((environment() / "lib").glob("python3*")) / "site-packages"
        self.port = port or free_port()
        self.address = f"grpc://127.0.0.1:{self.port}"
        triton = packages / "pytriton" / "tritonserver"
        backends = Path(folder) / "backends" / "python"
        if not backends.is_dir():
            shutil.copytree(triton / "backends" / "python", backends)
            version = packages.parent.name.removeprefix("python")
            shutil.copy(triton / "python_backend_stubs" / version / "triton_python_backend_stub", backends)
        self.log = Path(folder) / f"triton_{self.port}.log"
        about = {"LD_LIBRARY_PATH": str(packages / "nvidia_pytriton.libs"), "OMP_NUM_THREADS": "1"}
        about |= {"PATH": f"{environment() / 'bin'}:{os.environ['PATH']}", "HOME": os.environ.get("HOME", "/")}
        options = {"model-repository": repository, "backend-directory": backends.parent, "grpc-address": "127.0.0.1", "grpc-port": self.port}
        options |= {"allow-http": "false", "allow-metrics": "false", "exit-timeout-secs": 1, "model-load-thread-count": 1}
        with open(self.log, "w") as log:
            command = [triton / "bin" / "tritonserver", *(part for name, value in options.items() for part in (f"--{name}", str(value)))]
            self._process = subprocess.Popen(command, env=about, stdout=log, stderr=log, start_new_session=True)

    def __enter__(self):
        try:
            end_s = time.monotonic() + 180  # a busy machine takes long
            while "Started GRPCInferenceService" not in self.log.read_text():
                assert self._process.poll() is None, self.log.read_text()[-2000:]
                assert time.monotonic() < end_s, self.log.read_text()[-2000:]
                time.sleep(0.1)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error):
        if self._process.poll() is None:
            self._process.terminate()
            try:
                self._process.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()

    def kill(self):
        """At once, with the process of its model."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait(10)
