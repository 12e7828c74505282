"""What is installed and what can run here: python -m ncfast.info"""

import importlib
import importlib.metadata
import importlib.util
import os
import platform
from typing import TYPE_CHECKING

from ncfast.cli.parser import Parser, run
from ncfast.cli.startup import choose_device
from ncfast.version import __version__

if TYPE_CHECKING:
    import torch

OPERATIONS = (
    "nearest_code",
    "code_stats",
    "rotate_to_code",
    "barlow_twins_loss",
    "vicreg_loss",
    "vibcreg_loss",
    "iter_norm",
    "batch_norm",
    "thin_conv_transpose",
    "fused_linear",
    "layer_norm",
    "masked_attention",
    "unmask_step",
)
PACKAGES = ("numpy", "h5py", "safetensors", "triton", "aeon", "matplotlib", "scikit-learn", "tensorboard")


def make_parser() -> Parser:
    parser = Parser(prog="python -m ncfast.info", description="Versions, device, build facts, implementations.")
    parser.add_argument("--device", default="auto", help="the device to report on [auto]")
    return parser


def main(command_line: list[str] | None = None) -> None:
    device, reason = choose_device(make_parser().parse_args(command_line).device)
    import torch

    from ncfast.ops import dispatch

    cuda = torch.version.cuda or "none"
    print(f"ncfast       {__version__}")
    print(f"python       {platform.python_version()} on {platform.system()} {platform.machine()}")
    print(f"torch        {torch.__version__} (CUDA {cuda}, {torch.get_num_threads()} threads)")
    print(f"packages     {', '.join(f'{name} {version(name)}' for name in PACKAGES)}")
    print(f"device       {device} ({reason})")
    for name, fact in dispatch.build_record().items():
        print(f"build {name:<6} {'yes' if fact['built'] else 'no'}: {fact['why']}")
    module, _ = dispatch.load_module("_C")
    if module is not None:
        facts = module.build_info()
        openmp = "OpenMP" if facts["openmp"] else "no OpenMP: one thread"
        print(f"module _C    {facts['compiler']}, {openmp}; instruction sets here: {', '.join(module.isas())}")
    print(f"NCFAST_IMPL  {os.environ.get('NCFAST_IMPL', 'auto (not set)')}")
    print()
    print(f"operations on {device}, the first that can run is used:")
    for operation in OPERATIONS:
        for name, why in table(operation, device).items():
            print(f"  {operation:<20} {name:<10} {'yes' if why is None else f'no: {why}'}")


def table(operation: str, device: "torch.device") -> dict[str, str | None]:
    return importlib.import_module(f"ncfast.ops.{operation}").why_not(device)


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


if __name__ == "__main__":
    run(main)
