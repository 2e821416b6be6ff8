"""The machine: its environment, signals, memory, energy, time, cache and random numbers."""
