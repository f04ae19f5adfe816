"""Layer 4: trainers that other projects wrote. Nothing else in `erc` imports this package, and it imports none of them
until one of its modules is asked for: `erc.integrations.transformers`, `erc.integrations.trl`, `erc.integrations.verl`.
"""
