"""What a run will be like before it is one: arithmetic and simulation, no model, no torch."""
