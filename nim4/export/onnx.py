"""The streaming encoder and the phoneme head as an ONNX graph: one chunk in, one chunk out, the caches as inputs and outputs.

Inputs of the graph (B streams, a chunk of C encoder frames):
    x            (B, 4 C + 3, 80) float32, log-Mel features of nim4/corpus/feats.py, not normalised: the graph does that. The last 3 frames are the
                 next chunk's first. Where the features are inside the graph: samples (B, 640 C + 720) float32 in [-1, 1], the windows of the
                 same frames, with the mirrored edge at the start and at the end of a stream.
    x_lens       (B, 1) int64, feature frames that are real, 1 to 4 C + 3; fewer than all only at the end of a stream.
    NAME         the state, zeros at the start of a stream; every tensor has the batch first, and a fixed size.
Outputs:
    frames       (B, C, D) float32, what the adaptor of the speech LLM reads; ceil(x_lens / 4) of them are real.
    log_probs    (B, C, V) float32, natural logarithms; or, with `top` K: top_log_probs (B, C, K) float32, best first, and top_ids (B, C, K) int32.
    new_NAME     the state for the next chunk, of the same size.
What else a program must know is in the graph's metadata, see `facts_of`.
"""

import dataclasses
import logging
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
from nim4.model.conformer import LOOKAHEAD_FRAMES, SUBSAMPLING, Context, encoder_lens, valid_mask
from nim4.model.ctc import PhonemeModel

OPSET = 18  # the oldest that torch's exporter writes without converting
LARGEST_FILE = 1 << 30  # bytes of weights in one file: protobuf's limit is twice that; more go into NAME.data beside it


class StreamingStep(nn.Module):
    """What the graph computes; see above.

    Args:
        model: in evaluation mode, float32, on the CPU.
        top: so many phones for each frame instead of all; 0 = all.
        fbank: the graph takes samples, not features.
    """

    def __init__(self, model: PhonemeModel, context: Context, *, top: int = 0, fbank: bool = False):
        super().__init__()
        self.model, self.top = model, top
        self.fbank = GraphFbank() if fbank else nn.Identity()
        self.num_features = SUBSAMPLING * context.chunk_frames + LOOKAHEAD_FRAMES
        first = "samples" if fbank else "x"
        shape = ((self.num_features - 1) * SHIFT_SAMPLES + WINDOW_SAMPLES,) if fbank else (self.num_features, model.config.encoder.num_mel_bins)
        one, two = (model.encoder.initial_state(number, context) for number in (1, 2))
        self._state = type(one)
        # The axis of the batch in each field of the state: the one along which two streams take more than one.
        self._axes = {
            field.name: next(
                axis for axis, (a, b) in enumerate(zip(getattr(one, field.name).shape, getattr(two, field.name).shape, strict=True)) if a != b
            )
            for field in dataclasses.fields(one)
        }
        self.examples = {first: torch.zeros(2, *shape), "x_lens": torch.full((2, 1), self.num_features), **self.outside(two)}
        self.state_names = list(self._axes)
        self.outputs = ["frames", *(("top_log_probs", "top_ids") if top else ("log_probs",)), *(f"new_{name}" for name in self.state_names)]

    def outside(self, state: Any) -> dict[str, Tensor]:
        """The state of an encoder as tensors of the graph: batch first, and at least one axis more."""
        moved = {name: getattr(state, name).movedim(axis, 0) for name, axis in self._axes.items()}
        return {name: tensor[:, None] if tensor.ndim == 1 else tensor for name, tensor in moved.items()}

    def inside(self, tensors: Sequence[Tensor]) -> Any:
        """The other way round."""
        parts = zip(self._axes.items(), tensors, strict=True)
        return self._state(**{name: (tensor[:, 0] if tensor.ndim == 2 and axis == 0 else tensor.movedim(0, axis)) for (name, axis), tensor in parts})

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, x_lens, *state = tensors
        model, lens = self.model, x_lens[:, 0]
        x = model.normalise(self.fbank(x)).masked_fill(~valid_mask(lens, self.num_features)[..., None], 0.0)
        valid = valid_mask(encoder_lens(lens), self.num_features // SUBSAMPLING)
        frames, next_state = model.encoder.forward_chunk(x, self.inside(state), valid)
        log_probs = model.head(frames)
        phones = (log_probs,)
        if self.top:
            values, ids = log_probs.topk(self.top, dim=-1)
            phones = (values, ids.to(torch.int32))
        return frames, *phones, *self.outside(next_state).values()


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
    dynamic = {name: {0: "batch"} for name in step.examples}
    write_graph(step, path, step.examples, step.outputs, dynamic, facts_of(model, context, top=top, fbank=fbank), opset)


def facts_of(model: PhonemeModel, context: Context, *, top: int = 0, fbank: bool = False) -> dict[str, str]:
    """The metadata of a graph: names and texts."""
    encoder = model.config.encoder
    facts = {
        "model_type": "nim4_streaming_ctc",
        "version": "1",  # of the inputs and outputs
        "producer_version": __version__,
        "encoder": type(model.encoder).__name__.lower(),
        "chunk_frames": context.chunk_frames,
        "left_chunks": context.left_chunks,
        "subsampling": SUBSAMPLING,
        "lookahead_frames": LOOKAHEAD_FRAMES,
        "dim": encoder.dim,
        "vocab_size": model.config.vocab_size,
        "top": top,
        "fbank": "inside" if fbank else "outside",
        "num_mel_bins": encoder.num_mel_bins,
        "sampling_rate_hz": SAMPLING_RATE_HZ,
    }
    return {name: str(value) for name, value in facts.items()}


def write_graph(
    step: nn.Module,
    path: Path,
    examples: Mapping[str, Tensor],
    outputs: Sequence[str],
    dynamic: Mapping[str, Mapping[int, str]],
    facts: Mapping[str, str],
    opset: int = OPSET,
) -> None:
    """Writes a module as an ONNX file.

    Args:
        step: its `forward` takes all inputs as *tensors.
        examples: name -> input, in that order.
        dynamic: name -> axis -> its name, for axes of any size.
        facts: the metadata.
    """
    newest = onnx.defs.onnx_opset_version()
    if not OPSET <= opset <= newest:
        raise RecipeError("--opset", expected=f"{OPSET} to {newest}, what onnx {onnx.__version__} knows", found=opset, fix="leave it out")
    axes = {name: torch.export.Dim(name) for axes in dynamic.values() for name in axes.values()}
    shapes = tuple({axis: axes[name] for axis, name in dynamic.get(of, {}).items()} for of in examples)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            step,
            tuple(examples.values()),
            input_names=list(examples),
            output_names=list(outputs),
            dynamic_shapes=(shapes,),
            opset_version=opset,
            dynamo=True,
            verbose=False,
        )
    program.model.metadata_props.update(facts)
    weights = sum(tensor.numel() * tensor.element_size() for tensor in step.state_dict().values())
    program.save(path, external_data=weights > LARGEST_FILE)
