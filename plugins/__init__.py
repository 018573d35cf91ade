"""The built-in plugins of loopctl, one file each."""
