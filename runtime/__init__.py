"""What every run needs and none is about: its processes, device, state, output and mistakes."""
