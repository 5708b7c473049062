"""The infrastructure of a run: processes, device, state, output and error messages."""
