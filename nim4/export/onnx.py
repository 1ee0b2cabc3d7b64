"""The streaming encoder and the phoneme head as an ONNX graph: one chunk in, one chunk out, the caches as inputs and outputs.

Inputs of the graph (B streams, a chunk of C encoder frames):
    x            (B, T, 80) float32, log-Mel features of nim4/corpus/feats.py, not normalised: the graph does that. T is 4 C and the look-ahead, 3
                 frames for a Conformer and 13 for a Zipformer, which are the next chunk's first. Where the features are inside the graph:
                 samples (B, 160 T + 240) float32 in [-1, 1], the windows of the same frames, with the mirrored edges of a stream.
    x_lens       (B, 1) int64, feature frames that are real, 1 to T; fewer than all only at the end of a stream.
    NAME         the state, zeros at the start of a stream; every tensor has the batch first, and a fixed size.
Outputs:
    frames       (B, C, D) float32, what the adaptor of the speech LLM reads; ceil(x_lens / 4) of them are real.
    log_probs    (B, C, V) float32, natural logarithms; or, with `top` K: top_log_probs (B, C, K) float32, best first, and top_ids (B, C, K) int32.
    new_NAME     the state for the next chunk, of the same size.
What else a program must know is in the graph's metadata, see `facts_of`.
"""

import dataclasses
import tempfile
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor, nn

from nim4 import __version__
from nim4.config import RecipeError
from nim4.corpus.feats import SAMPLING_RATE_HZ, SHIFT_SAMPLES, WINDOW_SAMPLES
from nim4.export.fbank import GraphFbank
from nim4.model.conformer import SUBSAMPLING, Context, encoder_lens, valid_mask
from nim4.model.ctc import PhonemeModel

OPSETS = (17, 20)  # layer normalisation is one operator from 17 on; torch's exporter knows none after 20
OPSET = 17  # so that old runtimes run it, too
MODEL_TYPE = "nim4_streaming_ctc"
LARGEST_FILE = 1 << 30  # bytes of weights in one file: protobuf's limit is twice that; more go into NAME.data beside it


class Step(nn.Module):
    """What a graph computes: its `forward` takes all inputs, as *tensors, and gives all outputs.

    Attributes:
        examples: name -> an input, in their order.
        outputs: names; `new_NAME` is what the input NAME is in the next chunk.
        batch_axes: of inputs and outputs, the axis that may have any length; the examples have two streams. None of one stream alone.
    """

    examples: dict[str, Tensor]
    outputs: list[str]
    batch_axes: dict[str, int]


