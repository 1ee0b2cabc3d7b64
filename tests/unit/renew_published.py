#!/usr/bin/env python3
"""Makes the golden values that published code is compared with, by running that code; by hand, since it is no dependency.

    pip download --no-deps fireredasr==0.0.2 zipformer==0.1.3      # wheels; unpack both into DIR
    python tests/unit/renew_published.py DIR ICEFALL               # ICEFALL: a checkout of icefall, for its icefall/utils.py

Writes train/scaled_adam.safetensors (ScaledAdam and Eden of `zipformer`, which is icefall's code), published/firered.safetensors (the encoder of
`fireredasr`) and score/icefall_layout/ (store_transcripts and write_error_stats of icefall).
"""

import ast
import importlib
import runpy
import sys
import types
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import kaldialign
import torch
from safetensors.torch import save_file

HERE = Path(__file__).resolve().parent
SHAPES = {"weight0": (3, 4), "weight1": (3, 4), "bias": (5,), "one": (), "single": (1,), "tiny": (2, 2)}
GROUPS = ((("weight0", "weight1", "one", "tiny"), 0.045), (("bias", "single"), 0.02))
STEPS, KEPT, OUTLIERS = 215, (1, 4, 5, 11, 16, 61, 101, 151, 215), (15, 60, 150)


def module_of(folder: Path, name: str, **stubs):
    """A module of a package, without running what the package's __init__ would import; `stubs` stand for what it takes from its utils."""
    parts = name.split(".")
    for depth in range(1, len(parts)):
        package = types.ModuleType(".".join(parts[:depth]))
        package.__path__ = [str(folder.joinpath(*parts[:depth]))]
        sys.modules[package.__name__] = package
    if stubs:
        sys.modules[f"{parts[0]}.utils"] = utils = types.ModuleType(f"{parts[0]}.utils")
        vars(utils).update(stubs)
    return importlib.import_module(name)


def make_scaled_adam(folder: Path) -> None:
    """A course of parameters that meets every branch: outliers, a parameter at its largest size, one below the smallest, single entries."""
    optim = module_of(folder, "zipformer.modules.optim", fix_random_seed=torch.manual_seed)
    torch.manual_seed(0)
    params = {name: torch.nn.Parameter(torch.randn(shape) * 0.3) for name, shape in SHAPES.items()}
    with torch.no_grad():
        params["tiny"].mul_(1e-6)
        params["bias"].mul_(2.9 / params["bias"].square().mean().sqrt())
    made = {f"init.{name}": parameter.detach().clone() for name, parameter in params.items()}
    targets = {name: torch.randn(shape) for name, shape in SHAPES.items()}
    generator = torch.Generator().manual_seed(1)
    optimizer = optim.ScaledAdam([{"params": [params[name] for name in names], "lr": rate} for names, rate in GROUPS], lr=0.045, clipping_scale=2.0)
    schedule = optim.Eden(optimizer, lr_batches=40, lr_epochs=3, warmup_batches=20, warmup_start=0.5)
    gradients, rates = defaultdict(list), []
    for step in range(STEPS):
        if step % 50 == 0:
            schedule.step_epoch(step // 50)
        rates.append([group["lr"] for group in optimizer.param_groups])
        for name, parameter in params.items():
            away = (parameter.detach() - targets[name]) * 0.2 + torch.randn(parameter.shape, generator=generator) * 0.5
            parameter.grad = away * (30.0 if step in OUTLIERS else 1.0) - (0.6 * parameter.detach() if name == "bias" else 0)
            gradients[f"grads.{name}"].append(parameter.grad.clone())
        optimizer.step()
        schedule.step_batch()
        if step + 1 in KEPT:
            made |= {f"{step + 1}.{name}": parameter.detach().clone() for name, parameter in params.items()}
    made |= {name: torch.stack(steps) for name, steps in gradients.items()} | {"rates": torch.tensor(rates, dtype=torch.float64)}
    save_file(made, HERE / "train" / "scaled_adam.safetensors")


def make_firered(folder: Path) -> None:
    """Two utterances through two blocks."""
    original = module_of(folder, "fireredasr.models.module.conformer_encoder")
    torch.manual_seed(0)
    encoder = original.ConformerEncoder(80, 2, 2, 16, kernel_size=5).eval()
    with torch.no_grad():
        for parameter in encoder.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn(parameter.shape) * 0.3)
        x, x_lens = torch.randn(2, 61, 80), torch.tensor([61, 38])
        x[1, 38:] = 0
        y, y_lens, _ = encoder(x, x_lens)
    made = {f"encoder.{name}": tensor.clone() for name, tensor in encoder.state_dict().items() if not name.endswith(".pe")}  # sinusoids, 640 kB
    save_file(made | {"x": x, "x_lens": x_lens, "y": y.contiguous(), "y_lens": y_lens.long()}, HERE / "published" / "firered.safetensors")


def make_layout(utils: Path) -> None:
    """The two functions, cut out of a module whose other imports need k2."""
    texts = SimpleNamespace(**runpy.run_path(str(HERE / "score" / "test_icefall_files.py")))
    wanted = ("store_transcripts", "write_error_stats")
    functions = [node for node in ast.parse(utils.read_text(encoding="utf-8")).body if getattr(node, "name", "") in wanted]
    for node in functions:
        node.returns = None
        for argument in node.args.args:
            argument.annotation = None
    names = {"defaultdict": defaultdict, "kaldialign": kaldialign, "Dict": dict, "Tuple": tuple, "List": list}
    exec(compile(ast.Module(functions, []), str(utils), "exec"), names)
    rates = {}
    for system, hyps in texts.HYPS.items():
        results = sorted((name, text.split(), hyps[name].split()) for name, text in texts.REFS.items())
        names["store_transcripts"](texts.LAYOUT / f"recogs-test-{system}.txt", results)
        with open(texts.LAYOUT / f"errs-test-{system}.txt", "w", encoding="utf-8") as file:
            rates[system] = names["write_error_stats"](file, "test", results, enable_log=False)
    lines = ["settings\tWER", *(f"{system}\t{rate}" for system, rate in sorted(rates.items(), key=lambda item: item[1]))]
    (texts.LAYOUT / "wer-summary-test-all.txt").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    wheels, icefall = map(Path, sys.argv[1:])
    make_scaled_adam(wheels)
    make_firered(wheels)
    make_layout(icefall / "icefall" / "utils.py")
