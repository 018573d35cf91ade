"""Data-parallel training: the process group and its collectives, and the base class of the plugins ddp and fsdp."""
