"""model.py of a Triton model with the Python backend: the graph beside it under onnxruntime, and the state of every stream in one table.

Copied into model repositories by nim4/export/triton.py; it runs inside the server and needs numpy and onnxruntime there, nothing of nim4.

Tensors go in and out by DLPack: the server's own conversions misread numpy 2, without an error. Out through onnxruntime's, since the server does
not hand numpy's capsules back as numpy wants them.
"""

import json
import os
import time
from pathlib import Path

import numpy as np
import onnxruntime
import triton_python_backend_utils as triton

CHUNK = ("x", "x_lens")  # what a client sends; all other inputs of the graph are state
TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64}


class Table:
    """A row of state for each stream.

    Rows of streams that ended without saying so are taken again when they have been idle for as long as the server allows.

    Args:
        empty: name -> state of one stream at its start.
    """

    def __init__(self, empty, max_streams, idle_s):
        self._max_streams, self._idle_s = max_streams, idle_s
        self._tensors = {name: np.zeros((16, *tensor.shape), tensor.dtype) for name, tensor in empty.items()}
        self._free = list(range(16))
        self._rows = {}  # correlation id -> row
        self._used_s = {}  # correlation id -> when it was last asked for

    def row(self, stream, starts):
        """The row of a stream, empty when it starts."""
        if starts:
            self.forget(stream)
            self._rows[stream] = row = self._new_row()
            for tensor in self._tensors.values():
                tensor[row] = 0
        elif stream not in self._rows:
            raise KeyError(f"stream {stream} has no state here: its first chunk must be marked as its start")
        self._used_s[stream] = time.monotonic()
        return self._rows[stream]

    def _new_row(self):
        if not self._free:
            now_s = time.monotonic()
            for stream in [stream for stream, used_s in self._used_s.items() if now_s - used_s > self._idle_s]:
                self.forget(stream)
        if not self._free:
            size = len(next(iter(self._tensors.values())))
            if size >= self._max_streams:  # the server holds no more, so the one that was idle longest is none of its own
                self.forget(min(self._used_s, key=self._used_s.get))
            else:
                more = min(2 * size, self._max_streams)
                self._free = list(range(size, more))
                self._tensors = {
                    name: np.concatenate([tensor, np.zeros((more - size, *tensor.shape[1:]), tensor.dtype)]) for name, tensor in self._tensors.items()
                }
        return self._free.pop()

    def read(self, rows):
        return {name: tensor[rows] for name, tensor in self._tensors.items()}

    def write(self, rows, state):
        for name, tensor in self._tensors.items():
            tensor[rows] = state[name]

    def forget(self, stream):
        if stream in self._rows:
            self._free.append(self._rows.pop(stream))
            del self._used_s[stream]


class TritonPythonModel:
    """What the server loads."""

    def initialize(self, args):
        config = json.loads(args["model_config"])
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = int(os.environ.get("OMP_NUM_THREADS", "0"))
        path = Path(args["model_repository"]) / args["model_version"] / "model.onnx"
        self._session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {tensor.name: tensor for tensor in self._session.get_inputs()}
        empty = {name: np.zeros(tensor.shape[1:], TYPES[tensor.type]) for name, tensor in given.items() if name not in CHUNK}
        batching = config["sequence_batching"]
        idle_s = int(batching["max_sequence_idle_microseconds"]) / 1e6
        self._table = Table(empty, int(batching["oldest"]["max_candidate_sequences"]), idle_s)
        self._outputs = [output["name"] for output in config["output"]]
        self._states, self._sent = list(empty), None

    def execute(self, requests):
        """A response for each of the requests, which are of different streams: one chunk each."""
        responses, going = [None] * len(requests), []
        for number, request in enumerate(requests):
            stream, starts, ends = (int(_array(request, name).reshape(-1)[0]) for name in ("CORRID", "START", "END"))
            try:
                x, x_lens = (_array(request, name) for name in CHUNK)
                if len(x) != 1:
                    raise ValueError(f"a stream sends one chunk at a time, not {len(x)}")
                going.append((number, stream, ends, self._table.row(stream, starts), x, x_lens))
            except Exception as error:
                self._table.forget(stream)
                responses[number] = triton.InferenceResponse(error=triton.TritonError(str(error)))
        if going:
            numbers, streams, ends, rows, x, x_lens = zip(*going, strict=True)
            rows = np.array(rows)
            names = [*self._outputs, *(f"new_{name}" for name in self._states)]
            given = {"x": np.concatenate(x), "x_lens": np.concatenate(x_lens), **self._table.read(rows)}
            made = dict(zip(names, self._session.run(names, given), strict=True))
            self._table.write(rows, {name: made[f"new_{name}"] for name in self._states})
            for place, number in enumerate(numbers):
                tensors = [(name, onnxruntime.OrtValue.ortvalue_from_numpy(made[name][place : place + 1])) for name in self._outputs]
                responses[number] = triton.InferenceResponse([triton.Tensor.from_dlpack(name, tensor) for name, tensor in tensors])
            self._sent = made  # which these tensors are views of, until the server has taken them
            for stream, end in zip(streams, ends, strict=True):
                if end:
                    self._table.forget(stream)
        return responses


def _array(request, name):
    return np.from_dlpack(triton.get_input_tensor_by_name(request, name))
