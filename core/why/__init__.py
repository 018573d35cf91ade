"""Why two runs differ: compare their tapes, find what differs first, and say what that means."""
