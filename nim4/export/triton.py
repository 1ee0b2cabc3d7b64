"""A model repository for Triton Inference Server: the streaming encoder and the phoneme head, with the state of each stream in the server.

    REPO/nim4_encoder_640ms/config.pbtxt     a model for each size of chunk
                            1/model.onnx     nim4/export/onnx.py; its state is not among the inputs that a client sends
                            1/model.py       for the Python backend alone: nim4/export/triton_python.py

A stream is a sequence: its requests carry one correlation id, the first is marked as its start, the last as its end. Streams of different ages
share a batch, since their caches have a fixed size and tell how much of them is filled.

Two backends run the same graph:
    onnxruntime  keeps the state itself (implicit state), on a GPU: for production.
    python       keeps it in nim4/export/triton_python.py and runs onnxruntime on the CPU: where the server has no other backend. It cannot have
                 implicit state: the server then hands out the initial one for ever, and tells nobody.

Source: Triton's documentation of stateful models; that an encoder gives its best phones beside its frames is as in WeNet's runtime.
"""

import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from nim4.config import RecipeError
from nim4.export.onnx import StreamingStep, export_streaming
from nim4.export.runtime import check_graph
from nim4.model.conformer import Context
from nim4.model.ctc import PhonemeModel
from nim4.stage import atomic_write

Backend = Literal["onnxruntime", "python"]
FRAME_MS = 40
LEFT_MS = 2560  # paper, section 3.6: what the encoder sees before a chunk, whatever its size
TOP_PHONES = 4  # alternatives of a slot in nim4/decode/confusion.py: more are never looked at there
MAX_BATCH = 128  # ours: 3 ms on an H200 for 0.6 B parameters, and a longer batch has little more to gain
MAX_STREAMS = 2048  # that one server holds; what comes beyond waits for a place
IDLE_S = 60  # a stream that sends nothing for so long loses its state; nim4/serve/triton_client.py then sends its chunks again
QUEUE_DELAY_US = 5000  # ours: so long a batch waits for others, which is little beside a chunk
TYPES = {torch.float32: "TYPE_FP32", torch.int32: "TYPE_INT32", torch.int64: "TYPE_INT64"}


def name_of(chunk_ms: int) -> str:
    """The model's name in the server."""
    return f"nim4_encoder_{chunk_ms}ms"


def export_triton(
    model: PhonemeModel, fingerprint: str, out: Path, backend: Backend, chunks_ms: Sequence[int] = (640,), top: int = TOP_PHONES
) -> None:
    """Writes a model repository. Its graphs are compared with the model, chunk by chunk, before it gets its name.

    Args:
        model: in evaluation mode, on the CPU.
        fingerprint: of the model folder's weights (file_hash), by which a client sees that it asks the model it was made for.
        out: the repository, which must not be there yet; it appears when it is whole.
        chunks_ms: sizes of chunks, which divide LEFT_MS.
        top: best phones of each frame that are sent back.
    Raises:
        RecipeError: if a size or a number of phones cannot be had, or `out` is there.
    """
    for chunk_ms in chunks_ms:
        if chunk_ms < FRAME_MS or chunk_ms % FRAME_MS or LEFT_MS % chunk_ms:
            raise RecipeError("--chunk-ms", expected=f"multiples of {FRAME_MS} that divide {LEFT_MS}", found=chunk_ms, fix="correct it")
    if not 1 <= top <= model.config.vocab_size:
        raise RecipeError("--top", expected=f"1 to {model.config.vocab_size}, the phones there are", found=top, fix="leave it out")
    if out.exists():
        raise RecipeError(out, expected="a new folder", found="one that exists" if out.is_dir() else "a file", fix="name another as --out")
    work = out.with_name(out.name + ".tmp")
    shutil.rmtree(work, ignore_errors=True)
    try:
        for chunk_ms in chunks_ms:
            context = Context(chunk_ms // FRAME_MS, LEFT_MS // chunk_ms)
            version = work / name_of(chunk_ms) / "1"
            version.mkdir(parents=True)
            export_streaming(model, version / "model.onnx", context, top=top)
            check_graph(StreamingStep(model, context, top=top), version / "model.onnx")
            if backend == "python":
                shutil.copyfile(Path(__file__).with_name("triton_python.py"), version / "model.py")
            with atomic_write(version.parent / "config.pbtxt") as file:
                file.write(config_text(model, context, backend, top, fingerprint))
        work.rename(out)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def config_text(model: PhonemeModel, context: Context, backend: Backend, top: int, fingerprint: str) -> str:
    """The content of config.pbtxt; arguments as of export_triton."""
    step = StreamingStep(model, context, top=top)
    inputs = dict(step.examples)
    states = {name: example for name, example in inputs.items() if f"new_{name}" in step.outputs}
    chunk, dim = context.chunk_frames, model.config.encoder.dim
    outputs = {
        "frames": torch.zeros(1, chunk, dim),
        "top_log_probs": torch.zeros(1, chunk, top),
        "top_ids": torch.zeros(1, chunk, top, dtype=torch.int32),
    }
    lines = [f'name: "{name_of(chunk * FRAME_MS)}"', f'backend: "{backend}"', f"max_batch_size: {MAX_BATCH}"]
    lines += [f"input {{ {_tensor(name, tensor)} }}" for name, tensor in inputs.items() if name not in states]
    lines += [f"output {{ {_tensor(name, tensor)} }}" for name, tensor in outputs.items()]
    batches = ", ".join(str(size) for size in (16, 32, 64, 128) if size <= MAX_BATCH)
    lines += [
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {IDLE_S * 1_000_000}",
        f"  oldest {{ max_candidate_sequences: {MAX_STREAMS} preferred_batch_size: [{batches}] max_queue_delay_microseconds: {QUEUE_DELAY_US} }}",
        *(_controls() if backend == "python" else _states(states)),
        "}",
        f"instance_group {{ count: 1 kind: {'KIND_CPU' if backend == 'python' else 'KIND_GPU'} }}",
    ]
    facts = {"fingerprint": fingerprint, "chunk_frames": chunk, "dim": dim, "vocab_size": model.config.vocab_size, "top": top}
    lines += [f'parameters {{ key: "{name}" value: {{ string_value: "{value}" }} }}' for name, value in facts.items()]
    return "\n".join(lines) + "\n"


def _tensor(name: str, example: Tensor) -> str:
    return f'name: "{name}" data_type: {TYPES[example.dtype]} dims: {list(example.shape[1:])}'


def _states(states: Mapping[str, Tensor]) -> list[str]:
    """Implicit state: what comes out as new_NAME goes in as NAME with the stream's next chunk."""
    lines = []
    for name, example in states.items():
        about = f"data_type: {TYPES[example.dtype]} dims: {list(example.shape[1:])}"
        initial = f'initial_state {{ name: "zeros" {about} zero_data: true }}'
        lines.append(f'  state {{ input_name: "{name}" output_name: "new_{name}" {about} {initial} }}')
    return lines


def _controls() -> list[str]:
    """What tells the Python backend whose chunk it has, and where the stream begins and ends."""
    kinds = {
        "START": "kind: CONTROL_SEQUENCE_START int32_false_true: [0, 1]",
        "END": "kind: CONTROL_SEQUENCE_END int32_false_true: [0, 1]",
        "CORRID": "kind: CONTROL_SEQUENCE_CORRID data_type: TYPE_UINT64",
    }
    return [f'  control_input {{ name: "{name}" control {{ {kind} }} }}' for name, kind in kinds.items()]
