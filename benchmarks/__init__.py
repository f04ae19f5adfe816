"""What a user gains: speed, memory and accuracy of erc beside everything that could be used instead.

`python -m benchmarks --help` lists the commands. Reading order: `workloads` (what is computed), `ours` and `peers` (by
whom), `timing` and `memory` (how it is measured), `suite` (which combinations), `results` (what is kept), `report`,
`plots` and `readme`.
"""
