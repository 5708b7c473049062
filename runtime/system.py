"""The operating system: whoever needs one like Unix imports this first, and the program ends in one line without it."""

from runtime.commands import refuse

try:
    import fcntl
except ImportError:
    refuse('this program needs Linux or macOS; on Windows it runs in WSL, the Windows Subsystem for Linux')

__all__ = ['fcntl']
