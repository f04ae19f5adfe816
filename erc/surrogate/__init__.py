"""The objective as data, and what it means for one token: everything here works on `[N]` numbers, never on logits."""
