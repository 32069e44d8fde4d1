"""Compile a recorded graph: `python worker.py GRAPH PACKAGE`, a process without flowvi.

GRAPH holds a pickled graph and example inputs, from the process that started
this one; PACKAGE is written whole or not at all.
"""

import os
import pickle
import sys
import warnings


def main() -> None:
    """Read the graph, and write the package."""
    os.nice(5)
    warnings.simplefilter("ignore")
    import torch
    import torch._dynamo  # which the graph names

    torch.set_num_threads(1)
    source, package = sys.argv[1:]
    # Two fits of one model may be at it; whichever ends last wins.
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
