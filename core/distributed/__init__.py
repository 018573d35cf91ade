"""Training in several processes: the process group and its collectives, and what data-parallel plugins share."""
