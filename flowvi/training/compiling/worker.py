"""Compile a recorded graph: `python worker.py GRAPH PACKAGE`. Imports nothing of flowvi.

GRAPH holds a pickled graph and example inputs, written by the parent process.
PACKAGE is replaced atomically.
"""

import os
import pickle
import sys
import warnings


def main() -> None:
    """Read the graph, compile it, and write the package."""
    os.nice(5)
    warnings.simplefilter("ignore")
    import torch
    import torch._dynamo  # which the graph names

    torch.set_num_threads(1)
    source, package = sys.argv[1:]
    # Two fits of one model may compile at the same time; the later one overwrites.
    new = f"{package}.{os.getpid()}.new.pt2"
    with open(source, "rb") as file:
        module, inputs = pickle.load(file)
    with torch.no_grad():
        program = torch.export.export(module, inputs)
        torch._inductor.aoti_compile_and_package(
            program,
            package_path=new,
            inductor_configs={"aot_inductor.compile_wrapper_opt_level": "O0"},
        )
    os.replace(new, package)


if __name__ == "__main__":
    main()
