"""The plugins that come with loopctl, one file each."""
