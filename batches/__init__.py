"""Batches: composed in rounds, decoded by workers, cached, copied to the device, and resized there."""
