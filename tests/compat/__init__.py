"""`make compat`: every supported PyTorch with the Triton that it pins, on this machine and without a GPU.

For each pair, in an environment that is thrown away: the bindings compile against that release's headers; one wheel of
this package, built on the oldest release, loads and holds its contract; every Triton kernel compiles through Triton's
own launch path, for every architecture, without a spill; and the PTX for sm_90 holds the numerics contract when it is
executed (tests/ptx).
"""
