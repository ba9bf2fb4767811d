"""Cache in, student out: measures signals, computes the losses, and trains. Never imports the offline stage."""
