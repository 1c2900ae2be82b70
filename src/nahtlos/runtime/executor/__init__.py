"""From a blueprint to what each agent is told: decided by pure functions, sent by thin ones."""
