"""Modules that need a Unix-like system import this first; elsewhere the program exits with a one-line message."""

from runtime.commands import refuse

try:
    import fcntl
except ImportError:
    refuse('this program needs Linux or macOS; on Windows it runs in WSL, the Windows Subsystem for Linux')

__all__ = ['fcntl']
