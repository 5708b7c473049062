"""Batches: decoded by workers, cached, and copied to the device."""
