"""Exported graphs under ONNX Runtime: to check them against the model, to decode with them, and to make them smaller."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
import torch.nn.functional as F
from onnxruntime.quantization import QuantType, quantize_dynamic

from nim4.config import RecipeError
from nim4.corpus.feats import SHIFT_SAMPLES, WINDOW_SAMPLES, Fbank, mirrored
from nim4.export.onnx import MODEL_TYPE, Step
from nim4.model.conformer import SUBSAMPLING, Context

TOLERANCE = 1e-3  # of a float32 graph, beside the model


def open_graph(path: Path, threads: int = 1) -> onnxruntime.InferenceSession:
    """A graph, ready to run on the CPU. Raises RecipeError when the runtime cannot: another opset, a damaged file."""
    if not Path(path).is_file():
        raise RecipeError(path, expected="a graph of `nim4 export`", found="no such file", fix="correct the path")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    try:
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's kinds of errors share no base class of their own
        expected = f"a graph that onnxruntime {onnxruntime.__version__} runs"
        raise RecipeError(
            path, expected=expected, found=str(error)[:300], fix="export it again with another --opset, or update onnxruntime"
        ) from error


class ExportedEncoder:
    """A graph of `export_streaming`.

    Attributes:
        context: chunk size and left context.
        fbank: whether the graph takes samples.
    """

    def __init__(self, path: Path, threads: int = 1):
        self._session = open_graph(path, threads)
        facts = self._session.get_modelmeta().custom_metadata_map
        if facts.get("model_type") != MODEL_TYPE:
            found = f"one of {facts.get('model_type', 'another program')}"
            raise RecipeError(path, expected="a graph of `nim4 export --format onnx`", found=found, fix="name its model.onnx")
        self.context = Context(int(facts["chunk_frames"]), int(facts["left_chunks"]))
        self.fbank = facts["fbank"] == "inside"
        self._width = SUBSAMPLING * self.context.chunk_frames + int(facts["lookahead_frames"])  # feature frames
        self._first, _, *state = self._session.get_inputs()
        self._state = {part.name: (part.shape[1:], np.int64 if "int64" in part.type else np.float32) for part in state}
        self._outputs = [part.name for part in self._session.get_outputs()]

    def initial_state(self, batch_size: int) -> dict[str, np.ndarray]:
        """Name -> what a stream begins with, the batch first."""
        return {name: np.zeros((batch_size, *shape), dtype) for name, (shape, dtype) in self._state.items()}

    def step(self, x: np.ndarray, x_lens: np.ndarray, state: Mapping[str, np.ndarray]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
        """The outputs of a chunk by name, and the next state; shapes as in nim4/export/onnx.py."""
        made = self._session.run(None, {self._first.name: x, "x_lens": x_lens.reshape(-1, 1), **state})
        outputs = dict(zip(self._outputs, made, strict=True))
        return outputs, {name: outputs.pop(f"new_{name}") for name in self._state}

    def chunks(self, samples: np.ndarray) -> Iterator[dict[str, np.ndarray]]:
        """A recording, (N,) float32 in [-1, 1], as a stream: the outputs of each chunk, without the batch axis and frames beyond the end."""
        chunk_frames, width, state = self.context.chunk_frames, self._width, self.initial_state(1)
        whole = mirrored(torch.from_numpy(samples))
        features = Fbank().frames_of_padded(whole)
        for start in range(0, len(features), SUBSAMPLING * chunk_frames):
            length = min(width, len(features) - start)
            if self.fbank:
                begin, size = start * SHIFT_SAMPLES, (width - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES
                x = F.pad(whole[begin : begin + size], (0, max(0, begin + size - len(whole))))
            else:
                x = F.pad(features[start : start + width], (0, 0, 0, width - length))
            outputs, state = self.step(x[None].numpy(), np.array([length]), state)
            yield {name: output[0, : min(-(-length // SUBSAMPLING), chunk_frames)] for name, output in outputs.items()}


def check_graph(step: Step, path: Path, *, tolerance: float = TOLERANCE) -> float:
    """The largest difference between a step and its graph, over a few chunks of noise, the caches of each being its own.

    Args:
        tolerance: a larger difference is a fault of the graph, and raises RuntimeError.
    """
    session, generator = open_graph(path), torch.Generator().manual_seed(0)
    first, outputs, inputs = next(iter(step.examples)), step.outputs, dict(step.examples)
    for name, axis in step.batch_axes.items():  # not the number of streams that the graph was made with
        if name in inputs:
            inputs[name] = torch.cat([inputs[name], inputs[name].narrow(axis, 0, 1)], axis)
    shape = inputs.pop(first).shape
    state = [name for name in inputs if f"new_{name}" in outputs]
    inputs |= {name: torch.zeros_like(inputs[name]) for name in state}
    ours, theirs, largest = dict(inputs), {name: tensor.numpy() for name, tensor in inputs.items()}, 0.0
    for last in (False, False, True):
        x = torch.randn(shape, generator=generator) * 0.1
        if last and "x_lens" in inputs:
            ours["x_lens"] = (inputs["x_lens"] * torch.linspace(0.0, 1.0, shape[0])[:, None]).long().clamp(min=1)
            theirs["x_lens"] = ours["x_lens"].numpy()
        with torch.inference_mode():
            expected = dict(zip(outputs, step(x, *ours.values()), strict=True))
        found = dict(zip(outputs, session.run(None, {first: x.numpy(), **theirs}), strict=True))
        for name in state:
            ours[name], theirs[name] = expected.pop(f"new_{name}"), found.pop(f"new_{name}")
        largest = max(largest, *(float(np.abs(expected[name].numpy() - found[name]).max()) for name in expected if name != "top_ids"))
    if not largest <= tolerance:
        raise RuntimeError(f"{path}: the graph differs from the model by {largest:.3g}, more than {tolerance:g}")
    return largest


def quantise(path: Path, out: Path) -> None:
    """Writes the graph with its weights of matrix products in 8 bits; what they are multiplied with is rounded as it comes (dynamic quantisation).

    Not the features, whose range is too wide, and not the convolutions, which are few and whose 8-bit form many runtimes lack.
    """
    graph = onnx.load(path, load_external_data=False)
    features = [node.name for node in graph.graph.node if node.op_type == "MatMul" and "/fbank/" in node.name]
    with _silent():
        quantize_dynamic(
            path,
            out,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=features,
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=path.with_name(f"{path.name}.data").exists(),
        )


@contextmanager
def _silent() -> Iterator[None]:
    """Without the advice that onnxruntime gives to the root logger."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
