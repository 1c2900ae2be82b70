"""Agents in guests, as the agent of their host speaks to them."""
