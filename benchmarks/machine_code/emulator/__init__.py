"""Executes the machine code of a cubin on the CPU, so that a kernel's whole life is counted: every instruction that
every warp issues, not only the main loops.

NVIDIA documents the instructions by name alone. What they mean here is checked by the results: a kernel that this
emulator runs has to give the log-probs, entropies and gradients of the float64 oracle.

`cubin` reads the file, `machine` runs blocks and clusters, `operands` reads and writes registers; what the
instructions do stands in `integers`, `floats`, `lanes`, `memory` and `flow`.
"""
