"""Trainers and engines that other projects wrote. Nothing else in `erc` imports this package, and it imports
none of them until one of its modules is asked for: `erc.integrations.transformers`, `erc.integrations.trl`,
`erc.integrations.verl` (with `verl_in_context` for verl's agent loops); `erc.integrations.sampler` imports none.
"""
