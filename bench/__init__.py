"""How fast each method is on a machine, a model and a set of prompts, with what certainty, and with whose text."""
