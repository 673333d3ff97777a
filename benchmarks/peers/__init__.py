"""Onstream beside TRL: the same pair, prompts, batch, lengths and cores (`make bench-peers`)."""
