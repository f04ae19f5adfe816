"""From hidden states and the lm_head's weight, without ever holding the logits."""
