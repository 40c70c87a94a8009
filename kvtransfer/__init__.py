"""Moves KV blocks between workers: one contract, several transports, the hand-off state machine."""
