"""What this machine is, how fast it computes, and what follows from that for a training run."""
