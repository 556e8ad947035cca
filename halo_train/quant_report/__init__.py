"""The report of a run: what 8 bits cost, layer by layer, as one HTML page and as pictures."""
