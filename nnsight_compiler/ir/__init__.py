"""The language that experiments are compiled to: structured SSA with regions for forwards, loops and conditions."""
