"""What a user gains: speed, memory and accuracy of erc beside everything that could be used instead.

`python -m benchmarks --help` lists the commands. Reading order: `workloads` (what is computed), `ours` and `peers` (by
whom), `timing` and `memory` (how it is measured), `plans` (which combinations), `suite` (the run), `results` (what is
kept), `report`, `plots`, `roofline` and `readme`.
"""
