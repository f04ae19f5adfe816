"""Executes PTX, the code that nvcc and Triton compile for GPUs, on a machine without one.

The way of a launch: `source` parses the text of a kernel; `program` cuts it into basic blocks, and `block` turns each
into Python code for many threads at once, instruction by instruction (`isa`); `machine` runs the blocks of the grid
over NumPy arrays, with `lanes.c` for what NumPy lacks. `cuda_engine` and `triton_engine` are where launches come from:
the library's own launchers, and Triton's. `nvcc` compiles csrc/cuda and keeps what it compiled.

What is modelled:

- Every instruction, modifier and type that nvcc (CUDA 13) and Triton (3.6 to 3.9) write for the kernels of this
  library; `isa` names the section of the PTX ISA document for each. Any other ends a test with its name, whether it
  would have run or not.
- Threads at one place of the code run together, the lowest place first, and split and meet as they branch. Barriers of
  blocks, warps and clusters, shuffles, votes and reductions wait for the threads that take part.
- Registers of all types, and parameter, global, shared, local and distributed shared memory (shared::cluster).
- mbarriers with phases, arrivals and transaction counts, bulk copies and asynchronous stores. They land as late as the
  rules allow, and read their source only then.
- Arithmetic to the bit, fused where PTX says so. Approximate instructions err by the largest error that the document
  allows, up or down by a hash of the operand (`Checks.seed`): a result that depends on one being better is found.

What ends a launch with a `Fault`, though a GPU may say nothing: accesses out of bounds of the tensors, or misaligned;
reads of shared memory that nobody wrote; two threads at the same bytes with nothing between them that orders the two,
in shared and distributed shared memory and, on demand, in global memory; bytes of an asynchronous operation touched
before its mbarrier's phase was seen complete; waits that never end; barriers that threads of a block reach at different
places; a block that leaves while a peer may still touch its memory, or is touched before it is known to run; integer
division by zero.

What is not modelled: time, caches and their hints, the order in which a GPU runs blocks, weak memory between threads
that nothing orders (it is a fault instead), ordering by plain `mbarrier.arrive` (only transactions order; the rest is
reported as a race), functions, textures, tensor cores, grids of more than one dimension. PTX is not machine code: what
`ptxas` makes of it is the subject of tests/machine_code.
"""
