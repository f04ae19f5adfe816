"""Machine code measured without a GPU: `python -m benchmarks machine-code`.

`sass` reads cubins, `triton_variants` compiles this library's Triton kernels ahead of time, `benchmarks.hardware` says
what share of a GPU's memory bandwidth an instruction mix leaves reachable, `report` puts them together. Other kernels
(CUDA cubins, peers) join the report as `report.CompiledKernel` objects.
"""