class StreamingStep(Step):
    """A chunk of some streams; see above.

    Args:
        model: in evaluation mode, float32, on the CPU.
        top: so many phones for each frame instead of all; 0 = all.
        fbank: the graph takes samples, not features.
    """

    def __init__(self, model: PhonemeModel, context: Context, *, top: int = 0, fbank: bool = False):
        super().__init__()
        self.model, self.top, self.num_chunk_frames = model, top, context.chunk_frames
        self.fbank = GraphFbank() if fbank else nn.Identity()
        self.num_features = SUBSAMPLING * context.chunk_frames + model.encoder.lookahead_frames
        first = "samples" if fbank else "x"
        shape = ((self.num_features - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES,) if fbank else (self.num_features, model.config.encoder.num_mel_bins)
        one, two = (model.encoder.initial_state(number, context) for number in (1, 2))
        self._empty = one
        self._axes = {name: _batch_axis(part, parts_of(two)[name]) for name, part in parts_of(one).items()}
        self.examples = {first: torch.zeros(2, *shape), "x_lens": torch.full((2, 1), self.num_features), **self.outside(two)}
        self.outputs = ["frames", *(("top_log_probs", "top_ids") if top else ("log_probs",)), *(f"new_{name}" for name in self._axes)]
        self.batch_axes = dict.fromkeys((*self.examples, *self.outputs), 0)

    def outside(self, state: Any) -> dict[str, Tensor]:
        """The state of an encoder as tensors of the graph: batch first, and at least one axis more."""
        moved = {name: part.movedim(self._axes[name], 0) for name, part in parts_of(state).items()}
        return {name: tensor[:, None] if tensor.ndim == 1 else tensor for name, tensor in moved.items()}

    def inside(self, tensors: Sequence[Tensor]) -> Any:
        """The other way round."""
        axes = zip(self._axes.values(), parts_of(self._empty).values(), tensors, strict=True)
        return with_parts(self._empty, [(tensor[:, 0] if part.ndim == 1 else tensor.movedim(0, axis)) for axis, part, tensor in axes])

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, x_lens, *state = tensors
        model, lens = self.model, x_lens[:, 0]
        x = model.normalise(self.fbank(x)).masked_fill(~valid_mask(lens, self.num_features)[..., None], model.encoder.pad_value)
        frames, next_state = model.encoder.forward_chunk(x, self.inside(state), encoder_lens(lens).clamp(max=self.num_chunk_frames))
        log_probs = model.head(frames)
        phones = (log_probs,)
        if self.top:
            values, ids = log_probs.topk(self.top, dim=-1)
            phones = (values, ids.to(torch.int32))
        return frames, *phones, *self.outside(next_state).values()


def parts_of(state: Any) -> dict[str, Tensor]:
    """The tensors of an encoder's state, those of layers with the layer's number behind their names."""
    parts: dict[str, Tensor] = {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            parts[field.name] = value
        elif isinstance(value, list):
            parts |= {f"{name}_{number}": part for number, layer in enumerate(value) for name, part in layer._asdict().items()}
    return parts


def with_parts(state: Any, parts: Sequence[Tensor]) -> Any:
    """A state like this one, of other tensors, in the order of `parts_of`."""
    rest, changed = iter(parts), {}
    for field in dataclasses.fields(state):
        value = getattr(state, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = next(rest)
        elif isinstance(value, list):
            changed[field.name] = [type(layer)(*(next(rest) for _ in layer)) for layer in value]
    return dataclasses.replace(state, **changed)


def _batch_axis(one: Tensor, two: Tensor) -> int:
    """The axis along which a part of the state of two streams is longer than that of one."""
    return next(axis for axis, (a, b) in enumerate(zip(one.shape, two.shape, strict=True)) if a != b)


def export_streaming(model: PhonemeModel, path: Path, context: Context, *, top: int = 0, fbank: bool = False, opset: int = OPSET) -> None:
    """Writes the graph of this module's first lines.

    Args:
        model: in evaluation mode, float32, on the CPU.
        path: the file, ending in .onnx; weights of more than 1 GiB go into a second one, `path`.data.
        context: chunk size and left context, both limited.
        top, fbank: see StreamingStep.
    Raises:
        RecipeError: if the opset cannot be written.
    """
    step = StreamingStep(model, context, top=top, fbank=fbank)
    write_graph(step, path, facts_of(model, context, top=top, fbank=fbank), opset=opset)


def facts_of(model: PhonemeModel, context: Context, *, top: int = 0, fbank: bool = False) -> dict[str, str]:
    """The metadata of a graph: names and texts."""
    encoder = model.config.encoder
    facts = {
        "model_type": MODEL_TYPE,
        "version": "1",  # of the inputs and outputs
        "encoder": encoder.kind,
        "chunk_frames": context.chunk_frames,
        "left_chunks": context.left_chunks,
        "subsampling": SUBSAMPLING,
        "lookahead_frames": model.encoder.lookahead_frames,
        "dim": encoder.dim,
        "vocab_size": model.config.vocab_size,
        "top": top,
        "fbank": "inside" if fbank else "outside",
        "num_mel_bins": encoder.num_mel_bins,
        "sampling_rate_hz": SAMPLING_RATE_HZ,
    }
    return {name: str(value) for name, value in facts.items()}


def write_graph(step: Step, path: Path, facts: Mapping[str, str], *, opset: int = OPSET) -> None:
    """Writes what a step computes as an ONNX file.

    Args:
        facts: the metadata.
    Raises:
        RecipeError: if the opset cannot be written.

    Ours: torch's older exporter, which traces. The newer one takes twenty times as long for a graph that runs no faster, and nothing here is left for
    it to decide: sizes are fixed, and `check_graph` compares what was written with the model.
    """
    if not OPSETS[0] <= opset <= OPSETS[1]:
        expected = f"{OPSETS[0]} to {OPSETS[1]}, what this version of torch writes"
        raise RecipeError("--opset", expected=expected, found=opset, fix="leave it out, and update the runtime instead")
    step.eval()  # torch's exporter leaves it as it finds it, with all its parts
    with tempfile.TemporaryDirectory(dir=path.parent) as folder, torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tracing: that sizes become constants, which is what we want
        traced = Path(folder) / path.name  # weights of more than 2 GB come in many files, which are one in the end
        axes = {name: {axis: "batch"} for name, axis in step.batch_axes.items()}
        torch.onnx.export(
            step,
            tuple(step.examples.values()),
            traced,
            input_names=list(step.examples),
            output_names=step.outputs,
            dynamic_axes=axes,
            opset_version=opset,
            dynamo=False,
        )
        graph = onnx.load(traced)
        made = step(*step.examples.values())
    for output, tensor in zip(graph.graph.output, made, strict=True):  # tracing leaves names for sizes that it could not follow
        for axis, (size, number) in enumerate(zip(output.type.tensor_type.shape.dim, tensor.shape, strict=True)):
            if axis != step.batch_axes.get(output.name):
                size.dim_value = number
    graph.producer_name, graph.producer_version = "nim4", __version__
    onnx.helper.set_model_props(graph, dict(facts))
    large = sum(tensor.numel() * tensor.element_size() for tensor in step.state_dict().values()) > LARGEST_FILE
    onnx.save(graph, path, save_as_external_data=large, location=f"{path.name}.data")
